"""The command line: parse, build, call, print. Imports nothing heavy, so that an interrupt is heard from the start."""

import os
import signal
import sys
import threading
from types import FrameType

from mithridate.cli.exit_codes import INTERRUPTED

__all__ = ["main"]


def main() -> None:
    """The entry point of the `mithridate` command; Ctrl-C ends it with 130 and no traceback, wherever it is."""
    heard: list[int] = []

    def again(lost: "sys.UnraisableHookArgs") -> None:
        """Send an interrupt again that a finaliser has swallowed, which would be shown as an error besides."""
        if issubclass(lost.exc_type, KeyboardInterrupt):
            heard.clear()
            main_thread = threading.main_thread().ident or 0
            later = threading.Timer(0.1, signal.pthread_kill, (main_thread, signal.SIGINT))  # once this call is over
            later.daemon = True
            later.start()

    def interrupt(number: int, _: FrameType | None) -> None:
        if heard:  # the user insists: whatever holds the program up is not waited for
            os._exit(INTERRUPTED)
        heard.append(number)
        sys.unraisablehook = again
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background jobs are not to be interrupted
        signal.signal(signal.SIGINT, interrupt)
    try:
        from mithridate.cli.app import main as command

        command()
    except BaseException as end:
        if not heard:
            raise
        if not isinstance(end, SystemExit):  # else the command has said so
            print("interrupted.", file=sys.stderr)
        sys.exit(INTERRUPTED)  # also where foreign code has made another error of the interrupt
