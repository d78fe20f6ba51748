"""Detectors, one file each: a score a sample, lower for the more suspicious."""
