"""The command line: parse, build, call, print."""

from mithridate.cli.app import main

__all__ = ["main"]
