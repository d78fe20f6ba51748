from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mithridate.bench.store import Run
from mithridate.report.detectors import detectors, looking_back, reference, representatives
from mithridate.report.rows import rows

Make = Callable[..., Run]
WithScores = Callable[..., Run]


def test_interval_is_counted_from_the_end_of_the_burn_in(make_run: Make, with_scores: WithScores) -> None:
    tables: list[dict[str, Any]] = [
        {"name": "discrepancy", "label": "d2", "epoch": 2},
        {"name": "discrepancy", "label": "d11", "epoch": 11},
        {"name": "discrepancy", "label": "d5", "epoch": 5},
        {"name": "discrepancy", "label": "js", "epoch": 5, "divergence": "js"},
        {"name": "discrepancy", "label": "earliest"},
        {"name": "discrepancy", "label": "updates", "old": "back", "back": 3},
        {"name": "loss", "label": "loss"},
        {"name": "loss", "label": "l5", "epoch": 5},
    ]
    said = {t["label"]: {1: {"clean": [0.0]}} for t in tables} | {"stranger": {1: {"clean": [0.0]}}}
    run = with_scores(make_run(), said, tables)
    run = replace(run, config={**run.config, "burn_in": {"epochs": 12, "checkpoints": [5, 2, 11]}})
    found = {info.label: info for info in detectors(rows([run]))}
    assert {label: info.interval for label, info in found.items()} == {
        "d2": 10,
        "d11": 1,
        "d5": 7,
        "js": 7,
        "earliest": 10,
        "updates": None,
        "loss": None,
        "l5": 7,
        "stranger": None,
    }
    infos = list(found.values())
    families = [[info.label for info in family] for family in looking_back(infos, "discrepancy")]
    assert families == [["d11", "d5", "d2", "earliest"], ["js"]]
    assert reference(looking_back(infos, "discrepancy")[0]).label == "d5"
    assert [info.label for info in representatives(infos)] == ["d11", "d5", "js", "updates", "loss", "l5", "stranger"]


def test_a_given_checkpoint_has_no_epochs(make_run: Make, with_scores: WithScores) -> None:
    run = with_scores(make_run(), {"d": {1: {"clean": [0.0]}}}, [{"name": "discrepancy", "label": "d", "epoch": 4}])
    run = replace(run, config={**run.config, "burn_in": {"epochs": 40, "checkpoint": "model.pt"}})
    assert [info.interval for info in detectors(rows([run]))] == [None]


@pytest.mark.parametrize(("burn_in", "epoch"), [({"epochs": 40}, 20), ({}, None), ({"epochs": "many"}, None)])
def test_half_of_a_burn_in_of_unknown_length_is_no_epoch(
    make_run: Make, with_scores: WithScores, burn_in: dict[str, Any], epoch: int | None
) -> None:
    run = with_scores(
        make_run(), {"d": {1: {"clean": [0.0]}}}, [{"name": "discrepancy", "label": "d", "epoch": "half"}]
    )
    run = replace(run, config={**run.config, "burn_in": burn_in})
    assert [info.epoch for info in detectors(rows([run]))] == [epoch]
