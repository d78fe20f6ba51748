"""The components that come with this library by name, read from its source: a list waits for no import of torch."""

import ast
from collections.abc import Iterator
from importlib.resources import files

from mithridate.core.kind import Kind, check_kind


def built_in(kind: Kind) -> dict[str, str]:
    """The first line of each component's docstring by the component's name, sorted.

    Args:
        kind: Which sort of component.

    Raises:
        ConfigError: There is no such kind.
    """
    check_kind(kind)
    lines: dict[str, str] = {}
    for file in files("mithridate").joinpath(f"{kind}s").iterdir():
        if file.name.endswith(".py"):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    summary = (ast.get_docstring(node) or "").partition("\n")[0]
                    lines |= {name: summary for registered, name in _registrations(node) if registered == kind}
    return dict(sorted(lines.items()))


def _registrations(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Kind and name of each `@register(kind, name, ...)` above a class."""
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "register":
            kind, name = map(ast.literal_eval, decorator.args[:2])
            yield kind, name
