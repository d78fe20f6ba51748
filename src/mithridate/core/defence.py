"""What stands between a batch, or an update, and the model."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mithridate.core.batch import Batch
from mithridate.core.model import Criterion, Snapshot, Weights
from mithridate.core.update import Gradient
from mithridate.core.view import Need, View

FLAGGED = "flagged"
"""Where a defence that treats samples unlike each other notes, in `screen`, which of them it corrected, dropped or gave
less weight: (n,) bool over the batch that it was given. The learner clears it before every batch. For measurement."""


class Verdict(NamedTuple):
    """A defence's last word on a step.

    Args:
        admit: Keep it; False rolls back parameters, buffers and optimiser state.
        reason: Why, for the trace.
        parameters: Put these in place of the stepped ones (a shorter step, say); None keeps what the step gave.
    """

    admit: bool
    reason: str = ""
    parameters: Mapping[str, Tensor] | None = None


ADMITTED = Verdict(admit=True)


class Defence:
    """Stands between a batch and the model. Override what you use; each moment is the identity otherwise.

    A defence sees what a deployed system sees: the batch as received, its own model and notes, a trusted set if it
    declares one. It never sees which samples are poisoned.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    """What the defence sees besides the batch."""

    neutral: ClassVar[Mapping[str, Any]] = {}
    """Settings under which it changes nothing, bit for bit."""

    active: ClassVar[Mapping[str, Any]] = {}
    """Settings under which it surely acts on a toy stream; equal to `neutral` only for a defence that never acts."""

    notes_only: ClassVar[bool] = False
    """Whether its `screen` and `loss` only take notes and hand on what they are given, so that it may stand before a
    federation, whose server sees no samples."""

    @property
    def observes_loss(self) -> bool:
        """Whether its `loss` is the plain one, noted, so that it may stand beside a defence that changes the loss."""
        return self.notes_only

    @property
    def lookback(self) -> int:
        """How many updates back it looks in the model's history; 0 if only at burn-in checkpoints or not at all."""
        return 0

    def screen(self, batch: Batch, view: View) -> Batch:
        """Before the gradient: drop, weight or correct samples."""
        return batch

    def loss(self, model: nn.Module, batch: Batch, criterion: Criterion, view: View) -> Tensor:
        """The loss that is differentiated, the model being in update mode: weight samples, add a term."""
        return criterion(model(batch.x), batch.y)

    def bound(self, gradient: Gradient, view: View) -> Gradient:
        """Between gradient and step: bound or refuse it, each client's row by itself."""
        return gradient

    def factors(self, lengths: Tensor) -> Tensor | None:
        """What `bound` multiplies rows by, if their l2 lengths are all that it looks at; None if it looks at more.

        With it a server bounds many clients' updates without forming them. Whoever overrides `bound` may leave it.

        Args:
            lengths: (clients,), l2.
        """
        return torch.ones_like(lengths)

    def aggregate(self, gradient: Gradient, view: View) -> Gradient:
        """Of a federated round: all clients' rows to one; the mean by default."""
        return gradient.with_rows(gradient.rows.mean(0, keepdim=True))

    def admit(self, before: Snapshot, view: View) -> Verdict:
        """After the step: commit it, shorten it, or roll it back to `before`."""
        return ADMITTED

    def serve(self, view: View) -> Weights | None:
        """The model that answers queries, where it is another than the one that learns; None if it is that one."""
        return None


def row_factors(defence: Defence, lengths: Tensor) -> Tensor | None:
    """What a defence's `bound` multiplies rows of these l2 lengths by; None if that does not follow from the lengths.

    A class that overrides `bound` and not `factors` is taken at its `bound`, whatever it inherits.
    """
    owner = next(cls for cls in type(defence).__mro__ if "bound" in vars(cls))
    return defence.factors(lengths) if "factors" in vars(owner) else None
