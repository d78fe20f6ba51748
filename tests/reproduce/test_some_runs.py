"""Some runs of an item, with settings of one's own: what is chosen is made, shown and named."""

from pathlib import Path
from typing import Any

import pytest

from mithridate.bench.engine import run_recipe
from mithridate.cli.reproduce import reproduce_items
from mithridate.core.errors import ConfigError
from mithridate.reproduce.item import read_item
from mithridate.reproduce.run import reproduce
from mithridate.reproduce.selection import Selection

NAME = "some2020-table1"


def test_only_what_is_asked_for_is_made_and_a_change_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mithridate.report.figure_sections", lambda *_: [])
    options: dict[str, Any] = {"seeds": [0], "device": "cpu", "cache": tmp_path / "cache"}
    only, changes = Selection.asked(["attack=vanilla", "defence=clip"]), ["run.lr=0.02"]
    done = reproduce(read_item(NAME, folder), "smoke", tmp_path / "out", only=only, changes=changes, **options)
    (run,) = done.runs
    assert (run.path.name, run.config["run"]["lr"]) == ("vanilla__clip__seed0", 0.02)
    assert run.config["title"] == "Somebody et al., Table 1, smoke scale (run.lr=0.02): What one batch costs"
    assert "Run with other settings than the item&#39;s: run.lr=0.02." in done.report.html.read_text(encoding="utf-8")
    assert {path.name for path in run.path.parent.iterdir() if path.is_dir() and "__" in path.name} == {run.path.name}


def test_an_item_keeps_its_own_settings_when_some_are_changed(folder: Path) -> None:
    item = read_item(NAME, folder)
    assert item.recipe("small", ["run.lr=0.5"]).run.lr == 0.5
    assert item.recipe("small").run.lr == 0.01
    with pytest.raises(ConfigError, match=r"at scale small: .*lrr"):
        item.recipe("small", ["run.lrr=0.5"])


def test_a_choice_of_nothing_names_what_there_is(folder: Path, tmp_path: Path) -> None:
    item, only = read_item(NAME, folder), Selection.asked(["defence=clipp"])
    with pytest.raises(ConfigError, match="attack: clean-stream, vanilla; defence: none, clip"):
        reproduce(item, "smoke", tmp_path / "out", only=only, device="cpu", cache=tmp_path / "cache")
    with pytest.raises(ConfigError, match="none of the recipe's runs"):
        run_recipe(item.recipe("smoke"), tmp_path / "out", only=only.picks_cell, device="cpu", cache=tmp_path / "cache")
    assert not (tmp_path / "out").exists()


def test_a_variant_of_which_nothing_is_chosen_needs_no_data(folder: Path, tmp_path: Path) -> None:
    changes = ["grid.data.name=['digits','svhn']", "run.steps=0"]
    only = Selection.asked(["data.name=digits", "attack=clean-stream", "defence=none"])
    recipe = read_item(NAME, folder).recipe("smoke", changes)
    nothing: dict[str, Any] = {"data_root": tmp_path, "device": "cpu", "cache": tmp_path / "cache"}
    grid = run_recipe(recipe, tmp_path / "out", only=only.picks_cell, **nothing)
    assert [path.name for path in grid.directories] == [f"clean-stream__none__digits__seed{s}" for s in (0, 1)]


def test_records_lie_where_the_runs_belong(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure that shows a table's runs keeps none of its own."""
    monkeypatch.setattr("mithridate.report.figure_sections", lambda *_: [])
    head = f'title = "The same"\nsource = "Somebody et al., Figure 1"\nclaim = "the same"\nalso = ["{NAME}"]\n'
    (folder / "items" / "some2020-figure1.toml").write_text(head, encoding="utf-8")
    reproduce_items(
        [read_item("some2020-figure1", folder)],
        "smoke",
        tmp_path / "out",
        seeds=[0],
        only=["attack=clean-stream", "defence=none"],
        form="md",
        record=tmp_path / "results",
        device="cpu",
        cache=tmp_path / "cache",
    )
    kept = [path.relative_to(tmp_path / "results") for path in (tmp_path / "results").rglob("*.json")]
    assert kept == [Path(NAME, "smoke", "clean-stream__none__seed0.json")]
