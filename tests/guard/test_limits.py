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

from mithridate.core.errors import ConfigError
from mithridate.core.registry import make
from mithridate.guard.limits import (
    STATISTICS,
    Layout,
    ReplyLimits,
    State,
    count_fault,
    difference,
    excess,
    moved,
)

MODEL: dict[str, NDArray[Any]] = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.zeros(2, np.float32),
    "batches": np.array(7, np.int64),
}
LAYOUT = Layout.of(MODEL, ReplyLimits())
WEIGHTS = ("w", "b")


def received(by: float = 1.0, **other: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """The model with the first weight moved, one batch counted, and some arrays replaced."""
    w = MODEL["w"].copy()
    w[0, 0] += by
    return {**MODEL, "w": w, "batches": np.array(8, np.int64), **other}


def test_an_honest_update_has_no_fault() -> None:
    assert LAYOUT.fault(received(), MODEL) == ""
    assert LAYOUT.fault(MODEL, MODEL) == ""


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({k: v for k, v in received().items() if k != "b"}, "'b' is missing"),
        ({}, "is missing, and 2 more"),
        (received(c=np.zeros(1)), "unknown array 'c'"),
        (received(w=np.zeros((3, 2), np.float32)), r"'w' has shape \(3, 2\), not \(2, 3\)"),
        (received(w=np.zeros(0, np.float32)), "has shape"),
        (received(w=np.full((2, 3), np.nan, np.float32)), "'w' holds 6 of 6 values that are NaN"),
        (received(w=np.array([[0, 0, 0], [0, 0, -np.inf]], np.float32)), "holds 1 of 6"),
        (received(w=np.full((2, 3), 1e300)), "holds 6 of 6"),  # finite as it is, infinite as a weight of this model
        (received(w=np.zeros((2, 3), np.float16)), "'w' is float16, not float32"),
        (received(w=np.zeros((2, 3), np.int64)), "is int64"),
        (received(w=np.zeros((2, 3), np.complex64)), "is complex64"),
        (received(w=np.array([["a"] * 3] * 2)), "is <U1"),
        (received(w=np.zeros((2, 3), "datetime64[s]")), "is datetime64"),
        (received(w=np.zeros((2, 3), np.longdouble)), "'w' is .*, not float32"),  # torch knows no such type
        (received(w=np.zeros((2, 3), np.dtype("f4").newbyteorder("S"))), "'w' is .f4, not float32"),
        (received(w=np.zeros((2, 3), bool)), "'w' is bool"),
        (received(w=np.zeros((2, 3), object)), "'w' is object"),
        (received(w=np.zeros((2, 3), [("a", "f4")])), "'w' is"),
        (received(batches=np.array(8, np.int32)), "'batches' is int32, not int64"),
        (received(batches=np.array(2**62)), "'batches' counts, and moved by more"),
        (received(batches=np.array(np.nan)), "'batches' holds 1 of 1"),
    ],
)
def test_every_malformed_state_is_named(state: State, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(LAYOUT.fault(state, MODEL))


def test_types_that_an_average_widens_are_no_fault() -> None:
    """FedAvg makes a float64 of an integer counter, and FedAdam of every weight; clients send their own types back."""
    wide = {name: array.astype(np.float64) for name, array in MODEL.items()}
    assert LAYOUT.fault(received(), wide) == ""
    assert LAYOUT.fault({name: array.astype(np.float64) for name, array in received().items()}, wide) == ""


def test_a_federation_may_go_on_from_what_an_average_made_of_another() -> None:
    """FedAdam ends in float64, and so does the count of batches of an average; clients send what their torch has."""
    ended = {"w": np.ones(3), "bn.num_batches_tracked": np.array(7.5)}
    layout = Layout.of(ended, ReplyLimits())
    sent = {"w": np.zeros(3, np.float32), "bn.num_batches_tracked": np.array(8)}
    assert layout.fault(sent, ended) == ""
    assert layout.trained == ("w",)
    assert "float16" in layout.fault({**sent, "w": np.zeros(3, np.float16)}, ended)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"z": np.zeros(2, np.complex64)}, "array 'z' is complex64"),
        ({"n": np.zeros(2, np.int64)}, "no array of the model is trained, so there is nothing to guard: n"),
        ({"bn.running_mean": np.zeros(2)}, "no array of the model is trained"),
        ({}, "there are none"),
    ],
)
def test_a_model_that_cannot_be_measured_is_refused_at_once(state: State, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Layout.of(state, ReplyLimits())


def test_an_update_is_what_a_client_changed_of_the_weights() -> None:
    assert LAYOUT.trained == WEIGHTS
    assert LAYOUT.statistics == LAYOUT.frozen == ()
    change = difference(received(-3.0, b=np.array([4.0, 0], np.float32)), MODEL, WEIGHTS)
    assert change.dtype == np.float64
    np.testing.assert_allclose(change, [-3, 0, 0, 0, 0, 0, 4, 0])
    assert difference(received(), MODEL, ()).shape == (0,)


@how(deadline=None)  # the machine may be busy
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=8, max_size=8))
def test_a_change_can_be_put_back(change: list[float]) -> None:
    """In the types that the client sent, and of the arrays named alone."""
    like = {**MODEL, "b": MODEL["b"].astype(np.float64)}
    arrays = moved(MODEL, np.array(change), like, WEIGHTS)
    assert {name: a.dtype for name, a in arrays.items()} == {"w": np.float32, "b": np.float64}
    np.testing.assert_allclose(difference(arrays, MODEL, WEIGHTS), change, atol=1e-4)
    (one,) = moved(MODEL, np.array(change[:6]), like, ("w",))
    assert one == "w"


def test_what_is_absurdly_long_is_refused() -> None:
    assert excess(np.array([3.0, 4.0]), 5.0, "update") == ""
    assert excess(np.array([]), 1.0, "update") == ""
    assert excess(np.array([3.0, 4.0]), 4.9, "update") == "update of l2 length 5, limit 4.9"
    assert excess(np.array([1e30]), 1e9, "statistics") == "statistics of l2 length 1e+30, limit 1e+09"
    assert excess(np.array([1e30]), math.inf, "update") == ""
    assert "length inf" in excess(np.array([math.inf]), math.inf, "update")


NORMALISED: dict[str, NDArray[Any]] = {
    "conv.weight": np.zeros(4, np.float32),
    "bn.weight": np.ones(2, np.float32),
    "bn.running_mean": np.zeros(2, np.float32),
    "bn.running_var": np.full(2, 0.01, np.float32),
    "bn.num_batches_tracked": np.array(3),
}


def with_variances(var: float) -> dict[str, NDArray[Any]]:
    return {**NORMALISED, "bn.running_var": np.full(2, var, np.float32)}


def test_statistics_are_no_part_of_an_update() -> None:
    layout = Layout.of(NORMALISED, ReplyLimits())
    assert layout.trained == ("conv.weight", "bn.weight")
    assert layout.statistics == ("bn.running_mean", "bn.running_var")
    together = Layout.of(NORMALISED, ReplyLimits(statistics=()))
    assert len(together.trained) == 4
    named = Layout.of(NORMALISED, ReplyLimits(statistics=("conv.w??ght",)))
    assert named.statistics == ("conv.weight",)


def test_a_module_knows_what_is_trained_what_is_not_and_what_is_frozen() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    net[0].weight.requires_grad_(False)
    net.register_buffer("mask", torch.ones(2))
    state = {name: t.numpy() for name, t in net.state_dict().items()}
    layout = Layout.of(state, ReplyLimits(), net)
    assert layout.trained == ("0.bias", "1.weight", "1.bias", "2.weight", "2.bias")
    assert layout.statistics == ("mask", "1.running_mean", "1.running_var")
    assert layout.frozen == ("0.weight",)
    adapters = {name: state[name] for name in layout.trained}  # what is frozen need not be exchanged
    assert Layout.of(adapters, ReplyLimits(), net).frozen == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"more": np.zeros(2)}, "'more' is not in the module, or tied"),
        ({"weight": np.zeros((3, 2))}, r"'weight' is \(3, 2\) and \(2, 2\) in the module"),
        ({"bias": None}, "trains 'bias', which is not among the model's arrays: weight"),
    ],
)
def test_arrays_and_module_must_be_of_one_model(change: dict[str, Any], words: str) -> None:
    net = nn.Linear(2, 2)
    state = {name: t.numpy() for name, t in net.state_dict().items()} | change
    with pytest.raises(ConfigError, match=words):
        Layout.of({name: a for name, a in state.items() if a is not None}, ReplyLimits(), net)


def test_a_tied_parameter_goes_by_one_name() -> None:
    """Else a client could put into the second what the defence never sees."""
    net = nn.Module()
    net.a = nn.Linear(2, 2)
    net.b = net.a
    state = {name: t.numpy() for name, t in net.state_dict().items()}
    assert set(state) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    with pytest.raises(ConfigError, match=r"'b\.weight' is not in the module, or tied"):
        Layout.of(state, ReplyLimits(), net)


def test_the_patterns_of_statistics_are_those_of_torch() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    state = {name: t.numpy() for name, t in net.state_dict().items()}
    bare, known = Layout.of(state, ReplyLimits(statistics=STATISTICS)), Layout.of(state, ReplyLimits(), net)
    assert bare == known
    assert bare.statistics == ("1.running_mean", "1.running_var")


def test_a_pattern_must_mean_something() -> None:
    with pytest.raises(ConfigError, match=r"'\*running_maen' fits no array of the model, which are: bn.num"):
        Layout.of(NORMALISED, ReplyLimits(statistics=("*running_maen",)))
    assert Layout.of(MODEL, ReplyLimits()).statistics == ()  # those of torch fit whatever has BatchNorm
    with pytest.raises(ConfigError, match="did you mean 'statistics_clip_norm'"):
        make(ReplyLimits, {"statistic_clipnorm": 1.0}, where="[limits]")


def test_negative_variances_are_refused() -> None:
    """Too short a change for any bound, and yet the average of twenty would give NaN for every image."""
    layout = Layout.of(NORMALISED, ReplyLimits())
    sent = with_variances(-0.3)
    assert layout.fault(sent, NORMALISED) == "array 'bn.running_var' holds 2 of 2 variances that are negative"
    assert layout.fault(with_variances(0.0), NORMALISED) == ""
    assert layout.fault(sent, with_variances(-0.1)) == ""  # a server's momentum took it there


@pytest.mark.parametrize("count", [0, -1, -0.5, math.nan, math.inf, -math.inf, "50", None, [50], True])
def test_no_client_reports_an_impossible_number(count: object) -> None:
    assert "number of examples" in count_fault(count)


@pytest.mark.parametrize("count", [1, 50, 0.5, 10**400])
def test_any_other_number_may_be_reported(count: object) -> None:
    assert count_fault(count) == ""


def test_a_cap_bounds_what_a_report_counts_for() -> None:
    honest = [40.0, 50.0, 60.0]
    assert ReplyLimits().capped(honest) == honest
    assert ReplyLimits().capped([*honest, 10**15]) == [*honest, 500.0]
    assert ReplyLimits().capped([*honest, 10**400]) == [*honest, 500.0]
    assert ReplyLimits(max_examples_ratio=1.0).capped([*honest, 10**15]) == [40, 50, 50, 50]
    assert ReplyLimits(max_examples=55, max_examples_ratio=math.inf).capped([*honest, 10**15]) == [40, 50, 55, 55]
    assert ReplyLimits().capped([]) == []
    free = ReplyLimits(max_examples_ratio=math.inf)
    assert free.capped([10**400]) == [1e300]
    assert free.capped([1, 10**15]) == [1, 10**15]
    assert all(isinstance(count, int) for count in free.capped([1, 10**15]))  # untouched, type and all
