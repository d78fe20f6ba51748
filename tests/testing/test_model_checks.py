"""The checks of models: a model that breaks one rule fails the check of that rule, and no other."""

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from mithridate.core.registry import settings
from mithridate.core.seeding import seeded_default
from mithridate.data.catalogue import DatasetInfo


class Net(nn.Module):
    """One linear layer, and a place for faults."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__()
        self.layer = nn.Linear(64, len(info.classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x.flatten(1))
        return logits


@settings
class Linear:
    """One linear layer.

    Source:
        These tests.
    """

    net: ClassVar[type[Net]] = Net

    def build(self, info: DatasetInfo, *, seed: int) -> nn.Module:
        with seeded_default(seed):
            return self.net(info)


class IgnoresItsSeed(Linear):
    def build(self, info: DatasetInfo, *, seed: int) -> nn.Module:
        return super().build(info, seed=0)


class DrawsFromTorch(Linear):
    def build(self, info: DatasetInfo, *, seed: int) -> nn.Module:
        torch.rand(1)
        return super().build(info, seed=seed)


class SeedsTheGlobalGenerator(Linear):
    def build(self, info: DatasetInfo, *, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self.net(info)


class IsNeverTheSame(Linear):
    built: ClassVar[list[int]] = []

    def build(self, info: DatasetInfo, *, seed: int) -> nn.Module:
        self.built.append(seed)
        return super().build(info, seed=len(self.built))


class ThreeClasses(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :3]


class GivesThreeClasses(Linear):
    net: ClassVar[type[Net]] = ThreeClasses


class Detached(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class HasNoSlope(Linear):
    net: ClassVar[type[Net]] = Detached


class Centred(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class LooksAtTheBatch(Linear):
    net: ClassVar[type[Net]] = Centred


class Noisy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-3 * torch.randn(len(x), 4).to(x)


class IsNoisyInEvalMode(Linear):
    net: ClassVar[type[Net]] = Noisy


class NoisyOfItsOwn(Net):
    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        self.rng = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-3 * torch.randn(len(x), 4, generator=self.rng).to(x)


class HasItsOwnNoise(Linear):
    net: ClassVar[type[Net]] = NoisyOfItsOwn


class Recording(Net):
    seen: Tensor

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return super().forward(x)


class RecordsInEvalMode(Linear):
    net: ClassVar[type[Net]] = Recording


class SinglePrecision(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class AnswersInFloat32(Linear):
    net: ClassVar[type[Net]] = SinglePrecision


class ChangesItsMode(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.layer.train(not self.layer.training)
        return super().forward(x)


class LeavesItsMode(Linear):
    net: ClassVar[type[Net]] = ChangesItsMode


class LargeImages(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, :32, 8:])


class CannotRun(Linear):
    net: ClassVar[type[Net]] = LargeImages


BROKEN: dict[type, set[str]] = {
    IgnoresItsSeed: {"repeats"},
    DrawsFromTorch: {"draws_from_no_global_generator"},
    SeedsTheGlobalGenerator: {"draws_from_no_global_generator"},
    IsNeverTheSame: {"repeats", "keeps_state_in_notes"},
    GivesThreeClasses: {"gives_logits"},
    HasNoSlope: {"gives_logits"},
    LooksAtTheBatch: {"samples_do_not_look_at_each_other"},
    IsNoisyInEvalMode: {"draws_from_no_global_generator", "samples_do_not_look_at_each_other"},
    HasItsOwnNoise: {"repeats", "samples_do_not_look_at_each_other"},
    RecordsInEvalMode: {"leaves_the_model_alone"},
    AnswersInFloat32: {"keeps_dtype"},
    LeavesItsMode: {"leaves_train_flags_alone"},
    CannotRun: {"runs"},
}


def test_what_they_are_made_of_passes(failing: Callable[..., set[str]]) -> None:
    assert failing("model", Linear) == set()


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_who_breaks_a_rule_fails_its_check_and_no_other(cls: type, failing: Callable[..., set[str]]) -> None:
    assert failing("model", cls) == BROKEN[cls]
