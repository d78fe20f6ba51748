"""What stands in a step: between a batch, or clients' updates, and the model."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mithridate.core.batch import AnyBatch
from mithridate.core.component import Component
from mithridate.core.errors import ConfigError
from mithridate.core.model import answer
from mithridate.core.past import Weights
from mithridate.core.targets import Criterion
from mithridate.core.updates import Updates
from mithridate.core.view import View


class Screened(NamedTuple):
    """What a defence lets through of a batch.

    Args:
        batch: What is left, corrected or not, in the order received.
        flagged: (n,) bool over the received batch: the samples that the defence corrected, dropped or gives less
            weight; every dropped one is among them. None: it treats all samples alike. For measurement.
        weights: What each sample that is left counts in the loss, shaped like the targets' first dimension, >= 0. None:
            all count 1.
    """

    batch: AnyBatch
    flagged: Tensor | None = None
    weights: Tensor | None = None


class Verdict(NamedTuple):
    """A defence's last word on a step.

    Args:
        admit: Whether the step stays; False rolls back parameters, buffers and optimiser state.
        reason: Why, for the trace.
        parameters: Take the place of those that the step gave (a shorter step, say); None keeps the latter.
        forget: With a refusal: the optimiser begins anew, so that no momentum of earlier steps pushes the next one.
        measures: What was measured of the state that the step reached, for logs: `trusted_loss`, `trusted_worst`.
    """

    admit: bool
    reason: str = ""
    parameters: Mapping[str, Tensor] | None = None
    forget: bool = False
    measures: Mapping[str, float] = MappingProxyType({})


ADMITTED = Verdict(admit=True)


class Rounds(Protocol):
    """What a server of a federation says of its rounds to defences."""

    @property
    def bound(self) -> Literal["after", "before"]:
        """Whether a defence bounds the aggregate, or each client's row."""

    @property
    def distances(self) -> Literal["all", "without_norm"]:
        """Which parameters bounds and rules look at."""


class Calibration(NamedTuple):
    """A threshold that was measured on clean samples before the stream.

    Args:
        fields: The measured settings, by name.
        rate: Share of the clean samples above the threshold.
        interval: 95 % confidence interval of that share (Wilson), as if samples were independent.
        samples: How many clean samples were scored.
    """

    fields: Mapping[str, float]
    rate: float
    interval: tuple[float, float]
    samples: int

    def summary(self) -> dict[str, Any]:
        """Plain numbers for the store."""
        return {**self.fields, "rate": self.rate, "interval": list(self.interval), "samples": self.samples}


Rehearsal = Callable[[Callable[[AnyBatch, View], Tensor | None]], tuple[Tensor, Tensor]]
"""Lets an undefended twin of the learner go through clean batches, and calls a function on each batch before the twin
learns from it; that returns one score a sample, or None where there is none yet. Returns the number of updates made
before each score, and the scores: (scores,) int64 and (scores,) float64."""


class Defence(Component):
    """Stands in a step. Override what you use; each moment is the identity otherwise.

    A step asks in this order: `begin`, `screen`, `loss`, `bound`, then, once the optimiser has stepped, `admit`, and
    `committed` if the step stays. A server of a federation has updates and no samples: it skips `screen` and `loss`.

    A defence sees what a deployed system sees: the batch as received, its own model and notes, a trusted set if it
    declares one. It never sees which samples are poisoned. Its notes are tensors in `view.memory`, and nowhere else.
    """

    neutral: ClassVar[Mapping[str, Any]] = {}
    """Settings under which it changes nothing, bit for bit."""

    active: ClassVar[Mapping[str, Any]] = {}
    """Settings under which it acts on every toy stream; equal to `neutral` only for a defence that never acts."""

    def acts(self, moment: str) -> bool:
        """Whether it does anything of its own at a moment of the step, such as `screen`."""
        return overrides(self, moment)

    def begin(self, view: View) -> None:
        """A step, or a round of a federation, starts: take notes of the model as it is."""

    def screen(self, batch: AnyBatch, view: View) -> Screened:
        """Before the gradient: drop, weigh or correct samples."""
        return Screened(batch)

    def loss(self, model: nn.Module, batch: AnyBatch, criterion: Criterion, view: View) -> Tensor:
        """The loss that is differentiated, the model being in update mode; a scalar."""
        return criterion(answer(model, batch.x), batch.y)

    def bound(self, updates: Updates, view: View) -> Updates:
        """Between gradient and step: bound each client's row by itself."""
        return updates

    def admit(self, before: Weights, view: View) -> Verdict:
        """After the step: keep it, shorten it, or roll it back.

        Args:
            before: The model before the step, during this call only.
            view: What the defence declared, with the model after the step.
        """
        return ADMITTED

    def committed(self, view: View) -> None:
        """The step stays: take notes of the state that was reached."""

    def serve(self, view: View) -> Weights | None:
        """The model that answers queries, where that is not the one that learns; None where it is."""
        return None

    def check_federation(self, run: Rounds, clients: int) -> None:
        """Refuse a federation in which it would do nothing, or could not work; asked before the first round.

        Args:
            run: The server's settings.
            clients: In a round.

        Raises:
            ConfigError: Says what to change.
        """
        if overrides(self, "screen") or overrides(self, "loss"):
            raise ConfigError(
                f"{type(self).__name__} acts on training samples, and the server of a federation sees none, so it "
                "would do nothing; take one that acts on updates (clip, dgc) or on the model (gate, bound_update, ema)."
            )

    def calibrated(self, rehearse: Rehearsal) -> "tuple[Defence, Sequence[Calibration]]":
        """Measure the thresholds that the settings ask for: the defence with them, and what was measured.

        Args:
            rehearse: Goes through the trusted set as through a stream.
        """
        return self, ()


def overrides(defence: Defence, moment: str) -> bool:
    """Whether a defence does anything of its own at a moment of the step."""
    return getattr(type(defence), moment) is not getattr(Defence, moment)


def checked(defence: Defence, batch: AnyBatch, screened: Screened) -> Screened:
    """What a defence let through, once it is checked against what `Screened` promises.

    Args:
        defence: Named in the message.
        batch: What the defence received.
        screened: What it let through.

    Raises:
        AssertionError: A defect in the defence.
    """
    name, left = type(defence).__name__, screened.batch.size
    flagged, weights = screened.flagged, screened.weights
    if flagged is not None and (flagged.dtype != torch.bool or flagged.shape != (batch.size,)):
        raise AssertionError(f"{name}: flags of shape {tuple(flagged.shape)} for {batch.size} samples")
    if left != batch.size and (flagged is None or not int((~flagged).sum()) <= left < batch.size):
        raise AssertionError(f"{name} left {left} of {batch.size} samples, and did not flag those that it dropped")
    if weights is not None and weights.shape != (left,):
        raise AssertionError(f"{name}: weights of shape {tuple(weights.shape)} for {left} samples")
    return screened
