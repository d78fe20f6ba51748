"""What a guard tells others about steps of a user's own loop, and who may listen. Imports no torch."""

from dataclasses import dataclass
from typing import Literal, Protocol

Word = Literal["admitted", "shortened", "refused"]
"""What became of a step: it stayed, it stayed in part, or it was taken back."""

WORDS: tuple[Word, ...] = ("admitted", "shortened", "refused")


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step that a loop tried, or several that were judged at once (`every`), and what the guard made of it.

    Args:
        attempt: Steps of the optimiser that the loop has tried, this one among them: from 1.
        step: Those that stayed, before all that were judged: from 0.
        steps: Steps of the optimiser that were judged at once, >= 1; that of `attempt` is the last one.
        verdict: What became of all that were judged.
        reason: Why, where it was not admitted.
        seconds: What the guard itself took of them.
        quarantined: Samples of them that were shown to nobody: not finite, outside the domain, of an unknown class.
        flagged: Samples of them that the defence corrected, dropped or gives less weight.
        refusals_in_a_row: Refusals since the last step that stayed, this one among them.
        trusted_loss: Mean loss on the trusted set of the state that the step reached, where the defence measures it.
        trusted_worst: Accuracy of the worst class there, a fraction.
        rank: Of the process, from 0.
        warm_up: Whether the guard only watched yet.
        batch: Id of the batch in the quarantine folder; empty where it was not put there.
    """

    attempt: int
    step: int
    steps: int = 1
    verdict: Word
    reason: str = ""
    seconds: float
    quarantined: int = 0
    flagged: int = 0
    refusals_in_a_row: int = 0
    trusted_loss: float | None = None
    trusted_worst: float | None = None
    rank: int = 0
    warm_up: bool = False
    batch: str = ""


class Tracker(Protocol):
    """Whoever listens to a guard: a log, MLflow, TensorBoard, Prometheus, a user's own."""

    def note(self, record: StepRecord) -> None:
        """Take in one record."""

    def close(self) -> None:
        """Write what is not written yet: no step will follow. May be called twice."""
