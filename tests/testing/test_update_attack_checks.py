"""The checks of attacks on federated rounds: who breaks one rule fails the check of that rule, and no other."""

import math
import random
from collections.abc import Callable
from typing import Annotated, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Generator, Tensor

from mithridate.core.registry import settings
from mithridate.core.update_attack import Honest
from mithridate.core.view import Need, View
from mithridate.maths.norms import clip_rows
from mithridate.update_attacks.hostile import zero_sum
from mithridate.update_attacks.noise import NoiseUpdates
from mithridate.update_attacks.sign_flip import SignFlip


class DrawsFromTorch(NoiseUpdates):
    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        return torch.randn_like(honest.own)


class DrawsFromRandom(NoiseUpdates):
    def ready(self, view: View) -> bool:
        return random.random() > 1  # noqa: S311  (the fault)


class WritesToHonestRows(NoiseUpdates):
    every_row: ClassVar[bool] = True

    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        assert honest.rows is not None
        honest.rows.mul_(0.5)
        return super().craft(honest, view, rng)


class WritesToItsOwnSamples(NoiseUpdates):
    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        honest.y.zero_()
        return super().craft(honest, view, rng)


class Sighted(NoiseUpdates):
    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL})


class MovesParameters(Sighted):
    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        next(iter(view.model.parameters.values())).add_(1e-6)
        return super().craft(honest, view, rng)


class LeavesGradients(Sighted):
    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        for parameter in view.model.module.parameters():
            parameter.grad = None
        return super().craft(honest, view, rng)


class LeavesEvalMode(Sighted):
    def craft_trigger(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        view.model.module.eval()
        return super().craft_trigger(honest, view, rng)


class RemembersOnItself(NoiseUpdates):
    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        rounds = getattr(self, "rounds", 0)
        object.__setattr__(self, "rounds", rounds + 1)
        return super().craft(honest, view, rng) / (1 + rounds)


SEEN: list[float] = []


class RemembersInItsModule(NoiseUpdates):
    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        SEEN.append(0.0)
        return super().craft(honest, view, rng) / len(SEEN)


class NotesANumber(NoiseUpdates):
    def after_step(self, view: View, rng: Generator) -> None:
        view.memory["rounds"] = 1  # type: ignore[assignment]  # the fault


class LooksAtMore(NoiseUpdates):
    def after_step(self, view: View, rng: Generator) -> None:
        view.validation.x.mean()


class SendsTooFew(NoiseUpdates):
    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        sent = super().craft(honest, view, rng)
        return sent[:-1] if len(sent) == 4 else sent


class SendsGradients(NoiseUpdates):
    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        return super().craft(honest, view, rng).requires_grad_()


class SendsNothingFinite(NoiseUpdates):
    def craft_trigger(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        return super().craft_trigger(honest, view, rng) / 0


class SendsFloat32(NoiseUpdates):
    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        return super().craft(honest, view, rng).float()


class NeedsTwoClients(NoiseUpdates):
    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        return super().craft(honest, view, rng) + 0 * honest.own[1]


class EndsThePhaseForNobody(NoiseUpdates):
    def ready(self, view: View) -> bool:
        return self.poison_ratio == 0 and view.step > 0


@settings
class Bounded(NoiseUpdates):
    """NoiseUpdates of a bounded length.

    Args:
        radius: Length of a row at most, > 0.

    Source:
        These tests.
    """

    radius: Annotated[float, Field(gt=0)] = math.inf

    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        return clip_rows(super().craft(honest, view, rng), self.radius, "l2")


class IgnoresItsRadius(Bounded):
    def craft_trigger(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        return NoiseUpdates.craft(self, honest, view, rng)


class SendsTooLittleToTell(Bounded):
    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        return super().craft(honest, view, rng) * 1e-6


class HelpsTheServer(SignFlip):
    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        return honest.own + zero_sum(honest.own, 0.1, rng)


class CannotRun(NoiseUpdates):
    def ready(self, view: View) -> bool:
        raise KeyError("no such note")


STATE = {"keeps_state_in_notes", "resumes"}

BROKEN: dict[type, set[str]] = {
    DrawsFromTorch: {"draws_from_no_global_generator"},
    DrawsFromRandom: {"draws_from_no_global_generator"},
    WritesToHonestRows: {"leaves_inputs_alone"},
    WritesToItsOwnSamples: {"leaves_inputs_alone"},
    MovesParameters: {"leaves_the_model_alone"},
    LeavesGradients: {"leaves_gradients_alone"},
    LeavesEvalMode: {"leaves_train_flags_alone"},
    RemembersOnItself: STATE,
    RemembersInItsModule: {*STATE, "repeats"},
    NotesANumber: {"notes_can_be_saved"},
    LooksAtMore: {"declares_needs"},
    SendsTooFew: {"sends_rows"},
    SendsGradients: {"sends_rows"},
    SendsNothingFinite: {"sends_rows"},
    SendsFloat32: {"keeps_dtype"},
    NeedsTwoClients: {"batch_of_one"},
    EndsThePhaseForNobody: {"nobody_hostile"},
    IgnoresItsRadius: {"keeps_to_its_radius"},
    SendsTooLittleToTell: {"keeps_to_its_radius"},
    HelpsTheServer: {"beats_noise"},
    CannotRun: {"runs"},
}


@pytest.mark.parametrize("cls", [NoiseUpdates, SignFlip, Bounded])
def test_what_they_are_made_of_passes(cls: type, failing: Callable[..., set[str]]) -> None:
    assert failing("update_attack", cls) == set()


@pytest.mark.slow
@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_who_breaks_a_rule_fails_its_check_and_no_other(cls: type, failing: Callable[..., set[str]]) -> None:
    assert failing("update_attack", cls) == BROKEN[cls]
