"""Attacks of a federation, one file each: what hostile clients send in place of honest updates."""
