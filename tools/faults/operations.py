"""Operations on files, as they are asked for: counted, and the process killed at one of them."""

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

_CHANGING = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link"})
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_METHODS = frozenset({"write", "writelines", "flush", "truncate", "close"})


def watch(folder: Path, on_operation: Callable[[str], None]) -> None:
    """Call a function before each operation that changes something in a folder, from now to the end of this process.

    Seen are opening for writing, renaming, deleting, making folders, changing modes, synchronising, and what Python
    code asks of an open file. What native code writes between opening and renaming is not seen.

    Args:
        folder: Elsewhere nothing is looked at.
        on_operation: Called with what is about to be done.
    """
    inside = str(folder)

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = values
            writes = any(c in mode for c in "wax+") if isinstance(mode, str) else bool((flags or 0) & _WRITING)
            if writes and str(path).startswith(inside):
                on_operation(f"open {Path(str(path)).name}")
        elif event in _CHANGING and any(str(value).startswith(inside) for value in values[:2]):
            on_operation(f"{event.partition('.')[2]} {Path(str(values[0])).name}")

    def profile(frame: FrameType, event: str, called: Any) -> None:  # noqa: ANN401  (whatever is called)
        if event != "c_call":
            return
        name = called.__name__
        if name == "fsync":
            on_operation("fsync")
        elif name in _METHODS:
            file = getattr(called, "__self__", None)
            if isinstance(file, io.IOBase) and str(getattr(file, "name", "")).startswith(inside):
                on_operation(f"{name} {Path(str(getattr(file, 'name', ''))).name}")

    sys.addaudithook(hook)
    sys.setprofile(profile)


def kill_at(folder: Path, number: int) -> None:
    """Let this process kill itself right before the `number`-th operation in a folder, from 0."""
    seen = 0

    def count(_: str) -> None:
        nonlocal seen
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    watch(folder, count)
