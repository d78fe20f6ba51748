"""Numbers of detectors, and accuracy after a share of the steps."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mithridate.bench.store import Run
from mithridate.core.errors import ConfigError
from mithridate.reproduce.quantities import QUALITIES, check_measure, qualities, quantity
from tests.reproduce.made import run_of

SAID = [  # step, source, score
    *((1, "clean", -1.0), (1, "received", -4.0), (1, "moved_now", 6.0), (1, "moved_then", 2.0)),
    *((2, "clean", -3.0), (2, "received", -8.0), (2, "moved_now", 8.0), (2, "moved_then", 1.0)),
]
TRACE: list[dict[str, Any]] = [
    {"step": 0, "phase": "start", "accuracy": 0.9},
    {"step": 1, "phase": "accumulative", "accuracy": 0.8},
    {"step": 2, "phase": "trigger", "accuracy": 0.5},
]


@pytest.fixture
def run() -> Run:
    step, source, score = (np.array(column, dtype=object) for column in zip(*SAID, strict=True))
    scores = {
        "step": step.astype(np.int64),
        "source": source,
        "score": score.astype(np.float64),
        "detector": np.array(["d"] * len(SAID), dtype=object),
        "poisoned": source != "clean",
    }
    config = {"detector": [{"name": "discrepancy", "label": "d", "epoch": 1}], "burn_in": {"epochs": 4}}
    return replace(run_of(0, 0.5, trace=TRACE, config={**config, "run": {"steps": 2}}), scores=scores)


@pytest.mark.parametrize(
    ("measure", "value"),
    [
        ("score_clean", 2.0),
        ("score_poisoned:trigger", 8.0),
        ("score_gap", 4.0),
        ("score_gap:accumulative", 3.0),
        ("score_clean_at:2", 3.0),
        ("score_clean_at:3", None),
        ("moved_now", 7.0),
        ("moved_then:trigger", 1.0),
        ("accuracy_at:50%", 80.0),
        ("accuracy_at:100%", 50.0),
    ],
)
def test_a_record_gives_the_numbers_of_its_run(run: Run, measure: str, value: float | None) -> None:
    record = replace(run, scores={}, summary={**run.summary, QUALITIES: qualities(run)})
    for one in (run, record):
        assert quantity(one, measure, detector="d") == (None if value is None else pytest.approx(value))


def test_a_score_at_no_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="say of what"):
        check_measure("score_clean_at")
