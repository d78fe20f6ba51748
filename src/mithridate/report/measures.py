"""The measures of a defence: what it costs on a clean stream, what it holds under an attack, how long it takes.

They are those of Zhu et al., ICML 2023: final accuracy under the clean oracle, share of clean samples corrected
(Table 12), time of one mini-batch (Table 5), batches of the phase and accuracy after the trigger (Table 1), attack
success (Table 8: the share of poisoned samples that get past the defence); and what a defence that refuses steps adds.
Comparisons with the undefended run are made seed by seed, since runs of one seed share model and stream.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, log10
from operator import sub, truediv

from mithridate.bench.store import Run
from mithridate.report.page import TableSection
from mithridate.report.rows import Record, Row, Statistic, groups, spread, step_noun, to_csv, undefended, updates
from mithridate.report.wording import MISSING, decimal, listed, number, said_of, span

CLEAN_HEAD = (
    "defence",
    "stream",
    "final accuracy (%)",
    "against none (points)",
    "clean samples corrected (%)",
    "steps refused",
    "false alarms",
    "seconds a batch",
    "time / none",
    "n",
)
"""Headings of the table of clean streams."""

ATTACK_HEAD = (
    "attack",
    "defence",
    "before (%)",
    "after (%)",
    "drop (points)",
    "against none (points)",
    "attack success (%)",
    "phase (batches)",
    "first alarm (batch)",
    "steps refused",
    "quarantined",
    "time / none",
    "n",
)
"""Headings of the table of attacks."""

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


@dataclass(frozen=True)
class Measures:
    """All measures of one cell: a defence under one attack, or on a clean stream.

    Args:
        row: Its runs.
        accuracy_before_trigger: Fractions.
        accuracy_after_trigger: The final accuracy: on a clean stream the trigger step is one more clean batch.
        drop: Before minus after.
        against_none: Final accuracy minus that of the undefended run of the same seed and attack.
        flagged_clean: Share of clean samples that the defence corrected, dropped or weighed less.
        attack_success: Share of poisoned samples that it did not (Zhu et al., Table 8).
        refused: Share of steps that it rolled back; on a clean stream these are false vetoes.
        alarmed: Share of steps at which a monitor raised an alarm.
        first_alarm_step: The first of them, over the runs that have one; 1 is the first batch.
        steps: Batches of the phase.
        quarantined: Samples with NaN or infinite pixels.
        update_seconds: Mean time of one update, defence included.
        time_ratio: Over the time of the undefended run of the same seed and attack.
    """

    row: Row
    accuracy_before_trigger: Statistic
    accuracy_after_trigger: Statistic
    drop: Statistic
    against_none: Statistic
    flagged_clean: Statistic
    attack_success: Statistic
    refused: Statistic
    alarmed: Statistic
    first_alarm_step: Statistic
    steps: Statistic
    quarantined: Statistic
    update_seconds: Statistic
    time_ratio: Statistic


QUANTITIES = tuple(name for name in Measures.__annotations__ if name != "row")
"""The measures by name, as `measures.csv` has them."""


def measures(rows: Sequence[Row]) -> list[Measures]:
    """The measures of every clean stream with a phase and of every attack that is not a control.

    Args:
        rows: All rows of the report.

    Returns:
        By data set and model; in those clean streams first, then attack by attack, undefended first. Empty if nothing
        is defended.
    """
    if not any(row.defence_name != "none" for row in rows) and len({row.defence for row in rows}) < 2:
        return []
    measured = []
    for members in groups(rows).values():
        wanted = [row for row in members if not row.is_noise and (row.attacking or row.has_phase)]
        attacks = list(dict.fromkeys(row.attack for row in wanted))
        ordered = sorted(wanted, key=lambda row: (row.attacking, attacks.index(row.attack)))
        measured += [_measured(row, undefended(row, members)) for row in ordered]
    return measured


def _measured(row: Row, none: Row | None) -> Measures:
    nothing = Statistic(())
    return Measures(
        row=row,
        accuracy_before_trigger=row.statistic("accuracy_before_trigger"),
        accuracy_after_trigger=row.statistic("accuracy_after_trigger"),
        drop=row.statistic("drop"),
        against_none=nothing if none is None else row.against(none, "accuracy_after_trigger", sub),
        flagged_clean=row.statistic("flagged_clean"),
        attack_success=Statistic(tuple(1 - share for share in row.statistic("flagged_poisoned").values)),
        refused=row.each(_share_of_updates("rolled_back")),
        alarmed=row.each(_share_of_updates("alarms")),
        first_alarm_step=row.statistic("first_alarm_step"),
        steps=row.statistic("steps"),
        quarantined=row.statistic("quarantined"),
        update_seconds=row.statistic("update_seconds"),
        time_ratio=nothing if none is None else _ratio(row, none),
    )


def _share_of_updates(metric: str) -> Callable[[Run], float | None]:
    def share(run: Run) -> float | None:
        count, total = number(run.summary.get(metric)), updates(run)
        return None if count is None or not total else count / total

    return share


def _ratio(row: Row, none: Row) -> Statistic:
    """Time over time; a run that took no time at all was not measured."""
    timed = none.statistic("update_seconds").values
    return row.against(none, "update_seconds", truediv) if timed and min(timed) > 0 else Statistic(())


def measure_records(measured: Sequence[Measures]) -> list[Record]:
    """One record a cell: names, and mean, std and n of every measure; fractions, seconds and counts."""
    records: list[Record] = []
    for one in measured:
        record: dict[str, str | float | int | None] = {
            "dataset": one.row.dataset,
            "model": one.row.model,
            "attack": one.row.attack,
            "defence": one.row.defence,
            "runs": len(one.row.runs),
        }
        for name in QUANTITIES:
            statistic: Statistic = getattr(one, name)
            record |= {f"{name}_mean": statistic.mean, f"{name}_std": statistic.std, f"{name}_n": statistic.n}
        records.append(record)
    return records


def measures_csv(measured: Sequence[Measures]) -> str:
    """The records as CSV; there must be one at least."""
    return to_csv(measure_records(measured))


def measures_markdown(tables: Sequence[TableSection]) -> str:
    """The tables with their headings, those without rows left out."""
    return "\n".join(
        f"## {table.heading}\n\n{table.intro}\n\n{table.markdown()}" + (f"\n{table.note}\n" if table.note else "")
        for table in tables
        if table.rows
    )


def measure_sections(measured: Sequence[Measures]) -> list[TableSection]:
    """The two tables of the page: clean streams, then attacks; without rows where there is nothing to show."""
    clean = _by_group(measured, CLEAN_HEAD, _clean_cells, lambda one: not one.row.attacking)
    attacked = _by_group(measured, ATTACK_HEAD, _attack_cells, lambda one: one.row.attacking)
    several_streams = len({row[1] for rows in clean.values() for row in rows}) > 1
    noun = step_noun([one.row for one in measured])
    clean_head, clean, clean_note = _without_empty(CLEAN_HEAD, clean, set() if several_streams else {"stream"})
    attack_head, attacked, attack_note = _without_empty(ATTACK_HEAD, attacked, set())
    return [
        TableSection(
            id="costs",
            heading="What the defences cost on a clean stream",
            intro="Nothing is attacked here, so every sample corrected, dropped or weighed less, step refused and "
            "alarm is a false one. Against none: final accuracy minus that of the undefended run of the same seed. "
            "Time: of one update, the defence included. Mean ± standard deviation over n seeds.",
            head=[said_of(noun, name) for name in clean_head],
            rows=clean,
            note=clean_note,
            names=2 if several_streams else 1,
            bold=clean_head.index("against none (points)"),
        ),
        TableSection(
            id="holds",
            heading="What the defences hold under attack",
            intro="Attack success: share of the poisoned samples that the defence let pass untouched; blank where it "
            "treats all samples alike. Against none: accuracy after the trigger minus that of the undefended run of "
            f"the same seed. First alarm: the {noun} at which a monitor first raised one; the trigger comes right "
            "after the phase. Mean ± standard deviation over n seeds.",
            head=[said_of(noun, name) for name in attack_head],
            rows=attacked,
            note=attack_note,
            line=0,
            bold=attack_head.index("against none (points)"),
        ),
    ]


def _by_group(
    measured: Sequence[Measures],
    head: Sequence[str],
    cells: Callable[[Measures], Mapping[str, str]],
    wanted: Callable[[Measures], bool],
) -> dict[str, list[list[str]]]:
    table: dict[str, list[list[str]]] = {}
    for one in filter(wanted, measured):
        values = cells(one)
        table.setdefault(one.row.subject, []).append([values[name] for name in head])
    return table


def _clean_cells(one: Measures) -> dict[str, str]:
    return {
        "stream": one.row.attack,
        "final accuracy (%)": spread(one.accuracy_after_trigger),
        "clean samples corrected (%)": spread(one.flagged_clean),
        "false alarms": _of_updates(one.row, "alarms"),
        "seconds a batch": _seconds(one.update_seconds),
    } | _common_cells(one)


def _attack_cells(one: Measures) -> dict[str, str]:
    return {
        "attack": one.row.attack,
        "before (%)": spread(one.accuracy_before_trigger),
        "after (%)": spread(one.accuracy_after_trigger),
        "drop (points)": spread(one.drop),
        "attack success (%)": spread(one.attack_success),
        "phase (batches)": span(one.steps.values),
        "first alarm (batch)": _first_alarm(one),
        "quarantined": _total(one.quarantined),
    } | _common_cells(one)


def _common_cells(one: Measures) -> dict[str, str]:
    total, found = len(one.row.runs), one.accuracy_after_trigger.n
    return {
        "defence": one.row.defence,
        "against none (points)": signed(one.against_none),
        "steps refused": _of_updates(one.row, "rolled_back"),
        "time / none": times(one.time_ratio),
        "n": str(total) if found == total else f"{found} of {total}",
    }


def signed(statistic: Statistic) -> str:
    """A difference of fractions in points, with its sign.

    >>> signed(Statistic((0.01, 0.03))), signed(Statistic((-0.02,))), signed(Statistic(()))
    ('+2.0 ± 1.4', '-2.0', '—')
    """
    written = spread(statistic)
    return written if statistic.mean is None or written.startswith(("-", "0.0")) else f"+{written}"


def times(statistic: Statistic) -> str:
    """A ratio with its spread.

    >>> times(Statistic((1.5, 2.5))), times(Statistic(()))
    ('2.0 ± 0.7', '—')
    """
    if statistic.mean is None:
        return MISSING
    return decimal(statistic.mean) + ("" if statistic.std is None else f" ± {decimal(statistic.std)}")


def _seconds(statistic: Statistic) -> str:
    """Two significant digits of the mean, as many of the spread."""
    if statistic.mean is None:
        return MISSING
    digits = max(0, 1 - floor(log10(statistic.mean))) if statistic.mean > 0 else 1
    return decimal(statistic.mean, digits) + ("" if statistic.std is None else f" ± {decimal(statistic.std, digits)}")


def _of_updates(row: Row, metric: str) -> str:
    """How many of all updates of all runs; blank if no run counted them."""
    counted_in = [run for run in row.runs if number(run.summary.get(metric)) is not None]
    if not counted_in:
        return MISSING
    count, total = sum(row.statistic(metric).values), sum(map(updates, counted_in))
    return f"{count:g} of {total}" if count else "0"


def _total(statistic: Statistic) -> str:
    return f"{sum(statistic.values):g}" if statistic.values else MISSING


def _first_alarm(one: Measures) -> str:
    some, total = one.first_alarm_step, len(one.row.runs)
    return span(some.values) + (f" ({some.n} of {total})" if 0 < some.n < total else "")


def _without_empty(
    head: Sequence[str], table: Mapping[str, Sequence[Sequence[str]]], unwanted: Iterable[str]
) -> tuple[list[str], dict[str, list[list[str]]], str]:
    """The table without the unwanted columns and the optional ones that are empty, and a note that names the latter."""
    lines = [row for rows in table.values() for row in rows]
    empty = [name for i, name in enumerate(head) if name in OPTIONAL and all(row[i] in {MISSING, "0"} for row in lines)]
    kept = [i for i, name in enumerate(head) if name not in {*empty, *unwanted}]
    note = f"None in any row, so not shown: {listed([name.partition(' (')[0] for name in empty])}." if empty else ""
    return (
        [head[i] for i in kept],
        {subject: [[row[i] for i in kept] for row in rows] for subject, rows in table.items()},
        note,
    )
