"""The papers' tables beside ours, from what the papers print and the committed records of our runs."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from mithridate.bench.store import Run
from mithridate.report.rows import seed
from mithridate.reproduce.checks import Ruling
from mithridate.reproduce.comparison import beside, compared
from mithridate.reproduce.item import Item, Scale, item_names, read_item
from mithridate.reproduce.outcome import checks_table, summary, verdicts
from mithridate.reproduce.records import read_records

ROOT = Path(__file__).parents[2]

SHOWN: Sequence[Scale] = ("paper", "small")
"""Scales whose numbers say something of the papers'."""


def papers(results: Path = ROOT / "results") -> str:
    """Every printed table with our numbers in it, and the verdict on each claim of what we have run, as Markdown.

    A table that we have not run says so; figures and claims are there once they were run. At the head stands how many
    claims of each hold.

    Args:
        results: Committed records, a folder an item and in it one a scale.
    """
    items = [read_item(name) for name in item_names()]
    run = {item.name: _records(item, results) for item in items}
    parts = [line for item in items for line in _item(item, run[item.name])]
    return "\n".join([*_overview([(item, run[item.name]) for item in items]), *parts])


def _records(item: Item, results: Path) -> dict[Scale, list[Run]]:
    """The runs of an item by scale; those of another item that it shows lie where that has them."""
    folders = {scale: [results / part.name / scale for part in item.parts] for scale in SHOWN}
    there = {scale: of for scale, of in folders.items() if all(folder.is_dir() for folder in of)}
    return {scale: [run for folder in of for run in read_records(folder)] for scale, of in there.items()}


def _overview(items: Iterable[tuple[Item, dict[Scale, list[Run]]]]) -> Iterable[str]:
    """How many claims hold, an item a line; nothing if nothing was run."""
    lines = [
        f"| [{item.name}](#{item.name}) | {scale} | {_counts(item, runs)} |"
        for item, by_scale in items
        for scale, runs in by_scale.items()
    ]
    if lines:
        names = ("item", "scale", "runs", "seeds", "claims", *(ruling.value for ruling in Ruling))
        yield from ("| " + " | ".join(names) + " |", "|---" * 2 + "|---:" * 7 + "|", *lines, "")


def _counts(item: Item, runs: list[Run]) -> str:
    """Runs, seeds, claims in all, and these by verdict."""
    count = Counter(judgement.outcome for judgement in verdicts(item, runs))
    seeds = {seed(run) for run in runs}
    return " | ".join(map(str, (len(runs), len(seeds), count.total(), *(count[ruling] for ruling in Ruling))))


def _changes(scale: Scale, runs: Iterable[Run]) -> Iterable[str]:
    """What was set otherwise than the protocol of a scale has it, which a run's title says."""
    titles = dict.fromkeys(str(run.config["title"]) for run in runs)
    said = [title.partition(f", {scale} scale (")[2].partition("): ")[0] for title in titles]
    if any(said):
        yield from (f"Settings changed: {', or '.join(f'`{changes}`' for changes in said if changes)}.", "")


def _item(item: Item, by_scale: dict[Scale, list[Run]]) -> Iterable[str]:
    if item.table is None and not by_scale:
        return
    yield from (f"## {item.name}", "", f"{item.source}: {item.title}.", "")
    if not by_scale:
        yield from ("No records of ours are committed yet; what the paper prints, in brackets:", "")
        yield from (beside(item, compared(item, []), "no").markdown(), "")
    for scale, runs in by_scale.items():
        judgements = verdicts(item, runs)
        yield from (f"At the scale `{scale}`: {summary(judgement.outcome for judgement in judgements)}.", "")
        yield from _changes(scale, runs)
        made = [judgement for judgement in judgements if judgement.outcome is not Ruling.ABSENT]
        yield from (checks_table(made).markdown(), "")
        if item.table is not None:
            section = beside(item, compared(item, runs), scale)
            yield from (f"Ours at the scale `{scale}`, in brackets what the paper prints:", "")
            yield from (section.markdown(), section.note, "")
