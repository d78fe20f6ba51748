"""What an audit says in sentences; never that a model is safe."""

from collections.abc import Sequence

from mithridate.audit.plan import AuditPlan
from mithridate.audit.result import AuditRun, Side, VerdictName


def statement(verdict: VerdictName, reasons: Sequence[str], plan: AuditPlan) -> str:
    """The verdict in a sentence.

    Args:
        verdict: Which.
        reasons: Why.
        plan: Says what was allowed.
    """
    allowed = f"{plan.damage.step:g} points in one step or {plan.damage.phase:g} over the phase"
    if verdict == "pass":
        return f"No tried attack within this budget cost more than {allowed}."
    if verdict == "fail":
        return f"{reasons[0]}."
    return f"It cannot be told: {reasons[0]}."


def notes_of(side: Side, runs: Sequence[AuditRun], *, alike: bool) -> list[str]:
    """What a reader should know who relies on the verdict.

    Args:
        side: That the verdict is of.
        runs: Of that side.
        alike: Every seed began with the same model and stream.
    """
    notes = []
    if alike:
        notes.append(
            "The target function gave the same model and stream in every seed, so that the intervals know of the "
            "attacks' chance alone: train, or at least draw the stream, by the seed."
        )
    clean = [run for run in runs if run.attack == "clean"]
    if clean and all(len(set(run.accuracy)) == 1 for run in clean):
        who = "the guard served the model that it began with" if side.guarded else "the model did not change"
        notes.append(
            f"Accuracy never moved on a clean stream ({who}), so that little could be lost in so few steps: try more "
            "batches."
        )
    attacks = [r for r in side.rulings if not r.control and r.beyond]
    if side.verdict == "pass" and attacks and not any(b.low and b.low > 0 for r in attacks for b in r.beyond.values()):
        notes.append("No tried attack was shown to cost more than noise or a clean stream: stronger ones may exist.")
    if side.clean_steps and side.clean_refused == side.clean_steps:
        notes.append("The guard refused every step of the clean streams: nothing is learned behind it.")
    return notes
