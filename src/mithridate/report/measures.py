"""The measures of a defence: what it costs on a clean stream, what it prevents under an attack, how long it takes.

They are those of Zhu et al., ICML 2023: final accuracy under the clean oracle, share of clean samples corrected
(Table 12), time of one mini-batch (Table 5), batches of the phase and accuracy after the trigger (Table 1), attack
success (Table 8: the share of poisoned samples that get past the defence); and what a defence that refuses steps adds.
Comparisons with the undefended run are made seed by seed, since runs of one seed share model and stream.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import sub, truediv

from mithridate.bench.store import Run
from mithridate.report.comparisons import undefended
from mithridate.report.records import Record, means
from mithridate.report.rows import Row, groups, updates
from mithridate.report.statistic import Statistic
from mithridate.report.wording import number


@dataclass(frozen=True)
class Measures:
    """All measures of one cell: a defence under one attack, or on a clean stream.

    Args:
        row: The cell, with its runs.
        accuracy_before_trigger: Accuracy after the phase, fractions.
        accuracy_after_trigger: The final accuracy: on a clean stream the trigger step is one more clean batch.
        drop: Accuracy before the trigger minus accuracy after it.
        against_none: Final accuracy minus that of the undefended run of the same seed and attack.
        flagged_clean: Share of clean samples that the defence corrected, dropped or weighed less.
        attack_success: Share of poisoned samples that it did not correct, drop or weigh less (Zhu et al., Table 8).
        refused: Share of steps that it rolled back; on a clean stream these are false vetoes.
        alarmed: Share of steps at which a monitor raised an alarm.
        first_alarm_step: The first step with an alarm, over the runs that have one; 1 is the first batch.
        steps: Batches of the phase.
        quarantined: Samples with NaN or infinite pixels.
        update_seconds: Mean time of one update, defence included.
        time_ratio: Time of one update over that of the undefended run of the same seed and attack.
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
    nothing = Statistic()
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
    return row.against(none, "update_seconds", truediv) if timed and min(timed) > 0 else Statistic()


def measure_records(measured: Sequence[Measures]) -> list[Record]:
    """One record a cell: names, and mean, std and n of every measure; fractions, seconds and counts."""
    return [
        {
            **cell.row.names,
            "runs": len(cell.row.runs),
            **means({name: getattr(cell, name) for name in QUANTITIES}),
        }
        for cell in measured
    ]
