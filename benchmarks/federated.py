"""Speed and memory of a federated round with many clients, simulated on one machine.

Measured on a CPU, in one run, on the same model (burnt in for a few steps) and the same images:

- seconds to sum the clipped updates of all clients of a round, four ways, which take turns, the order changing from
  repetition to repetition: `separate` backward passes as anybody would write them (one client after the other: zero the
  gradients, `backward`, lay them end to end, clip, add); `summed`, what a round takes whose server needs no single
  update (`simulation.per_client.sums`); and the two that form every client's row, as a round with a robust rule needs
  them, `layered` and `mapped`, as many clients at a time as a round takes, their rows clipped and added by one product
  of a vector and a matrix. All keep the running sum, not the rows. Beside wall-clock time stands the
  processor time of all threads, which other work on the machine spoils less. The sums must agree;
- the same for a whole round of `run_federated` with its bookkeeping (sampling, loss, BatchNorm statistics, step), one
  image a client, every update clipped before the mean, without the evaluation of the model that follows a round;
- peak memory and seconds of a whole round of `run_federated`, one image a client, every update clipped before the mean
  (`bound = "before"`), for more and more clients: once with BatchNorm statistics frozen, and once synchronised. Each in
  a process of its own: after a
  round of two clients, the kernel's high-water mark of resident memory is reset, the round is made, and the rise of the
  mark above what was resident before is the round's memory (Linux only).

    MITHRIDATE_DATA=... python benchmarks/federated.py --threads 2 --json federated.json
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from mithridate.core.batch import Batch
from mithridate.core.errors import DataError
from mithridate.core.updates import Updates
from mithridate.core.view import View
from mithridate.data import DatasetInfo, dataset_info, load_images
from mithridate.data.shards import Shards
from mithridate.data.stream import StreamSettings, open_stream
from mithridate.defences.clip import Clip
from mithridate.models import build_model
from mithridate.simulation.clients import FederatedRun, federate
from mithridate.simulation.federated import run_federated
from mithridate.simulation.per_client.gradients import PASS, Way, client_gradients
from mithridate.simulation.per_client.sums import SUMMED_PASS, summed_gradients
from mithridate.simulation.run import victim_optimiser
from mithridate.training.learner import Learner
from mithridate.update_attacks.clean import CleanUpdates
from peak_memory import peak_memory

DATA = "cifar10"
TRAINING_STEPS, TRAINING_BATCH = 20, 100
AGREEMENT = 1e-2
"""Largest distance of two sums, relative to their length. Most lie within 1e-3, as float32 lengths of a million entries
do; a ReLU at its kink may fall to either side when images go through the model in other company."""

STATISTICS: tuple[Literal["frozen", "synchronised"], ...] = ("frozen", "synchronised")
"""What becomes of BatchNorm statistics in the rounds whose memory is measured."""

TEST = 10
"""Images that a whole round is tested on: next to none."""


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="resnet18", help="a registered model")
    parser.add_argument("--width", type=int, default=16, help="its width")
    parser.add_argument("--norm", default="batch", help="its normalisation layers: batch or group")
    parser.add_argument("--clients", type=int, default=1000, help="clients whose updates are summed")
    parser.add_argument("--samples", type=int, default=1, help="images of each of them")
    parser.add_argument("--clip", type=float, default=1.0, help="bound of each client's update, l2")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each way")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument(
        "--memory-clients", type=int, nargs="*", default=[100, 1000, 10_000], help="clients of the rounds measured"
    )
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def images(info: DatasetInfo, n: int) -> tuple[Batch, str]:
    """Training images of CIFAR-10 where MITHRIDATE_DATA has them, else random pixels; and which."""
    if os.environ.get("MITHRIDATE_DATA"):
        found = load_images(DATA, "train")
        if n > len(found.y):
            raise DataError(f"{n} images asked for, and {DATA} has {len(found.y)}: use fewer clients or samples.")
        return Batch(torch.from_numpy(found.x[:n].copy()).float() / 255, torch.from_numpy(found.y[:n].copy())), DATA
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(n, *info.shape, generator=rng)
    return Batch(x, torch.randint(len(info.classes), (n,), generator=rng)), "random pixels"


def train(model: nn.Module, batch: Batch) -> None:
    """A few plain SGD steps, so that gradients are those of a model in use; left in eval mode."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.train()
    for _ in range(TRAINING_STEPS):
        optimiser.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(batch.x), batch.y))
        optimiser.step()
    optimiser.zero_grad()
    model.eval()


# The sum of a round's clipped updates.


def separate(model: nn.Module, x: Tensor, y: Tensor, clip: float) -> Tensor:
    """One backward pass a client, as anybody would write it."""
    parameters = list(model.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters))
    for pixels, labels in zip(x, y, strict=True):
        model.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(pixels), labels))
        row = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        total.add_(row, alpha=min(1.0, clip / float(torch.linalg.vector_norm(row))))
    return total


def together(way: Way, model: nn.Module, x: Tensor, y: Tensor, clip: float) -> Tensor:
    """Per-client gradients, as many clients at a time as in a round."""
    clients = max(1, PASS // y.shape[1])
    total = torch.zeros(sum(p.numel() for p in model.parameters()))
    place = torch.empty(min(clients, len(y)), len(total))
    for pixels, labels in zip(torch.split(x, clients), torch.split(y, clients), strict=True):
        rows = client_gradients(model, F.cross_entropy, pixels, labels, way=way, out=place[: len(labels)])
        total += (clip / torch.linalg.vector_norm(rows, dim=1)).clamp(max=1.0) @ rows
    return total


def summed(model: nn.Module, x: Tensor, y: Tensor, clip: float) -> Tensor:
    """The same without a client's row, as in a round whose server needs none."""
    clients = max(1, SUMMED_PASS // y.shape[1])
    total = torch.zeros(sum(p.numel() for p in model.parameters()))
    defence, shapes = Clip(clip_norm=clip), {name: p.shape for name, p in model.named_parameters()}

    def no_rows() -> Tensor:
        raise AssertionError("a bound by l2 length looks at no row")

    def factors(lengths: Tensor) -> Tensor | None:
        return defence.bound(Updates(no_rows, shapes, lengths=lengths), View()).factors

    for pixels, labels in zip(torch.split(x, clients), torch.split(y, clients), strict=True):
        found = summed_gradients(model, F.cross_entropy, pixels, labels, factors=factors)
        if isinstance(found, str):
            raise TypeError(found)
        total += found.total
    return total


Sum = Callable[[nn.Module, Tensor, Tensor, float], Tensor]

WAYS: Mapping[str, Sum] = {
    "separate": separate,
    "summed": summed,
    "layered": partial(together, "layered"),
    "mapped": partial(together, "mapped"),
}


def whole_round(model: nn.Module, clients: int, clip: float) -> Callable[[], Tensor]:
    """A round of a federation whose clients hold the stream's images, one each; gives the sum that it came to."""
    stream = open_stream(StreamSettings(name=DATA, burn_in=1, victim=clients, trusted=0, validation=0, test=TEST))
    federation = federate(stream, Shards(clients=clients, partition="one"), seed=0)
    run = FederatedRun(rounds=0, bound="before", momentum=0.0)

    def go() -> Tensor:
        own = copy.deepcopy(model)
        learner = Learner(own, victim_optimiser(own, run), defence=Clip(clip_norm=clip))
        run_federated(learner, federation, CleanUpdates(), run)
        moved = [p.detach() - q.detach() for p, q in zip(model.parameters(), own.parameters(), strict=True)]
        return torch.cat([m.flatten() for m in moved]) * (clients / run.lr)

    return go


def speed(model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace, source: str) -> dict[str, dict[str, Any]]:
    """Seconds of each way, the ways in turn, and how far its sum is from that of separate passes."""
    ways: dict[str, Callable[[], Tensor]] = {name: partial(way, model, x, y, args.clip) for name, way in WAYS.items()}
    own = ways["separate"]()  # also warms up
    differences: dict[str, float | None] = {
        name: float((way() - own).norm() / own.norm()) for name, way in ways.items()
    }
    if max(d for d in differences.values() if d is not None) > AGREEMENT:
        raise RuntimeError(f"the sums differ, relative to the first: {differences}; this is a defect, report it")
    if source == DATA and args.samples == 1:
        ways["a whole round"] = whole_round(model, args.clients, args.clip)
        ways["a whole round"]()
        differences["a whole round"] = None  # of other images
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for repeat in range(args.repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            start, used = time.perf_counter(), time.process_time()
            ways[name]()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - used)
    return {
        name: {
            "difference": differences[name],
            "wall": against(wall[name], wall["separate"]),
            "cpu": against(cpu[name], cpu["separate"]),
        }
        for name in ways
    }


def against(own: list[float], theirs: list[float]) -> dict[str, Any]:
    """The median, and how many times faster than `theirs` in the same repetition: median, smallest, largest."""
    ratios = [b / a for a, b in zip(own, theirs, strict=True)]
    return {
        "seconds": statistics.median(own),
        "times_faster": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "all": own,
    }


# Memory of a whole round.


def round_of(clients: int, batch_norm: Literal["frozen", "synchronised"], args: argparse.Namespace) -> dict[str, float]:
    """Bytes and seconds of one round in this process."""
    stream = open_stream(
        StreamSettings(name=DATA, burn_in=TRAINING_BATCH, victim=clients, trusted=0, validation=0, test=100)
    )
    model = build_model({"name": args.model, "width": args.width, "norm": args.norm}, stream.info, seed=0)
    train(model, stream.burn_in.all())
    federation = federate(stream, Shards(clients=clients, partition="one"), seed=0)
    run = FederatedRun(rounds=0, bound="before", batch_norm=batch_norm)
    learner = Learner(model, victim_optimiser(model, run), defence=Clip(clip_norm=args.clip))
    run_federated(learner, federation, CleanUpdates(), replace(run, per_round=2))
    start, used = time.perf_counter(), time.process_time()
    size = peak_memory(lambda: run_federated(learner, federation, CleanUpdates(), run))
    return {"bytes": size, "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}


def memory(args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Every round, each in a fresh process, by statistics and clients."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for batch_norm in STATISTICS:
        for clients in args.memory_clients:
            more = ["--memory-of", f"{batch_norm}:{clients}"]
            done = subprocess.run(  # noqa: S603  (this very file, with the arguments it was given)
                [sys.executable, __file__, *sys.argv[1:], *more], capture_output=True, text=True, check=True
            )
            found.setdefault(batch_norm, {})[str(clients)] = json.loads(done.stdout)
    return found


def show(figures: Mapping[str, Any], console: Console) -> None:
    """The two tables."""
    about = "{clients} clients, {samples} of {data} each, {model} width {width}, {norm} norm, {threads} threads".format(
        **figures["setting"]
    )
    table = Table(title=f"Sum of clipped updates: {about}", title_justify="left")
    for column in ("", "wall (s)", "times faster", "processor (s)", "times faster", "apart by"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, f in figures["speed"].items():
        pairs = [
            text
            for clock in (f["wall"], f["cpu"])
            for text in (
                f"{clock['seconds']:.2f}",
                f"{clock['times_faster']:.2f} ({clock['least']:.2f} to {clock['most']:.2f})",
            )
        ]
        apart = "" if f["difference"] is None else f"{f['difference']:.0e}"
        table.add_row(name, *pairs, apart)
    console.print(table)
    table = Table(title="A whole round: memory above what was resident before", title_justify="left")
    for column in ("BatchNorm statistics", "clients", "MiB", "wall (s)", "processor (s)"):
        table.add_column(column, justify="left" if column.startswith("Batch") else "right")
    for batch_norm, rounds in figures["memory"].items():
        for clients, f in rounds.items():
            mib = f"{f['bytes'] / 2**20:.0f}"
            table.add_row(batch_norm, clients, mib, f"{f['seconds']:.1f}", f"{f['cpu_seconds']:.1f}")
    console.print(table)


def main() -> None:
    """Measure, print, and write where asked."""
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.memory_of is not None:
        name, _, clients = args.memory_of.partition(":")
        print(json.dumps(round_of(int(clients), STATISTICS[STATISTICS.index(name)], args)))
        return
    info = dataset_info(DATA)
    model = build_model({"name": args.model, "width": args.width, "norm": args.norm}, info, seed=0)
    data, source = images(info, args.clients * args.samples)
    train(model, Batch(data.x[:TRAINING_BATCH], data.y[:TRAINING_BATCH]))
    x = data.x.view(args.clients, args.samples, *info.shape)
    console = Console()
    figures: dict[str, Any] = {
        "speed": speed(model, x, data.y.view(args.clients, args.samples), args, source),
        "memory": memory(args) if sys.platform == "linux" and source == DATA else {},
        "setting": {
            **{key: value for key, value in vars(args).items() if key not in {"json", "memory_of"}},
            "data": source,
            "torch": torch.__version__,
            "cpu": platform.processor() or platform.machine(),
        },
    }
    show(figures, console)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
