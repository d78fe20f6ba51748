"""Defences, one file each: what stands between a batch and the model."""
