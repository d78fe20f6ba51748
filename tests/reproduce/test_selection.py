"""Which runs are meant, and which number of each."""

from typing import Any

import pytest

from mithridate.core.errors import ConfigError
from mithridate.reproduce.quantities import quantity
from mithridate.reproduce.selection import Place, Selection, paired
from tests.reproduce.made import run_of

RUNS = [
    run_of(0, 0.8, attack="ours+eps-0.1", config={"run": {"lr": 0.1}}),
    run_of(0, 0.7, attack="ours+eps-0.2", config={"run": {"lr": 0.1}}),
    run_of(0, 0.6, attack="others", defence="clip", variant="a", config={"burn_in": {"clip_norm": 1.0}}),
    run_of(1, 0.5, attack="others", defence="clip", variant="b", config={"data": {"name": "svhn"}}),
]


@pytest.mark.parametrize(
    ("condition", "picked"),
    [
        ({}, [0, 1, 2, 3]),
        ({"attack": "ours"}, [0, 1]),  # what a grid makes of it is it, too
        ({"attack": "ours+eps-0.2"}, [1]),
        ({"attack": "our"}, []),
        ({"defence": ["clip", "none"], "attack": "others"}, [2, 3]),
        ({"run": {"lr": "1/10"}}, [0, 1]),
        ({"run.lr": 0.1}, [0, 1]),
        ({"attack": {"eps": "2/10"}}, [0, 1, 2, 3]),
        ({"burn_in.clip_norm": 1}, [2]),
        ({"burn_in.clip_norm": "none"}, [0, 1, 3]),
        ({"data.name": ["svhn", "mnist"]}, [3]),
        ({"variant": "a"}, [2]),
        ({"run.lr": True}, []),
    ],
)
def test_conditions_choose_by_label_setting_and_variant(condition: dict[str, Any], picked: list[int]) -> None:
    selection = Selection.of(condition, where="here")
    assert selection.runs(RUNS) == [RUNS[i] for i in picked]


@pytest.mark.parametrize(
    ("wanted", "picked"),
    [
        ("poisoned", {"poisoned", "poisoned+eps-0.1"}),
        ("poisoned+accu", {"poisoned+accu", "poisoned+accu+eps-0.1+lam-2"}),
        ("poisoned+accu+eps-0.1", {"poisoned+accu+eps-0.1+lam-2"}),
        ("black-box", {"black-box+early"}),
    ],
)
def test_a_label_with_a_plus_of_its_own_is_another_attack(wanted: str, picked: set[str]) -> None:
    settings = {"attack": {"name": "accumulative", "eps": 0.1, "lam": 2}}
    labels = ("poisoned", "poisoned+eps-0.1", "poisoned+accu", "poisoned+accu+eps-0.1+lam-2", "black-box+early")
    runs = [
        run_of(0, 0.8, attack=label, config={**settings, **({"surrogate": {}} if "black" in label else {})})
        for label in labels
    ]
    assert {run.summary["attack"] for run in Selection.of({"attack": wanted}, where="").runs(runs)} == picked


def test_a_label_that_a_rule_of_the_server_was_added_to_is_still_that_defence() -> None:
    runs = [
        run_of(0, 0.8, defence=label, config={"federated": {"rule": {"name": "krum"}}})
        for label in ("clip+krum", "clip+x")
    ]
    assert Selection.of({"defence": "clip"}, where="").runs(runs) == runs[:1]


def test_two_conditions_of_one_setting_must_both_hold() -> None:
    first = Selection.of({"attack": ["ours", "others"]}, where="")
    assert first.joined(Selection.of({"attack": "others", "measure": "drop"}, where="")).runs(RUNS) == RUNS[2:]


@pytest.mark.parametrize(
    ("conditions", "picked"),
    [
        (["attack=ours"], [0, 1]),
        (["attack=ours,others", "run.lr=0.1"], [0, 1]),
        ([" defence = clip , none ", "variant=a,b"], [2, 3]),
        (["run.lr=1/10", 'attack="ours+eps-0.2"'], [1]),
        (["burn_in.clip_norm=none"], [0, 1, 3]),
    ],
)
def test_conditions_of_a_command_line_choose_the_same(conditions: list[str], picked: list[int]) -> None:
    assert Selection.asked(conditions).runs(RUNS) == [RUNS[i] for i in picked]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("defence", "--only defence: write"),
        ("defence=,", "write a label"),
        ("=clip", "unknown condition"),
        ("lr=0.1", "unknown condition 'lr'"),
        ("measure=drop", "write a label"),
        ("detector=distance", "write a label"),
    ],
)
def test_a_condition_of_a_command_line_that_cannot_choose_is_refused(condition: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Selection.asked([condition])


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"atack": "ours"}, "attack"),
        ({"attack": "a", "measure": "afterr"}, "after"),
        ({"monitor.floor": 0.8}, "has parts"),
        ({"measure": "auroc:triger"}, "trigger"),
        ({"measure": "trace"}, "say of what"),
        ({"measure": 3}, "give a text"),
        ({"lr": 3}, "unknown condition"),
    ],
)
def test_what_cannot_choose_is_refused_by_name(condition: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Selection.of(condition, where="here")


def test_numbers_of_one_seed_stand_side_by_side_within_the_variants_that_both_have() -> None:
    left: dict[Place, float] = {(0, "a"): 1.0, (0, "b"): 3.0, (1, "a"): 5.0}
    right: dict[Place, float] = {(0, "a"): 10.0, (0, "c"): 99.0, (1, "a"): 20.0, (2, "a"): 7.0}
    assert paired([left, right]) == [[1.0, 10.0], [5.0, 20.0]]
    other: dict[Place, float] = {(0, "x"): 4.0, (1, "x"): 6.0}
    assert paired([left, other]) == [[2.0, 4.0], [5.0, 6.0]]  # no variant in common: means over each one's own
    assert paired([left, {}]) == []


STEPS = [
    {"step": 0, "phase": "start", "accuracy": 0.9, "loss": 0.1},
    {"step": 1, "phase": "accumulative", "accuracy": 0.8, "loss": 0.4},
    {"step": 2, "phase": "accumulative", "accuracy": None, "loss": float("nan")},
    {"step": 3, "phase": "trigger", "accuracy": 0.4, "loss": 1.0},
]


@pytest.mark.parametrize(
    ("measure", "value"),
    [
        ("start", 95.0),
        ("before", 90.0),
        ("after", 50.0),
        ("drop", 40.0),
        ("change", -40.0),
        ("phase_cost", 5.0),
        ("batches", 4.0),
        ("mean_accuracy", 60.0),
        ("accuracy_at:1", 80.0),
        ("accuracy_at:2", None),
        ("trace:loss:max", 1.0),
        ("trace:loss:mean", 0.7),
        ("trace:loss:last", 1.0),
        ("trace:loss:trigger", 1.0),
        ("trace:loss:0", 0.1),
        ("trace:nothing:last", None),
        ("summary:alarms", 2.0),
        ("attack_success", 75.0),
        ("flagged_clean", None),
        ("burn_in_accuracy:2", 70.0),
        ("burn_in_accuracy:last", 60.0),
        ("burn_in_best", 70.0),
        ("auroc", None),
    ],
)
def test_measures_are_what_they_are_called(measure: str, value: float | None) -> None:
    curve = [{"epoch": 2, "accuracy": 0.7}, {"epoch": 4, "accuracy": 0.6}]
    summary = {"alarms": 2, "flagged_poisoned": 0.25, "burn_in_curve": curve}
    assert quantity(run_of(0, 0.5, trace=STEPS, summary=summary), measure) == pytest.approx(value)


def test_a_place_in_the_trace_that_there_is_not_is_named() -> None:
    with pytest.raises(ConfigError, match="say which step"):
        quantity(run_of(0, 0.5, trace=STEPS), "trace:loss:middle")
