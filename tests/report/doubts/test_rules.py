# ruff: noqa: RUF001  (cells are written with a multiplication sign)

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from mithridate.bench.store import Run
from mithridate.report.doubts.clean_stream import costs_on_clean, false_alarms, false_vetoes
from mithridate.report.doubts.crafting import objective_fell
from mithridate.report.doubts.doubt import ALL_CELLS, Doubt, Severity
from mithridate.report.doubts.environment import made_in_two_places, versions_mixed
from mithridate.report.doubts.learning import buffers_explain, diverged, quarantined, starts_differ
from mithridate.report.doubts.noise import includes_zero, no_better_than_noise, no_noise_baseline
from mithridate.report.doubts.phase import (
    alarms_before_trigger,
    early_loss,
    floor_above_start,
    halted,
    no_phase,
    nothing_read,
)
from mithridate.report.doubts.power import budgets_differ, left_its_ball, power_over_optimiser
from mithridate.report.doubts.seeds import class_unread, duplicate_seeds, few_seeds, few_test_samples, settings_apart
from mithridate.report.doubts.threshold import calibration_missed, chooses_nothing
from mithridate.report.rows import Row, rows

Make = Callable[..., Run]
MakeRow = Callable[..., Row]

ALARMED = {1: "too loud"}


def cells(found: Sequence[Doubt]) -> list[str]:
    return [doubt.cell for doubt in found]


def test_few_seeds(make_row: MakeRow) -> None:
    assert few_seeds([make_row(0.2, 0.2, 0.2)]) == []
    (two,) = few_seeds([make_row(0.2, 0.2)])
    assert two.severity is Severity.CAUTION
    assert "2 seeds (0, 1)" in two.text
    (one,) = few_seeds([make_row(0.2)])
    assert (one.severity, one.cell) == (Severity.SERIOUS, "accumulative × none")


def test_few_seeds_says_it_once_for_all_cells(make_row: MakeRow) -> None:
    pair = [make_row(0.2), make_row(0.1, attack="noise")]
    assert cells(few_seeds(pair)) == [ALL_CELLS]
    assert cells(few_seeds([*pair, make_row(0, 0, 0, attack="clean")])) == ["accumulative × none, noise × none"]


def test_duplicate_seeds(make_run: Make) -> None:
    assert duplicate_seeds(rows([make_run(seed=seed) for seed in (0, 1, 2)])) == []
    (doubt,) = duplicate_seeds(rows([make_run(seed=seed) for seed in (0, 1, 1)]))
    assert "3 runs, but seed 1" in doubt.text


@pytest.mark.parametrize(
    ("before", "drop", "expected"),
    [
        (0.96, 0.2, None),
        (0.92, 0.2, Severity.CAUTION),
        (0.90, 0.05, Severity.SERIOUS),
        (0.96, 0.02, Severity.SERIOUS),
        (0.975, 0.001, None),
    ],
)
def test_early_loss(make_row: MakeRow, before: float, drop: float, expected: Severity | None) -> None:
    row = make_row(drop, drop, accuracies=(0.98, before))
    assert [doubt.severity for doubt in early_loss([row])] == ([] if expected is None else [expected])


def test_no_phase(make_row: MakeRow, federated: Make) -> None:
    empty = {"accuracies": (0.98,), "summary": {"phase_asked": True, "steps": 0}}
    (doubt,) = no_phase([make_row(0.2, 0.2, **empty)])
    assert doubt.severity is Severity.SERIOUS
    assert doubt.text.startswith("phase of 0 batches in 2 of 2 runs (seeds 0, 1)")
    assert no_phase([make_row(0.2, summary={"phase_asked": True})]) == []
    assert no_phase([make_row(0.2, attack="vanilla", accuracies=(0.98,), summary={"phase_asked": False})]) == []
    assert no_phase([make_row(0.2, attack="noise", **empty)]) == []
    run = federated()
    run = replace(run, summary={**run.summary, "phase_asked": True, "steps": 0})
    (doubt,) = no_phase(rows([run]))
    assert doubt.text.startswith("phase of 0 rounds")


@pytest.mark.parametrize("table", [{"accuracy_floor": 0.99}, {"inner": {"accuracy_floor": 0.99}}], ids=str)
def test_floor_above_start(make_row: MakeRow, table: dict[str, Any]) -> None:
    attack = {"name": "accumulative", "eps": 0.2}
    (doubt,) = floor_above_start([make_row(0.2, config={"attack": {**attack, **table}})])
    assert doubt.severity is Severity.SERIOUS
    assert "ends below 99.0 %, and the model starts at 98.0 %" in doubt.text
    assert floor_above_start([make_row(0.2, config={"attack": {**attack, "accuracy_floor": 0.98}})]) == []
    assert floor_above_start([make_row(0.2)]) == []


@pytest.mark.parametrize("table", [{"accuracy_floor": 0.8}, {"max_drop": 0.05}, {"inner": {"max_drop": 0.05}}], ids=str)
def test_nothing_read(make_row: MakeRow, table: dict[str, Any]) -> None:
    unwatched: dict[str, Any] = {"monitor": []}
    with_floor = {"config": unwatched | {"attack": {"name": "accumulative", "eps": 0.2, **table}}}
    (doubt,) = nothing_read([make_row(0.2, 0.2, **with_floor, summary={"read_step": 0})])
    assert doubt.severity is Severity.CAUTION
    assert doubt.text.startswith(
        "2 of 2 runs (seeds 0, 1) measured nothing between start and trigger: the attack's floor"
    )
    assert nothing_read([make_row(0.2, **with_floor, summary={"read_step": 1})]) == []
    assert nothing_read([make_row(0.2, **with_floor, summary={"read_step": 0, "steps": 0})]) == []
    assert nothing_read([make_row(0.2, **with_floor)]) == []
    assert nothing_read([make_row(0.2, config=unwatched, summary={"read_step": 0})]) == []


@pytest.mark.parametrize("monitors", [{"floor": 0.8}, [{"factor": 3.0}, {"max_drop": 0.1}]], ids=str)
def test_nothing_read_by_a_monitor(make_row: MakeRow, monitors: Any) -> None:
    (doubt,) = nothing_read([make_row(0.0, attack="clean", config={"monitor": monitors}, summary={"read_step": 0})])
    assert "the monitor's floor of accuracy" in doubt.text
    blind = {"config": {"monitor": {"name": "loss_amplification", "factor": 3.0}}, "summary": {"read_step": 0}}
    assert nothing_read([make_row(0.0, attack="clean", **blind)]) == []


def test_class_unread(make_row: MakeRow) -> None:
    (doubt,) = class_unread([make_row(0.2, 0.2, summary={"classes_unread": 2})])
    assert (doubt.severity, doubt.cell) == (Severity.CAUTION, "accumulative × none")
    assert "lacks 2 classes of the test part in 2 of 2 runs" in doubt.text
    assert class_unread([make_row(0.2, summary={"classes_unread": 0}), make_row(0.2)]) == []


def test_few_test_samples_of_a_subset(make_row: MakeRow) -> None:
    data = {"config": {"data": {"name": "digits", "test": 1000}}}
    (doubt,) = few_test_samples([make_row(0.2, **data, summary={"read_samples": 50})])
    assert "read between start and trigger on 50 samples: each is 2.0 points" in doubt.text
    assert few_test_samples([make_row(0.2, **data, summary={"read_samples": n}) for n in (100, 1000)]) == []


def test_few_test_samples(make_row: MakeRow) -> None:
    few, enough = (make_row(0.2, config={"data": {"name": "digits", "test": n}}) for n in (40, 100))
    (doubt,) = few_test_samples([few])
    assert "40 samples: each is 2.5 points" in doubt.text
    assert few_test_samples([enough, make_row(0.2)]) == []


def test_left_its_ball(make_row: MakeRow) -> None:
    kept, drifted = (make_row(0.2, eps=0.4, config={"attack": {"name": "accumulative", "eps": e}}) for e in (0.4, 0.2))
    assert left_its_ball([kept, make_row(0.0, attack="clean")]) == []
    (doubt,) = left_its_ball([drifted])
    assert "moved by 0.4, and eps is 0.2" in doubt.text


def test_objective_fell(make_row: MakeRow) -> None:
    def with_ends(row: Row, *ends: tuple[float | None, float | None]) -> Row:
        steps = [{"objective_start": start, "objective_end": end} for start, end in ends]
        return replace(row, runs=tuple(replace(run, trace=steps) for run in row.runs))

    row = make_row(0.2)
    assert objective_fell([row, with_ends(row, (None, None)), with_ends(row, (1.0, 2.0), (3.0, 2.9))]) == []
    (doubt,) = objective_fell([with_ends(row, (106.9, 97.5), (100.0, 90.0), (1.0, 2.0), (None, None))])
    assert doubt.severity is Severity.SERIOUS
    assert "in 2 of 3 batches" in doubt.text
    assert "69.3 -> 63.17" in doubt.text


@pytest.mark.parametrize("control", ["clean", "noise"])
def test_controls_may_lose_early(make_row: MakeRow, control: str) -> None:
    assert early_loss([make_row(0.0, attack=control, accuracies=(0.98, 0.8))]) == []


def test_alarms_before_trigger(make_row: MakeRow) -> None:
    (doubt,) = alarms_before_trigger([make_row(0.2, 0.2, alarms=ALARMED)])
    assert "2 of 2 runs (seeds 0, 1)" in doubt.text
    assert alarms_before_trigger([make_row(0.2, alarms={4: "in the trigger step"})]) == []
    assert alarms_before_trigger([make_row(0.0, attack="clean", alarms=ALARMED)]) == []


def test_false_alarms(make_row: MakeRow) -> None:
    assert len(false_alarms([make_row(0.0, attack="clean", alarms=ALARMED)])) == 1
    assert false_alarms([make_row(0.0, attack="clean"), make_row(0.2, alarms=ALARMED)]) == []


def test_no_better_than_noise(make_row: MakeRow) -> None:
    noise = make_row(0.04, 0.06, attack="noise")
    strong, weak = make_row(0.2, 0.2), make_row(0.06, 0.06, label="weak")
    assert cells(no_better_than_noise([noise, strong, weak])) == ["weak × none"]
    assert no_better_than_noise([make_row(0.04, 0.06, attack="noise", defence="clip"), weak]) == []
    assert cells(no_better_than_noise([make_row(0.06, attack="noise"), weak])) == ["weak × none"]


def test_no_noise_baseline(make_row: MakeRow) -> None:
    plain, clipped = make_row(0.2), make_row(0.2, defence="clip")
    noise = make_row(0.01, attack="noise")
    (doubt,) = no_noise_baseline([plain, clipped, noise])
    assert doubt.cell == "defence clip"
    assert "no noise baseline" in doubt.text
    assert no_noise_baseline([plain, noise]) == []
    assert cells(no_noise_baseline([plain, clipped])) == ["defences none and clip"]
    assert no_noise_baseline([make_row(0.0, attack="clean")]) == []


def test_a_defence_that_leaves_no_effect_is_no_doubt(make_row: MakeRow) -> None:
    noise, bare = make_row(0.05, 0.06, attack="noise"), make_row(0.3, 0.31, attack="weak")
    held = make_row(0.0, 0.01, attack="weak", defence="gate")
    silent = make_row(0.04, 0.05, attack="noise", defence="gate")
    assert no_better_than_noise([noise, bare, held, silent]) == []
    assert cells(no_better_than_noise([held, silent])) == ["weak × gate"]
    assert includes_zero([bare, held]) == []


def test_includes_zero(make_row: MakeRow) -> None:
    assert len(includes_zero([make_row(0.3, -0.1, 0.0)])) == 1
    assert includes_zero([make_row(0.3, 0.25, 0.28)]) == []
    assert includes_zero([make_row(0.0)]) == []
    assert includes_zero([make_row(0.1, -0.1, attack="noise")]) == []


@pytest.mark.parametrize(("after_buffers", "fires"), [(0.95, False), (0.87, False), (0.86, True), (0.5, True)])
def test_buffers_explain(make_row: MakeRow, after_buffers: float, fires: bool) -> None:
    found = buffers_explain([make_row(0.2, 0.2, 0.2, after_buffers=after_buffers)])
    assert bool(found) is fires


def test_buffers_explain_needs_a_drop_and_a_measurement(make_row: MakeRow) -> None:
    assert buffers_explain([make_row(0.005, after_buffers=0.95)]) == []
    assert buffers_explain([make_row(0.2, summary={"accuracy_after_buffers": None})]) == []


def flagging(make_row: MakeRow, clean: float | None, poisoned: float | None, **how: Any) -> list[Row]:
    on_clean, attacked = {"flagged_clean": clean}, {"flagged_poisoned": poisoned}
    how = {"defence": "dsc"} | how
    return [make_row(0.0, 0.0, attack="clean", summary=on_clean, **how), make_row(0.1, 0.1, summary=attacked, **how)]


@pytest.mark.parametrize(
    ("clean", "poisoned", "expected"),
    [
        (0.03, 0.8, None),
        (None, None, None),
        (None, 0.2, None),
        (0.94, 0.96, None),
        (0.95, 1.0, (Severity.CAUTION, "clean × dsc", "corrects 95.0 % of clean samples and 100.0 % of those that ")),
        (1.0, None, (Severity.CAUTION, "clean × dsc", "corrects 100.0 % of clean samples: it takes everything for ")),
        (
            0.02,
            0.0,
            (Severity.SERIOUS, "accumulative × dsc", "0.0 % of the poisoned samples, of clean ones on a clean "),
        ),
        (
            None,
            0.0,
            (Severity.SERIOUS, "accumulative × dsc", "corrects 0.0 % of the poisoned samples: its threshold let"),
        ),
        (
            0.2,
            0.1,
            (Severity.CAUTION, "accumulative × dsc", "corrects 10.0 % of the poisoned samples, of clean ones on a "),
        ),
    ],
)
def test_chooses_nothing(
    make_row: MakeRow, clean: float | None, poisoned: float | None, expected: tuple[Severity, str, str] | None
) -> None:
    found = chooses_nothing(flagging(make_row, clean, poisoned))
    assert [(doubt.severity, doubt.cell) for doubt in found] == ([] if expected is None else [expected[:2]])
    assert expected is None or expected[2] in found[0].text


def test_choosing_is_judged_defence_by_defence(make_row: MakeRow) -> None:
    both = [*flagging(make_row, 1.0, 1.0, defence="at"), *flagging(make_row, 0.03, 0.9)]
    assert cells(chooses_nothing(both)) == ["clean × at"]
    noise = make_row(0.0, attack="noise", defence="dsc", summary={"flagged_poisoned": 0.0})
    assert chooses_nothing([*flagging(make_row, 0.03, 0.9), noise]) == []


@pytest.mark.parametrize(
    ("share", "fires"), [(0.019, True), (0.021, False), (0.05, False), (0.13, False), (0.15, True)]
)
def test_calibration_missed(make_row: MakeRow, share: float, fires: bool) -> None:
    calibration = {"mu": 0.3, "tau": 0.0, "rate": 0.05, "interval": [0.04, 0.07], "samples": 200}
    how: dict[str, Any] = {"attack": "clean", "summary": {"flagged_clean": share, "calibrations": [calibration]}}
    found = calibration_missed([make_row(0.0, 0.0, defence="dsc", **how)])
    assert bool(found) is fires
    if fires:
        assert f"corrects {100 * share:.1f} % (calibrated to 4.0 to 7.0 %) and" in found[0].text
        assert "2 of 2 runs (seeds 0, 1)" in found[0].text
    assert calibration_missed([make_row(0.0, defence="chain", **how)]) == []


@pytest.mark.parametrize("calibrations", [None, [], [1], [{"interval": None}], [{"interval": ["a", 1]}], [{}, {}]])
def test_a_calibration_that_cannot_be_read_is_not_judged(make_row: MakeRow, calibrations: object) -> None:
    summary = {"flagged_clean": 0.9, "calibrations": calibrations}
    assert calibration_missed([make_row(0.0, attack="clean", defence="dsc", summary=summary)]) == []


def test_false_vetoes(make_run: Make, make_row: MakeRow) -> None:
    runs = [make_run(attack="clean", defence="gate", seed=s, summary={"rolled_back": 2 * s}) for s in (0, 1, 2)]
    (doubt,) = false_vetoes(rows(runs))
    assert "6 of 12 steps of a clean stream were refused, in 2 of 3 runs (seeds 1, 2)." in doubt.text
    assert false_vetoes(rows(runs[:1])) == []
    assert false_vetoes([make_row(0.1, defence="gate", summary={"rolled_back": 3})]) == []


@pytest.mark.parametrize(("cost", "fires"), [(-0.05, False), (0.0, False), (0.009, False), (0.012, True)])
def test_costs_on_clean(make_row: MakeRow, cost: float, fires: bool) -> None:
    none = make_row(0.0, 0.01, 0.02, attack="clean")
    defended = make_row(cost, 0.01 + cost, 0.02 + cost, attack="clean", defence="at")
    found = costs_on_clean([none, defended])
    assert bool(found) is fires
    assert not fires or found[0].text.startswith("costs 1.2 ± 0.0 points (n = 3)")
    assert costs_on_clean([defended]) == []
    assert costs_on_clean([make_row(0.0), make_row(0.3, defence="at")]) == []


def test_quarantined(make_run: Make) -> None:
    runs = [make_run(seed=s, summary={"quarantined": 5 * s}) for s in (0, 1, 2)]
    (doubt,) = quarantined(rows(runs))
    assert (doubt.severity, doubt.text) == (
        Severity.NOTE,
        "15 samples with NaN or infinite pixels kept from the model in 2 of 3 runs (seeds 1, 2).",
    )
    assert quarantined(rows(runs[:1])) == []


def test_diverged(make_run: Make) -> None:
    runs = [make_run(seed=0), make_run(seed=1, status="diverged")]
    (doubt,) = diverged(rows(runs))
    assert "1 of 2 runs (seed 1)" in doubt.text
    assert diverged(rows(runs[:1])) == []


def test_halted(make_run: Make) -> None:
    runs = [make_run(seed=0), make_run(seed=1, status="halted", after=None)]
    (doubt,) = halted(rows(runs))
    assert "that of the other 1" in doubt.text
    (all_halted,) = halted(rows(runs[1:]))
    assert "unknown" in all_halted.text
    assert halted(rows(runs[:1])) == []


def test_starts_differ(make_row: MakeRow) -> None:
    low = make_row(0.1, label="low", accuracies=(0.96, 0.95))
    near = make_row(0.1, label="near", accuracies=(0.985, 0.97))
    reference = make_row(0.2)
    assert starts_differ([reference, near]) == []
    (doubt,) = starts_differ([reference, low])
    assert "96.0 % (low × none) to 98.0 %" in doubt.text


def test_budgets_differ(make_row: MakeRow) -> None:
    small, large = make_row(0.1), make_row(0.2, label="large", eps=0.3)
    assert len(budgets_differ([small, large])) == 1
    assert budgets_differ([small, make_row(0.2, attack="vanilla"), make_row(0, attack="clean", eps=0.9)]) == []


def test_power_over_optimiser(make_row: MakeRow) -> None:
    config = {"attack": {"name": "accumulative", "eps": 0.2, "weight_momentum": 1.1}}
    (doubt,) = power_over_optimiser([make_row(0.1, config=config)])
    assert "1.1" in doubt.text
    assert power_over_optimiser([make_row(0.1)]) == []


def test_settings_apart(make_run: Make) -> None:
    (doubt,) = settings_apart(rows([make_run(eps=0.1), make_run(eps=0.2)]))
    assert (doubt.severity, "attack.eps (0.1 | 0.2)" in doubt.text) == (Severity.NOTE, True)
    assert settings_apart(rows([make_run(seed=0), make_run(seed=1)])) == []


def test_made_in_two_places(make_run: Make) -> None:
    here = {"threads": 1, "cpu_capability": "AVX2"}
    elsewhere = make_run(seed=1, environment={**here, "burn_in": {"threads": "1, 2"}})
    resumed = make_run(seed=2, environment={**here, "resumed": [{"after_step": 3, "cpu_capability": "AVX512, AVX2"}]})
    blind = make_run(seed=3, environment={**here, "surrogate": {"torch": "2.13, 2.12"}})
    (third,) = made_in_two_places(rows([make_run(environment=here), blind]))
    assert "1 of 2 runs (seed 3) crafted on a surrogate of another environment (torch: 2.13, 2.12)" in third.text
    assert versions_mixed(rows([make_run(environment=here), blind])) == []
    first, second = made_in_two_places(rows([make_run(environment=here), elsewhere, resumed]))
    assert "1 of 3 runs (seed 1) started from a burn-in of another environment (threads: 1, 2)" in first.text
    assert "1 of 3 runs (seed 2) went on with a part of another environment (cpu_capability: AVX512" in second.text
    assert made_in_two_places(rows([make_run(environment=here)])) == []
    assert versions_mixed(rows([make_run(environment=here), elsewhere, resumed])) == []


@pytest.mark.parametrize(
    ("key", "value"), [("cpu_capability", "DEFAULT"), ("processor", "other"), ("packages", {"extra": "2"})]
)
def test_every_part_of_the_environment_counts(make_run: Make, key: str, value: object) -> None:
    here = {"threads": 1, "cpu_capability": "AVX2", "cpus": 4}
    (doubt,) = versions_mixed(rows([make_run(environment=here), make_run(seed=1, environment={**here, key: value})]))
    assert key in doubt.text
    assert versions_mixed(rows([make_run(environment=here), make_run(seed=1, environment={**here, "cpus": 8})])) == []


@pytest.mark.parametrize("key", ["mithridate", "torch", "device"])
def test_versions_mixed(make_run: Make, key: str) -> None:
    here = {"mithridate": "0.1.0", "torch": "2.12.0", "device": "cpu", "cpus": 2}
    runs = [make_run(seed=0, environment=here), make_run(seed=1, environment=here | {key: "other"})]
    (doubt,) = versions_mixed(rows(runs))
    assert f"{key}: {here[key]} | other" in doubt.text
    assert versions_mixed(rows([runs[0], make_run(seed=1, environment=here | {"cpus": 8})])) == []


def test_refused_updates_are_not_called_samples(federated: Make) -> None:
    run = federated()
    run = replace(run, summary={**run.summary, "quarantined": 2})
    (doubt,) = quarantined(rows([run]))
    assert doubt.text.startswith("2 updates of clients with NaN or infinite entries")
