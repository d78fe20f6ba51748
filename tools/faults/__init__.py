"""Faults on purpose: kills, damaged files, and garbage in recipes, batches and Flower's replies, by count and seed.

`python -m tools.faults` from the repository's root, on a POSIX system, with the extra `test`.
"""
