"""Models that learn: one update, burn-in, and the loops that attack and defend."""
