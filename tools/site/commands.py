"""The reference of the command line, from the commands themselves."""

import inspect
from collections.abc import Iterator
from typing import Any

import typer

from mithridate.cli.app import app


def commands() -> str:
    """Every command with what it does, its arguments and its options, as Markdown."""
    root: Any = typer.main.get_command(app)  # of click, or of the click that newer versions of typer hold
    return "\n".join(line for name, command in root.commands.items() for line in _command(name, command))


def _command(name: str, command: Any) -> Iterator[str]:  # noqa: ANN401
    context = command.context_class(command, info_name=f"mithridate {name}")
    usage = command.get_usage(context).removeprefix("Usage: ")
    yield from (f"## {name}", "", "```text", " ".join(usage.split()), "```", "")
    yield inspect.cleandoc(command.help or "")
    yield ""
    rows = [row for parameter in command.params if (row := _parameter(parameter, context))]
    if rows:
        yield from ("| argument | what it is |", "|---|---|")
        yield from rows
        yield ""


def _parameter(parameter: Any, context: Any) -> str:  # noqa: ANN401
    if parameter.param_type_name == "option":
        if parameter.hidden or "--help" in parameter.opts:
            return ""
        names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
        metavar = "" if parameter.is_flag else f" {_kind(parameter.make_metavar(context))}"
    else:
        names, metavar = f"`{parameter.make_metavar(context)}`", ""
    words = " ".join((parameter.help or "").split())
    default = parameter.get_default(context)
    unset = default is None or default is False or default in ("", [], ()) or callable(default)
    shown = "" if unset else f" Default: `{_text(default)}`."
    variable = f" Environment: `{parameter.envvar}`." if parameter.envvar else ""
    return f"| {names}{metavar} | {words}{shown}{variable} |".replace("\n", " ")


def _kind(metavar: str) -> str:
    """What a value is: a word in capitals, or the choices."""
    return metavar.replace("|", "/").strip("[]") if "|" in metavar else metavar.partition(" ")[0]


def _text(value: object) -> str:
    return str(getattr(value, "value", value))
