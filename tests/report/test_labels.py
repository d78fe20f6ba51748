"""Runs are pooled only if they differ in nothing but the seed; in what they differ is said wherever they are named."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mithridate.bench.store import Run
from mithridate.report import build_report
from mithridate.report.comparisons import undefended
from mithridate.report.labels import LONGEST
from mithridate.report.rows import rows
from mithridate.report.tables.results import to_markdown

Make = Callable[..., Run]
Save = Callable[[Run], Run]


def with_setting(run: Run, table: str, key: str, value: object) -> Run:
    return replace(run, config={**run.config, table: {**run.config.get(table, {}), key: value}})


def test_runs_that_differ_in_the_seed_alone_are_pooled(make_run: Make) -> None:
    (row,) = rows(
        [make_run(seed=seed, config={"title": f"run {seed}", "plugins": [f"/{seed}.py"]}) for seed in range(3)]
    )
    assert len(row.runs) == 3
    assert row.names.keys() == {"dataset", "model", "attack", "defence"}


@pytest.mark.parametrize(
    ("table", "key", "where", "said"),
    [
        ("attack", "eps", "attack", "accumulative, eps 0.1"),
        ("defence", "clip_norm", "defence", "none, clip_norm 0.1"),
        ("model", "width", "model", "small_cnn, width 0.1"),
        ("data", "batch_size", "dataset", "digits, data.batch_size 0.1"),
        ("burn_in", "lr", "dataset", "digits, burn_in.lr 0.1"),
        ("run", "lr", "dataset", "digits, run.lr 0.1"),
        ("monitor", "floor", "dataset", "digits, monitor.floor 0.1"),
        ("surrogate", "epoch", "attack", "accumulative, surrogate.epoch 0.1"),
        ("future", "x", "dataset", "digits, future.x 0.1"),
    ],
)
def test_whatever_else_differs_is_shown_apart(make_run: Make, table: str, key: str, where: str, said: str) -> None:
    found = rows([with_setting(make_run(seed=0), table, key, value) for value in (0.1, 0.2)])
    assert len(found) == 2
    assert said in {getattr(row, where) for row in found}
    assert [row.names[f"{table}.{key}"] for row in found] == ["0.1", "0.2"]


def test_what_one_run_leaves_unset_is_said(make_run: Make) -> None:
    found = rows([make_run(), with_setting(make_run(), "attack", "norm", "l2")])
    assert {row.attack for row in found} == {"accumulative, norm unset", "accumulative, norm l2"}


def test_long_values_stay_apart(make_run: Make) -> None:
    values = ["x" * 300 + end for end in "ab"]
    found = rows([with_setting(make_run(), "attack", "note", value) for value in values])
    assert len({row.attack for row in found}) == 2
    assert max(len(row.attack) for row in found) < LONGEST + len("accumulative, note ") + 8


def test_other_samples_are_another_data_set(make_run: Make) -> None:
    """The same path may hold other samples today; the same samples may lie elsewhere."""
    own = [make_run(seed=seed, config={"data": {"name": "npz", "path": f"/{seed}"}}) for seed in (0, 1)]
    assert len(rows([replace(run, summary={**run.summary, "samples_key": "a"}) for run in own])) == 1
    same_path = [make_run(seed=s, summary={"samples_key": str(s)}) for s in (0, 1)]
    assert len(rows(same_path)) == 2


def test_a_label_means_the_same_under_every_defence(make_run: Make) -> None:
    bare = [make_run(eps=eps) for eps in (0.1, 0.2)]
    clipped = make_run(eps=0.1, defence="clip")
    found = rows([*bare, clipped])
    (defended,) = (row for row in found if row.defence == "clip")
    twin = undefended(defended, found)
    assert twin is not None
    assert twin.attack_settings["eps"] == 0.1


def test_every_table_and_file_has_the_settings_as_columns(make_run: Make, save_run: Save, tmp_path: Path) -> None:
    for eps in (0.1, 0.2):
        for defence in ("none", "clip"):
            save_run(make_run(eps=eps, defence=defence, folder=tmp_path / "store" / f"{eps}"))
    folders = [tmp_path / "store" / "0.1", tmp_path / "store" / "0.2"]
    paths = build_report(folders, tmp_path / "report")
    for path in (paths.files[f"{name}.csv"] for name in ("summary", "runs", "measures")):
        assert path is not None
        with path.open(encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        assert [line["attack.eps"] for line in lines] in (["0.1", "0.2"] * 2, ["0.1"] * 2 + ["0.2"] * 2)
    for text in (paths.files[f"{name}.md"].read_text(encoding="utf-8") for name in ("summary", "measures")):
        assert "| attack.eps |" in text
    page = paths.html.read_text(encoding="utf-8")
    assert "accumulative, eps 0.1" in page
    assert page.count(">attack.eps</th>") >= 2


def test_columns_of_numbers_stay_numbers(make_run: Make) -> None:
    text = to_markdown(rows([make_run(eps=0.1), make_run(eps=0.2)]))
    head, align, *lines = text.splitlines()
    assert head.split(" | ")[:3] == ["| attack", "defence", "attack.eps"]
    assert align.split(" | ")[2:4] == ["---", "---:"]
    assert len(lines) == 2


def test_runs_from_other_start_models_are_shown_apart_wherever_the_file_lies(make_run: Make) -> None:
    def run(seed: int, path: str, inputs: str) -> Run:
        made = with_setting(make_run(seed=seed), "burn_in", "checkpoint", path)
        return replace(made, summary={**made.summary, "inputs_key": inputs})

    assert len(rows([run(0, "/a/model.pt", "11aa"), run(1, "/b/model.pt", "11aa")])) == 1
    assert len(rows([run(0, "/a/model.pt", "11aa"), run(1, "/a/model.pt", "22bb")])) == 2


def test_runs_of_other_plug_in_code_are_shown_apart(make_run: Make) -> None:
    def run(seed: int, digest: str) -> Run:
        made = make_run(seed=seed)
        return replace(made, environment={**made.environment, "code": {"/somewhere/plug.py": digest}})

    assert len(rows([run(0, "11aa"), run(1, "11aa")])) == 1
    apart = rows([run(0, "11aa"), run(1, "22bb")])
    assert len(apart) == 2
    assert "code.plug.py 11aa" in apart[0].dataset
