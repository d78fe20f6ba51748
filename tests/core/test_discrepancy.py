"""What Memorization Discrepancy measures of models whose outputs are not one class of several."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pytest
import torch
from scipy.stats import entropy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from mithridate.attacks.accumulative import Accumulative
from mithridate.core.batch import Batch
from mithridate.core.component import Component
from mithridate.core.discrepancy import memorization_discrepancy
from mithridate.core.errors import ConfigError
from mithridate.core.model import WhiteBox
from mithridate.core.past import Weights
from mithridate.core.targets import Criterion
from mithridate.core.view import Need
from mithridate.defences.dsc import DSC
from mithridate.defences.trades import Trades
from mithridate.detectors.discrepancy import Discrepancy
from mithridate.training.history import History
from mithridate.training.learner import Learner

BCE = F.binary_cross_entropy_with_logits
X = torch.rand(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = (X[:, :3] > 0.5).double()


def model_of(outputs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def pair(outputs: int) -> tuple[nn.Module, Weights]:
    """A model, and another one that is taken for its past."""
    return model_of(outputs, 1), Weights.of(model_of(outputs, 2))


def of_labels(now: nn.Module, old: Weights) -> Tensor:
    """KL(old || now) of every label that holds or does not, mean over labels, by scipy."""
    then = copy.deepcopy(now)
    then.load_state_dict({**old.parameters})
    p, q = (torch.sigmoid(m(X)).detach().numpy() for m in (then, now))
    return torch.from_numpy(entropy([p, 1 - p], [q, 1 - q]).mean(1))


def owned(logits: Tensor, y: Tensor) -> Tensor:
    return BCE(logits, y)


@pytest.mark.parametrize("criterion", [BCE, nn.BCEWithLogitsLoss(), partial(BCE, pos_weight=torch.ones(3)), owned])
def test_labels_that_may_hold_at_once_are_compared_one_by_one(criterion: Criterion) -> None:
    now, old = pair(3)
    found = memorization_discrepancy(WhiteBox(now, criterion), old, Batch(X, LABELS))
    torch.testing.assert_close(found, of_labels(now, old))


@pytest.mark.parametrize("flat", [False, True])
def test_one_output_that_says_yes_or_no_is_no_class_of_one(flat: bool) -> None:
    now, old = pair(1)
    expected = of_labels(now, old)
    if flat:
        now = nn.Sequential(now, nn.Flatten(0))
        old = Weights({f"0.{name}": p for name, p in old.parameters.items()}, {})
    y = LABELS[:, 0] if flat else LABELS[:, :1]
    found = memorization_discrepancy(WhiteBox(now, BCE), old, Batch(X, y))
    torch.testing.assert_close(found, expected)
    assert float(found.min()) > 0


def test_probabilities_of_classes_are_no_labels() -> None:
    now, old = pair(3)
    numbers, soft = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), LABELS / LABELS.sum(1, keepdim=True).clamp(min=1)
    by_numbers, by_soft = (
        memorization_discrepancy(WhiteBox(now, F.cross_entropy), old, Batch(X, y)) for y in (numbers, soft)
    )
    assert torch.equal(by_numbers, by_soft)


NUMBERS: Mapping[str, tuple[Criterion, Tensor]] = {
    "regression": (F.mse_loss, X[:, :3]),
    "whole numbers": (F.mse_loss, torch.arange(8).unsqueeze(1)),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_are_compared_by_l2_alone(case: str) -> None:
    criterion, y = NUMBERS[case]
    now, old = pair(3)
    box, batch = WhiteBox(now, criterion), Batch(X, y)
    with pytest.raises(ConfigError, match=r'no probabilities.*set divergence = "l2"'):
        memorization_discrepancy(box, old, batch)
    then = copy.deepcopy(now)
    then.load_state_dict({**old.parameters})
    lengths = (then(X) - now(X)).norm(dim=1).detach()
    torch.testing.assert_close(memorization_discrepancy(box, old, batch, kind="l2"), lengths)


def learner_of(criterion: Criterion, outputs: int) -> Learner:
    now, old = pair(outputs)
    return Learner(now, SGD(now.parameters(), lr=0.1), criterion=criterion, history=History(checkpoints={0: old}))


def test_the_detector_and_dsc_look_at_labels() -> None:
    learner = learner_of(BCE, 3)
    assert learner.history is not None
    expected, batch = of_labels(learner.model, learner.history.checkpoint()), Batch(X, LABELS)
    view = replace(learner.view(), granted=frozenset(Need))
    torch.testing.assert_close(-Discrepancy().score(batch, view, {}), expected)
    middle = float(expected.mean())
    screened = DSC(mu=middle, tau=0.0, steps=1, eps=0.1).screen(batch, view)
    assert screened.flagged is not None
    assert torch.equal(screened.flagged, expected > middle)


@pytest.mark.parametrize("component", [Discrepancy(), DSC(), Trades()])
def test_numbers_are_refused_before_a_run(component: Component) -> None:
    with pytest.raises(ConfigError, match=r"numbers outside \[0, 1\]"):
        component.check_inputs(Batch(X, 3 * X))
    component.check_inputs(Batch(X, LABELS))
    component.check_inputs(Batch(X, torch.zeros(8, dtype=torch.int64)))
    if isinstance(component, Discrepancy | DSC):
        replace(component, divergence="l2").check_inputs(Batch(X, 3 * X))


def test_trades_holds_every_label_near_a_sample() -> None:
    learner = learner_of(BCE, 3)
    defence = Trades(steps=0, adv_steps=3, adv_eps=0.2, beta=1.0)
    batch, view = Batch(X, LABELS), replace(learner.view(), granted=frozenset(Need))
    near = defence.up_the_divergence(batch, view)
    penalty = defence.loss(learner.model, batch, BCE, view) - BCE(learner.model(X), LABELS)
    beside = X + 0.2 * torch.randn(X.shape, generator=torch.Generator().manual_seed(1), dtype=X.dtype).sign()
    found, at_random = (divergence_of(learner.model, X, x) for x in (near, beside))
    torch.testing.assert_close(penalty, found)
    assert found.item() > at_random.item()


def divergence_of(model: nn.Module, x: Tensor, near: Tensor) -> Tensor:
    p, q = (torch.sigmoid(model(inputs)) for inputs in (x, near))
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()


def test_who_hides_from_it_needs_one_class_of_several() -> None:
    with pytest.raises(ConfigError, match=r"beta > 0 .*class numbers"):
        Accumulative(beta=1.0).check_inputs(Batch(X, LABELS))
    Accumulative().check_inputs(Batch(X, LABELS))
    Accumulative(beta=1.0).check_inputs(Batch(X, torch.zeros(8, dtype=torch.int64)))
