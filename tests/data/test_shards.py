"""Clients of a federation: who owns which image, and who takes part in a round."""

import numpy as np
import pytest
from numpy.typing import NDArray

from mithridate.core.errors import ConfigError, DataError
from mithridate.core.registry import make
from mithridate.data.shards import Shards, divide, sampled
from mithridate.data.stream import Part
from mithridate.testing import toy_stream

PARTITIONS = ("iid", "dirichlet", "one")


def part_of(n: int, classes: int = 5) -> Part:
    return Part("victim", np.zeros((n, 1, 2, 2), np.uint8), np.arange(n, dtype=np.int64) % classes)


def largest_class_share(part: Part, shards: list[NDArray[np.int64]]) -> float:
    """Mean over clients of the share of their most frequent class."""
    return float(np.mean([np.bincount(part.y[shard]).max() / len(shard) for shard in shards]))


@pytest.mark.parametrize("partition", PARTITIONS)
def test_no_image_has_two_owners_and_no_client_is_without(partition: str) -> None:
    part = part_of(203)
    how = make(Shards, {"clients": 10, "partition": partition}, where="[clients]")
    shards = divide(part, how, seed=3)
    owned = np.concatenate(shards)
    assert len(shards) == 10
    assert min(map(len, shards)) >= 1
    assert len(set(owned.tolist())) == len(owned)
    assert owned.min() >= 0
    assert owned.max() < len(part)
    assert len(owned) == (10 if partition == "one" else len(part))  # everything is given out, or one each


@pytest.mark.parametrize("partition", PARTITIONS)
def test_the_seed_decides(partition: str) -> None:
    part = part_of(120)
    how = make(Shards, {"clients": 8, "partition": partition}, where="[clients]")
    first, again, other = (divide(part, how, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_iid_shards_are_equally_large_and_one_means_one() -> None:
    sizes = {len(shard) for shard in divide(part_of(203), Shards(clients=10), seed=0)}
    assert sizes == {20, 21}
    assert {len(s) for s in divide(part_of(203), Shards(clients=203, partition="one"), seed=0)} == {1}


def test_a_small_alpha_gives_each_client_few_classes_and_a_large_one_all() -> None:
    part = part_of(2000)
    shares = [
        largest_class_share(part, divide(part, Shards(clients=10, partition="dirichlet", alpha=alpha), seed=0))
        for alpha in (0.1, 1.0, 1000.0)
    ]
    assert shares[0] > 0.6
    assert shares[0] > shares[1] > shares[2]
    assert shares[2] < 0.25  # 0.2 is an even mixture of five classes


def test_a_dirichlet_draw_is_repeated_until_every_client_holds_enough() -> None:
    how = Shards(clients=10, partition="dirichlet", alpha=0.5, smallest=5)
    for seed in range(5):
        assert min(len(shard) for shard in divide(part_of(400), how, seed=seed)) >= 5


@pytest.mark.parametrize("partition", PARTITIONS)
def test_more_clients_than_images_are_refused(partition: str) -> None:
    how = make(Shards, {"clients": 101, "partition": partition}, where="[clients]")
    with pytest.raises(DataError, match=r"101 clients need at least 101 samples.*has 100.*would be empty"):
        divide(toy_stream(0).victim, how, seed=0)


def test_shards_that_no_draw_fills_are_refused() -> None:
    hopeless = Shards(clients=20, partition="dirichlet", alpha=1e-3)
    with pytest.raises(DataError, match=r"100 Dirichlet draws with alpha = 0\.001 left one of 20 clients"):
        divide(part_of(100), hopeless, seed=0)
    with pytest.raises(DataError, match="20 clients need at least 200 samples"):
        divide(part_of(100), Shards(clients=20, partition="dirichlet", smallest=10), seed=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clients": 0}, "clients = 0"),
        ({"alpha": 0.0}, r"alpha = 0\.0"),
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": float("inf")}, "alpha"),
        ({"smallest": 0}, "smallest"),
        ({"partition": "even"}, "partition"),
        ({"client": 3}, "unknown key 'client'"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(Shards, values, where="[clients]")


def test_the_clients_of_a_round_depend_on_seed_and_round_alone() -> None:
    rounds = [sampled(50, 10, round_=r, seed=4) for r in range(20)]
    for who in rounds:
        assert len(set(who.tolist())) == 10
        assert (np.diff(who) > 0).all()
    assert np.array_equal(rounds[7], sampled(50, 10, round_=7, seed=4))
    assert not np.array_equal(rounds[7], sampled(50, 10, round_=7, seed=5))
    assert not np.array_equal(rounds[7], rounds[8])
    assert len(set(np.concatenate(rounds).tolist())) > 45  # all of them come up
    assert np.array_equal(sampled(6, 6, round_=0, seed=0), np.arange(6))


@pytest.mark.parametrize("per_round", [0, 11, -1])
def test_no_client_or_more_than_there_are_cannot_be_sampled(per_round: int) -> None:
    with pytest.raises(DataError, match=f"{per_round} of 10 clients asked for"):
        sampled(10, per_round, round_=0, seed=0)


def test_a_draw_by_class_needs_classes() -> None:
    part = Part("victim", np.zeros((9, 2), np.float32), np.linspace(0, 1, 9, dtype=np.float32))
    with pytest.raises(DataError, match=r"targets of the part 'victim' are float32 of shape \(9,\), no class numbers"):
        divide(part, Shards(clients=3, partition="dirichlet"), seed=0)
    assert len(divide(part, Shards(clients=3), seed=0)) == 3
