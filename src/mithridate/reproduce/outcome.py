"""What a reproduced item came to: the paper's table beside ours, the figure redrawn, and a verdict on each claim."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite

from mithridate.bench.store import Run
from mithridate.report.figures import FigureSection, drawn
from mithridate.report.figures.drawing import Drawing
from mithridate.report.figures.series import Panel, Place, Point, series
from mithridate.report.findings import KeyNumber
from mithridate.report.lead import Lead
from mithridate.report.records import Record
from mithridate.report.rows import Row, seed
from mithridate.report.tables.section import TableSection, Toned
from mithridate.report.wording import MISSING, listed
from mithridate.reproduce.checks import Interval, Judgement, Ruling
from mithridate.reproduce.comparison import NEAR_IN_WORDS, Compared, beside, compared, near
from mithridate.reproduce.item import Item, Scale, Series
from mithridate.reproduce.quantities import OF_DETECTOR, QUANTITIES, quantity
from mithridate.reproduce.selection import LABELS, setting_of

TONES = {Ruling.HOLDS: "near", Ruling.FAILS: "apart", Ruling.UNDECIDED: "", Ruling.ABSENT: "absent"}

LEAST_SEEDS = 3
"""Of fewer, Student's interval is so wide that the lines beside it would be flat."""


def verdicts(item: Item, runs: Sequence[Run]) -> list[Judgement]:
    """What runs say to each claim of an item."""
    chosen = item.where.runs(runs)
    return [check.verdict(chosen) for check in item.checks]


def summary(outcomes: Iterable[Ruling]) -> str:
    """How many claims hold, in words.

    >>> summary([Ruling.HOLDS, Ruling.HOLDS, Ruling.UNDECIDED])
    '2 of 3 checks hold, 1 is not decided'
    """
    count = Counter(outcomes)
    if not count:
        return "no check"
    said = {Ruling.FAILS: ("does not", "do not"), Ruling.UNDECIDED: ("is not decided", "are not decided")}
    said[Ruling.ABSENT] = ("was not run", "were not run")
    others = [f"{count[ruling]} {words[count[ruling] > 1]}" for ruling, words in said.items() if count[ruling]]
    holding, total = count[Ruling.HOLDS], count.total()
    return ", ".join([f"{holding} of {total} checks {'holds' if holding == 1 else 'hold'}", *others])


def lead_of(item: Item, scale: Scale, changes: Sequence[str] = ()) -> Callable[[Sequence[Row]], Lead]:
    """What stands at the head of the page of an item.

    Args:
        item: The table or figure.
        scale: Of the runs.
        changes: In what they differ from the item's recipe.
    """

    def lead(rows: Sequence[Row]) -> Lead:
        runs = [run for row in rows for run in row.runs]
        judgements = verdicts(item, runs)
        drawings = [drawing for name in item.draw for drawing in drawn(name, rows)]
        drawings += series_drawings(item, rows)
        of_runs = f"{len(runs)} runs at {scale} scale, seeds {listed(sorted({str(seed(run)) for run in runs}))}"
        parts: list[TableSection | FigureSection] = [
            FigureSection("redrawn", f"{item.source}, redrawn", drawings),
            checks_table(judgements),
        ]
        cells = compared(item, runs)
        parts += [] if item.table is None else [beside(item, cells, scale)]
        files = [*(["claims"] if judgements else []), *(["table"] if item.table is not None else [])]
        return Lead(
            title=f"{item.source}: {item.title}",
            headline=f"{summary(v.outcome for v in judgements)} ({of_runs}).",
            details=[
                f"What the paper says: {item.claim}.",
                *([f"Run with other settings than the item's: {', '.join(changes)}."] if changes else []),
            ],
            parts=parts,
            drawn=item.draw,
            numbers=_key_numbers(judgements, cells),
            files=[*(f"{name}.{kind}" for name in files for kind in ("csv", "parquet")), "table.md", "table.tex"],
        )

    return lead


def _key_numbers(judgements: Sequence[Judgement], cells: Sequence[Compared]) -> list[KeyNumber]:
    """How many claims hold, and how many printed numbers ours are near to."""
    holding = sum(verdict.outcome is Ruling.HOLDS for verdict in judgements)
    ours = [cell for cell in cells if cell.difference is not None]
    counts = [
        (holding, len(judgements), "of the paper's claims hold in our runs"),
        (sum(map(near, ours)), len(ours), f"of our numbers {NEAR_IN_WORDS}"),
    ]
    return [KeyNumber(f"{some} of {total}", says) for some, total, says in counts if total]


def checks_table(judgements: Sequence[Judgement]) -> TableSection:
    """The verdict on each claim, with the numbers behind it.

    Args:
        judgements: One a claim.
    """
    return TableSection(
        id="claims",
        heading="The claims, and what our runs say",
        intro="A claim holds if the whole 95 % interval over seeds (Student's t) lies where it says, and does not "
        "hold if it lies wholly elsewhere; otherwise the runs do not decide it. Claims were written before the runs.",
        head=("claim", "verdict", "ours", "n"),
        rows={"": [_line(verdict) for verdict in judgements]} if judgements else {},
        names=2,
    )


def _line(verdict: Judgement) -> list[str]:
    numbers = "; ".join(MISSING if i is None else _interval(i) for i in verdict.intervals)
    outcome = Toned(verdict.outcome.value, TONES[verdict.outcome])
    return [verdict.says, outcome, f"{verdict.unit} {numbers}", str(verdict.n)]


def _interval(interval: Interval) -> str:
    mean, low, high = (
        round(value, 9) if isfinite(value) else value for value in (interval.mean, interval.low, interval.high)
    )
    return f"{mean:.3g}" + (f" ({low:.3g} to {high:.3g})" if isfinite(low) else "")


def check_records(judgements: Sequence[Judgement]) -> list[Record]:
    """One record a part of a claim, for files.

    Args:
        judgements: One a claim.
    """
    return [
        {
            "claim": verdict.says,
            "verdict": verdict.outcome.value,
            "unit": verdict.unit,
            "mean": i.mean if i else None,
            "low": i.low if i and isfinite(i.low) else None,
            "high": i.high if i and isfinite(i.high) else None,
            "n": len(i.values) if i else 0,
            "seeds": " ".join(f"{value:.6g}" for value in i.values) if i else "",
        }
        for verdict in judgements
        for i in verdict.intervals
    ]


def panels_of(item: Item, runs: Sequence[Run]) -> list[Panel]:
    """The lines of an item, those without any point left out."""
    return [
        Panel(s.title, _words(s.x), s.unit or listed(list(map(_words, s.y))), lines)
        for s in item.series
        if (lines := _lines(s, runs))
    ]


def series_drawings(item: Item, rows: Sequence[Row]) -> list[Drawing]:
    """The lines of an item, all panels in one figure; nothing if no run has a point of them."""
    shown = panels_of(item, [run for row in rows for run in row.runs])
    if not shown:
        return []
    caption = (
        f"Line: mean over seeds; small dots: single seeds; bar: 95 % interval of the mean, of {LEAST_SEEDS} seeds or "
        "more (of fewer it says nothing)."
    )
    return [series(shown, rows[0], item.name, heading=item.title, caption=caption)]


def _lines(s: Series, runs: Sequence[Run]) -> dict[str, dict[Place, Point]]:
    """The lines of each measure; of several, named by it."""
    if len(s.y) == 1:
        return _lines_of(s.y[0], s, runs)
    named = ((measure, _lines_of(measure, s, runs)) for measure in s.y)
    return {
        ", ".join(filter(None, [_words(measure.partition(":")[0]), line])): points
        for measure, lines in named
        for line, points in lines.items()
    }


def _lines_of(measure: str, s: Series, runs: Sequence[Run]) -> dict[str, dict[Place, Point]]:
    """At each place of each line the values of its seeds, as a mean with its interval."""
    values: dict[str, dict[Place, list[float]]] = defaultdict(lambda: defaultdict(list))
    across: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run in s.where.runs(runs):
        y = quantity(run, measure, detector=s.where.detector)
        x = _across(s, run)
        if y is None or x is None:
            continue
        line = str(setting_of(run, s.line)) if s.line else ""
        if _measured(s.x):  # one point a cell: the mean of what it measured there
            cell = "|".join([line, *(str(run.summary.get(label)) for label in LABELS), str(run.config.get("variant"))])
            across[line, cell].append(float(x))
            values[line][cell].append(y)
        else:
            values[line][x].append(y)
    lines: dict[str, dict[Place, Point]] = {}
    for line, places in values.items():
        for place, several in places.items():
            at: Place = place
            if (line, str(place)) in across:
                xs = across[line, str(place)]
                at = sum(xs) / len(xs)
            interval = Interval.of(several)
            ends = (interval.low, interval.high) if len(several) >= LEAST_SEEDS else None
            lines.setdefault(line, {})[at] = Point(several, ends)
    return lines


def _across(s: Series, run: Run) -> Place | None:
    if _measured(s.x):
        return quantity(run, s.x, detector=s.where.detector)
    value = setting_of(run, s.x)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None if value is None and "." not in s.x else str("none" if value is None else value)
    return float(value)


def _measured(x: str) -> bool:
    return x.partition(":")[0] in {*QUANTITIES, *OF_DETECTOR}


WORDS: Mapping[str, str] = {
    "start": "accuracy at the start (%)",
    "before": "accuracy before the trigger (%)",
    "after": "accuracy after the trigger (%)",
    "drop": "drop in the trigger step (points)",
    "phase_cost": "lost in the phase (points)",
    "batches": "batches of the phase",
    "mean_accuracy": "mean accuracy along the stream (%)",
    "flagged_clean": "clean samples corrected (%)",
    "attack_success": "attack success (%)",
    "seconds": "seconds an update",
    "burn_in_best": "best accuracy of the burn-in (%)",
    "auroc": "AUROC",
    "score_clean": "score of clean samples",
    "score_poisoned": "score of poisoned samples",
    "score_ratio": "poisoned over clean score",
    "burn_in.epochs": "epochs of the burn-in",
    "attack.eps": "eps",
}


def _words(name: str) -> str:
    """A measure or setting in words."""
    base, _, what = name.partition(":")
    words = WORDS.get(base, base.replace("_", " "))
    return f"{words}, {what}" if what else words
