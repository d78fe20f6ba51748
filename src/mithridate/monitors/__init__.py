"""Monitors, one file each: what a service watches, and when it raises an alarm."""
