"""What a poisoned stream did, in three lines: the quiet phase, the one step, and the same under a defence."""

from collections.abc import Sequence

from mithridate.report.rows import Row, step_noun
from mithridate.report.steadiness import is_quiet
from mithridate.report.wording import counted, points


def story(rows: Sequence[Row]) -> list[str]:
    """The lines that a person remembers; those that the runs have nothing for are left out.

    Args:
        rows: Of one data set and model: an attack with a phase and one that is its trigger alone, without a defence
            and with others.
    """
    phased = [row for row in rows if row.poisons_before_trigger and row.claims_drop]
    bare = next((row for row in phased if row.defence_name == "none"), None)
    if bare is None:
        return []
    step = step_noun([bare])
    alone = next(
        (row for row in rows if row.defence_name == "none" and row.claims_drop and not row.poisons_before_trigger), None
    )
    alarmed = len(bare.alarmed_early())
    alarms = "no alarm" if not alarmed else f"an alarm in {alarmed} of {counted(len(bare.runs), 'run')}"
    phase = "Quiet" if is_quiet(bare, rows) else "Not quiet"
    lines = [
        f"{phase}: {counted(f'{bare.mean_steps:.0f} poisoned', step)} take the accuracy from "
        f"{_of(bare, 'accuracy_start')} to {_of(bare, 'accuracy_before_trigger')}; {alarms}.",
        f"Then one {step}: {_of(bare, 'accuracy_before_trigger')} -> {_of(bare, 'accuracy_after_trigger')}.",
    ]
    if alone is not None:
        lines[1] += (
            f" The same {step} without the quiet ones: {_of(alone, 'accuracy_before_trigger')} -> "
            f"{_of(alone, 'accuracy_after_trigger')}."
        )
    defended = [row for row in phased if row.attack == bare.attack and row.defence_name != "none"]
    if defended:
        best = max(defended, key=lambda row: row.statistic("accuracy_after_trigger").mean or 0.0)
        lines.append(f"Defended ({best.defence}): the same poison leaves {_of(best, 'accuracy_after_trigger')}.")
    return lines


def _of(row: Row, metric: str) -> str:
    mean = row.statistic(metric).mean
    return "?" if mean is None else f"{points(mean)} %"
