"""The checks of attacks: an attack that breaks one rule fails the check of that rule, and no other."""

import random
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from mithridate.attacks.label_flip import WrongLabels
from mithridate.attacks.noise import Noise
from mithridate.attacks.pgd import PGD
from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.view import Need, View


class LeavesTheBall(Noise):
    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        return view.domain.clamp(batch.x + 3 * (super().craft(batch, view, mask, rng) - batch.x))


class LeavesTheBallUnseen(Noise):
    def poison(self, batch: AnyBatch, view: View, *, rng: Generator) -> AnyBatch:
        sent = super().poison(batch, view, rng=rng)
        return Batch(view.domain.clamp(batch.x + 3 * (sent.x - batch.x)), sent.y)


class LeavesTheDomain(Noise):
    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        return batch.x + self.ball.project(self.eps * torch.randn(batch.x.shape, generator=rng).to(batch.x))


class LeavesTheDomainUnseen(Noise):
    def poison(self, batch: AnyBatch, view: View, *, rng: Generator) -> AnyBatch:
        return Batch(batch.x + self.ball.project(2 * (super().poison(batch, view, rng=rng).x - batch.x)), batch.y)


class TakesAllForPixels(Noise):
    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        return super().craft(batch, view, mask, rng).clamp(0, 1)


class ChangesLabels(Noise):
    def poison(self, batch: AnyBatch, view: View, *, rng: Generator) -> AnyBatch:
        return super().poison(batch, view, rng=rng)._replace(y=batch.y.flip(0))


class MovesInputsWithTheLabels(WrongLabels):
    def substitute(self, batch: AnyBatch, view: View, mask: Tensor, rng: Generator) -> AnyBatch:
        other = batch.take(torch.arange(batch.size).roll(1))
        return super().substitute(batch, view, mask, rng)._replace(x=other.x)


class TurnsNoLabel(WrongLabels):
    def substitute(self, batch: AnyBatch, view: View, mask: Tensor, rng: Generator) -> AnyBatch:
        return batch


class WritesToItsBatch(Noise):
    def poison(self, batch: AnyBatch, view: View, *, rng: Generator) -> AnyBatch:
        sent = super().poison(batch, view, rng=rng)
        batch.x.copy_(sent.x)
        return sent


class WritesToValidation(Noise):
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VALIDATION})

    def after_step(self, view: View, rng: Generator) -> None:
        view.validation.y.zero_()


class WritesToTheTrigger(Noise):
    needs: ClassVar[frozenset[Need]] = frozenset({Need.TRIGGER})

    def ready(self, view: View) -> bool:
        view.clean_trigger.x.mul_(0.5)
        return False


class DrawsFromTorch(Noise):
    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        return view.domain.clamp(batch.x + self.eps * self.ball.direction(torch.randn_like(batch.x)))


class DrawsFromNumpy(Noise):
    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        drawn = torch.from_numpy(np.random.standard_normal(batch.x.shape)).to(batch.x)  # noqa: NPY002  (the fault)
        return view.domain.clamp(batch.x + self.eps * self.ball.direction(drawn))


class DrawsFromRandom(Noise):
    def after_step(self, view: View, rng: Generator) -> None:
        view.memory["drawn"] = torch.tensor(random.random())  # noqa: S311  (the fault)


class RemembersOnItself(Noise):
    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        batches = getattr(self, "batches", 0)
        object.__setattr__(self, "batches", batches + 1)
        return torch.lerp(batch.x, super().craft(batch, view, mask, rng), 1 / (1 + batches))


class RemembersOnItsClass(Noise):
    seen: ClassVar[list[float]] = []

    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        self.seen.append(0.0)
        return torch.lerp(batch.x, super().craft(batch, view, mask, rng), 1 / len(self.seen))


SEEN: list[float] = []


class RemembersInItsModule(Noise):
    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        SEEN.append(0.0)
        return torch.lerp(batch.x, super().craft(batch, view, mask, rng), 1 / len(SEEN))


class LooksAtMore(Noise):
    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        view.validation.x.mean()
        return super().craft(batch, view, mask, rng)


class NotesANumber(Noise):
    def after_step(self, view: View, rng: Generator) -> None:
        view.memory["batches"] = 1  # type: ignore[assignment]  # the fault


class NotesAGradient(Noise):
    def after_step(self, view: View, rng: Generator) -> None:
        view.memory["pixels"] = torch.zeros(3, requires_grad=True)


class Sighted(Noise):
    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL})


class MovesParameters(Sighted):
    def after_step(self, view: View, rng: Generator) -> None:
        next(iter(view.model.parameters.values())).add_(1e-6)


class RecordsStatistics(Sighted):
    def after_step(self, view: View, rng: Generator) -> None:
        for buffer in view.model.module.buffers():
            buffer.add_(1)


class LeavesGradients(Sighted):
    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        torch.autograd.backward(view.model.criterion(view.model.logits(batch.x, parameters={}), batch.y))
        return super().craft(batch, view, mask, rng)


class LeavesEvalMode(Sighted):
    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        view.model.module.eval()
        return super().craft(batch, view, mask, rng)


class LeavesTrainMode(Sighted):
    def ready(self, view: View) -> bool:
        view.model.module.train()
        return False


class RoundsPixels(Noise):
    def poison(self, batch: AnyBatch, view: View, *, rng: Generator) -> AnyBatch:
        sent = super().poison(batch, view, rng=rng)
        return Batch((sent.x * 1e5).round() / 1e5, sent.y)


class MakesFloat32(Noise):
    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        return super().craft(batch, view, mask, rng).float()


class NeedsTwoSamples(Noise):
    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        assert batch.x[1].isfinite().all()
        return super().craft(batch, view, mask, rng)


class NoNumberOfOneSample(Noise):
    def poison(self, batch: AnyBatch, view: View, *, rng: Generator) -> AnyBatch:
        sent = super().poison(batch, view, rng=rng)
        return Batch(sent.x + 0 * sent.x.std(0), sent.y) if self.eps and self.poison_ratio == 1 else sent


class MovesAbout(Noise):
    def positions(self, n: int, view: View, rng: Generator) -> Tensor:
        return torch.randperm(n, generator=rng) < int(self.ratio * n + 0.5)


class HelpsTheVictim(PGD):
    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        return view.domain.clamp(2 * batch.x - super().craft(batch, view, mask, rng))


class DoesNothing(PGD):
    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        return batch.x


class TakesAnything(Noise):
    def check_inputs(self, batch: AnyBatch) -> None:
        pass


class CannotRun(Noise):
    def ready(self, view: View) -> bool:
        raise KeyError("no such note")


STATE = {"keeps_state_in_notes", "resumes"}

BROKEN: dict[type, set[str]] = {
    LeavesTheBall: {"stays_in_the_ball"},
    LeavesTheBallUnseen: {"stays_in_the_ball"},
    LeavesTheDomain: {"stays_in_the_domain"},
    LeavesTheDomainUnseen: {"stays_in_the_domain"},
    TakesAllForPixels: {"stays_in_the_domain"},
    ChangesLabels: {"keeps_labels"},
    MovesInputsWithTheLabels: {"keeps_labels", "stays_in_the_ball"},
    TurnsNoLabel: {"uses_its_budget", "beats_noise"},
    WritesToItsBatch: {"leaves_inputs_alone"},
    WritesToValidation: {"leaves_inputs_alone"},
    WritesToTheTrigger: {"leaves_inputs_alone", "resumes"},
    DrawsFromTorch: {"draws_from_no_global_generator"},
    DrawsFromNumpy: {"draws_from_no_global_generator"},
    DrawsFromRandom: {"draws_from_no_global_generator"},
    RemembersOnItself: STATE,
    RemembersOnItsClass: {*STATE, "repeats"},
    RemembersInItsModule: {*STATE, "repeats"},
    LooksAtMore: {"declares_needs"},
    NotesANumber: {"notes_can_be_saved"},
    NotesAGradient: {"notes_can_be_saved"},
    MovesParameters: {"leaves_the_model_alone"},
    RecordsStatistics: {"leaves_the_model_alone"},
    LeavesGradients: {"leaves_gradients_alone"},
    LeavesEvalMode: {"leaves_train_flags_alone"},
    LeavesTrainMode: {"leaves_train_flags_alone"},
    RoundsPixels: {"zero_budget", "zero_ratio", "half_a_batch"},
    MakesFloat32: {"keeps_dtype"},
    NeedsTwoSamples: {"batch_of_one"},
    NoNumberOfOneSample: {"batch_of_one"},
    MovesAbout: {"half_a_batch"},
    HelpsTheVictim: {"beats_noise"},
    DoesNothing: {"uses_its_budget", "beats_noise"},
    TakesAnything: {"says_which_inputs_it_takes"},
    CannotRun: {"runs"},
}


@pytest.mark.slow  # both are registered, and pass in test_components
@pytest.mark.parametrize("cls", [Noise, PGD])
def test_what_they_are_made_of_passes(cls: type, failing: Callable[..., set[str]]) -> None:
    assert failing("attack", cls) == set()


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_who_breaks_a_rule_fails_its_check_and_no_other(cls: type, failing: Callable[..., set[str]]) -> None:
    assert failing("attack", cls) == BROKEN[cls]
