"""Gradients of many clients at once: as rows, or as sums that need none."""
