"""A budget in another unit than the inputs': an attack that sees every feature divided by a scale of its own."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Generator, Tensor, nn

from mithridate.core.attack import Attack
from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.domain import Domain
from mithridate.core.model import WhiteBox
from mithridate.core.past import Epoch
from mithridate.core.view import Need, View
from mithridate.maths.norms import Ball


class Rescaled(nn.Module):
    """A model of inputs that were divided by a scale.

    Args:
        model: Of the inputs as they were.
        scale: Shaped like one sample, > 0.
    """

    def __init__(self, model: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: Tensor) -> object:
        """What the model says."""
        return self.model(x * self.get_buffer("scale").to(x.dtype))


@dataclass(frozen=True, eq=False)
class Scaled(Attack):
    """An attack whose ball is measured after every feature is divided by a scale; what it sends is in the old unit.

    Args:
        inner: The attack; its radius is in the new unit.
        scale: Shaped like one sample; where it is 0 a feature is left alone.
    """

    inner: Attack
    scale: Tensor

    def __post_init__(self) -> None:
        for name in ("needs", "power", "control", "weight_momentum"):
            object.__setattr__(self, name, getattr(self.inner, name))

    @cached_property
    def _safe(self) -> Tensor:
        """The scale with 1 where it is 0."""
        return torch.where(self.scale > 0, self.scale, 1.0)

    @property
    def ball(self) -> Ball:
        """The inner attack's."""
        return self.inner.ball

    @property
    def ratio(self) -> float:
        """The inner attack's."""
        return self.inner.ratio

    @property
    def lookback(self) -> int:
        """The inner attack's."""
        return self.inner.lookback

    @property
    def old_epochs(self) -> frozenset[Epoch | None]:
        """The inner attack's."""
        return self.inner.old_epochs

    def ready(self, view: View) -> bool:
        """When the inner attack is."""
        return self.inner.ready(self._inside(view))

    def after_step(self, view: View, rng: Generator) -> None:
        """The inner attack adapts."""
        self.inner.after_step(self._inside(view), rng)

    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        """The inputs that the inner attack sends."""
        x: Tensor = self.poison(batch, view, rng=rng).x
        return x

    def poison(self, batch: AnyBatch, view: View, *, rng: Generator) -> AnyBatch:
        """What the inner attack makes of the batch, in the old unit."""
        return self._sent(self.inner.poison, batch, view, rng)

    def trigger(self, batch: AnyBatch, view: View, *, rng: Generator) -> AnyBatch:
        """What the inner attack makes of the trigger, in the old unit."""
        return self._sent(self.inner.trigger, batch, view, rng)

    def _sent(self, act: Callable[..., AnyBatch], batch: AnyBatch, view: View, rng: Generator) -> AnyBatch:
        scaled = self._divided(batch)
        sent = act(scaled, self._inside(view), rng=rng)
        moved = sent.x != scaled.x
        fixed = self.scale.to(batch.x.device) == 0
        x = torch.where(moved & ~fixed, sent.x * self._safe.to(batch.x), batch.x)
        return Batch(view.domain.clamp(x), sent.y)

    def _divided(self, batch: AnyBatch) -> AnyBatch:
        return Batch(batch.x / self._safe.to(batch.x), batch.y)

    def _inside(self, view: View) -> View:
        """The same, in the new unit."""
        available = dict(view.available)
        for need in (Need.VALIDATION, Need.TRIGGER):
            if need in available:
                available[need] = self._divided(available[need])
        if Need.MODEL in available:
            box: WhiteBox = available[Need.MODEL]
            twin = Rescaled(box.module, self._safe.to(next(box.module.parameters())))
            twin.training = box.module.training  # not `train`, which sets the flags of the model inside
            available[Need.MODEL] = WhiteBox(twin, box.criterion)
        low, high = (
            bound
            if not isinstance(bound, Tensor) and bound in (-torch.inf, torch.inf)
            else torch.as_tensor(bound) / self._safe
            for bound in view.domain
        )
        return replace(view, available=available, domain=Domain(low, high))
