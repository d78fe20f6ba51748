"""Sample correction: move received samples back down the loss, inside a ball, before the model learns from them."""

from abc import ABC
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.component import check_classes, check_moves
from mithridate.core.defence import Defence, Screened
from mithridate.core.modes import Precision
from mithridate.core.registry import settings
from mithridate.core.seeding import generator
from mithridate.core.targets import loss_of
from mithridate.core.view import Need, View
from mithridate.maths.ascent import climb
from mithridate.maths.calculus import Slope, input_gradient
from mithridate.maths.directions import Parameters
from mithridate.maths.divergence import divergence
from mithridate.maths.margin import margin
from mithridate.maths.norms import Ball, Norm

CorrectionLoss = Literal["ce", "ce_kl", "kl", "cw"]
"""`ce`: the learner's criterion; `kl`: KL(received answer || now); `ce_kl`: both; `cw`: the margin over the label."""

NUDGE = 0.001
"""Standard deviation, in pixel units, of the Gaussian noise with which a walk along a divergence from a sample's own
answer begins: at the sample itself its gradient is zero. The value of TRADES' Algorithm 1 and MART's released code."""


@settings
class Correcting(Defence, ABC):
    """Reverse PGD: descend the loss of a received sample.

    Args:
        eps: Radius of the ball in which a sample may be moved, >= 0, in pixel units of [0, 1].
        norm: Of the ball: `linf` or `l2`.
        steps: Steps of the correction, K, >= 0; 0 corrects nothing.
        step_size: Length of one step, > 0, in pixel units.
        correction_loss: What is descended. `ce`: the learner's own criterion (cross-entropy). `cw`: the margin of the
            best other class over the label. `kl`: KL(answer to the received sample || answer now), from a start beside
            the sample, since it is least at the sample itself: alone, it holds the answer to what it was. `ce_kl`: `ce`
            plus that divergence over the number of classes, from the sample itself.
        precision: Of the passes that look for a correction: `bfloat16` halves their time on processors that multiply
            in it; what is learned is learned in the loop's own precision.

    Source:
        Zhu et al., ICML 2023, Table 2, and their released code for `ce_kl`, whose KLDivLoss is a mean over samples and
        classes.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL})

    needs_classes: ClassVar[bool] = False
    """Whether it compares targets with the class that the model says."""

    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.2
    norm: Norm = "linf"
    steps: Annotated[int, Field(ge=0)] = 10
    step_size: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.02
    correction_loss: CorrectionLoss = "ce"
    precision: Precision = "float32"

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
        if self.needs_classes or (self.steps > 0 and self.correction_loss != "ce"):
            check_classes(batch, who=type(self).__name__)

    def answers(self, batch: Batch, view: View) -> Tensor | None:
        """Logits of samples as received, without a graph, if what is descended looks at them."""
        if self.correction_loss not in {"kl", "ce_kl"}:
            return None
        return self.says(batch.x, view)

    @torch.no_grad()
    def says(self, x: Tensor, view: View) -> Tensor:
        """Logits of inputs from the current model, in eval mode, without a graph."""
        return view.model.logits(x, precision=self.precision)

    def descended(self, logits: Tensor, y: Tensor, received: Tensor | None, view: View) -> Tensor:
        """What a correction descends, a scalar whose gradient in one sample depends on no other but for a factor.

        Args:
            logits: Of the samples now (n, classes), with a graph.
            y: Labels (n,).
            received: Logits of the same samples as received, without a graph (`answers`).
            view: Shows the model's criterion.
        """
        if self.correction_loss == "cw":
            return margin(logits, y)
        if received is None:
            return loss_of(view.model.criterion, logits, y, where=f"batch given to {view.owner}")
        away = divergence(received, logits, "kl").mean()
        if self.correction_loss == "kl":
            return away
        loss = loss_of(view.model.criterion, logits, y, where=f"batch given to {view.owner}")
        return loss + away / logits.shape[1]

    def correction_gradient(self, batch: Batch, received: Tensor | None, view: View) -> Tensor:
        """Gradient in the inputs of what a correction descends, in eval mode; arguments as in `descended`."""
        box = view.model

        def objective(parameters: Parameters, x: Tensor, y: Tensor) -> Tensor:
            return self.descended(box.logits(x, parameters=parameters, precision=self.precision), y, received, view)

        return input_gradient(objective, box.parameters, *batch).gradient

    def beside(self, x: Tensor, ball: Ball, view: View) -> Tensor:
        """Inputs nudged by noise that depends on the step alone, so that a run repeats and can be resumed."""
        rng = generator("defence", type(self).__name__, view.step)
        noise = torch.randn(x.shape, generator=rng, dtype=x.dtype).to(x.device)
        return view.domain.clamp(x + ball.project(NUDGE * noise))

    def loss_gradient(self, batch: Batch, view: View) -> Tensor:
        """Gradient of the current model's loss in the inputs, in eval mode."""
        with view.model.objective("eval", self.precision) as objective:
            return input_gradient(objective, view.model.parameters, *batch).gradient

    def stepped(self, centre: Tensor, current: Tensor, gradient: Tensor, view: View) -> Tensor:
        """Inputs after one step down a gradient of the loss, inside the ball around `centre` and inside the domain."""
        return climb(
            centre,
            lambda _: Slope(-gradient),
            self.ball,
            into_domain=view.domain.clamp,
            steps=1,
            step_size=self.step_size,
            start=current,
        ).x

    def all_corrected(self, batch: Batch, view: View) -> Screened:
        """The batch, every sample corrected."""
        if self.steps == 0:
            return Screened(batch)
        return Screened(Batch(self.corrected(batch, view), batch.y), torch.ones(batch.size, dtype=torch.bool))

    def corrected(self, batch: Batch, view: View) -> Tensor:
        """Inputs after all steps down the loss of the current model."""
        x = self.beside(batch.x, self.ball, view) if self.correction_loss == "kl" else batch.x
        received = self.answers(batch, view)
        for _ in range(self.steps):
            x = self.stepped(batch.x, x, self.correction_gradient(Batch(x, batch.y), received, view), view)
        return x
