"""The paper's table beside ours: cell by cell what was printed, what our runs gave, and how far they are apart."""

from collections.abc import Sequence
from dataclasses import dataclass

from mithridate.bench.store import Run
from mithridate.report.records import Record
from mithridate.report.tables.section import TableSection, Toned
from mithridate.report.wording import MISSING, decimal
from mithridate.reproduce.checks import Interval
from mithridate.reproduce.item import Item, PublishedCell
from mithridate.reproduce.selection import by_seed

NEAR = 1.0
"""Numbers that differ by no more than this, in their own unit (points, of accuracies), are said to agree."""

NEAR_IN_WORDS = "are within 1 of the paper's, or within its spread"


@dataclass(frozen=True)
class Compared:
    """A printed number and ours.

    Args:
        cell: What the paper prints.
        seeds: Our numbers, by seed; empty if nothing of the kind was run.
        interval: Of them; None without any.
    """

    cell: PublishedCell
    seeds: dict[int | None, float]
    interval: Interval | None

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        return None if self.interval is None or self.cell.value is None else self.interval.mean - self.cell.value


def compared(item: Item, runs: Sequence[Run]) -> list[Compared]:
    """Every printed number of an item's table with ours.

    Args:
        item: With a table.
        runs: Finished ones, of any scale.
    """
    if item.table is None:
        return []
    result = []
    runs = item.where.runs(runs)
    for cell in item.table.cells:
        chosen = item.table.selection(cell)
        seeds = {} if chosen is None else by_seed(chosen.by_place(runs))
        result.append(Compared(cell, seeds, Interval.of(list(seeds.values())) if seeds else None))
    return result


def records(item: Item, cells: Sequence[Compared]) -> list[Record]:
    """One record a printed number, for files."""
    keys = dict.fromkeys(key for c in cells for key in c.cell.keys)
    return [
        {
            **{key: c.cell.keys.get(key) for key in keys},
            "measure": c.cell.measure,
            "paper": c.cell.value,
            "paper_std": c.cell.std,
            "ours": c.interval.mean if c.interval else None,
            "low": c.interval.low if c.interval and len(c.seeds) > 1 else None,
            "high": c.interval.high if c.interval and len(c.seeds) > 1 else None,
            "n": len(c.seeds),
            "difference": c.difference,
            "seeds": " ".join(f"{seed}:{value:.6g}" for seed, value in c.seeds.items()),
        }
        for c in cells
    ]


def beside(item: Item, cells: Sequence[Compared], scale: str) -> TableSection:
    """The paper's table with our numbers in it.

    Args:
        item: With a table.
        cells: Its numbers and ours.
        scale: Of our runs.

    Raises:
        ValueError: It is a figure without a table.
    """
    if item.table is None:
        raise ValueError(f"{item.name} has no table.")
    down, across = item.table.rows, item.table.columns

    def place(cell: PublishedCell, keys: Sequence[str]) -> tuple[str, ...]:
        return tuple(cell.measure if key == "measure" else cell.keys[key] for key in keys)

    head = list(dict.fromkeys(place(c.cell, across) for c in cells))
    lines: dict[tuple[str, ...], dict[tuple[str, ...], str]] = {}
    for c in cells:
        lines.setdefault(place(c.cell, down), {})[place(c.cell, across)] = written(c)
    # A single measure is not said at every column, but where there is nothing else to say.
    told = len({c.cell.measure for c in cells}) > 1 or list(across) == ["measure"]
    named = [
        " ".join(part for key, part in zip(across, names, strict=True) if told or key != "measure") for names in head
    ]
    missing = sum(c.interval is None for c in cells)
    return TableSection(
        id="paper",
        heading=f"{item.source}, and ours at {scale} scale",
        intro="Ours: mean and half of the 95 % interval over seeds (none for a single seed); in brackets what the "
        "paper prints. Green: the two are within 1, or within what the paper gives as its spread; red: the paper's "
        "number lies outside our interval; else our interval is too wide to tell.",
        head=[*(key.replace("_", " ") for key in down), *(name.replace("_", " ") for name in named)],
        rows={item.title: [[*names, *(line.get(column, "") for column in head)] for names, line in lines.items()]},
        note=f"Not run at this scale, or nothing of ours to compare: {missing} of {len(cells)}." if missing else "",
        names=len(down),
        line=0 if len(down) > 1 else None,
    )


def near(c: Compared) -> bool:
    """Whether ours and the paper's number agree."""
    return c.difference is not None and abs(c.difference) <= max(NEAR, c.cell.std or 0)


def written(c: Compared) -> str:
    """Ours and the paper's number as one cell."""
    printed = MISSING if c.cell.value is None else f"{c.cell.value:g}" + (f" ± {c.cell.std:g}" if c.cell.std else "")
    if c.interval is None:
        return Toned(f"{MISSING} ({printed})", "absent")
    half = (c.interval.high - c.interval.low) / 2
    size = max(abs(c.interval.mean), abs(c.cell.value or 0))  # a mean near zero needs no more digits than its column
    digits = 1 if size >= 10 else 2 if size >= 0.1 else 4
    ours = decimal(c.interval.mean, digits) + ("" if len(c.seeds) < 2 else f" ± {decimal(half, digits)}")
    if c.difference is None or c.cell.value is None:
        return f"{ours} ({printed})"
    if near(c):
        return Toned(f"{ours} ({printed})", "near")
    inside = c.interval.low <= c.cell.value <= c.interval.high
    return f"{ours} ({printed})" if inside else Toned(f"{ours} ({printed})", "apart")
