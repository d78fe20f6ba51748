"""Each simple attack on a round against numpy."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import norm as normal
from torch import Tensor

from mithridate.core.errors import ConfigError, DataError
from mithridate.core.model import WhiteBox
from mithridate.core.registry import build
from mithridate.core.update_attack import Honest, UpdateAttack
from mithridate.core.view import Need, View
from mithridate.data.shards import Shards
from mithridate.simulation.clients import FederatedRun, federate
from mithridate.simulation.federated import run_federated
from mithridate.simulation.per_client.gradients import client_gradients
from mithridate.testing import toy_learner, toy_stream
from mithridate.update_attacks.alie import LARGEST_SHARE, largest_z
from mithridate.update_attacks.label_flip import LabelFlip
from mithridate.update_attacks.min_max import MinMax


def round_of(rows: Tensor, hostile: int) -> Honest:
    own, honest = rows[:hostile], rows[hostile:]
    nothing = torch.zeros(hostile, 1, 1, 1, 1), torch.zeros(hostile, 1, dtype=torch.int64)
    return Honest(honest.sum(0), honest.sum(0), len(honest), *nothing, honest, lambda x, y: own)


def rows_of(seed: int = 0, n: int = 10, width: int = 6, scale: float = 1.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return scale * (torch.randn(n, width, generator=rng, dtype=torch.float64) + 0.5)


def sent_by(attack: dict[str, Any], honest: Honest, seed: int = 0) -> NDArray[np.float64]:
    made: UpdateAttack = build("update_attack", attack)
    rows: NDArray[np.float64] = made.craft(honest, View(), torch.Generator().manual_seed(seed)).numpy()
    return rows


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_sign_flip(scale: float) -> None:
    rows = rows_of()
    assert np.array_equal(sent_by({"name": "sign_flip", "scale": scale}, round_of(rows, 3)), -scale * rows[:3].numpy())


@pytest.mark.parametrize("scale", [0.1, 4.0])
def test_ipm(scale: float) -> None:
    rows = rows_of()
    expected = np.tile(-scale * rows[3:].numpy().mean(0), (3, 1))
    sent = sent_by({"name": "ipm", "scale": scale}, round_of(rows, 3))
    assert np.allclose(sent, expected, atol=1e-12)
    assert not sent_by({"name": "ipm"}, round_of(rows, 10)).any()  # nobody's mean to turn


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_noise_is_as_long_as_it_says_and_points_anywhere(scale: float) -> None:
    rows = rows_of(seed=7, width=3000)
    sent = sent_by({"name": "noise", "scale": scale}, round_of(rows, 3))
    lengths = np.linalg.norm(rows[:3].numpy(), axis=1)
    assert np.allclose(np.linalg.norm(sent, axis=1), scale * lengths)
    cosines = np.corrcoef(np.vstack([sent, rows[:3].numpy()]))
    assert np.abs(cosines[~np.eye(6, dtype=bool)]).max() < 0.1
    assert np.array_equal(sent, sent_by({"name": "noise", "scale": scale}, round_of(rows, 3)))
    assert not np.array_equal(sent, sent_by({"name": "noise", "scale": scale}, round_of(rows, 3), seed=1))


def test_noise_as_long_as_nothing_is_nothing() -> None:
    assert not sent_by({"name": "noise"}, round_of(torch.zeros(4, 6), 2)).any()


# A little is enough.


def test_alie_sends_the_mean_less_some_deviations() -> None:
    rows = rows_of()
    honest = rows[3:].numpy()
    expected = honest.mean(0) - 1.5 * honest.std(0)
    assert np.allclose(sent_by({"name": "alie", "z": 1.5}, round_of(rows, 3)), np.tile(expected, (3, 1)))
    z = normal.ppf((10 - 3 - 3) / (10 - 3))  # 10 // 2 + 1 - 3 = 3 supporters
    expected = honest.mean(0) - z * honest.std(0)
    assert np.allclose(sent_by({"name": "alie"}, round_of(rows, 3)), np.tile(expected, (3, 1)))


@pytest.mark.parametrize("clients", [10, 25, 50, 51])
def test_alies_z_is_the_papers_formula(clients: int) -> None:
    for hostile in range(1, (clients + 1) // 2):
        supporters = math.floor(clients / 2 + 1) - hostile
        share = (clients - hostile - supporters) / (clients - hostile)
        if share > 0.5:
            assert largest_z(clients, hostile) == pytest.approx(normal.ppf(share))
        else:
            assert largest_z(clients, hostile) == 0
    found = [largest_z(clients, hostile) for hostile in range(1, clients)]
    assert found == sorted(found)  # more allies, further out
    assert found[-1] == normal.ppf(LARGEST_SHARE)


def test_alies_row_is_within_the_honest_ones_where_it_says() -> None:
    """As many honest rows as the formula counts on lie further out than the hostile row, entry by entry."""
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(1000, 40, generator=rng, dtype=torch.float64)
    hostile = 300
    row = sent_by({"name": "alie"}, round_of(rows, hostile))[0]
    further = (rows[hostile:].numpy() < row).mean(0)
    supporters = 1000 // 2 + 1 - hostile
    assert further.mean() == pytest.approx(supporters / (1000 - hostile), abs=0.02)


# Min-max.


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("direction", ["unit", "std", "sign"])
def test_min_max_goes_as_far_as_honest_rows_are_from_each_other_and_no_further(direction: str, scale: float) -> None:
    rows = rows_of(scale=scale)
    honest = rows[4:].numpy()
    sent = sent_by({"name": "min_max", "direction": direction}, round_of(rows, 4))
    limit = max(np.linalg.norm(a - b) for a in honest for b in honest)
    reach = np.linalg.norm(honest - sent[0], axis=1).max()
    assert reach <= limit * (1 + 1e-9)
    assert reach == pytest.approx(limit, rel=1e-6)  # tight
    mean = honest.mean(0)
    against = {"unit": -mean, "std": -honest.std(0), "sign": -np.sign(mean)}[direction]
    moved = sent[0] - mean
    assert moved @ against == pytest.approx(np.linalg.norm(moved) * np.linalg.norm(against))
    assert (sent == sent[0]).all()


def test_min_max_among_rows_that_hardly_differ() -> None:
    """In float32, with distances a ten-thousandth of the lengths, the bound still holds."""
    rng = torch.Generator().manual_seed(0)
    rows = (1 + 1e-4 * torch.randn(60, 50, generator=rng)).float()
    sent = MinMax().craft(round_of(rows, 10), View(), rng).double().numpy()
    honest = rows[10:].double().numpy()
    limit = max(np.linalg.norm(a - b) for a in honest for b in honest)
    assert np.linalg.norm(honest - sent[0], axis=1).max() == pytest.approx(limit, rel=1e-3)


@pytest.mark.parametrize("direction", ["unit", "std", "sign"])
def test_min_max_has_nowhere_to_go_among_equal_rows(direction: str) -> None:
    same = torch.ones(5, 6, dtype=torch.float64)
    assert np.allclose(sent_by({"name": "min_max", "direction": direction}, round_of(same, 2)), 1, atol=1e-12)
    one = rows_of(n=3)
    assert np.allclose(sent_by({"name": "min_max", "direction": direction}, round_of(one, 2)), one[2], atol=1e-12)
    zero = torch.zeros(5, 6, dtype=torch.float64)
    assert not sent_by({"name": "min_max", "direction": direction}, round_of(zero, 2)).any()


@pytest.mark.parametrize("name", ["alie", "min_max"])
def test_who_hides_among_honest_rows_needs_some(name: str) -> None:
    attack: UpdateAttack = build("update_attack", {"name": name})
    assert attack.every_row
    rows = rows_of()
    for honest in (round_of(rows, 10), replace(round_of(rows, 3), rows=None)):
        with pytest.raises(DataError, match="there is none to look at"):
            attack.craft(honest, View(), torch.Generator())


# Turned labels.


@pytest.mark.parametrize("shift", [1, 3, 5])
def test_label_flip_is_the_gradient_of_shifted_labels(shift: int) -> None:
    stream = toy_stream(0)
    learner = toy_learner(stream)
    _, data = federate(stream, Shards(clients=5), seed=0).round(0, FederatedRun())
    rows = torch.zeros(5, sum(p.numel() for p in learner.model.parameters()))
    honest = replace(
        round_of(rows, 2),
        x=data.x[:2],
        y=data.y[:2],
        gradients=lambda x, y: client_gradients(learner.model, F.cross_entropy, x, y),
    )
    view = View(0, {}, {Need.MODEL: WhiteBox(learner.model, F.cross_entropy)}, LabelFlip.needs)
    sent = LabelFlip(shift=shift, scale=2.0).craft(honest, view, torch.Generator())
    learner.model.eval()
    for i in range(2):
        loss = F.cross_entropy(learner.model(data.x[i]), (data.y[i] + shift) % 4)
        g = torch.cat([t.flatten() for t in torch.autograd.grad(loss, list(learner.model.parameters()))])
        assert torch.allclose(sent[i], 2 * g, atol=1e-5)


def test_a_shift_that_flips_nothing_is_refused() -> None:
    stream = toy_stream(0)
    federation = federate(stream, Shards(clients=5), seed=0)
    with pytest.raises(ConfigError, match="shift = 8 leaves every label of 4 classes as it is"):
        run_federated(toy_learner(stream), federation, LabelFlip(shift=8), FederatedRun(rounds=1))


def test_flipped_labels_teach_the_wrong_classes() -> None:
    """With every client hostile, the model learns the shifted labels."""
    stream = toy_stream(0)
    learner = toy_learner(stream)
    run_federated(
        learner, federate(stream, Shards(clients=10), seed=0), LabelFlip(poison_ratio=1.0), FederatedRun(rounds=50)
    )
    x, y = stream.test.all()
    learner.model.eval()
    answers = learner.model(x).argmax(1)
    assert float((answers == (y + 1) % 4).float().mean()) > 0.6
    assert float((answers == y).float().mean()) < 0.2


# The control.


@pytest.mark.parametrize("ratio", [0.0, 0.7])
def test_nobody_is_hostile_in_the_control(ratio: float) -> None:
    clean: UpdateAttack = build("update_attack", {"name": "clean", "poison_ratio": ratio})
    assert clean.ratio == 0
    stream = toy_stream(0)
    outcome = run_federated(
        toy_learner(stream), federate(stream, Shards(clients=5), seed=0), clean, FederatedRun(rounds=1)
    )
    assert [row["poisoned"] for row in outcome.trace] == [0, 0, 0]


@pytest.mark.parametrize("name", ["accumulative", "alie", "direct", "ipm", "label_flip", "noise", "sign_flip", "clean"])
@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_more_hostile_clients_than_there_are_cannot_be_asked_for(name: str, ratio: float) -> None:
    with pytest.raises(ConfigError, match="poison_ratio"):
        build("update_attack", {"name": name, "poison_ratio": ratio})
