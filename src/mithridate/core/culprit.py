"""Whose error it is: the component from elsewhere in which an exception was raised."""

import traceback

from torch import nn

from mithridate.core.component import Component
from mithridate.core.watch import Monitor

OURS = ("mithridate", "torch")
"""Packages whose classes are no component from elsewhere."""


def culprit(error: BaseException) -> str | None:
    """The class and the method of a component or model from elsewhere in which an error was raised; None if in none.

    The innermost one is named, and a method that its class has from this library only if the class has no own one.

    Args:
        error: As it was caught.

    Returns:
        Such as `Halve.bound (in the module parts)`.
    """
    inherited = None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        owner = frame.f_locals.get("self")
        if not isinstance(owner, Component | Monitor | nn.Module) or not _foreign(type(owner).__module__):
            continue
        module = str(frame.f_globals.get("__name__"))
        name = f"{type(owner).__name__}.{frame.f_code.co_name} (in the module {type(owner).__module__})"
        if _foreign(module) and any(cls.__module__ == module for cls in type(owner).__mro__):
            return name
        inherited = inherited or name
    return inherited


def _foreign(module: str) -> bool:
    return module.partition(".")[0] not in OURS
