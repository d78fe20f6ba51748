"""The page of a guard's folder: what was refused in a loop, when and why."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from mithridate.core.errors import DataError, StoreError
from mithridate.core.files import locked, path_of, remove_parts, write_whole
from mithridate.guard.entry import Quarantined
from mithridate.guard.quarantine import Quarantine
from mithridate.guard.step_log import Logged, Steps, read_steps
from mithridate.report.figures import FigureSection
from mithridate.report.figures.drawing import Drawing
from mithridate.report.figures.guarded_steps import guarded_steps
from mithridate.report.figures.quarantined_images import quarantined_images
from mithridate.report.findings import KeyNumber
from mithridate.report.lead import Lead
from mithridate.report.page import LOCK, board
from mithridate.report.settings import flattened
from mithridate.report.tables.refusals import quarantine_table, reasons_table, steps_table, when
from mithridate.report.tables.section import TableSection
from mithridate.report.wording import MISSING, counted, decimal, one_line

STUCK = 10
"""So many refusals at the end are said first: nothing is learned then."""

MOST_PICTURES = 12
"""Batches whose images are shown, the newest."""

MOST_IMAGES = 20
"""Images shown of each."""


@dataclass(frozen=True)
class GuardReport:
    """What was written of a guard's folder.

    Args:
        html: The page, self-contained.
        headline: The result in a sentence.
        reasons: Why steps were not admitted.
    """

    html: Path
    headline: str
    reasons: TableSection


def build_guard_report(directory: str | Path, out: str | Path | None = None) -> GuardReport:
    """Read a guard's folder and write its page. It may be at work meanwhile.

    Args:
        directory: The guard's folder.
        out: Where the page goes; the folder itself by default.

    Raises:
        StoreError: It is no guard's folder, or cannot be read.
        WriteError: The page cannot be written.
    """
    directory = path_of(directory)
    target = directory if out is None else path_of(out)
    steps = read_steps(directory)
    quarantine = _quarantine(directory)
    entries = quarantine.list() if quarantine else ()
    reasons = reasons_table(steps.by_rank)
    headline = _headline(_first_rank(steps))
    lead = Lead(
        title=f"What the guard did: {one_line(directory.resolve().name)}",
        headline=headline,
        details=[*_details(steps, entries), *([] if quarantine is None else _left_out(quarantine))],
        parts=[part for part in _parts(steps, reasons, entries, quarantine) if not part.empty],
        numbers=_key_numbers(_first_rank(steps)),
    )
    page = board(lead)
    with locked(target / LOCK):
        remove_parts(target, of="report.html")
        write_whole(target / "report.html", page)
    return GuardReport(target / "report.html", headline, reasons)


def _quarantine(directory: Path) -> Quarantine | None:
    try:
        return Quarantine.existing(directory)
    except StoreError:  # a guard need not have one
        return None


def _first_rank(steps: Steps) -> Sequence[Logged]:
    return next(iter(steps.by_rank.values()), ())


def _parts(
    steps: Steps, reasons: TableSection, entries: Sequence[Quarantined], quarantine: Quarantine | None
) -> list[TableSection | FigureSection]:
    curves = guarded_steps([step.record for step in _first_rank(steps)])
    along = FigureSection(
        "along",
        "Along the steps",
        [] if curves is None else [curves],
        absent="The defence measures nothing on a trusted set, and no step was refused.",
        subheadings=False,
    )
    first: list[TableSection | FigureSection] = [reasons, along] if curves is None else [along, reasons]
    return [
        *first,
        FigureSection("pictures", "Refused batches", _pictures(entries, quarantine)),
        quarantine_table(entries),
        steps_table(steps.by_rank),
        *(
            TableSection(name, heading, intro).filled(
                [("", {"setting": key, "value": value}) for key, value in flattened(table).items()]
            )
            for name, heading, intro in (
                ("defence", "Settings of the defence", "As they were when the guard was attached last."),
                ("environment", "Environment", "Versions and machine, then."),
            )
            if isinstance(table := steps.about.get(name), dict)
        ),
    ]


def _pictures(entries: Sequence[Quarantined], quarantine: Quarantine | None) -> list[Drawing]:
    """The images of the newest batches that hold some."""
    drawings: list[Drawing] = []
    for entry in sorted(entries, key=lambda entry: -entry.attempt):
        if quarantine is None or len(drawings) == MOST_PICTURES:
            break
        if entry.problem:
            continue
        try:
            drawing = quarantined_images(entry, quarantine.arrays(entry.id), most=MOST_IMAGES)
        except DataError:  # the table shows that it is damaged, or it was dropped meanwhile
            continue
        drawings += [] if drawing is None else [drawing]
    return drawings


def _headline(steps: Sequence[Logged]) -> str:
    if not steps:
        return "No step has been tried yet."
    counts, total = _counts(steps)
    last = steps[-1].record
    if last.refusals_in_a_row >= STUCK:
        return f"The last {last.refusals_in_a_row:,} steps were all refused: nothing is learned any more."
    longest = max(step.record.refusals_in_a_row for step in steps)
    refusals = counted(f"{counts['refused']:,}", "refusal") if counts["refused"] else "No refusal"
    said = [
        f"{refusals} in {counted(f'{total:,}', 'step')}" + (f", at most {longest:,} in a row" if longest > 1 else ""),
        f"{counts['shortened']:,} shortened" if counts["shortened"] else "",
    ]
    return "; ".join(filter(None, said)) + "."


def _key_numbers(steps: Sequence[Logged]) -> list[KeyNumber]:
    if not steps:
        return []
    _, total = _counts(steps)
    refused = sum(step.record.steps for step in steps if step.record.verdict == "refused")
    return [
        KeyNumber(f"{refused:,} of {total:,}", "steps refused"),
        KeyNumber(
            _short(median(step.record.seconds for step in steps)), "that the guard itself took of a step, median"
        ),
    ]


def _counts(steps: Sequence[Logged]) -> tuple[Counter[str], int]:
    """Steps by verdict, and all that were attempted: the log leaves out some that were admitted."""
    counts: Counter[str] = Counter(step.record.verdict for step in steps)
    return counts, steps[-1].record.attempt - steps[0].record.attempt + 1


def _details(steps: Steps, entries: Sequence[Quarantined]) -> list[str]:
    first = _first_rank(steps)
    if not first:
        return []
    seconds = [step.record.seconds for step in first]
    name = one_line(_of(steps, "defence").get("name", ""))
    span = f"{first[0].record.attempt:,} to {first[-1].record.attempt:,}"
    sentences = [
        f"Attempted steps {span}, {when(first[0].time)} to {when(first[-1].time)} UTC"
        + (f"; defence {name}." if name else "."),
        f"The guard itself took {_short(median(seconds))} of a step (median), {_short(max(seconds))} at most.",
    ]
    window = min((b.record.attempt - a.record.attempt for a, b in pairwise(first)), default=1)
    if window > 1:
        sentences.append(f"Steps are judged {window} at a time; a refusal takes all of them back.")
    if len(steps.by_rank) > 1:
        sentences.append(f"{len(steps.by_rank)} ranks have a log; numbers above and curves are those of the first.")
    if any(step.record.warm_up for step in first):
        sentences.append(f"The warm-up took {counted(sum(step.record.warm_up for step in first), 'step')}.")
    if entries:
        damaged = sum(bool(entry.problem) for entry in entries)
        also = f", {damaged} of them damaged" if damaged else ""
        sentences.append(f"{counted(len(entries), 'batch')} in quarantine{also}.")
    if steps.taken_again:
        sentences.append(
            f"The guard was attached {counted(steps.attached, 'time')}; {counted(steps.taken_again, 'step')} that a "
            "resumed training took again counted once."
        )
    if steps.broken:
        sentences.append(f"{counted(steps.broken, 'line')} of the log cannot be read and left out.")
    return sentences


def _left_out(quarantine: Quarantine) -> list[str]:
    number = quarantine.left_out()
    return [f"{counted(number, 'batch')} more not stored, for there was no room."] if number else []


def _of(steps: Steps, name: str) -> dict[str, object]:
    table = steps.about.get(name)
    return table if isinstance(table, dict) else {}


def _short(seconds: float) -> str:
    """A time in milliseconds or seconds.

    >>> _short(0.0123), _short(2.5)
    ('12.3 ms', '2.5 s')
    """
    if math.isnan(seconds):
        return MISSING
    return f"{decimal(seconds)} s" if seconds >= 1 else f"{decimal(1000 * seconds)} ms"
