"""What the command line ends with, beside 0 for done; an audit has its own (`audit.result.EXIT`)."""

FAILED = 1
"""The command ran to its end, and some runs failed."""

USER_MISTAKE = 2
"""What was asked cannot be done; a message says why."""

INTERRUPTED = 130
"""The user interrupted it, as shells have it."""
