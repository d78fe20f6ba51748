"""Bucketing: each row is in one bucket, drawn by the round's generator for clients and not for places."""

import pytest
import torch

from mithridate.aggregators.bucketing import Bucketing
from mithridate.aggregators.centered_clipping import CENTRE
from mithridate.aggregators.median import Median
from mithridate.core.aggregator import Context
from mithridate.core.errors import ConfigError


def context(n: int, seed: int = 0) -> Context:
    return Context(clients=torch.arange(n), rng=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "size"), [(8, 2), (7, 2), (7, 3), (5, 9), (6, 1)])
def test_each_row_is_averaged_in_one_bucket_of_the_asked_size(n: int, size: int) -> None:
    rows = 2.0 ** torch.arange(n, dtype=torch.float64).unsqueeze(1)  # the sum of a bucket says who is in it
    mixed, ids = Bucketing(bucket_size=size).mix(rows, context(n))
    full, rest = divmod(n, size)
    sizes = [size] * full + [rest] * (rest > 0)
    members = [round(float(value) * count) for value, count in zip(mixed, sizes, strict=True)]
    assert sum(members) == 2**n - 1
    assert [bin(member).count("1") for member in members] == sizes
    assert ids.tolist() == list(range(len(sizes)))


def test_another_draw_makes_other_buckets() -> None:
    rows = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Bucketing().aggregate(rows, context(12)), Bucketing().aggregate(rows, context(12)))
    assert not torch.equal(Bucketing().aggregate(rows, context(12)), Bucketing().aggregate(rows, context(12, 1)))


def test_buckets_of_one_are_the_inner_rule() -> None:
    rows = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    plain = Median().aggregate(rows, context(9))
    assert torch.equal(Bucketing(bucket_size=1).aggregate(rows, context(9)), plain)


def test_buckets_differ_less_than_rows() -> None:
    """Averages of s independent rows have an s-th of their variance (Karimireddy et al. 2022, Lemma 1)."""
    rows = torch.randn(400, 50, generator=torch.Generator().manual_seed(0))
    for size in (2, 4):
        mixed, _ = Bucketing(bucket_size=size).mix(rows, context(400))
        assert float(mixed.var(0).mean() * size) == pytest.approx(1, abs=0.1)


def test_notes_of_the_inner_rule_are_kept_between_rounds() -> None:
    rule = Bucketing(inner={"name": "centered_clipping", "clip_norm": 1.0})
    now = context(6)
    row = torch.tensor([0.0, 7.0])
    made = [rule.aggregate(row.repeat(6, 1), now) for _ in range(3)]
    assert [float(m[1]) for m in made] == pytest.approx([1, 2, 3])
    assert torch.equal(now.memory[f"inner.{CENTRE}"], made[-1])


def test_an_inner_rule_with_worker_momentum_is_refused() -> None:
    with pytest.raises(ConfigError, match="set `worker_momentum` on Bucketing"):
        Bucketing(inner={"name": "centered_clipping", "worker_momentum": 0.9})
    Bucketing(worker_momentum=0.9, inner={"name": "centered_clipping"})
