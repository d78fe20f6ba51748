"""Attack, inspect and defend models that learn from live data streams."""
