"""Doubts about the phase before the trigger: whether there was one, and whether it was quiet."""

from collections.abc import Iterator, Sequence

from mithridate.bench.store import Run
from mithridate.report.doubts.doubt import Doubt, Severity
from mithridate.report.doubts.rule import rule
from mithridate.report.doubts.selection import claiming_rows, share_of_runs
from mithridate.report.rows import Row, step_noun
from mithridate.report.steadiness import NEGLIGIBLE, quiet_limit
from mithridate.report.wording import counted, listed, number, points


@rule("Phase of 0 batches")
def no_phase(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for attacks that have a phase before their trigger, and were given or took no step for it."""
    for row in claiming_rows(rows):
        empty = [run for run in row.runs if run.summary.get("phase_asked") and run.summary.get("steps") == 0]
        if empty:
            text = (
                f"phase of {counted(0, step_noun([row]))} in {share_of_runs(empty, row)}, although the attack has one: "
                "what is shown is its trigger alone."
            )
            yield Doubt(Severity.SERIOUS, row.cell, text)


@rule("Floor above the start")
def floor_above_start(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for attacks whose accuracy floor lies above the start accuracy, so that their phase ends after one step."""
    for row in claiming_rows(rows):
        floor = _limits(row).get("accuracy_floor")
        start = row.statistic("accuracy_start").mean
        if floor is not None and start is not None and floor > start:
            text = (
                f"the phase ends below {points(floor)} %, and the model starts at {points(start)} %: it ends after one "
                f"{step_noun([row])}, whatever that does; take max_drop, which counts from the start."
            )
            yield Doubt(Severity.SERIOUS, row.cell, text)


@rule("Nothing read in the phase")
def nothing_read(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for phases that a floor of accuracy was to end, and in which no accuracy was read after the start's."""
    for row in rows:
        blind = [run for run in row.runs if number(run.summary.get("read_step")) == 0 and run.summary.get("steps")]
        floors = ["the attack's"] if row.claims_drop and _limits(row) else []
        floors += ["the monitor's"] if any(_watches_accuracy(run) for run in blind) else []
        if blind and floors:
            text = (
                f"{share_of_runs(blind, row)} measured nothing between start and trigger: {listed(floors)} floor of "
                "accuracy knew the start alone, and could not be crossed; take a smaller evaluate_every."
            )
            yield Doubt(Severity.CAUTION, row.cell, text)


def _limits(row: Row) -> dict[str, float]:
    """The accuracies by which a row's attack, or the inner one of `gate_aware`, ends its phase, by setting."""
    tables = (row.attack_settings, row.attack_settings.get("inner", {}))
    limits = ((key, number(table.get(key))) for table in tables for key in ("accuracy_floor", "max_drop"))
    return {key: value for key, value in limits if value is not None}


def _watches_accuracy(run: Run) -> bool:
    """Whether a monitor of the run has a floor of accuracy, by whatever name."""
    monitors = run.config.get("monitor", [])
    tables = monitors if isinstance(monitors, list) else [monitors]
    return any(number(table.get(key)) is not None for table in tables for key in ("floor", "max_drop"))


@rule("Lost before the trigger")
def early_loss(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for attacks that cost more before the trigger than a clean stream loses, or as much as the trigger."""
    for row in claiming_rows(rows):
        before = row.difference("accuracy_start", "accuracy_before_trigger").mean
        drop = row.statistic("drop").mean
        if before is None or before < NEGLIGIBLE:
            continue
        lost = f"{points(before)} points were"
        if drop is not None and before >= drop:
            text = f"{lost} lost before the trigger and {points(drop)} in its step: not one {step_noun([row])}'s work."
            yield Doubt(Severity.SERIOUS, row.cell, text)
        elif before > (limit := quiet_limit(row, rows))[0]:
            text = f"{lost} lost before the trigger ({limit[1]}): the phase is not quiet."
            yield Doubt(Severity.CAUTION, row.cell, text)


@rule("Halted before the trigger")
def halted(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for runs that a monitor stopped before the trigger: they have no drop, and the others are a selection."""
    for row in rows:
        if runs := row.with_status("halted"):
            n = row.statistic("drop").n
            drop = f"that of the other {n}" if n else "unknown"
            text = f"{share_of_runs(runs, row)} halted before the trigger; the drop is {drop}."
            yield Doubt(Severity.CAUTION, row.cell, text)


@rule("Not quiet")
def alarms_before_trigger(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for monitors that raised an alarm before the trigger of an attack: the phase was not quiet."""
    for row in rows:
        if row.claims_drop and (early := row.alarmed_early()):
            text = f"a monitor raised an alarm before the trigger in {share_of_runs(early, row)}."
            yield Doubt(Severity.CAUTION, row.cell, text)
