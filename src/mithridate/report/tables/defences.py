"""The tables of defences: what they cost on a clean stream, what they hold under attack."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mithridate.report.measures import Measures
from mithridate.report.rows import Row, step_noun, updates
from mithridate.report.statistic import Statistic, seconds, signed, spread, times
from mithridate.report.tables.section import TableSection
from mithridate.report.wording import MISSING, listed, number, out_of, span, with_step_noun

OPTIONAL = frozenset(
    {
        "clean samples corrected (%)",
        "steps refused",
        "false alarms",
        "attack success (%)",
        "first alarm (batch)",
        "quarantined",
    }
)
"""Columns that are left out, and named below the table, where they hold nothing but zeros and blanks."""

BOLD = "against none (points)"
"""The column that the eye should find."""


def defence_tables(measured: Sequence[Measures]) -> list[TableSection]:
    """Clean streams, then attacks; without rows where there is nothing to show.

    Args:
        measured: As `measures` gives them.
    """
    clean = [cell for cell in measured if not cell.row.attacking]
    several_streams = len({cell.row.attack for cell in clean}) > 1
    noun = step_noun([cell.row for cell in measured])
    apart = measured[0].row.apart if measured else {}
    costs = TableSection(
        id="costs",
        heading="What the defences cost on a clean stream",
        intro="Nothing is attacked here, so every sample corrected, dropped or weighed less, step refused and "
        "alarm is a false one. Against none: final accuracy minus that of the undefended run of the same seed. "
        "Time: of one update, the defence included. Mean ± standard deviation over n seeds.",
        names=(2 if several_streams else 1) + len(apart),
    )
    holds = TableSection(
        id="holds",
        heading="What the defences hold under attack",
        intro="Attack success: share of the poisoned samples that the defence let pass untouched; blank where it "
        "treats all samples alike. Against none: accuracy after the trigger minus that of the undefended run of "
        f"the same seed. First alarm: the {noun} at which a monitor first raised one; the trigger comes right "
        "after the phase. Mean ± standard deviation over n seeds.",
        names=2 + len(apart),
        line=0,
    )
    return [
        _filled(
            costs,
            [(cell.row.subject, _clean_cells(cell, several_streams=several_streams)) for cell in clean],
            noun,
            apart,
        ),
        _filled(
            holds, [(cell.row.subject, _attack_cells(cell)) for cell in measured if cell.row.attacking], noun, apart
        ),
    ]


def _filled(
    table: TableSection, cells: Sequence[tuple[str, Mapping[str, str]]], noun: str, apart: Mapping[str, str]
) -> TableSection:
    """The table with these cells; optional columns that are empty are named in a note instead."""
    head = list(cells[0][1]) if cells else []
    empty = [name for name in head if name in OPTIONAL and all(line[name] in {MISSING, "0"} for _, line in cells)]
    shown = [name for name in head if name not in empty]
    note = f"None in any row, so not shown: {listed([name.partition(' (')[0] for name in empty])}." if empty else ""
    return replace(table, note=note, bold=shown.index(BOLD) if shown else None).filled(
        [
            (subject, {name if name in apart else with_step_noun(noun, name): line[name] for name in shown})
            for subject, line in cells
        ]
    )


def _clean_cells(cell: Measures, *, several_streams: bool) -> dict[str, str]:
    return {
        "defence": cell.row.defence,
        **({"stream": cell.row.attack} if several_streams else {}),
        **cell.row.apart,
        "final accuracy (%)": spread(cell.accuracy_after_trigger),
        BOLD: signed(cell.against_none),
        "clean samples corrected (%)": spread(cell.flagged_clean),
        "steps refused": _of_updates(cell.row, "rolled_back"),
        "false alarms": _of_updates(cell.row, "alarms"),
        "seconds a batch": seconds(cell.update_seconds),
        "time / none": times(cell.time_ratio),
        "n": out_of(cell.accuracy_after_trigger.n, len(cell.row.runs)),
    }


def _attack_cells(cell: Measures) -> dict[str, str]:
    return {
        "attack": cell.row.attack,
        "defence": cell.row.defence,
        **cell.row.apart,
        "before (%)": spread(cell.accuracy_before_trigger),
        "after (%)": spread(cell.accuracy_after_trigger),
        "drop (points)": spread(cell.drop),
        BOLD: signed(cell.against_none),
        "attack success (%)": spread(cell.attack_success),
        "phase (batches)": span(cell.steps.values),
        "first alarm (batch)": _first_alarm(cell.first_alarm_step, len(cell.row.runs)),
        "steps refused": _of_updates(cell.row, "rolled_back"),
        "quarantined": f"{sum(cell.quarantined.values):g}" if cell.quarantined.n else MISSING,
        "time / none": times(cell.time_ratio),
        "n": out_of(cell.accuracy_after_trigger.n, len(cell.row.runs)),
    }


def _of_updates(row: Row, metric: str) -> str:
    """How many of all updates of all runs; blank if no run counted them."""
    counted = [(count, updates(run)) for run in row.runs if (count := number(run.summary.get(metric))) is not None]
    if not counted:
        return MISSING
    count, total = map(sum, zip(*counted, strict=True))
    return f"{count:g} of {total}" if count else "0"


def _first_alarm(alarms: Statistic, runs: int) -> str:
    return span(alarms.values) + (f" ({alarms.n} of {runs})" if 0 < alarms.n < runs else "")
