"""Which files doctests are collected from: not those that need an extra which is not installed."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("flwr") else ["mithridate/guard/flower*.py"]
