"""What a guard knows of the step that a loop is trying."""

from dataclasses import dataclass, field

from mithridate.core.batch import AnyBatch
from mithridate.training.step import Received


@dataclass
class Attempt:
    """One step of a loop, from its first forward pass to the end of the optimiser's step.

    Args:
        begun: Whether it is known where the loop stood before it.
        stepped: Whether the optimiser has stepped.
        held_back: Whether the optimiser itself has held the step back, since its gradients overflowed.
        fault: Why it will be refused whatever the defence says; empty if it will not.
        screened: Whether a batch went through the defence.
        loss_taken: Whether the defence's loss was asked for.
        received: Screened batches whose samples are weighed, or whose loss is the defence's, by the id of their
            targets.
        seen: The batches as received, or what the model was called with.
        quarantined: Samples that were shown to nobody; like the next two, of all steps that are judged with this one.
        flagged: Samples that the defence corrected, dropped or gives less weight.
        seconds: What the guard itself has taken.
    """

    begun: bool = False
    stepped: bool = False
    held_back: bool = False
    fault: str = ""
    screened: bool = False
    loss_taken: bool = False
    received: dict[int, Received] = field(default_factory=dict)
    seen: list[AnyBatch] = field(default_factory=list)
    quarantined: int = 0
    flagged: int = 0
    seconds: float = 0.0

    def next(self) -> "Attempt":
        """The step after this one, which will be judged with it."""
        return Attempt(quarantined=self.quarantined, flagged=self.flagged, seconds=self.seconds)
