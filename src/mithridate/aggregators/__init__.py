"""Aggregators, one file a rule: a matrix of updates (client, parameter) in, one update (parameter,) out.

The rules are written here because the kept library that has them on torch tensors, ByzFL, requires torchvision,
matplotlib and seaborn, and builds many of them on (client, client, parameter) intermediates.
"""
