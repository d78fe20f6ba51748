"""No component compares a model with itself: who looks back at a model that is not kept is refused before the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tomli_w
from torch import Generator, Tensor

from mithridate.attacks.budget import Phased
from mithridate.bench.recipe import Recipe, make_recipe, read_recipe
from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.core.registry import settings
from mithridate.core.view import Need, View
from tests.command import invoke

ATTACK = {"name": "accumulative", "eps": 0.1}
DISCREPANCY = {"name": "discrepancy"}
LOOKING: dict[str, tuple[dict[str, Any], str]] = {
    "dsc": ({"defence": {"name": "dsc"}}, "defence dsc"),
    "chain": ({"defence": {"name": "chain", "parts": [{"name": "clip"}, {"name": "dsc"}]}}, "defence chain"),
    "filter": ({"defence": {"name": "filter", "detector": DISCREPANCY}}, "defence filter"),
    "detector": ({"detector": {**DISCREPANCY, "label": "old"}}, "detector old"),
    "hiding": ({"attack": {**ATTACK, "beta": 0.1}}, "attack accumulative"),
    "gate_aware": (
        {"attack": {"name": "gate_aware", "inner": {"name": "accumulative", "beta": 0.1}}},
        "attack gate_aware",
    ),
    "surrogate": ({"attack": {**ATTACK, "model_access": "surrogate"}}, r"\[surrogate\]"),
    "dgc": ({"defence": {"name": "dgc"}}, "defence dgc"),
    "dgc in rounds": ({"defence": {"name": "dgc"}, "federated": {}}, "defence dgc"),
    "plug-in": ({"attack": {"name": f"{__name__}:Nostalgic"}}, "attack Nostalgic"),
}
"""Tables of a recipe with one component that looks back, and who is named."""


@settings
class Nostalgic(Phased):
    """An attack of somebody else's that looks back, and says no more of it than its need."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.HISTORY})

    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        view.history.checkpoint()
        return batch.x


def cells_of(tables: Mapping[str, Any], **burn_in: Any) -> Recipe:
    recipe = make_recipe({"attack": {"name": "clean"}, "burn_in": burn_in, **tables})
    assert list(recipe.cells())
    return recipe


@pytest.mark.parametrize("who", LOOKING)
@pytest.mark.parametrize("burn_in", [{}, {"checkpoints": [40]}, {"epochs": 0, "checkpoints": [0]}], ids=str)
def test_without_an_older_model_nothing_runs(who: str, burn_in: dict[str, Any]) -> None:
    tables, name = LOOKING[who]
    with pytest.raises(ConfigError, match=rf"{name} looks back .*`\[burn_in\] checkpoints = \[\d+\]`"):
        cells_of(tables, **burn_in)
    cells_of(tables, epochs=40, checkpoints=[20])
    cells_of(tables, checkpoint="model.pt", older={"20": "older.pt"})


@pytest.mark.parametrize(
    ("tables", "name"),
    [
        ({"defence": {"name": "dsc", "epoch": 40}}, "defence dsc"),
        ({"detector": {**DISCREPANCY, "epoch": 40}}, "detector discrepancy"),
        ({"detector": {"name": "loss", "epoch": 40}}, "detector loss"),
        ({"attack": {**ATTACK, "beta": 0.1, "hide_from": 40}}, "attack accumulative"),
        ({"attack": {**ATTACK, "model_access": "surrogate"}, "surrogate": {"epoch": 40}}, r"\[surrogate\]"),
    ],
    ids=str,
)
def test_the_last_epoch_is_the_model_itself(tables: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} looks back at burn-in epoch 40, the model that the stream starts"):
        cells_of(tables, epochs=40, checkpoints=[20, 40])


def test_half_of_the_burn_in_has_to_be_kept() -> None:
    half = {"defence": {"name": "dsc", "epoch": "half"}}
    cells_of(half, epochs=15, checkpoints=[7])
    with pytest.raises(ConfigError, match=r"burn-in epoch 7, which is not kept.*checkpoints = \[7\]"):
        cells_of(half, epochs=15, checkpoints=[8])


@pytest.mark.parametrize(
    "tables",
    [
        {"defence": {"name": "dsc", "old": "back"}},
        {"detector": {"name": "loss"}},
        {"attack": {**ATTACK, "beta": 0.0}},
        {"attack": {**ATTACK, "model_access": "surrogate"}, "surrogate": {"kind": "trained"}},
    ],
    ids=str,
)
def test_who_does_not_look_at_the_burn_in_needs_none_of_it(tables: dict[str, Any]) -> None:
    cells_of(tables)


def test_the_command_says_so_before_the_run(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    tables = {"data": {"name": "digits"}, "attack": {"name": "clean"}, "defence": {"name": "dsc", "epoch": "half"}}
    recipe.write_text(tomli_w.dumps(tables), encoding="utf-8")
    out = tmp_path / "runs"
    done = invoke("run", recipe, "--out", out, "--set", "burn_in.epochs=6")
    assert done.code == 2
    assert "defence dsc looks back at burn-in epoch 3" in done.err
    assert "checkpoints = [3]" in done.err
    assert not out.exists()


def test_paths_of_older_states_start_at_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[burn_in]\ncheckpoint = "m.pt"\nolder = { 20 = "old/e20.pt" }\n[attack]\nname = "clean"\n', encoding="utf-8"
    )
    recipe = read_recipe(path)
    assert recipe.burn_in.older == {"20": str(tmp_path / "old" / "e20.pt")}
    (cell,) = recipe.cells()
    assert make_recipe(cell.config()).burn_in == recipe.burn_in
