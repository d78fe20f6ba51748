"""A defence that does nothing is the identity; what one lets through is held to what it promises."""

from typing import Literal, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.defence import (
    ADMITTED,
    Calibration,
    Defence,
    Screened,
    Verdict,
    checked,
    overrides,
)
from mithridate.core.errors import ConfigError
from mithridate.core.past import Weights
from mithridate.core.updates import Updates
from mithridate.core.view import View

MOMENTS = ("begin", "screen", "loss", "bound", "admit", "committed", "serve")


def batch_of(n: int = 4) -> Batch:
    x = torch.rand(n, 3, generator=torch.Generator().manual_seed(0))
    return Batch(x, torch.arange(n) % 2)


def test_a_defence_that_overrides_nothing_is_the_identity() -> None:
    batch, updates = batch_of(), Updates.of({"w": torch.ones(2)})
    view = View(granted=frozenset())
    defence = Defence()
    defence.begin(view)
    screened = defence.screen(batch, view)
    assert screened.batch is batch
    assert (screened.flagged, screened.weights) == (None, None)
    assert defence.bound(updates, view) is updates
    verdict = defence.admit(Weights({}, {}), view)
    assert verdict == ADMITTED == Verdict(admit=True, reason="", parameters=None)
    defence.committed(view)
    assert defence.serve(view) is None
    assert Defence.needs == frozenset()
    assert view.memory == {}
    assert not any(overrides(defence, moment) for moment in MOMENTS)


def test_its_loss_is_the_criterion_of_the_models_answer() -> None:
    model, batch = nn.Linear(3, 2), batch_of()
    loss = Defence().loss(model, batch, F.cross_entropy, View())
    assert torch.equal(loss, F.cross_entropy(model(batch.x), batch.y))


class Learning(Defence):
    def loss(self, model: nn.Module, batch: AnyBatch, criterion: object, view: View) -> Tensor:
        return torch.zeros(())


class Inheriting(Learning):
    def bound(self, updates: Updates, view: View) -> Updates:
        return updates


def test_a_moment_counts_wherever_in_the_line_it_was_written() -> None:
    assert [moment for moment in MOMENTS if overrides(Inheriting(), moment)] == ["loss", "bound"]


class Server(NamedTuple):
    bound: Literal["after", "before"] = "after"
    distances: Literal["all", "without_norm"] = "all"


def test_what_acts_on_samples_is_refused_in_a_federation() -> None:
    class Screening(Defence):
        def screen(self, batch: AnyBatch, view: View) -> Screened:
            return Screened(batch)

    Defence().check_federation(Server(), 10)
    for defence in (Screening(), Learning()):
        with pytest.raises(ConfigError, match=f"^{type(defence).__name__} acts on training samples"):
            defence.check_federation(Server(), 10)


# What a screen may give.

FLAGS = torch.tensor([False, True, False, True])


def test_a_screen_keeps_what_it_does_not_flag() -> None:
    batch = batch_of()
    for good in (
        Screened(batch),
        Screened(batch, FLAGS),  # corrected
        Screened(batch.take(~FLAGS), FLAGS),
        Screened(batch.take(slice(3)), FLAGS),  # the second was corrected, the last one dropped
        Screened(batch.take(slice(0)), torch.ones(4, dtype=torch.bool)),
        Screened(batch, FLAGS, torch.tensor([1.0, 0.5, 1.0, 0.0])),
        Screened(batch.take(~FLAGS), FLAGS, torch.ones(2)),
    ):
        assert checked(Defence(), batch, good) is good


@pytest.mark.parametrize(
    ("screened", "message"),
    [
        (Screened(batch_of(3)), "left 3 of 4 samples, and did not flag those"),
        (Screened(batch_of(1), FLAGS), "left 1 of 4 samples, and did not flag those"),
        (Screened(batch_of(5)), "left 5 of 4"),
        (Screened(batch_of(), FLAGS[:3]), r"flags of shape \(3,\) for 4 samples"),
        (Screened(batch_of(), FLAGS.float()), r"flags of shape \(4,\)"),
        (Screened(batch_of().take(~FLAGS), FLAGS, torch.ones(4)), r"weights of shape \(4,\) for 2 samples"),
        (Screened(batch_of(), None, torch.ones(4, 1)), r"weights of shape \(4, 1\) for 4 samples"),
    ],
)
def test_a_screen_that_breaks_its_word_is_a_defect(screened: Screened, message: str) -> None:
    class Own(Defence):
        pass

    with pytest.raises(AssertionError, match=f"^Own.*{message}"):
        checked(Own(), batch_of(), screened)


# What was measured.


def test_a_defence_that_measures_nothing_comes_back_as_it_is() -> None:
    def never(score: object) -> tuple[Tensor, Tensor]:
        raise AssertionError("nobody rehearses")

    defence = Defence()
    assert defence.calibrated(never) == (defence, ())


def test_a_calibration_is_plain_numbers_in_the_store() -> None:
    made = Calibration({"mu": 0.5, "tau": 0.01}, 0.05, (0.02, 0.1), 120)
    assert made.summary() == {"mu": 0.5, "tau": 0.01, "rate": 0.05, "interval": [0.02, 0.1], "samples": 120}
