"""Defences in real training loops."""
