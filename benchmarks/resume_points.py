"""Processor time a step in a long run, with a resume point after each: they must not grow with the steps behind.

Runs a tiny model over a synthetic stream with two detectors, through the engine as `mithridate run` does, and prints
the median time of the steps around some places:

    python benchmarks/resume_points.py --at 10 1000 5000 [--save-every 1] [--json times.json]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mithridate.bench.engine import run_recipe
from mithridate.bench.recipe import Cell, make_recipe
from mithridate.bench.watcher import Watcher

WINDOW = 9
"""Steps before and after a place whose median is taken."""


class Clock(Watcher):
    """Notes the processor time at the end of each step, which other work on the machine does not stretch."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def step(self, cell: Cell, done: int, steps: int, accuracy: float) -> None:
        """A step has ended."""
        self.ends.append(time.process_time())


def arguments() -> argparse.Namespace:
    """How long a run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--at", type=int, nargs="+", default=[10, 1000, 5000], help="steps whose time is printed")
    parser.add_argument("--save-every", type=int, default=1, help="steps between resume points")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--json", type=Path, default=None, help="write the times here")
    return parser.parse_args()


def seconds(folder: Path, steps: int, batch_size: int, save_every: int) -> list[float]:
    """Processor time of each step, from the second on."""
    rng = np.random.default_rng(0)
    n = (steps + 1) * batch_size + 300
    np.savez(folder / "x.npz", x=rng.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8), y=np.arange(n) % 3)
    parts = {"burn_in": 100, "victim": (steps + 1) * batch_size, "validation": 10, "trusted": 10, "test": 100}
    recipe = make_recipe(
        {
            "data": {"name": "npz", "path": str(folder / "x.npz"), "batch_size": batch_size, "augment": False, **parts},
            "model": {"name": "small_cnn", "width": 2},
            "burn_in": {"epochs": 1, "lr": 0.01},
            "attack": {"name": "noise", "eps": 0.01},
            "detector": [{"name": "loss"}, {"name": "loss", "label": "again"}],
            "monitor": {"name": "accuracy_floor", "floor": 0.0},
            "run": {"steps": steps, "lr": 1e-4, "images": 0, "save_every": save_every},
        }
    )
    clock = Clock()
    run_recipe(recipe, folder / "runs", device="cpu", cache=folder / "cache", watcher=clock)
    return [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]


def around(times: Sequence[float], step: int) -> float:
    """The median of the steps around one."""
    return statistics.median(times[max(step - WINDOW - 1, 0) : step + WINDOW])


def main() -> None:
    """Run, print, and write where asked."""
    args = arguments()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        times = seconds(Path(folder), max(args.at) + WINDOW, args.batch_size, args.save_every)
    found = {step: around(times, step) for step in args.at}
    table = Table(box=None, caption=f"a resume point every {args.save_every} steps; torch {torch.__version__}")
    for column in ("step", "milliseconds a step"):
        table.add_column(column, justify="right")
    for step, value in found.items():
        table.add_row(str(step), f"{1000 * value:.2f}")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
