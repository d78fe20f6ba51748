"""`python -m mithridate` is the command line."""

from mithridate.cli import main

main()
