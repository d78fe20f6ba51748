"""What the loop relies on: attacks are held to their budget and their domain, whatever they return."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from mithridate.core.attack import Attack
from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.domain import Domain
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.view import View
from mithridate.maths.norms import Ball, Norm


def rng(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(n: int = 4, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    generator = rng(seed)
    x = torch.rand(n, 3, 4, 4, generator=generator, dtype=dtype)
    return Batch(x, torch.randint(10, (n,), generator=generator))


@dataclass(frozen=True, kw_only=True)
class Scripted(Attack):
    """Does what a test tells it, and counts the calls."""

    do: Callable[[Batch, Tensor], Tensor] = lambda batch, mask: (batch.x + 0.1).clamp(0, 1)
    eps: float = 0.1
    norm: Norm = "linf"
    share: float = 1.0
    calls: list[str] = field(default_factory=list)

    @property
    def ball(self) -> Ball:
        return Ball(self.norm, self.eps)

    @property
    def ratio(self) -> float:
        return self.share

    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        self.calls.append("craft")
        return self.do(batch, mask)


class WithTrigger(Scripted):
    def craft_trigger(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        self.calls.append("trigger")
        return (batch.x - 0.1).clamp(0, 1)


def changed(before: Batch, after: Batch) -> list[int]:
    return [i for i in range(len(before.x)) if not torch.equal(before.x[i], after.x[i])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_poisoned_batch_keeps_its_form(dtype: torch.dtype) -> None:
    batch = batch_of(dtype=dtype)
    before = Batch(batch.x.clone(), batch.y.clone())
    poisoned = Scripted().poison(batch, View(), rng=rng())
    assert torch.equal(poisoned.x, (before.x + 0.1).clamp(0, 1))
    assert poisoned.x.dtype == dtype
    assert not poisoned.x.requires_grad
    assert torch.equal(poisoned.y, before.y)
    assert torch.equal(batch.x, before.x)


def test_the_trigger_has_its_own_craft_and_falls_back_on_the_common_one() -> None:
    batch = batch_of()
    for attack, expected in ((Scripted(), "craft"), (WithTrigger(), "trigger")):
        attack.trigger(batch, View(), rng=rng())
        assert attack.calls == [expected]
    assert torch.equal(WithTrigger().trigger(batch, View(), rng=rng()).x, (batch.x - 0.1).clamp(0, 1))


def push(amount: float) -> Callable[[Batch, Tensor], Tensor]:
    """One pixel of one sample moves away from 1/2 by `amount`, inside [0, 1]."""

    def do(batch: Batch, mask: Tensor) -> Tensor:
        x = batch.x.clone()
        x[1, 0, 0, 0] = 0.5 + amount
        return x

    return do


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("moment", ["poison", "trigger"])
def test_an_attack_that_leaves_its_ball_is_stopped(norm: Norm, moment: str) -> None:
    batch = Batch(torch.full((4, 3, 4, 4), 0.5), torch.zeros(4, dtype=torch.int64))
    getattr(Scripted(do=push(0.0999), norm=norm), moment)(batch, View(), rng=rng())
    with pytest.raises(AssertionError, match=f"Scripted left its {norm} ball of radius 0.1"):
        getattr(Scripted(do=push(0.101), norm=norm), moment)(batch, View(), rng=rng())


def in_place(batch: Batch, mask: Tensor) -> Tensor:
    return batch.x.add_(0.2).clamp_(0, 1)


def relabel(batch: Batch, mask: Tensor) -> Tensor:
    batch.y.zero_()
    return batch.x


def unmask(batch: Batch, mask: Tensor) -> Tensor:
    mask.fill_(True)
    return (batch.x + 0.1).clamp(0, 1)


def test_writing_in_place_does_not_get_round_the_guard() -> None:
    batch = batch_of()
    before = Batch(batch.x.clone(), batch.y.clone())
    with pytest.raises(AssertionError, match="left its linf ball"):
        Scripted(do=in_place).poison(batch, View(), rng=rng())
    assert torch.equal(Scripted(do=relabel).poison(batch, View(), rng=rng()).y, before.y)
    assert len(changed(batch, Scripted(do=unmask, share=0.5).poison(batch, View(), rng=rng()))) == 2
    assert torch.equal(batch.x, before.x)
    assert torch.equal(batch.y, before.y)


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda batch, mask: batch.x.double(), r"torch.float64 \(4, 3, 4, 4\)"),
        (lambda batch, mask: batch.x[:1], r"\(1, 3, 4, 4\) of torch.float32 \(4, 3, 4, 4\)"),
        (lambda batch, mask: batch.x.mean((2, 3), keepdim=True), r"\(4, 3, 1, 1\)"),
    ],
)
def test_another_dtype_or_shape_is_stopped(do: Callable[[Batch, Tensor], Tensor], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        Scripted(do=do).poison(batch_of(), View(), rng=rng())


def test_pixels_outside_the_range_and_bad_input_are_refused() -> None:
    bright = Batch(torch.ones(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match="batch made by Scripted"):
        Scripted(do=lambda batch, mask: batch.x + 0.1).poison(bright, View(), rng=rng())
    attack = Scripted()
    with pytest.raises(DataError, match="batch given to Scripted"):
        attack.poison(Batch(bright.x + 1, bright.y), View(), rng=rng())
    assert attack.calls == []


@pytest.mark.parametrize("nothing", [{"eps": 0.0}, {"share": 0.0}, {"share": 0.01}])
@pytest.mark.parametrize("moment", ["poison", "trigger"])
def test_no_budget_is_the_identity_and_nothing_is_crafted(nothing: dict[str, float], moment: str) -> None:
    batch = batch_of(10)
    attack = WithTrigger(**nothing)  # type: ignore[arg-type]  # numbers, whatever their names
    found = getattr(attack, moment)(batch, View(), rng=rng())
    assert torch.equal(found.x, batch.x)
    assert torch.equal(found.y, batch.y)
    assert attack.calls == []


@settings(deadline=None)
@given(st.integers(1, 30), st.fractions(0, 1, max_denominator=40).map(float), st.integers(0, 1000))
def test_the_ratio_counts_samples_and_their_positions_stay(n: int, share: float, seed: int) -> None:
    attack, view, generator = WithTrigger(share=share), View(), rng(seed)
    first = changed(batch_of(n), attack.poison(batch_of(n), view, rng=generator))
    assert abs(len(first) - share * n) <= 0.5 + 1e-9
    assert changed(batch_of(n, seed=1), attack.poison(batch_of(n, seed=1), view, rng=generator)) == first
    assert changed(batch_of(n, seed=2), attack.trigger(batch_of(n, seed=2), view, rng=generator)) == first
    resumed = View(memory={k: t.clone() for k, t in view.memory.items()})
    assert changed(batch_of(n), attack.poison(batch_of(n), resumed, rng=rng(seed + 1))) == first


def test_positions_are_drawn_by_the_given_generator() -> None:
    batch, attack = batch_of(40), Scripted(share=0.5)
    first, second, again = (changed(batch, attack.poison(batch, View(), rng=rng(s))) for s in (0, 1, 0))
    assert first == again
    assert first != second


def test_an_attack_says_what_it_sees_and_when_it_stops() -> None:
    assert Scripted().needs == frozenset()
    assert Scripted().lookback == 0
    assert Scripted().ready(View()) is False
    assert Scripted().weight_momentum is None
    assert Attack.__abstractmethods__ == {"ball", "ratio", "craft"}


# Inputs that are no images.


def test_the_domain_of_the_view_is_what_is_checked() -> None:
    scores = Batch(3 * torch.randn(6, 5, generator=rng()), torch.zeros(6))
    attack = Scripted(do=lambda batch, mask: batch.x + 0.1)
    with pytest.raises(DataError, match=r"batch given to Scripted: .*outside the domain \[0, 1\]"):
        attack.poison(scores, View(), rng=rng())
    assert torch.equal(attack.poison(scores, View(domain=Domain()), rng=rng()).x, scores.x + 0.1)
    narrow = Domain(low=scores.x.amin(0), high=scores.x.amax(0))
    with pytest.raises(DataError, match="batch made by Scripted"):
        attack.poison(scores, View(domain=narrow), rng=rng())


WORDS: AnyBatch = Batch({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, torch.zeros(2, dtype=torch.int64))


def test_inputs_that_cannot_be_moved_are_refused_before_a_run() -> None:
    with pytest.raises(ConfigError, match="Scripted moves inputs by small amounts and needs one tensor of floats"):
        Scripted().check_inputs(WORDS)
    with pytest.raises(ConfigError, match=r"these inputs are a tensor of torch\.int64"):
        Scripted().check_inputs(Batch(torch.ones(2, 3, dtype=torch.int64), WORDS.y))
    Scripted().check_inputs(batch_of())
    for nothing in (Scripted(eps=0.0), Scripted(share=0.0)):
        nothing.check_inputs(WORDS)
        assert nothing.poison(WORDS, View(), rng=rng()) is WORDS
