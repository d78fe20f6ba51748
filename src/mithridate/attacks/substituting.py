"""Attacks that move no input within a ball: they send other labels, or other samples, in places of a batch."""

from abc import ABC, abstractmethod

import torch
from torch import Generator, Tensor

from mithridate.attacks.budget import Share
from mithridate.core.attack import Attack
from mithridate.core.batch import AnyBatch, Batch, check_batch, tensors_of
from mithridate.core.registry import settings
from mithridate.core.view import View
from mithridate.maths.norms import Ball, by_row


@settings
class Substituting(Attack, ABC):
    """What attacks have in common that replace labels or whole samples; they need no gradient in the inputs.

    Args:
        poison_ratio: Share of each batch that is replaced, in [0, 1]; the positions are the same in every batch, the
            trigger included.
        phase: True: every batch of the accumulative phase is treated like the trigger; False: the trigger batch alone.
    """

    poison_ratio: Share = 1.0
    phase: bool = True

    @property
    def ball(self) -> Ball:
        """Radius zero: what is moved is not what it is about."""
        return Ball("linf", 0.0)

    @property
    def ratio(self) -> float:
        """Share of each batch that is replaced."""
        return self.poison_ratio

    def ready(self, view: View) -> bool:
        """At once when there is no phase."""
        return not self.phase

    @abstractmethod
    def substitute(self, batch: AnyBatch, view: View, mask: Tensor, rng: Generator) -> AnyBatch:
        """A batch of the same size and kind; what it holds outside the mask is not used.

        Args:
            batch: The clean batch.
            view: What the attack declared.
            mask: (n,) bool, the samples that may be replaced.
            rng: The only source of randomness.
        """

    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        """The inputs alone of what is sent."""
        return self.substitute(batch, view, mask, rng).x  # type: ignore[no-any-return]  # of the batch's own kind

    def poison(self, batch: AnyBatch, view: View, *, rng: Generator) -> AnyBatch:
        """One batch, of which the masked samples are replaced.

        Raises:
            AssertionError: The attack made a batch of another kind; a defect in it.
        """
        mask = self.positions(batch.size, view, rng)
        if not bool(mask.any()):
            return batch
        copy = batch.clone().with_class_numbers()
        sent = self.substitute(copy, view, mask.clone(), rng)
        name = type(self).__name__
        check_batch(sent, where=f"batch made by {name}")
        sent = Batch(sent.x, sent.y.to(batch.y.dtype))
        pairs = list(zip(_tensors(batch), _tensors(sent), strict=True))
        if any((a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device) for a, b in pairs):
            raise AssertionError(f"{name} made a batch of another shape, type or device")
        replaced = iter([torch.where(by_row(mask.to(a.device), a), b.detach(), a) for a, b in pairs])
        return batch.each(lambda _: next(replaced))

    def trigger(self, batch: AnyBatch, view: View, *, rng: Generator) -> AnyBatch:
        """The trigger batch, treated as any other."""
        return self.poison(batch, view, rng=rng)


def _tensors(batch: AnyBatch) -> list[Tensor]:
    return [*tensors_of(batch.x), batch.y]
