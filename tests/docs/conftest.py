"""Doctests are looked for in every module, also where the library that one needs is not installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("sybil") else ["pages.py"]
