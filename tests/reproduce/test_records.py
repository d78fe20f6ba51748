"""Records of runs: read again they say the same; and the leaderboard that is made of them."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mithridate.bench.store import Run
from mithridate.core.errors import StoreError
from mithridate.report.rows import groups, rows
from mithridate.reproduce.leaderboard import Printed, boards_of, reported_accuracies, standings, write_leaderboard
from mithridate.reproduce.quantities import OF_DETECTOR, QUANTITIES, quantity
from mithridate.reproduce.records import read_records, write_records
from tests.reproduce.made import run_of

STEPS = [
    {"step": 0, "phase": "start", "accuracy": 0.95, "loss": 0.1, "alarms": "", "admitted": None},
    {"step": 1, "phase": "accumulative", "accuracy": 0.9, "loss": float("nan"), "alarms": "floor", "admitted": True},
    {"step": 2, "phase": "trigger", "accuracy": 0.4, "loss": 1.23456789, "alarms": "", "admitted": False},
]


def scored(seed: int = 0) -> Run:
    """A run with what two detectors said of four samples a step, before and after poisoning."""
    rng = np.random.default_rng(seed)
    table = [
        (d, step, source, s)
        for d in ("kd", "mem")
        for step in (1, 2)
        for source in ("clean", "received")
        for s in range(4)
    ]
    scores = {
        "detector": np.array([d for d, *_ in table]),
        "step": np.array([step for _, step, *_ in table]),
        "source": np.array([source for *_, source, _ in table]),
        "poisoned": np.array([source == "received" for *_, source, _ in table]),
        "score": rng.normal(size=len(table)) - np.array([2.0 * (source == "received") for *_, source, _ in table]),
    }
    detectors = {"detector": [{"name": "kd"}, {"name": "discrepancy", "label": "mem", "epoch": 1}]}
    run = run_of(seed, 0.4, trace=STEPS, config=detectors)
    return Run(**{**run.__dict__, "scores": scores})


def test_a_record_says_what_its_run_says(tmp_path: Path) -> None:
    run = scored()
    (path,) = write_records([run], tmp_path / "some" / "where")
    assert json.loads(path.read_text(encoding="utf-8"))["run"] == run.path.name
    (again,) = read_records(tmp_path)
    arguments = {"accuracy_at": "1", "trace": "loss:last", "summary": "steps", "burn_in_accuracy": "last"}
    for name in QUANTITIES:
        measure = f"{name}:{arguments[name]}" if name in arguments else name
        told, wanted = quantity(again, measure), quantity(run, measure)
        assert told == (wanted if wanted is None else pytest.approx(wanted, rel=1e-5)), measure
    for name in OF_DETECTOR:
        for detector in ("kd", "mem"):
            told, wanted = (quantity(of, f"{name}:trigger", detector=detector) for of in (again, run))
            assert told == (wanted if wanted is None else pytest.approx(wanted)), (name, detector)
    assert quantity(run, "score_poisoned", detector="mem") == pytest.approx(
        -float(run.scores["score"][(run.scores["detector"] == "mem") & run.scores["poisoned"]].mean())
    )


def test_settings_that_are_infinite_are_kept_as_toml_writes_them(tmp_path: Path) -> None:
    write_records(
        [run_of(0, 0.4, config={"defence": {"name": "gate", "max_loss_rise": math.inf, "some": [-math.inf]}})], tmp_path
    )
    (again,) = read_records(tmp_path)
    assert again.config["defence"] == {"name": "gate", "max_loss_rise": "inf", "some": ["-inf"]}


@pytest.mark.parametrize("text", ["{}", "[]", "nothing", '{"format": 99}'])
def test_what_is_no_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "some.json").write_text(text, encoding="utf-8")
    with pytest.raises(StoreError, match=r"some\.json"):
        read_records(tmp_path)
    with pytest.raises(StoreError, match="no folder"):
        read_records(tmp_path / "nowhere")


RUNS = [
    run_of(seed, after, attack=attack, defence=defence, before=before, trace=STEPS, summary={"update_seconds": seconds})
    for seed in (0, 1)
    for attack, defence, before, after, seconds in (
        ("clean", "none", 0.95, 0.95, 1.0),
        ("clean", "clip", 0.94, 0.94, 1.5),
        ("clean", "gate", 0.93, 0.93, 1.2),
        ("vanilla", "none", 0.95, 0.60, 1.0),
        ("vanilla", "clip", 0.95, 0.90, 1.0),
        ("vanilla", "gate", 0.95, 0.95, 1.0),
        ("accumulative", "none", 0.93, 0.40, 1.0),
        ("accumulative", "clip", 0.93, 0.80, 1.0),
        ("accumulative", "gate", 0.70, 0.70, 1.0),
    )
]


def test_the_worst_attack_decides_the_place(tmp_path: Path) -> None:
    (members,) = groups(rows(RUNS)).values()
    assert [(s.defence, s.worst) for s in standings(members)] == [
        ("clip", "accumulative"),
        ("gate", "accumulative"),
        ("none", "accumulative"),
    ]
    tables = boards_of(members, {"clip": Printed("57.1", "60.2 (n = 3)")}, 1)
    first, attacks, printed = (
        dict(zip(table.head, next(iter(table.rows.values()))[0], strict=True)) for table in tables
    )
    assert (first["left by it (%)"], first["largest trigger drop (points)"]) == ("80.0 ± 0.0", "13.0")
    assert (first["place"], first["largest phase cost (points)"]) == ("1", "2.0")
    assert (first["clean stream: against none (points)"], first["time / none"]) == ("-1.0 ± 0.0", "1.5 ± 0.0")
    assert (attacks["defence"], attacks["accumulative"]) == ("clip", "80.0 ± 0.0")
    assert printed == {"defence": "clip", "reported": "57.1", "reproduced": "60.2 (n = 3)"}
    html = write_leaderboard(RUNS, tmp_path, {})
    page = html.read_text(encoding="utf-8")
    assert "Best under its worst attack: clip on" in page
    assert page.index("<dd>80.0 %</dd>") < page.index("<dd>40.0 %</dd>") < page.index("<svg") < page.index("<table")
    assert "clip: at worst 80.0 percent, by accumulative. gate: at worst 70.0 percent" in page
    assert "papers-1" not in page  # nothing is said of papers where there is nothing
    lines = pq.read_table(html.with_suffix(".parquet")).to_pylist()
    texts = list(csv.DictReader(html.with_suffix(".csv").read_text(encoding="utf-8").splitlines()))
    assert [line["seeds"] for line in lines] == [text["seeds"] for text in texts]
    assert [str(line["worst"]) for line in lines] == [text["worst"] for text in texts]


def test_the_papers_own_methods_are_beside_ours() -> None:
    printed = reported_accuracies([])
    assert {name: (p.reported, p.reproduced) for name, p in printed.items()} == {
        "none": ("50.4", ""),
        "clip": ("75.1", ""),
        "at": ("75.3", ""),
        "dsc": ("77.3", ""),
    }


def test_a_leaderboard_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no run attacks a defence"):
        write_leaderboard([run for run in RUNS if run.config["attack"]["name"] == "clean"], tmp_path, {})
