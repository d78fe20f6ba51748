"""A command of the command line: its mistakes are messages, and its page of help says what each argument is."""

import errno
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, get_type_hints

import typer
from typer.core import TyperArgument, TyperCommand

from mithridate.cli.blame import blamed
from mithridate.cli.exit_codes import INTERRUPTED, USER_MISTAKE
from mithridate.cli.terminal import err, print_mistake
from mithridate.core.errors import UserError

P = ParamSpec("P")


class Command(TyperCommand):
    """A command whose arguments have their help, which typer up to 0.20 loses with click 8.5: click clears it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401  (those of `TyperCommand`)
        super().__init__(*arguments, **options)
        declared = get_type_hints(inspect.unwrap(options["callback"]), include_extras=True)
        for parameter in self.params:
            if isinstance(parameter, TyperArgument):
                (info,) = declared[str(parameter.name)].__metadata__
                parameter.help = info.help


def reports_mistakes(command: Callable[P, None]) -> Callable[P, None]:
    """A command for which a mistake, of the user or a plug-in, is a message and 2; an interrupt says how to go on.

    Args:
        command: Any function of the command line.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with blamed():
                command(*args, **kwargs)
        except UserError as error:
            print_mistake(str(error))
            raise typer.Exit(USER_MISTAKE) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read the output has heard enough
                raise
            where = f"{error.filename}: " if error.filename else ""
            print_mistake(f"{where}{error.strerror or error}; give a path that this user may read and write.")
            raise typer.Exit(USER_MISTAKE) from None
        except KeyboardInterrupt:
            err.print(
                "\n[yellow]interrupted.[/] Finished runs are kept, and the current one up to its last whole step; the "
                "same command goes on from there (`run` with --resume).",
                soft_wrap=True,
            )
            raise typer.Exit(INTERRUPTED) from None

    return run
