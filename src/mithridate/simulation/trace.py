"""One row of a run's trace: what is measured at each step. Store, writer and report take their columns from here."""

from typing import Literal, TypedDict

Phase = Literal["start", "accumulative", "trigger"]


class Sent(TypedDict):
    """The columns of a row that say what was sent and what became of it."""

    batch_loss: float | None
    gradient_norm: float | None
    bounded_norm: float | None
    update_norm: float | None
    objective_start: float | None
    objective_end: float | None
    poison_linf: float | None
    poison_l2: float | None
    poisoned: float | None
    quarantined: int
    flagged_clean: float | None
    flagged_poisoned: float | None
    admitted: bool
    verdict: str


class Seconds(TypedDict):
    """The columns of a row that say how long it took."""

    craft_seconds: float
    update_seconds: float
    seconds: float


class TraceRow(Sent, Seconds):
    """What is measured at one step, or round; None where it has no meaning.

    Args:
        step: Updates since the stream began; 0 is the state before it.
        phase: Which part of the run.
        accuracy: On the test part, after the step, a fraction; None where nothing was measured (`evaluate_every`).
        loss: Mean loss on the test part, after the step; None as `accuracy`.
        test_samples: Samples of the test part that both were measured on: all, or those of `evaluate_size`; None as
            `accuracy`.
        batch_loss: Mean loss of the batch as the model received it, before the step.
        gradient_norm: l2 length of the gradient before the defence bounds it; in a federation the mean over clients.
        bounded_norm: l2 length of the gradient after the defence has bounded it.
        update_norm: l2 distance of the parameters before and after the step.
        objective_start: What the attack climbs (H_t, for the accumulative one) where its crafting of the batch began;
            None for attacks that climb no function of the whole batch.
        objective_end: The same for the batch that was sent; crafting that leaves it below the start has failed.
        poison_linf: Largest change of an input value in the batch.
        poison_l2: Mean l2 length of the changed samples' perturbations.
        poisoned: Share of the batch's samples that were changed, or of a round's clients that are hostile.
        quarantined: Samples with NaN or infinity, or updates that were not finite and clients whose samples the model
            cannot take, kept from the model.
        flagged_clean: Share of the unchanged samples that the defence corrected, dropped or gave less weight.
        flagged_poisoned: Share of the changed samples that the defence corrected, dropped or gave less weight.
        admitted: False: the step was rolled back, or not made.
        verdict: Why, and which clients a round left out; empty if there is nothing to say.
        alarms: Monitors' alarms joined by "; ", empty if none.
        craft_seconds: The attack's time.
        update_seconds: The learner's and the defence's time.
        seconds: The whole step, evaluation included.
    """

    step: int
    phase: str
    accuracy: float | None
    loss: float | None
    test_samples: int | None
    alarms: str


COLUMNS = (
    "step",
    "phase",
    "accuracy",
    "loss",
    "test_samples",
    *Sent.__annotations__,
    "alarms",
    *Seconds.__annotations__,
)
"""The columns of a row, in the order of the store."""

NOTHING_SENT = Sent(
    batch_loss=None,
    gradient_norm=None,
    bounded_norm=None,
    update_norm=None,
    objective_start=None,
    objective_end=None,
    poison_linf=None,
    poison_l2=None,
    poisoned=0.0,
    quarantined=0,
    flagged_clean=None,
    flagged_poisoned=None,
    admitted=True,
    verdict="",
)
"""The row of the state before the stream, in which nothing was sent."""
