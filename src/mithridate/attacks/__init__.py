"""Attacks, one file each: what an adversary does to the batches of a stream."""
