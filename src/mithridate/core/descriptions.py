"""What the fields of a settings class are, in the words of its docstrings."""

import dataclasses
import inspect
import re

_ENTRY = re.compile(r"    (\w+): (.*)")
"""A field of an `Args:` section; the lines that continue it are indented further."""


def described_fields(cls: type) -> dict[str, str]:
    """What each field of a settings class is: a word on it stands once, in the class that declares or narrows it.

    Args:
        cls: Any dataclass whose docstrings, or those of the classes that it derives from, have `Args:` sections.

    Returns:
        A paragraph a field, in the order of the fields, in the words of the nearest class that has any; a field that
        nobody describes is left out.
    """
    sections = [_arguments(base) for base in cls.__mro__]
    texts = {
        field.name: next((section[field.name] for section in sections if field.name in section), "")
        for field in dataclasses.fields(cls)
    }
    return {name: text for name, text in texts.items() if text}


def _arguments(cls: type) -> dict[str, str]:
    """The `Args:` section of a class's own docstring."""
    _, _, rest = inspect.cleandoc(cls.__dict__.get("__doc__") or "").partition("\nArgs:\n")
    texts: dict[str, str] = {}
    name = ""
    for line in rest.splitlines():
        if line and not line.startswith(" "):
            break
        entry = _ENTRY.fullmatch(line)
        if entry:
            name, texts[entry[1]] = entry[1], entry[2]
        elif name and line:
            texts[name] += f" {line.strip()}"
    return texts
