"""The reference of the Python names: what `mithridate` and its folders offer, documented by their docstrings."""

import inspect
from collections.abc import Iterable, Sequence
from importlib import import_module
from types import ModuleType

import mithridate
from mithridate.core.errors import UserError
from mithridate.core.registry import KINDS

COMPONENTS = {f"{kind}s" for kind in KINDS}
"""Folders whose names are on the pages of their components."""


def api() -> str:
    """A section for `mithridate` and one for each of its folders that is not a kind of component."""
    names = mithridate.__all__
    folders = [name for name in names if isinstance(getattr(mithridate, name), ModuleType)]
    sections = [("mithridate", [name for name in names if name not in folders])]
    for folder in folders:
        if folder not in COMPONENTS:
            module = getattr(mithridate, folder)
            public = sorted(getattr(module, "__all__", None) or _defined_in(module))
            sections.append((module.__name__, public))
    seen: set[int] = set()
    return "\n".join(line for module, public in sections for line in _section(module, public, seen))


def _defined_in(module: ModuleType) -> Iterable[str]:
    """What a module offers that has no list of it: the names that do not come from elsewhere."""
    for name in dir(module):
        try:
            value = getattr(module, name)
        except UserError:  # it needs an extra that is not installed
            continue
        if not name.startswith("_") and str(getattr(value, "__module__", "")).startswith(module.__name__):
            yield name


def _section(module: str, names: Sequence[str], seen: set[int]) -> Iterable[str]:
    """Directives for some names of a module, but for what a section above has already."""
    yield from (f"## {module}", "", "```{eval-rst}")
    place = import_module(module)
    for name in names:
        value = getattr(place, name)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, type):
            yield from (f".. autoclass:: {module}.{name}", "   :members:", "")
        elif inspect.isroutine(value):
            yield from (f".. autofunction:: {module}.{name}", "")
        elif name.isupper():
            yield from (f".. autodata:: {module}.{name}", "")
    yield from ("```", "")
