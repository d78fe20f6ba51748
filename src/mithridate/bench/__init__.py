"""Recipes, grids of runs, and the store that they are written to."""
