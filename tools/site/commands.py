"""The reference of the command line, from the commands themselves."""

import inspect
from collections.abc import Iterator

import click
import typer

from mithridate.cli.app import app


def commands() -> str:
    """Every command with what it does, its arguments and its options, as Markdown."""
    root = typer.main.get_command(app)
    assert isinstance(root, click.Group)  # noqa: S101  (an app of several commands is one)
    return "\n".join(line for name, command in root.commands.items() for line in _command(name, command))


def _command(name: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=f"mithridate {name}")
    usage = command.get_usage(context).removeprefix("Usage: ")
    yield from (f"## {name}", "", "```text", " ".join(usage.split()), "```", "")
    yield inspect.cleandoc(command.help or "")
    yield ""
    rows = [row for parameter in command.params if (row := _parameter(parameter, context))]
    if rows:
        yield from ("| argument | what it is |", "|---|---|")
        yield from rows
        yield ""


def _parameter(parameter: click.Parameter, context: click.Context) -> str:
    if isinstance(parameter, click.Option):
        if parameter.hidden or "--help" in parameter.opts:
            return ""
        names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
        choices = parameter.type.choices if isinstance(parameter.type, click.Choice) else ()
        metavar = "" if parameter.is_flag else f" {'/'.join(map(str, choices)) or _kind(parameter.type)}"
    else:
        names, metavar = f"`{parameter.make_metavar(context)}`", ""
    words = " ".join((getattr(parameter, "help", "") or "").split())
    default = parameter.get_default(context)
    shown = (
        "" if default in {None, False, ""} or callable(default) or default == [] else f" Default: `{_text(default)}`."
    )
    variable = f" Environment: `{parameter.envvar}`." if parameter.envvar else ""
    return f"| {names}{metavar} | {words}{shown}{variable} |".replace("\n", " ")


def _kind(kind: click.ParamType) -> str:
    """What a value is: a word in capitals."""
    return kind.name.partition(" ")[0].upper()


def _text(value: object) -> str:
    return str(getattr(value, "value", value))
