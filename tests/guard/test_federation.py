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

from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.registry import make
from mithridate.guard.federation import (
    STATISTICS,
    Guard,
    Lengths,
    Measure,
    State,
    Trusted,
    best_of,
    born_types,
    capped_counts,
    clipped,
    find_count_fault,
    find_excess,
    find_fault,
    find_overlength,
    judge,
    lengths_of,
    names_of,
    trusted_module,
    update_of,
)

MODEL: dict[str, NDArray[Any]] = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.zeros(2, np.float32),
    "batches": np.array(7, np.int64),
}
BORN = born_types(MODEL, Guard())
WEIGHTS = ["w", "b"]


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
        (moved(w=np.zeros((2, 3), np.longdouble)), "'w' is .*, not float32"),  # torch knows no such type
        (moved(w=np.zeros((2, 3), np.dtype("f4").newbyteorder("S"))), "'w' is .f4, not float32"),
        (moved(w=np.zeros((2, 3), bool)), "'w' is bool"),
        (moved(w=np.zeros((2, 3), object)), "'w' is object"),
        (moved(w=np.zeros((2, 3), [("a", "f4")])), "'w' is"),
        (moved(batches=np.array(8, np.int32)), "'batches' is int32, not int64"),
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


def test_a_federation_may_go_on_from_what_an_average_made_of_another() -> None:
    """FedAdam ends in float64, and so does the count of batches of an average; clients send what their torch has."""
    ended = {"w": np.ones(3), "bn.num_batches_tracked": np.array(7.5)}
    born = born_types(ended, Guard())
    sent = {"w": np.zeros(3, np.float32), "bn.num_batches_tracked": np.array(8)}
    assert find_fault(sent, ended, born) == ""
    assert lengths_of(sent, ended, born, Guard()).update == pytest.approx(math.sqrt(3))
    assert "float16" in find_fault({**sent, "w": np.zeros(3, np.float16)}, ended, born)


def test_a_model_that_cannot_be_measured_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="array 'z' is complex64"):
        born_types({"z": np.zeros(2, np.complex64)}, Guard())


def test_the_length_is_that_of_the_weights() -> None:
    both = moved(-3.0, b=np.array([4.0, 0], np.float32))
    assert lengths_of(moved(3.0), MODEL, BORN, Guard()) == pytest.approx((3.0, 0.0))
    assert lengths_of(both, MODEL, BORN, Guard()) == pytest.approx((5.0, 0.0))
    assert lengths_of(both, MODEL, BORN, Guard(norm="linf")) == pytest.approx((4.0, 0.0))
    assert lengths_of({"n": np.array(3)}, {"n": np.array(1)}, {"n": np.dtype(np.int64)}, Guard()) == (0.0, 0.0)
    assert names_of(BORN, Guard()) == (WEIGHTS, [])
    assert update_of(moved(), MODEL, WEIGHTS).shape == (1, 8)


def test_what_is_absurdly_long_is_refused() -> None:
    assert find_excess(Lengths(1.0, 1.0), Guard()) == ""
    assert "update of l2 length 1e+30, limit 1e+09" in find_excess(Lengths(1e30), Guard())
    assert "arrays apart of l2 length 1e+30, limit 1e+09" in find_excess(Lengths(1.0, 1e30), Guard())
    assert find_excess(Lengths(1e30), Guard(max_update_norm=math.inf)) == ""
    assert "length inf" in find_excess(Lengths(math.inf), Guard(max_update_norm=math.inf))
    assert "length 2, limit 1" in find_excess(Lengths(2.0), Guard(max_update_norm=1.0))


NORMALISED: dict[str, NDArray[Any]] = {
    "conv.weight": np.zeros(4, np.float32),
    "bn.weight": np.ones(2, np.float32),
    "bn.running_mean": np.zeros(2, np.float32),
    "bn.running_var": np.full(2, 0.01, np.float32),
    "bn.num_batches_tracked": np.array(3),
}


def normalised(weights: float, mean: float, var: float = 0.01) -> dict[str, NDArray[Any]]:
    """What a client makes of a model with BatchNorm: one weight moved, one mean, all variances."""
    state = {name: array.copy() for name, array in NORMALISED.items()}
    state["conv.weight"][0] += weights
    state["bn.running_mean"][0] += mean
    state["bn.running_var"][:] = var
    return state


def test_statistics_apart_do_not_count_in_the_length_and_have_a_bound_of_their_own() -> None:
    """An honest client whose images are of another kind: its weights move little, its statistics much."""
    sent = normalised(0.3, 40.0)
    together, apart = Guard(clip_norm=1.0), Guard(clip_norm=1.0, apart=STATISTICS)
    bounded = Guard(clip_norm=1.0, apart=STATISTICS, apart_clip_norm=5.0)
    born = born_types(NORMALISED, apart)
    assert names_of(born, apart) == (["conv.weight", "bn.weight"], ["bn.running_mean", "bn.running_var"])
    assert lengths_of(sent, NORMALISED, born, together) == pytest.approx((math.hypot(0.3, 40.0), 0.0))
    assert lengths_of(sent, NORMALISED, born, apart) == pytest.approx((0.3, 40.0))
    assert "update of l2 length 40" in find_overlength(lengths_of(sent, NORMALISED, born, together), together)
    assert find_overlength(lengths_of(sent, NORMALISED, born, apart), apart) == ""
    reason = find_overlength(lengths_of(sent, NORMALISED, born, bounded), bounded)
    assert reason == "arrays apart of l2 length 40, limit 5"
    made = clipped(sent, NORMALISED, born, together)
    assert made["conv.weight"][0] == pytest.approx(0.3 / math.hypot(0.3, 40.0), rel=1e-5)  # hardly anything is left
    made = clipped(sent, NORMALISED, born, bounded)
    assert made["conv.weight"] is sent["conv.weight"]  # within its bound: as sent
    assert made["bn.running_mean"][0] == pytest.approx(5.0)
    far = normalised(3.0, 4.0)
    made = clipped(far, NORMALISED, born, bounded)
    assert made["conv.weight"][0] == pytest.approx(1.0)
    assert made["bn.running_mean"][0] == pytest.approx(4.0)
    assert made["bn.num_batches_tracked"] == 3
    assert list(made) == list(NORMALISED)


def test_the_patterns_of_statistics_are_those_of_torch() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    state = {name: t.numpy() for name, t in net.state_dict().items()}
    guard = Guard(apart=STATISTICS)
    update, apart = names_of(born_types(state, guard), guard)
    assert update == [name for name, _ in net.named_parameters()]
    assert apart == [name for name, b in net.named_buffers() if b.is_floating_point()]


def test_patterns_and_bounds_of_arrays_apart_must_mean_something() -> None:
    with pytest.raises(ConfigError, match=r"apart = '\*running_maen' fits no array of the model, which are: bn.num"):
        born_types(NORMALISED, Guard(apart=("*running_maen",)))
    with pytest.raises(ConfigError, match="it names none"):
        Guard(apart_clip_norm=1.0)


def test_negative_variances_are_refused() -> None:
    """Too short for any clipping, and yet the average of twenty would give NaN for every image."""
    born = born_types(NORMALISED, Guard())
    sent = normalised(0.0, 0.0, -0.3)
    assert lengths_of(sent, NORMALISED, born, Guard()).update < 0.5
    assert find_fault(sent, NORMALISED, born) == "array 'bn.running_var' holds 2 of 2 variances that are negative"
    assert find_fault(normalised(0.0, 0.0, 0.0), NORMALISED, born) == ""
    lost = {**NORMALISED, "bn.running_var": np.full(2, -0.1, np.float32)}  # a server's momentum took it there
    assert find_fault(sent, lost, born) == ""


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
    before, after = update_of(received, MODEL, WEIGHTS)[0], update_of(made, MODEL, WEIGHTS)[0]
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
