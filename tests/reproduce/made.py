"""Runs in memory, and a folder of items like the package's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mithridate.bench.store import Run

ITEM = """
title = "What one batch costs"
source = "Somebody et al., Table 1"
claim = "the attack costs more without a defence"
extends = "digits"

[recipe]
defence = [{ name = "none" }, { name = "clip", clip_norm = 0.1 }]

[[recipe.attack]]
name = "clean"
label = "clean-stream"

[[recipe.attack]]
name = "vanilla"
eps = 0.2

[small.run]
lr = 0.01

[table]
published = "table.csv"
rows = ["data", "attack"]
columns = ["defence", "measure"]

[table.cells.data]
CIFAR-10 = { data.name = ["cifar10", "digits"] }

[table.cells.attack]
Clean = { attack = "clean-stream" }
Poison = { attack = "vanilla" }

[table.cells.defence]
ST = { defence = "none" }
GC = { defence = "clip", "defence.clip_norm" = "1/10" }

[table.cells.measure]
accuracy = { measure = "after" }

[figure]
draw = ["accuracy_curves"]
series = { x = "defence", y = "after", line = "attack" }

[[check]]
says = "clipping ends higher"
greater = [
  { attack = "vanilla", defence = "clip", measure = "after" },
  { attack = "vanilla", defence = "none", measure = "after" },
]
"""

BASE = """
[recipe.model]
name = "small_cnn"
width = 4

[smoke]
data = { name = "digits", burn_in = 100, victim = 100, batch_size = 20, validation = 40, test = 100 }
burn_in = { epochs = 1, batch_size = 50 }
run = { steps = 1, seeds = [0, 1], images = 0 }

[small]
data = { name = "cifar10" }
run = { steps = 16, lr = 0.1 }

[paper]
data = { name = "cifar10" }
run = { steps = 100 }
"""

PUBLISHED = """# printed in bold: none
data,attack,defence,measure,value,std
CIFAR-10,Clean,ST,accuracy,83.4,
CIFAR-10,Clean,GC,accuracy,82.1,0.5
CIFAR-10,Poison,ST,accuracy,60,
CIFAR-10,Poison,GC,accuracy,,
SVHN,Clean,ST,accuracy,90,
"""


def item_folder(tmp_path: Path) -> Path:
    """A folder with one item, its base and published numbers."""
    texts = {"items/some2020-table1.toml": ITEM, "bases/digits.toml": BASE, "published/table.csv": PUBLISHED}
    for name, text in texts.items():
        path = tmp_path / "package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "package"


def run_of(
    seed: int,
    after: float,
    *,
    attack: str = "vanilla",
    defence: str = "none",
    before: float = 0.9,
    variant: str = "",
    trace: list[dict[str, Any]] | None = None,
    summary: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Run:
    """A run that ended at an accuracy, a fraction."""
    tables = {"attack": {"name": attack, "eps": 0.2}, "defence": {"name": defence}, "data": {"name": "digits"}}
    return Run(
        path=Path(f"{attack}__{defence}__{variant}__seed{seed}"),
        config={**tables, **(config or {}), **({"variant": variant} if variant else {})},
        summary={
            "seed": seed,
            "attack": attack,
            "defence": defence,
            "accuracy_start": 0.95,
            "accuracy_before_trigger": before,
            "accuracy_after_trigger": after,
            "drop": before - after,
            "steps": 4,
            **(summary or {}),
        },
        trace=trace or [],
        environment={},
        images={},
    )
