"""How time and memory grow: with steps, clients, runs of a report and detectors. No term should be above linear.

Models are tiny, so that what is measured is the loop around them. Each point runs in a process of its own, after a
small one that loads what is needed:

    python benchmarks/growth.py steps clients runs detectors [--sizes 1000 10000] [--json growth.json]

`steps`: an online run with two monitors and a resume point every ten steps, through the engine, over a victim part
that is as long as the run. `clients`: twenty rounds in which every client brings one sample. `runs`: a report of so
many runs, ten seeds a cell, each with scores and pictures. `detectors`: an online run of two hundred steps.
Beside each point stands the power of the size by which time has grown since the point before: 1 is linear.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mithridate.bench import store
from mithridate.bench.engine import run_recipe
from mithridate.bench.recipe import make_recipe
from mithridate.report import build_report
from peak_memory import peak_memory

SIZES: Mapping[str, tuple[int, ...]] = {
    "steps": (1000, 10_000, 100_000),
    "clients": (10, 100, 1000, 10_000),
    "runs": (10, 100, 1000),
    "detectors": (1, 2, 4, 8),
}
"""What is measured by default."""

ROUNDS, STEPS, BATCH, SEEDS = 20, 200, 10, 10


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="+", choices=list(SIZES))
    parser.add_argument("--sizes", type=int, nargs="+", default=None, help="in place of the usual ones")
    parser.add_argument("--json", type=Path, default=None, help="write the points here")
    parser.add_argument("--point", action="store_true", help="measure one size in this process, and print it as JSON")
    return parser.parse_args()


def images(folder: Path, victim: int) -> dict[str, Any]:
    """Settings of a data set of noise, written to a folder."""
    parts = {"burn_in": 100, "victim": victim, "validation": 10, "trusted": 10, "test": 100}
    n, rng = sum(parts.values()), np.random.default_rng(0)
    np.savez(folder / "x.npz", x=rng.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8), y=np.arange(n) % 3)
    return {"name": "npz", "path": str(folder / "x.npz"), "batch_size": BATCH, "augment": False, **parts}


def run(folder: Path, victim: int, **tables: Any) -> Callable[[], object]:  # noqa: ANN401  (of a recipe)
    """A run of a tiny model, by the engine."""
    recipe = make_recipe(
        {
            "data": images(folder, victim),
            "model": {"name": "small_cnn", "width": 2},
            "burn_in": {"epochs": 1, "lr": 0.01},
            **tables,
        }
    )
    return lambda: run_recipe(recipe, folder / "runs", device="cpu", cache=folder / "cache")


def steps_of(folder: Path, size: int) -> Callable[[], object]:
    """An online run of so many steps."""
    return run(
        folder,
        (size + 1) * BATCH,
        attack={"name": "noise", "eps": 0.01},
        monitor=[{"name": "accuracy_floor", "floor": 0.0}, {"name": "loss_amplification", "factor": 1e6}],
        run={"steps": size, "lr": 1e-4, "images": 0, "save_every": 10, "evaluate_every": 10},
    )


def clients_of(folder: Path, size: int) -> Callable[[], object]:
    """Rounds of so many clients."""
    return run(
        folder,
        size,
        attack={"name": "accumulative", "poison_ratio": 0.1},
        clients={"clients": size, "partition": "one"},
        federated={"rounds": ROUNDS, "lr": 1e-3},
    )


def detectors_of(folder: Path, size: int) -> Callable[[], object]:
    """An online run with so many detectors."""
    return run(
        folder,
        (STEPS + 1) * BATCH,
        attack={"name": "noise", "eps": 0.01},
        detector=[{"name": "loss", "label": f"loss-{i}"} for i in range(size)],
        run={"steps": STEPS, "lr": 1e-4, "images": 0, "save_every": 10, "evaluate_every": 10},
    )


def runs_of(folder: Path, size: int) -> Callable[[], object]:
    """A report of so many runs: ten seeds a cell, and as many attacks as defences."""
    cells = math.ceil(size / SEEDS)
    side = math.ceil(math.sqrt(cells))
    for number in range(size):
        cell, seed = divmod(number, SEEDS)
        _write_run(folder / "runs", f"attack-{cell // side}", f"defence-{cell % side}", seed)
    return lambda: build_report(folder / "runs", folder / "report")


def _write_run(folder: Path, attack: str, defence: str, seed: int, steps: int = 20) -> None:
    """A run of made-up numbers, as the engine writes them."""
    rng = np.random.default_rng(seed)
    path = folder / store.run_id(attack, defence, seed)
    accuracy = 0.9 - 0.002 * np.arange(steps + 2) + rng.normal(0, 0.005, steps + 2)
    accuracy[-1] -= 0.2
    phases = ["start", *["accumulative"] * steps, "trigger"]
    trace = [
        {"step": i, "phase": phase, "accuracy": float(a), "loss": 1 - float(a), "test_samples": 1000, "batch_loss": 0.3}
        | {"gradient_norm": 1.0, "bounded_norm": 1.0, "update_norm": 0.1, "poison_linf": 0.1, "poisoned": 1.0}
        | {"quarantined": 0, "admitted": True, "verdict": "", "alarms": "", "seconds": 0.1}
        for i, (phase, a) in enumerate(zip(phases, accuracy, strict=True))
    ]
    start, before, after = (float(accuracy[i]) for i in (0, -2, -1))
    summary = {
        **{"accuracy_start": start, "accuracy_before_trigger": before, "accuracy_after_trigger": after},
        **{"drop": before - after, "accuracy_after_buffers": before, "steps": steps, "seconds": 2.0, "seed": seed},
        **{"status": "finished", "stopped_by": "steps", "alarms": 0, "first_alarm_step": None, "rolled_back": 0},
        **{"quarantined": 0, "flagged_clean": None, "flagged_poisoned": None, "update_seconds": 0.01},
        **{"read_step": steps, "read_accuracy": before, "read_samples": 1000, "classes_unread": 0},
        **{"attack": attack, "defence": defence, "dataset": "digits", "model": "small_cnn", "calibrations": []},
    }
    config = {
        "data": {"name": "digits", "batch_size": 100, "test": 1000},
        "model": {"name": "small_cnn", "width": 16},
        "attack": {"name": "pgd", "label": attack, "eps": 0.1},
        "defence": {"name": "none" if defence.endswith("-0") else "clip", "label": defence},
        "run": {"seeds": [seed], "steps": steps},
    }
    said = [(step, source, i) for step in range(1, steps + 1) for source in ("clean", "received") for i in range(BATCH)]
    scores = {
        "step": np.array([step for step, _, _ in said]),
        "source": np.array([source for _, source, _ in said], dtype=object),
        "detector": np.full(len(said), "loss", dtype=object),
        "sample": np.array([i for _, _, i in said]),
        "poisoned": np.array([source == "received" for _, source, _ in said]),
        "score": rng.normal(size=len(said)),
    }
    pictures = {f"accumulative.{kind}": rng.random((4, 1, 8, 8), dtype=np.float32) for kind in ("clean", "poisoned")}
    store.seal(
        path,
        {
            store.CONFIG: store.write_toml(path / store.CONFIG, config),
            store.TRACE: store.write_trace(path / store.TRACE, trace),
            store.SUMMARY: store.write_json(path / store.SUMMARY, summary),
            store.ENVIRONMENT: store.write_json(path / store.ENVIRONMENT, {"torch": torch.__version__}),
            store.IMAGES: store.write_arrays(path / store.IMAGES, pictures),
            store.SCORES: store.write_scores(path / store.SCORES, scores),
        },
    )


CALLS = {"steps": steps_of, "clients": clients_of, "runs": runs_of, "detectors": detectors_of}


def point(what: str, size: int) -> dict[str, float]:
    """Wall and processor seconds, and bytes at the highest, of one size."""
    torch.set_num_threads(1)
    measured: dict[str, float] = {}
    for n in (min(SIZES[what][0], size), size):  # the first loads what is needed, and is not counted
        with tempfile.TemporaryDirectory() as name:
            call = CALLS[what](Path(name), min(n, 20) if n != size else n)
            began, processor = time.perf_counter(), time.process_time()
            peak = peak_memory(call)
            measured = {
                "seconds": time.perf_counter() - began,
                "processor": time.process_time() - processor,
                "bytes": peak,
            }
    return measured


def main() -> None:
    """Measure, print, and write where asked."""
    args = arguments()
    if args.point:
        print(json.dumps(point(args.what[0], args.sizes[0])))
        return
    points: dict[str, dict[int, dict[str, float]]] = {}
    table = Table(box=None, caption=f"torch {torch.__version__}, one thread")
    for column in ("", "size", "seconds", "processor seconds", "grown by the power", "peak MiB"):
        table.add_column(column, justify="right")
    for what in args.what:
        points[what] = {}
        last: tuple[int, float] | None = None
        for size in args.sizes or SIZES[what]:
            command = [sys.executable, __file__, what, "--sizes", str(size), "--point"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603  (this file)
            now = points[what][size] = json.loads(done.stdout.splitlines()[-1])
            power = "" if last is None else f"{math.log(now['processor'] / last[1]) / math.log(size / last[0]):.2f}"
            last = size, now["processor"]
            row = (f"{now['seconds']:.1f}", f"{now['processor']:.1f}", power, f"{now['bytes'] / 2**20:.0f}")
            table.add_row(what, f"{size:,}", *row)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(points) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
