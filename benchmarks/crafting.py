"""Speed and memory of crafting: forward-over-reverse (`mithridate.maths.calculus`) against double backward.

Measured on a CPU, in one run, on the same model and the same images:

- seconds of one PGD step of the accumulative attack, that is of one gradient in the pixels: `normalised` (parameter
  gradient at x, `alignment_gradient` with one unit vector a tensor, `mixed_partial`) and `plain` (`mixed_partial`
  alone), each against the obvious way: `torch.autograd.grad` with `create_graph=True`, the product, a second `grad`
  in x;
- the same normalised step against Algorithm 1 as printed, which computes G_t inside the inner loop: there it costs
  double backward over S_val and the trigger at every step, while the attack computes it once a batch, as it does not
  depend on the batch's pixels (`joint` triggers excepted);
- seconds of the set-up G_t (`product_gradient`, the two gradients included), the validation batch in chunks, against
  double backward in the same chunks;
- the share of pixels (set-up: parameters) whose sign is the same in both; a PGD step takes nothing but the sign;
- peak memory of a crafting step, of its double-backward twin and of a training step (forward, backward, SGD with
  momentum) on the same batch. Each in a process of its own: after a warm-up on one image, the kernel's high-water mark
  of resident memory is reset, the step is made, and the rise of the mark above what was resident before is the step's
  memory. (Linux only. `ru_maxrss` would not do: a child inherits its parent's.)

The two ways are timed in turn, the order swapped at every repetition; the table shows medians and the median, smallest
and largest ratio of the pairs. The model is first trained for a few steps, so that gradients are those of a model in
use. Other work on the machine spoils wall-clock times: with it, `--threads 1` misleads least.

    MITHRIDATE_DATA=... python benchmarks/crafting.py --threads 2 --json crafting.json
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from mithridate.attacks.accumulative import Accumulative
from mithridate.core.batch import Batch
from mithridate.core.model import WhiteBox
from mithridate.data import DatasetInfo, dataset_info, load_images
from mithridate.maths import calculus
from mithridate.maths.alignment import turn_towards
from mithridate.maths.calculus import Normalise, Objective, Parameters
from mithridate.models import build_model
from peak_memory import peak_memory

DATA = "cifar10"
TRAINING_STEPS = 5
ATTACK_CHUNK = Accumulative().chunk
"""Images that the attack computes at a time, unless told otherwise."""


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="resnet18", help="a registered model")
    parser.add_argument("--width", type=int, default=64, help="its width")
    parser.add_argument("--norm", default="batch", help="its normalisation layers: batch or group")
    parser.add_argument(
        "--batch", type=int, default=100, help="images in the batch that is poisoned, and in the trigger"
    )
    parser.add_argument("--validation", type=int, default=500, help="images of S_val")
    parser.add_argument("--chunk", type=int, default=ATTACK_CHUNK, help="images computed at a time")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of timings")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--memory-of", choices=list(STEPS), default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def images(info: DatasetInfo, n: int) -> tuple[Batch, str]:
    """Test images of CIFAR-10 where MITHRIDATE_DATA has them, else random pixels; and which."""
    if os.environ.get("MITHRIDATE_DATA"):
        found = load_images(DATA, "test")
        return Batch(torch.from_numpy(found.x[:n].copy()).float() / 255, torch.from_numpy(found.y[:n].copy())), DATA
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(n, *info.shape, generator=rng)
    return Batch(x, torch.randint(len(info.classes), (n,), generator=rng)), "random pixels"


def train(model: nn.Module, batch: Batch, steps: int) -> None:
    """Plain SGD steps, as the victim makes them."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(batch.x), batch.y))
        optimiser.step()


# The obvious way.


def tracked(parameters: Parameters) -> Parameters:
    """Leaves of a fresh graph."""
    return {name: p.detach().requires_grad_() for name, p in parameters.items()}


def graph_gradient(objective: Objective, parameters: Parameters, batch: Batch) -> Parameters:
    """The parameter gradient, itself differentiable."""
    found = torch.autograd.grad(objective(parameters, *batch), list(parameters.values()), create_graph=True)
    return dict(zip(parameters, found, strict=True))


def double_backward_step(
    objective: Objective, parameters: Parameters, batch: Batch, w: Parameters, normalise: Normalise
) -> Tensor:
    """d/dx <unit(grad_theta L(x)), w> through a graph of the backward pass."""
    leaves, x = tracked(parameters), batch.x.detach().requires_grad_()
    g = graph_gradient(objective, leaves, Batch(x, batch.y))
    (found,) = torch.autograd.grad(calculus.inner(calculus.unit(g, normalise), w), x)
    return found


def double_backward_product_gradient(
    objective: Objective, parameters: Parameters, first: Batch, second: Batch, normalise: Normalise, chunk: int
) -> Parameters:
    """`calculus.product_gradient`, its Hessian-vector products through graphs of the backward pass."""
    leaves = tracked(parameters)

    def pieces(batch: Batch) -> list[tuple[float, Batch]]:
        cut = zip(torch.split(batch.x, chunk), torch.split(batch.y, chunk), strict=True)
        return [(len(x) / len(batch.x), Batch(x, y)) for x, y in cut]

    def weighted(terms: list[tuple[float, tuple[Tensor, ...]]]) -> Parameters:
        sums = [sum((share * t for share, t in each), torch.zeros(())) for each in zip_terms(terms)]
        return dict(zip(parameters, sums, strict=True))

    def gradient(batch: Batch) -> Parameters:
        values = list(leaves.values())
        return weighted([(s, torch.autograd.grad(objective(leaves, *b), values)) for s, b in pieces(batch)])

    def curvature(batch: Batch, v: Parameters) -> Parameters:
        terms = []
        for share, piece in pieces(batch):
            along = calculus.inner(graph_gradient(objective, leaves, piece), v)
            terms.append((share, torch.autograd.grad(along, list(leaves.values()))))
        return weighted(terms)

    a, b = gradient(first), gradient(second)
    by_a = calculus.alignment_gradient(a, calculus.unit(b, normalise), normalise)
    by_b = calculus.alignment_gradient(b, calculus.unit(a, normalise), normalise)
    return calculus.add(curvature(first, by_a), curvature(second, by_b))


def zip_terms(terms: list[tuple[float, tuple[Tensor, ...]]]) -> list[list[tuple[float, Tensor]]]:
    """Chunks of tensors to tensors of chunks, each with its chunk's share."""
    return [[(share, tensors[i]) for share, tensors in terms] for i in range(len(terms[0][1]))]


# Our way.


def forward_over_reverse_step(
    objective: Objective, parameters: Parameters, batch: Batch, w: Parameters, normalise: Normalise, chunk: int
) -> Tensor:
    """d/dx <unit(grad_theta L(x)), w> as the attack computes it."""
    return turn_towards(objective, parameters, *batch, w, normalise=normalise, chunk=chunk)


# Time.


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> dict[str, Any]:
    """Both, one after the other, the first of a pair changing from pair to pair."""
    times: dict[str, list[float]] = {"ours": [], "double_backward": []}
    for i in range(repeats):
        pair = [("ours", ours), ("double_backward", theirs)]
        for name, run in pair if i % 2 == 0 else reversed(pair):
            times[name].append(seconds(run))
    ratios = [b / a for a, b in zip(times["ours"], times["double_backward"], strict=True)]
    return {
        "ours_s": statistics.median(times["ours"]),
        "double_backward_s": statistics.median(times["double_backward"]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "all": times,
    }


def same_signs(a: Tensor, b: Tensor) -> float:
    """Share of entries whose signs agree."""
    return float((a.sign() == b.sign()).double().mean())


def speed(model: nn.Module, info: DatasetInfo, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """All timings, and where the images came from."""
    everything, source = images(info, 2 * args.batch + args.validation)
    sizes = [args.batch, args.batch, args.validation]
    parts = zip(torch.split(everything.x, sizes), torch.split(everything.y, sizes), strict=True)
    batch, trigger, validation = (Batch(x, y) for x, y in parts)
    train(model, batch, TRAINING_STEPS)
    box, figures = WhiteBox(model, F.cross_entropy), {}
    parameters = box.parameters
    with box.objective("eval") as objective:
        for name, normalise in NORMALISATIONS.items():
            kept = calculus.unit(calculus.gradient(objective, parameters, *trigger), normalise)
            step = objective, parameters, batch, kept, normalise
            agree = same_signs(forward_over_reverse_step(*step, args.chunk), double_backward_step(*step))
            figures[f"step, {name}"] = {
                "same_signs": agree,
                **in_turn(
                    partial(forward_over_reverse_step, *step, args.chunk),
                    partial(double_backward_step, *step),
                    args.repeats,
                ),
            }

        def ours() -> Parameters:
            return calculus.product_gradient(
                objective, parameters, validation, trigger, normalise="tensor", chunk=args.chunk
            )

        def theirs() -> Parameters:
            return double_backward_product_gradient(objective, parameters, validation, trigger, "tensor", args.chunk)

        kept = calculus.unit(calculus.gradient(objective, parameters, *trigger), "tensor")
        step = objective, parameters, batch, kept, "tensor"

        def as_printed() -> Tensor:
            theirs()
            return double_backward_step(*step)

        figures["step, against Algorithm 1 as printed"] = {
            "same_signs": figures["step, normalised"]["same_signs"],
            **in_turn(lambda: forward_over_reverse_step(*step, args.chunk), as_printed, args.repeats),
        }
        flat = [torch.cat([t.flatten() for t in run().values()]) for run in (ours, theirs)]
        figures["set-up G_t"] = {"same_signs": same_signs(*flat), **in_turn(ours, theirs, args.repeats)}
    return figures, source


# Memory.

NORMALISATIONS: Mapping[str, Normalise] = {"normalised": "tensor", "plain": "none"}
Step = Callable[[nn.Module, Batch], object]


def crafting(way: Callable[..., Tensor], normalise: Normalise, *more: int) -> Step:
    """One crafting step towards a fixed direction; `more` are further arguments of the way."""

    def step(model: nn.Module, batch: Batch) -> object:
        box = WhiteBox(model, F.cross_entropy)
        parameters = box.parameters
        with box.objective("eval") as objective:
            return way(objective, parameters, batch, parameters, normalise, *more)

    return step


STEPS: Mapping[str, Step] = {
    "training": lambda model, batch: train(model, batch, 1),
    "normalised": crafting(forward_over_reverse_step, "tensor", ATTACK_CHUNK),
    "plain": crafting(forward_over_reverse_step, "none", ATTACK_CHUNK),
    "normalised, double backward": crafting(double_backward_step, "tensor"),
    "plain, double backward": crafting(double_backward_step, "none"),
}


def peak_of(step: Step, model: nn.Module, batch: Batch) -> int:
    """Bytes by which a step raises resident memory at its highest."""
    step(model, Batch(batch.x[:1], batch.y[:1]))
    model.zero_grad(set_to_none=True)
    return peak_memory(lambda: step(model, batch))


def memory(args: argparse.Namespace) -> dict[str, int]:
    """Peak of each step, each in a fresh process."""
    found = {}
    for name in STEPS:
        done = subprocess.run(  # noqa: S603  (this very file, with the arguments it was given)
            [sys.executable, __file__, *sys.argv[1:], "--memory-of", name], capture_output=True, text=True, check=True
        )
        found[name] = int(done.stdout)
    return found


def show(figures: Mapping[str, Any], console: Console) -> None:
    """The two tables."""
    setting = figures["setting"]
    about = "{model} width {width}, {norm} norm, batch {batch} of {data}, {threads} threads, torch {torch}".format(
        **setting
    )
    table = Table(title=f"Speed: {about}", title_justify="left")
    for column in ("", "ours (s)", "double backward (s)", "times faster", "same signs"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, f in figures["speed"].items():
        ratio = f"{f['ratio']:.2f} ({f['ratio_min']:.2f} to {f['ratio_max']:.2f})"
        table.add_row(
            name, f"{f['ours_s']:.3f}", f"{f['double_backward_s']:.3f}", ratio, f"{100 * f['same_signs']:.2f} %"
        )
    console.print(table)
    table = Table(title="Peak memory of one step, above what was resident before", title_justify="left")
    for column in ("", "MiB", "of a training step"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, size in figures["memory_bytes"].items():
        table.add_row(name, f"{size / 2**20:.0f}", f"{size / figures['memory_bytes']['training']:.2f}")
    console.print(table)


def main() -> None:
    """Measure, print, and write where asked."""
    args = arguments()
    torch.set_num_threads(args.threads)
    info = dataset_info(DATA)
    model = build_model({"name": args.model, "width": args.width, "norm": args.norm}, info, seed=0)
    if args.memory_of is not None:
        batch, _ = images(info, args.batch)
        print(peak_of(STEPS[args.memory_of], model, batch))
        return
    console = Console()
    figures: dict[str, Any] = {"memory_bytes": memory(args) if sys.platform == "linux" else {}}
    figures["speed"], source = speed(model, info, args)
    figures["setting"] = {
        **{key: value for key, value in vars(args).items() if key not in {"json", "memory_of"}},
        "data": source,
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
    }
    show(figures, console)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
