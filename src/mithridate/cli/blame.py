"""Errors of components from elsewhere: a sentence says whose it is, and the traceback is kept for their authors."""

import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mithridate.core.errors import ComponentError, UserError, said

TRACEBACK = "traceback.txt"
"""What the file is called; a later traceback comes after the earlier ones."""


@contextmanager
def blamed(folder: Path | None = None) -> Iterator[None]:
    """Say whose error it is, where a component from elsewhere raises one inside the block.

    Args:
        folder: Where the traceback is kept, if it is there; else that is the system's folder for temporary files. What
            cannot be kept is printed.

    Raises:
        ComponentError: It did.
    """
    try:
        yield
    except ComponentError:  # it is told already
        raise
    except Exception as error:
        from mithridate.core.culprit import culprit

        raised = error.__cause__ if isinstance(error, UserError) else error
        whose = None if raised is None else culprit(raised)
        if raised is None or whose is None:
            raise
        where = _kept(raised, folder)
        if isinstance(error, UserError):  # what it says is right, and its author wants to know the line
            raise type(error)(f"{error} {where}") from error
        raise ComponentError(
            f"{whose} raised {type(error).__name__}: {said(error)}. {where} Mend it, or leave it out."
        ) from error


def _kept(error: BaseException, folder: Path | None) -> str:
    """Where the traceback is, as a sentence."""
    lines = "".join(traceback.format_exception(error))
    try:
        if folder is not None and folder.is_dir():
            path = folder / TRACEBACK
        else:
            handle, name = tempfile.mkstemp(prefix="mithridate-", suffix=f"-{TRACEBACK}")
            os.close(handle)
            path = Path(name)
        with path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(f"{lines}\n")
    except OSError:
        print("".join(c if c.isprintable() or c == "\n" else "?" for c in lines), file=sys.stderr)
        return "Its traceback is above."
    return f"Its traceback is in {path}."
