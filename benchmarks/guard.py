"""What a guard costs in a plain loop of torch: seconds and peak memory of a step, against the same loop without it.

On real CIFAR-10, a ResNet-18 that was trained for two epochs (dsc looks back at the first) learns on from batches of
100, at a low rate. The guards take turns with the plain loop, the order changing from repetition to repetition; the
table shows the median, smallest and largest ratio of the same batches in the same repetition. dsc's threshold is set
such that it corrects 5 % of trusted samples. Memory: each loop in a process of its own; the rise of the kernel's
high-water mark while it makes three steps (Linux only).

    MITHRIDATE_DATA=... python benchmarks/guard.py --threads 1 --json guard.json
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

from mithridate.core.batch import Batch
from mithridate.core.defence import Defence
from mithridate.core.discrepancy import memorization_discrepancy
from mithridate.core.environment import environment
from mithridate.core.model import WhiteBox
from mithridate.core.past import Weights
from mithridate.data.stream import StreamSettings, open_stream
from mithridate.guard.loop import Guard
from mithridate.models import build_model
from mithridate.training.history import History
from peak_memory import peak_memory

CIFAR = StreamSettings(name="cifar10", victim=10_000, trusted=1000, test=100)
GUARDS: dict[str, dict[str, Any]] = {
    "no defence": {"defence": Defence()},
    "default": {},
    "clip": {"defence": "clip"},
    "gate": {"defence": "gate"},
    "gate, bfloat16": {"defence": {"name": "gate", "precision": "bfloat16"}},
    "gate, every 10 steps": {"defence": "gate", "every": 10},
    "gate, 500 samples": {"defence": {"name": "gate", "trusted_size": 500}},
    "dsc": {"defence": {"name": "dsc"}},
    "recommended": {"defence": "recommended"},
}
OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-4),
}


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=16, help="of the ResNet-18")
    parser.add_argument("--images", type=int, default=4000, help="that the model is trained on first")
    parser.add_argument("--batches", type=int, default=20, help="steps that are timed, after a first; a multiple of 10")
    parser.add_argument("--repeats", type=int, default=5, help="loops of each kind")
    parser.add_argument("--optimiser", choices=list(OPTIMISERS), default="sgd", help="of the loop")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def learn(model: nn.Module, optimiser: torch.optim.Optimizer, batch: Batch) -> None:
    """One step of a plain loop."""
    optimiser.zero_grad()
    torch.autograd.backward(functional.cross_entropy(model(batch.x), batch.y))
    optimiser.step()


def prepared(args: argparse.Namespace) -> tuple[nn.Module, Weights, Batch, list[Batch]]:
    """A model that has learned a little, what it was halfway, trusted samples, and the batches to come."""
    torch.manual_seed(0)
    stream = open_stream(CIFAR)
    model = build_model({"name": "resnet18", "width": args.width}, stream.info, seed=0)
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    old = Weights.of(model)
    for epoch in range(2):
        order = torch.randperm(args.images, generator=torch.Generator().manual_seed(epoch))
        for part in order.split(100):  # type: ignore[no-untyped-call]
            learn(model, optimiser, stream.burn_in.batch(part))
        old = old if epoch else Weights.of(model).copied()
    batches = list(stream.victim_batches(args.batches, seed=0))
    return model, old, stream.trusted.all(), batches


class Loop:
    """A loop with or without a guard, on copies.

    Args:
        name: Of the guard; empty: none.
        model: To begin with.
        old: What dsc looks back at.
        trusted: Samples.
        kind: Of the optimiser.
    """

    def __init__(self, name: str, model: nn.Module, old: Weights, trusted: Batch, kind: str) -> None:
        self.model = copy.deepcopy(model).train()
        self.optimiser = OPTIMISERS[kind](self.model.parameters())
        settings = copy.copy(GUARDS.get(name, {}))
        if name == "dsc":
            with torch.no_grad():
                scores = memorization_discrepancy(WhiteBox(model, functional.cross_entropy), old, trusted)
            limit = float(scores.quantile(0.95))
            settings["defence"] = {"name": "dsc", "mu": limit, "tau": 0.0}
            settings["history"] = History(checkpoints={1: old}, length=2)
        self.guard = Guard(self.model, self.optimiser, trusted=trusted, **settings) if name else None
        self.screens = name == "dsc"

    def run(self, batches: list[Batch]) -> float:
        """Go through the batches: seconds."""
        began = time.perf_counter()
        for batch in batches:
            if self.screens and self.guard is not None:
                with self.guard.step(batch) as screened:
                    learn(self.model, self.optimiser, screened)
            else:
                learn(self.model, self.optimiser, batch)
        return time.perf_counter() - began


def timed(args: argparse.Namespace, ready: tuple[nn.Module, Weights, Batch, list[Batch]]) -> dict[str, dict[str, Any]]:
    """Ratios of seconds to the plain loop, in turns."""
    model, old, trusted, batches = ready
    names = ["", *GUARDS]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    refused = dict.fromkeys(names, 0)
    for repeat in range(args.repeats + 1):  # the first round warms up
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            loop = Loop(name, model, old, trusted, args.optimiser)
            loop.run(batches[:1])  # the first step measures where the model stands before it
            took = loop.run(batches)
            if repeat:
                seconds[name].append(took / len(batches))
                refused[name] += 0 if loop.guard is None else loop.guard.refused
    out: dict[str, dict[str, Any]] = {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[""], strict=True)]
        out[name or "plain loop"] = {
            "seconds": statistics.median(times),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "refused": refused[name],
        }
    return out


def memory(state: Path) -> dict[str, int]:
    """Peak of three steps of each loop, each in a fresh process."""
    peaks = {}
    for name in ["", *GUARDS]:
        more = ["--memory-of", name or "plain loop", "--state", str(state)]
        done = subprocess.run(  # noqa: S603  (this very file, with the arguments it was given)
            [sys.executable, __file__, *sys.argv[1:], *more], capture_output=True, text=True, check=True
        )
        peaks[name or "plain loop"] = int(done.stdout)
    return peaks


def main() -> None:
    """Measure and print."""
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.memory_of is not None:
        tensors = torch.load(args.state, weights_only=True)
        model = build_model({"name": "resnet18", "width": args.width}, open_stream(CIFAR).info, seed=0)
        model.load_state_dict(tensors["now"])
        old = Weights(tensors["parameters"], tensors["buffers"], "old")
        batches = [Batch(*pair) for pair in tensors["batches"]]
        name = "" if args.memory_of == "plain loop" else args.memory_of
        loop = Loop(name, model, old, Batch(*tensors["trusted"]), args.optimiser)
        loop.run([batch.take(slice(0, 4)) for batch in batches[:1]])
        print(peak_memory(lambda: loop.run(batches[:3])))
        return
    ready = prepared(args)
    figures = timed(args, ready)
    model, old, trusted, batches = ready
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state.pt"
        torch.save(
            {
                "now": model.state_dict(),
                "parameters": dict(old.parameters),
                "buffers": dict(old.buffers),
                "trusted": tuple(trusted),
                "batches": [tuple(batch) for batch in batches[:3]],
            },
            state,
        )
        peaks = memory(state)
    table = Table(title=f"ResNet-18, width {args.width}, batches of 100, {args.optimiser}, {args.threads} thread(s)")
    for column in ("loop", "s a step", "ratio", "smallest to largest", "peak MiB", "refused"):
        table.add_column(column, justify="left" if column == "loop" else "right")
    for name, row in figures.items():
        row["peak"] = peaks[name]
        spread = f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}"
        steps = args.repeats * (args.batches + 1)
        cells = (f"{row['seconds']:.4f}", f"{row['ratio']:.2f}", spread, f"{row['peak'] / 2**20:.0f}")
        table.add_row(name, *cells, f"{row['refused']} of {steps}")
    Console().print(table)
    if args.json:
        record = {"environment": environment(torch.device("cpu")), "arguments": vars(args), "figures": figures}
        args.json.write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
