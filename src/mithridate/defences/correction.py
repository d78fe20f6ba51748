"""Sample correction: move received samples back down the loss, inside a ball, before the model learns from them."""

from abc import ABC
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.component import check_classes, check_moves
from mithridate.core.defence import Defence, Screened
from mithridate.core.registry import settings
from mithridate.core.view import Need, View
from mithridate.maths.ascent import climb
from mithridate.maths.calculus import input_gradient
from mithridate.maths.norms import Ball, Norm


@settings
class Correcting(Defence, ABC):
    """Reverse PGD: descend the cross-entropy of a received sample.

    Args:
        eps: Radius of the ball in which a sample may be moved, in pixel units of [0, 1].
        norm: Of the ball: `linf` or `l2`.
        steps: Steps of the correction, K; 0 corrects nothing.
        step_size: Length of one step, in pixel units.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL})

    needs_classes: ClassVar[bool] = False
    """Whether it compares targets with the class that the model says."""

    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.2
    norm: Norm = "linf"
    steps: Annotated[int, Field(ge=0)] = 10
    step_size: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.02

    @property
    def ball(self) -> Ball:
        """Where a sample may be moved."""
        return Ball(self.norm, self.eps)

    def check_inputs(self, batch: AnyBatch) -> None:
        """Refuse inputs that cannot be moved, and targets that are no class numbers where these are looked at.

        Raises:
            ConfigError: They are not one tensor of floats, or not one int64 a sample.
        """
        if self.steps > 0:
            check_moves(batch, who=type(self).__name__)
        if self.needs_classes:
            check_classes(batch, who=type(self).__name__)

    def loss_gradient(self, batch: Batch, view: View) -> Tensor:
        """Gradient of the current model's loss in the inputs, in eval mode."""
        with view.model.objective("eval") as objective:
            return input_gradient(objective, view.model.parameters, *batch)

    def stepped(self, centre: Tensor, current: Tensor, gradient: Tensor, view: View) -> Tensor:
        """Inputs after one step down a gradient of the loss, inside the ball around `centre` and inside the domain."""
        return climb(
            centre,
            lambda _: -gradient,
            self.ball,
            into_domain=view.domain.clamp,
            steps=1,
            step_size=self.step_size,
            start=current,
        )

    def all_corrected(self, batch: Batch, view: View) -> Screened:
        """The batch, every sample corrected."""
        if self.steps == 0:
            return Screened(batch)
        return Screened(Batch(self.corrected(batch, view), batch.y), torch.ones(batch.size, dtype=torch.bool))

    def corrected(self, batch: Batch, view: View) -> Tensor:
        """Inputs after all steps down the loss of the current model."""
        x = batch.x
        for _ in range(self.steps):
            x = self.stepped(batch.x, x, self.loss_gradient(Batch(x, batch.y), view), view)
        return x
