"""A federation on handwritten digits, with hostile clients and a guard."""
