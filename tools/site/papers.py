"""The papers' tables beside ours, from what the papers print and the committed records of our runs."""

from collections.abc import Iterable
from pathlib import Path

from mithridate.reproduce.comparison import beside, compared
from mithridate.reproduce.item import Item, item_names, read_item
from mithridate.reproduce.outcome import checks_table, summary, verdicts
from mithridate.reproduce.records import read_records

ROOT = Path(__file__).parents[2]


def papers(results: Path = ROOT / "results") -> str:
    """Every printed table with our numbers in it, and the verdict on each claim of what we have run, as Markdown.

    A table that we have not run says so; figures are there once they were run.

    Args:
        results: Committed records, a folder an item and in it one a scale.
    """
    return "\n".join(line for name in item_names() for line in _item(name, read_item(name), results / name))


def _item(name: str, item: Item, folder: Path) -> Iterable[str]:
    scales = [scale for scale in ("paper", "small") if (folder / scale).is_dir()]
    if item.table is None and not scales:
        return
    yield from (f"## {name}", "", f"{item.source}: {item.title}.", "")
    if not scales:
        yield from ("No records of ours are committed yet; what the paper prints, in brackets:", "")
        yield from (beside(item, compared(item, []), "no").markdown(), "")
    for scale in scales:
        runs = read_records(folder / scale)
        judgements = verdicts(item, runs)
        yield from (f"At the scale `{scale}`: {summary(judgement.outcome for judgement in judgements)}.", "")
        yield from (checks_table(judgements).markdown(), "")
        if item.table is not None:
            section = beside(item, compared(item, runs), scale)
            yield from (f"Ours at the scale `{scale}`, in brackets what the paper prints:", "")
            yield from (section.markdown(), section.note, "")
