"""What every rule refuses, and what it is told: each message names who and what."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mithridate.aggregators.fltrust import FLTrust
from mithridate.aggregators.mean import Mean
from mithridate.core.aggregator import Aggregator, Context, Spread
from mithridate.core.errors import ConfigError, DataError, ThreatModelError
from mithridate.core.registry import build, settings
from mithridate.core.usable_rows import unusable


def context(n: int, **things: Any) -> Context:
    return Context(clients=10 + torch.arange(n), rng=torch.Generator(), **things)


ROWS = torch.arange(12.0).view(4, 3)


@pytest.mark.parametrize(
    ("rows", "things", "message"),
    [
        (ROWS[0], {}, r"matrix of floats"),
        (ROWS.long(), {}, r"int64 of shape \(4, 3\)"),
        (ROWS[:, :0], {}, r"shape \(4, 0\)"),
        (ROWS, {"clients": torch.arange(3)}, r"4 rows, but client ids are torch.int64 of shape \(3,\)"),
        (ROWS, {"clients": torch.arange(4.0)}, r"ids are torch.float32"),
        (ROWS, {"clients": torch.tensor([5, 6, 5, 6])}, r"clients 5, 6 sent more than one row"),
        (ROWS.double() * 1e300, {}, r"clients 10, 11, 12, 13 sent NaN, infinite or larger entries than 1e\+300"),
        (ROWS, {"weights": torch.ones(3)}, r"4 rows, but weights of shape \(3,\)"),
        (ROWS, {"weights": torch.tensor([1.0, -1.0, 1.0, torch.nan])}, r"clients 11, 13 have a negative or non-finite"),
        (ROWS, {"weights": torch.zeros(4)}, r"all 4 weights are zero"),
        (ROWS, {"trusted": torch.ones(4)}, r"trusted update has shape \(4,\)"),
        (ROWS, {"trusted": torch.tensor([1.0, torch.inf, 0.0])}, r"one finite row of 3"),
    ],
)
def test_a_round_that_no_rule_can_work_on(rows: Tensor, things: dict[str, Any], message: str) -> None:
    asked = {"clients": 10 + torch.arange(4), "rng": torch.Generator(), **things}
    with pytest.raises(DataError, match=message):
        Mean().aggregate(rows, Context(**asked))


def test_one_bad_client_is_named_alone_and_the_others_work_without_it() -> None:
    rows = ROWS.clone()
    rows[2, 1] = torch.nan
    with pytest.raises(DataError, match=r"client 12 sent NaN"):
        Mean().aggregate(rows, context(4))
    left = ~unusable(rows)
    assert left.tolist() == [True, True, False, True]
    clean = Context(clients=context(4).clients[left], rng=torch.Generator())
    assert torch.allclose(Mean().aggregate(rows[left], clean), ROWS[[0, 1, 3]].mean(0))


def test_a_missing_trusted_update_is_said() -> None:
    with pytest.raises(ThreatModelError, match="FLTrust needs the server's own update"):
        FLTrust().aggregate(ROWS, context(4))


@pytest.mark.parametrize(
    ("table", "enough", "bound"),
    [
        ({"name": "krum", "hostile": 2}, 7, r"2f \+ 3 = 7"),
        ({"name": "multi_krum", "hostile": 3}, 9, r"2f \+ 3 = 9"),
        ({"name": "bulyan", "hostile": 2}, 11, r"4f \+ 3 = 11"),
        ({"name": "trimmed_mean", "hostile": 2}, 5, r"2f \+ 1 = 5"),
        ({"name": "nnm", "hostile": 3}, 7, r"2f \+ 1 = 7"),
        ({"name": "nnm", "hostile": 1, "inner": {"name": "krum"}}, 5, r"inner rule krum stands 0"),
        ({"name": "bucketing", "inner": {"name": "krum", "hostile": 1}}, 9, r"8 rows fill 4 buckets of 2.*2f \+ 3 = 5"),
        ({"name": "median"}, 1, "0 rows"),
    ],
)
def test_too_few_rows_name_the_bound(table: dict[str, Any], enough: int, bound: str) -> None:
    rule: Aggregator = build("aggregator", table)
    rows = torch.randn(enough, 3, generator=torch.Generator().manual_seed(0))
    rule.aggregate(rows, context(enough))
    with pytest.raises(ConfigError, match=bound):
        rule.check(enough - 1)
    with pytest.raises(ConfigError, match=bound):
        rule.aggregate(rows[1:], context(enough - 1))


@pytest.mark.parametrize(
    ("name", "stands"),
    [
        ("mean", [0, 0, 0, 0]),
        ("norm_bounding", [0, 0, 0, 0]),
        ("median", [0, 1, 4, 10]),
        ("geometric_median", [0, 1, 4, 10]),
        ("trimmed_mean", [0, 0, 2, 4]),
        ("krum", [0, 0, 3, 9]),
        ("multi_krum", [0, 0, 3, 9]),
        ("bulyan", [0, 0, 1, 4]),
        ("centered_clipping", [0, 0, 1, 2]),
        ("fltrust", [1, 3, 10, 21]),
        ("nnm", [0, 1, 4, 10]),
        ("bucketing", [0, 0, 2, 5]),
    ],
)
def test_what_each_stands_among_1_3_10_and_21_rows(name: str, stands: list[int]) -> None:
    rule: Aggregator = build("aggregator", {"name": name})
    assert [rule.most_hostile(n) for n in (1, 3, 10, 21)] == stands


def test_told_to_expect_some_a_rule_stands_no_more() -> None:
    rule: Aggregator = build("aggregator", {"name": "krum", "hostile": 2})
    assert [rule.most_hostile(n) for n in (3, 5, 7, 100)] == [0, 1, 2, 2]


def test_shares_sum_to_one_and_follow_the_weights() -> None:
    assert context(4).shares().tolist() == [0.25] * 4
    weighted = context(4, weights=torch.tensor([1.0, 0.0, 3.0, 0.0])).shares()
    assert weighted.tolist() == [0.25, 0.0, 0.75, 0.0]
    assert context(2, weights=torch.tensor([1e308, 1e308], dtype=torch.float64)).shares().tolist() == [0.5, 0.5]


def test_the_spread_of_a_right_triangle() -> None:
    spread = Spread.of(torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]))
    assert spread.diameter == pytest.approx(5)
    assert spread.widths.tolist() == [3.0, 4.0]
    assert spread.length == pytest.approx(4)
    assert spread.diagonal == pytest.approx(5)
    wider = spread.widened(1.0)
    assert (wider.diameter, wider.length) == pytest.approx((7, 5))
    assert wider.widths.tolist() == [5.0, 6.0]


@settings
class Broken(Mean):
    """Gives what is no update."""

    nan: bool = False

    def combine(self, rows: Tensor, context: Context) -> Tensor:
        return rows[0] * torch.nan if self.nan else rows


@pytest.mark.parametrize(("nan", "message"), [(True, "NaN"), (False, r"\(4, 3\)")])
def test_a_rule_that_makes_no_update_is_caught(nan: bool, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        Broken(nan=nan).aggregate(ROWS, context(4))
