import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from mithridate.core import Batch
from mithridate.engines.guard import (
    Guard,
    Measure,
    State,
    Trusted,
    best_of,
    capped_counts,
    clipped,
    find_count_fault,
    find_excess,
    find_fault,
    judge,
    length_of,
    trusted_module,
    update_of,
)
from mithridate.errors import ConfigError, DataError
from mithridate.registry import make

MODEL: dict[str, NDArray[Any]] = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.zeros(2, np.float32),
    "batches": np.array(7, np.int64),
}
BORN = {name: array.dtype for name, array in MODEL.items()}


def moved(by: float = 1.0, **other: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """The model with the first weight moved, one batch counted, and some arrays replaced."""
    w = MODEL["w"].copy()
    w[0, 0] += by
    return {**MODEL, "w": w, "batches": np.array(8, np.int64), **other}


def test_an_honest_update_has_no_fault() -> None:
    assert find_fault(moved(), MODEL, BORN) == ""
    assert find_fault(MODEL, MODEL, BORN) == ""
    assert find_fault({}, {}, {}) == ""


@pytest.mark.parametrize(
    ("received", "words"),
    [
        ({k: v for k, v in moved().items() if k != "b"}, "'b' is missing"),
        ({}, "is missing, and 2 more"),
        (moved(c=np.zeros(1)), "unknown array 'c'"),
        (moved(w=np.zeros((3, 2), np.float32)), r"'w' has shape \(3, 2\), not \(2, 3\)"),
        (moved(w=np.zeros(0, np.float32)), "has shape"),
        (moved(w=np.full((2, 3), np.nan, np.float32)), "'w' holds 6 of 6 values that are NaN"),
        (moved(w=np.array([[0, 0, 0], [0, 0, -np.inf]], np.float32)), "holds 1 of 6"),
        (moved(w=np.full((2, 3), 1e300)), "holds 6 of 6"),  # finite as it is, infinite as a weight of this model
        (moved(w=np.zeros((2, 3), np.float16)), "'w' is float16, not float32"),
        (moved(w=np.zeros((2, 3), np.int64)), "is int64"),
        (moved(w=np.zeros((2, 3), np.complex64)), "is complex64"),
        (moved(w=np.array([["a"] * 3] * 2)), "is <U1"),
        (moved(w=np.zeros((2, 3), "datetime64[s]")), "is datetime64"),
        (moved(batches=np.array(2**62)), "'batches' counts, and moved by more"),
        (moved(batches=np.array(np.nan)), "'batches' holds 1 of 1"),
    ],
)
def test_every_malformed_state_is_named(received: State, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(find_fault(received, MODEL, BORN))


def test_types_that_an_average_widens_are_no_fault() -> None:
    """FedAvg makes a float64 of an integer counter, and FedAdam of every weight; clients send their own types back."""
    wide = {name: array.astype(np.float64) for name, array in MODEL.items()}
    assert find_fault(moved(), wide, BORN) == ""
    assert find_fault({name: array.astype(np.float64) for name, array in moved().items()}, wide, BORN) == ""


def test_the_length_is_that_of_the_weights() -> None:
    assert length_of(moved(3.0), MODEL, BORN, "l2") == pytest.approx(3.0)
    assert length_of(moved(-3.0, b=np.array([4.0, 0], np.float32)), MODEL, BORN, "l2") == pytest.approx(5.0)
    assert length_of(moved(-3.0, b=np.array([4.0, 0], np.float32)), MODEL, BORN, "linf") == pytest.approx(4.0)
    assert length_of({"n": np.array(3)}, {"n": np.array(1)}, {"n": np.dtype(np.int64)}, "l2") == 0.0
    assert update_of(moved(), MODEL, BORN).shape == (1, 8)


def test_what_is_absurdly_long_is_refused() -> None:
    assert find_excess(1.0, Guard()) == ""
    assert "limit 1e+09" in find_excess(1e30, Guard())
    assert find_excess(1e30, Guard(max_update_norm=math.inf)) == ""
    assert "length inf" in find_excess(math.inf, Guard(max_update_norm=math.inf))
    assert "length 2, limit 1" in find_excess(2.0, Guard(max_update_norm=1.0))


@how(deadline=None)  # the machine may be busy
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=8, max_size=8), st.floats(0.01, 100.0))
def test_a_clipped_update_keeps_its_direction_and_the_bound(change: list[float], bound: float) -> None:
    received = {
        "w": MODEL["w"] + np.array(change[:6], np.float32).reshape(2, 3),
        "b": MODEL["b"] + np.array(change[6:], np.float32),
        "batches": np.array(8, np.int64),
    }
    guard = Guard(clip_norm=bound)
    made = clipped(received, MODEL, BORN, guard)
    before, after = update_of(received, MODEL, BORN)[0], update_of(made, MODEL, BORN)[0]
    rounding = 1e-4
    assert float(after.norm()) <= bound + rounding
    if float(before.norm()) > bound:
        torch.testing.assert_close(after, before * bound / before.norm(), atol=rounding, rtol=1e-4)
    else:
        torch.testing.assert_close(after, before, atol=rounding, rtol=0)
    assert {name: a.dtype for name, a in made.items()} == BORN
    assert made["batches"] == 8


def test_clipping_in_linf_bounds_the_largest_change() -> None:
    made = clipped(moved(-3.0, b=np.array([1.0, 0], np.float32)), MODEL, BORN, Guard(clip_norm=1.5, norm="linf"))
    assert made["w"][0, 0] == pytest.approx(MODEL["w"][0, 0] - 1.5)
    assert made["b"][0] == pytest.approx(0.5)


@pytest.mark.parametrize("count", [0, -1, -0.5, math.nan, math.inf, -math.inf, "50", None, [50], True])
def test_no_client_reports_an_impossible_number(count: object) -> None:
    assert "number of examples" in find_count_fault(count)


@pytest.mark.parametrize("count", [1, 50, 0.5, 10**400])
def test_any_other_number_may_be_reported(count: object) -> None:
    assert find_count_fault(count) == ""


def test_a_cap_bounds_what_a_report_counts_for() -> None:
    honest = [40.0, 50.0, 60.0]
    assert capped_counts(honest, Guard()) == honest
    assert capped_counts([*honest, 10**15], Guard()) == [*honest, 500.0]
    assert capped_counts([*honest, 10**400], Guard()) == [*honest, 500.0]
    assert capped_counts([*honest, 10**15], Guard(max_examples_ratio=1.0)) == [40, 50, 50, 50]
    assert capped_counts([*honest, 10**15], Guard(max_examples=55, max_examples_ratio=math.inf)) == [40, 50, 55, 55]
    assert capped_counts([], Guard()) == []
    assert capped_counts([10**400], Guard(max_examples_ratio=math.inf)) == [1e300]
    off = capped_counts([1, 10**15], Guard(max_examples_ratio=math.inf))
    assert off == [1, 10**15]
    assert all(isinstance(count, int) for count in off)  # untouched, type and all


def test_the_gate_holds_loss_and_accuracy() -> None:
    guard = Guard(max_loss_rise=0.1, max_accuracy_drop=0.05)
    before = Measure(0.5, 0.9)
    assert judge(before, Measure(0.59, 0.86), guard).admit
    assert judge(before, Measure(0.2, 0.85), guard).admit  # exactly the limit
    assert "trusted loss 0.5 to 0.7" in judge(before, Measure(0.7, 0.9), guard).reason
    assert "trusted accuracy 0.900 to 0.800" in judge(before, Measure(0.4, 0.8), guard).reason
    assert not judge(before, Measure(math.nan, 0.9), guard).admit
    assert not judge(before, Measure(math.inf, 0.9), Guard(max_accuracy_drop=1.0)).admit
    assert judge(before, Measure(math.nan, 0.0), Guard()).admit  # off


def test_the_best_of_two_takes_each_from_where_it_is_better() -> None:
    assert best_of(Measure(0.5, 0.9), Measure(0.4, 0.8)) == Measure(0.4, 0.9)
    assert best_of(Measure(math.nan, 0.1), Measure(0.4, 0.8)) == Measure(0.4, 0.8)
    assert best_of(Measure(0.4, 0.8), Measure(math.nan, 0.1)) == Measure(0.4, 0.8)


def test_flagging_without_a_consequence_is_no_setting() -> None:
    with pytest.raises(ConfigError, match="nothing would happen"):
        Guard(max_discrepancy=0.5)
    assert Guard(max_discrepancy=0.5, flagged="refuse").needs_trusted
    with pytest.raises(ConfigError, match="did you mean 'clip_norm'"):
        make(Guard, {"clipnorm": 1.0}, where="[guard]")


def test_the_limit_of_discrepancy_rises_by_round() -> None:
    guard = Guard(max_discrepancy=0.5, discrepancy_rise=0.02, clip_norm=1.0)
    assert guard.discrepancy_limit(10) == pytest.approx(0.7)


def linear() -> tuple[nn.Linear, Trusted]:
    """A linear classifier of two pixels, right on two trusted samples, and wrong with its weights reversed."""
    module = nn.Linear(2, 2, bias=False)
    batch = Batch(torch.eye(2), torch.tensor([0, 1]))
    return module, trusted_module(module, batch)


def test_trusted_samples_measure_any_state_and_leave_the_module_alone() -> None:
    module, trusted = linear()
    before = module.weight.detach().clone()
    good: dict[str, NDArray[Any]] = {"weight": 5 * np.eye(2)}  # float64, as a server optimiser leaves it
    bad: dict[str, NDArray[Any]] = {"weight": -5 * np.eye(2)}
    assert trusted.measure(good).accuracy == 1.0
    assert trusted.measure(bad).accuracy == 0.0
    assert trusted.measure(good).loss == pytest.approx(math.log1p(math.exp(-5)), rel=1e-5)
    assert trusted.discrepancy(good, good, "kl") == pytest.approx(0.0, abs=1e-12)
    p = 1 / (1 + math.exp(-5))
    assert trusted.discrepancy(good, bad, "kl") == pytest.approx((2 * p - 1) * 5, rel=1e-5)
    assert torch.equal(module.weight, before)


def test_trusted_samples_of_one_class_are_refused() -> None:
    with pytest.raises(DataError, match="one class"):
        trusted_module(nn.Linear(2, 2), Batch(torch.eye(2), torch.tensor([1, 1])))
