"""A user's own data, from a recipe on the command line, and again from the config that the run wrote."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tomli_w
from PIL import Image

from mithridate.bench.engine import run_recipe
from mithridate.bench.recipe import read_recipe
from mithridate.data import OWN
from tests.command import invoke
from tests.recipes import tiny_text


def recipe_text(name: str, path: str) -> str:
    """The tiny recipe on data of one's own, with a split as the data have it."""
    data = tomli_w.dumps({"data": {"name": name, "path": path, "victim": 0.25, "test": 60, "batch_size": 15}})
    return tiny_text(data, "run.steps=2")


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)


def trace(out: Path) -> dict[str, list[object]]:
    """All that a run recorded but its times."""
    (path,) = out.glob("*/trace.parquet")
    return {k: v for k, v in pq.read_table(path).to_pydict().items() if "seconds" not in k}


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_every_source_runs_and_its_config_runs_again_with_the_same_numbers(
    name: str, written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    recipes.mkdir()
    elsewhere.mkdir()
    (recipes / written[name].name).symlink_to(written[name])
    (recipes / "own.toml").write_text(recipe_text(name=name, path=written[name].name), encoding="utf-8")
    monkeypatch.chdir(elsewhere)  # a relative path starts at the recipe, wherever the command is given
    done = invoke("run", recipes / "own.toml", "--out", tmp_path / "first", "--cache", tmp_path / "cache 1")
    assert (done.code, "report:" in done.out) == (0, True), done
    (config,) = (tmp_path / "first").glob("*/config.toml")
    data = tomllib.loads(config.read_text(encoding="utf-8"))["data"]
    assert data["path"] == str(recipes / written[name].name)
    assert {part: data[part] for part in ("burn_in", "victim", "validation", "trusted", "test")} == {
        "burn_in": 96,
        "victim": 60,
        "validation": 12,
        "trusted": 12,
        "test": 60,
    }
    grid = run_recipe(read_recipe(str(config)), str(tmp_path / "second"), cache=str(tmp_path / "cache 2"))
    assert trace(tmp_path / "first") == trace(tmp_path / "second")
    assert (grid.directories[0] / "config.toml").read_text(encoding="utf-8") == config.read_text(encoding="utf-8")


def test_a_path_in_a_recipe_starts_at_its_folder_and_one_in_the_shell_at_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.toml").write_text(recipe_text(name="folder", path="pictures"), encoding="utf-8")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert read_recipe("../own.toml").data.path == str(tmp_path / "here" / ".." / "pictures")
    changed = read_recipe("../own.toml", changes=["data.path=others", "burn_in.checkpoint=model.pt"])
    assert changed.data.path == str(tmp_path / "here" / "others")
    assert changed.burn_in.checkpoint == str(tmp_path / "here" / "model.pt")


def no_classes(root: Path) -> str:
    (root / "own").mkdir()
    return "folder"


def one_class(root: Path) -> str:
    for number in range(4):
        write_image(root / "own" / "cat" / f"{number}.png")
    return "folder"


def one_image(root: Path) -> str:
    write_image(root / "own" / "cat" / "1.png")
    return "folder"


def unequal_lengths(root: Path) -> str:
    np.savez(root / "own", x=np.zeros((5, 8, 8), np.uint8), y=np.arange(4) % 2)
    (root / "own.npz").rename(root / "own")
    return "npz"


def pickled(root: Path) -> str:
    np.savez(root / "own", x=np.array([object()] * 4), y=np.arange(4) % 2)
    (root / "own.npz").rename(root / "own")
    return "npz"


def nothing(_: Path) -> str:
    return "saved"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_classes, "own has no class folders"),
        (one_class, "one class alone"),
        (one_image, "own has one image"),
        (unequal_lengths, "x has 5, y has 4 rows"),
        (pickled, "unpickling them runs code"),
        (nothing, "own is not a data set that `save_to_disk` wrote"),
    ],
)
def test_bad_data_end_with_exit_code_2_a_message_and_nothing_written(
    spoil: Callable[[Path], str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "own.toml").write_text(recipe_text(name=spoil(tmp_path), path="own"), encoding="utf-8")
    done = invoke("run", tmp_path / "own.toml", "--out", tmp_path / "out", "--cache", tmp_path / "cache")
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "out").exists()
