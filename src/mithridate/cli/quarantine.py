"""What `mithridate quarantine` does: the batches that a guard refused are shown, released or dropped."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from mithridate.cli.terminal import out
from mithridate.core.errors import ComponentError, ConfigError, DataError, UserError, said, shown
from mithridate.core.files import write_whole
from mithridate.core.plugins import reason
from mithridate.guard.entry import INPUTS, Quarantined, known_targets
from mithridate.guard.quarantine import Quarantine
from mithridate.report.wording import counted, one_line

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_SCORES = 10
"""Scores of a batch that are printed; its JSON file has all."""

TOKENS = f"{INPUTS}.input_ids"
"""Where token ids are in inputs that are a mapping."""


@dataclass(frozen=True)
class Wishes:
    """What goes with some actions alone.

    Args:
        ids: Which batches.
        all: Whether it is all of them.
        to: Where released batches go.
        pictures: A PNG file for the images of one batch.
        decoder: `package.module:function`, which makes text of token ids.
    """

    ids: Sequence[str] = ()
    all: bool = False
    to: Path | None = None
    pictures: Path | None = None
    decoder: str | None = None


def review(action: str, folder: Path, wishes: Wishes) -> None:
    """Do one of `list`, `show`, `release` and `drop`.

    Args:
        action: Which.
        folder: The quarantine, or the guard's folder around it.
        wishes: Its options.

    Raises:
        UserError: The options do not fit the action, or the batches are not there or not in order.
    """
    _check(action, wishes)
    quarantine = Quarantine.existing(folder)
    if action == "list":
        print_list(quarantine)
        return
    ids = [entry.id for entry in quarantine.list()] if wishes.all else list(dict.fromkeys(wishes.ids))
    if not ids:
        raise ConfigError(f"name the batches to {action} by their ids, as `mithridate quarantine list` shows them.")
    entries = [quarantine.show(id) for id in ids]  # nothing is done before all of them are known to be there
    if action == "show":
        _show(quarantine, entries, wishes)
    elif action == "release":
        _release(quarantine, entries, wishes.to)
    else:
        for entry in entries:
            quarantine.drop(entry.id)
        out.print(f"{counted(len(entries), 'batch')} dropped.", markup=False)


def print_list(quarantine: Quarantine) -> None:
    """A table of all batches, how much room they take, and how many were not stored."""
    entries = quarantine.list()
    if entries:
        table = Table(box=None, pad_edge=False)
        for column, right in (("id", False), ("verdict", False), ("samples", True), ("time (UTC)", False)):
            table.add_column(column, justify="right" if right else "left", no_wrap=True)
        table.add_column("why", overflow="fold")
        for entry in entries:
            why = ("damaged: ", "red") if entry.problem else ""
            cells = (entry.id, one_line(entry.verdict), str(entry.size), one_line(entry.time)[:16].replace("T", " "))
            table.add_row(*map(Text, cells), Text.assemble(why, one_line(entry.problem or entry.reason)))
        out.print(table)
    total = sum(entry.bytes for entry in entries)
    out.print(f"{counted(len(entries), 'batch')}, {total / 1e6:.1f} MB", style="bold", markup=False)
    if left_out := quarantine.left_out():
        out.print(f"{counted(left_out, 'batch')} not stored, for there was no room", style="yellow", markup=False)


def _check(action: str, wishes: Wishes) -> None:
    for option, given, of in (
        ("--to", wishes.to, "release"),
        ("--pictures", wishes.pictures, "show"),
        ("--decoder", wishes.decoder, "show"),
    ):
        if given is not None and action != of:
            raise ConfigError(f"{option} goes with `quarantine {of}`, not with `{action}`; leave it out.")
    if wishes.all and wishes.ids:
        raise ConfigError("give ids or --all, not both.")
    if action == "list" and (wishes.all or wishes.ids):
        raise ConfigError("`quarantine list` shows all batches; for one of them: `quarantine show DIR ID`.")
    if wishes.pictures is not None and (wishes.all or len(set(wishes.ids)) != 1):
        raise ConfigError("--pictures draws the images of one batch; give one id.")
    if wishes.pictures is not None and wishes.pictures.suffix.lower() != ".png":
        raise ConfigError(f"--pictures {shown(str(wishes.pictures))}: give a file that ends with .png.")


def _show(quarantine: Quarantine, entries: Sequence[Quarantined], wishes: Wishes) -> None:
    decode = None if wishes.decoder is None else _decoder(wishes.decoder)
    for entry in entries:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in _described(entry):
            table.add_row(name, Text(text))
        out.print(table)
        if entry.problem:
            continue
        if decode is not None:
            for line in _texts(entry, quarantine.arrays(entry.id), decode, str(wishes.decoder)):
                out.print(Text(line))
        if wishes.pictures is not None:
            _draw(quarantine, entry, wishes.pictures)


def _described(entry: Quarantined) -> Iterator[tuple[str, str]]:
    yield "id", entry.id
    if entry.problem:
        yield "damaged", one_line(entry.problem)
    yield "attempt", f"{entry.attempt}, after {counted(entry.step, 'step')} that stayed, rank {entry.rank}"
    yield "verdict", one_line(f"{entry.verdict}: {entry.reason}" if entry.reason else entry.verdict)
    yield "time", one_line(entry.time)
    yield "samples", str(entry.size)
    for name, shape in entry.shapes.items():
        yield one_line(name), one_line(shape)
    if entry.scores:
        few = ", ".join(f"{score:.4g}" for score in entry.scores[:MOST_SCORES])
        more = len(entry.scores) - MOST_SCORES
        yield "scores", few + (f" and {more} more" if more > 0 else "")
    yield "sha256", one_line(entry.sha256)


def _draw(quarantine: Quarantine, entry: Quarantined, path: Path) -> None:
    from mithridate.report.figures.quarantined_images import quarantined_images

    drawing = quarantined_images(entry, quarantine.arrays(entry.id), most=200)
    if drawing is None:
        shapes = ", ".join(f"{name} {shape}" for name, shape in entry.shapes.items())
        raise DataError(
            f"{entry.id} holds no images of shape (n, 1 or 3, height, width) to draw: {one_line(shapes)}; leave out "
            "--pictures."
        )
    write_whole(path, drawing.png)
    out.print(drawing.caption, markup=False, highlight=False)
    out.print(f"pictures: {path}", soft_wrap=True, markup=False)


def _release(quarantine: Quarantine, entries: Sequence[Quarantined], to: Path | None) -> None:
    if to is None:
        raise ConfigError("say with --to where released batches go, such as --to released.")
    for entry in entries:
        if entry.problem:
            raise DataError(f"nothing was released: {entry.problem}")
    for entry in entries:
        out.print(str(quarantine.release(entry.id, to=to)), soft_wrap=True, markup=False, highlight=False)
    out.print("Read one with mithridate.guard.read_batch(PATH).", markup=False)


def _decoder(name: str) -> Callable[[list[int]], object]:
    """The function that a user names."""
    module_name, _, path = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise ConfigError(f"--decoder {shown(name)}: write package.module:function.")
    try:
        value: object = importlib.import_module(module_name)
    except Exception as error:  # whatever somebody else's code can raise
        raise ConfigError(
            f"--decoder {name}: the module {module_name} cannot be imported ({reason(error)}); mend it, or run where "
            "Python finds it."
        ) from error
    for part in path.split("."):
        value = getattr(value, part, None)
    if not callable(value):
        raise ConfigError(f"--decoder {name}: there is no such function; it takes a list of token ids and gives text.")
    return value


def _texts(
    entry: Quarantined, arrays: "Mapping[str, NDArray[Any]]", decode: Callable[[list[int]], object], name: str
) -> Iterator[str]:
    """Each sample as text, with its target and its score."""
    ids = arrays.get(TOKENS, arrays.get(INPUTS))
    if ids is None or ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise DataError(
            f"{entry.id} holds no token ids to decode: whole numbers of shape (samples, length) as its inputs, or as "
            "'input_ids' among them; leave out --decoder."
        )
    mask = arrays.get(f"{INPUTS}.attention_mask")
    targets = known_targets(arrays)
    for number, row in enumerate(ids):
        read = row[mask[number].astype(bool)] if mask is not None and mask.shape == ids.shape else row
        try:
            text = one_line(decode(read.tolist()))
        except UserError:
            raise
        except Exception as error:  # see `_decoder`
            raise ComponentError(
                f"--decoder {name} raised {type(error).__name__}: {said(error)}, for sample {number} of {entry.id}."
            ) from error
        target = f" target {targets[number]}" if targets and targets[number] is not None else ""
        score = f" score {entry.scores[number]:.4g}" if entry.scores else ""
        yield f"{number}:{target}{score}: {text}"
