"""What the command line prints on: any terminal, whatever its encoding and width; text from outside is no markup."""

import codecs
import io
import sys

from rich.console import Console
from rich.text import Text

out = Console(emoji=False)
err = Console(stderr=True, emoji=False)

_PLAIN = {"±": "+-", "—": "-", "…": "..."}
"""How characters that we print are written where the terminal cannot show them."""


def _in_plain(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end


def take_any_text() -> None:
    """Let the standard streams print every text: what their encoding lacks is written in plain characters."""
    codecs.register_error("plain", _in_plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


def print_mistake(message: str) -> None:
    """A mistake, on standard error: one message, as it is, without codes for the terminal that hide in it."""
    shown = "".join(c if c.isprintable() or c == "\n" else "?" for c in message)
    err.print(Text.assemble(("error:", "bold red"), " ", shown), soft_wrap=True)
