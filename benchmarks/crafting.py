"""Speed and memory of crafting one accumulative batch: `attacks.accumulative` against the released code's way.

The released way, written anew from what their code does: S_val (all its images at once), the trigger, the batch and
every inner step get a graph of their gradient (`create_graph=True`), each gradient tensor is divided by its length, and
derivatives go backwards through those graphs; BatchNorm and layout as the model has them. Ours is the attack as a run
calls it, with everything a run has around it: `poison`, `trigger_mode = "fixed"`, `normalise = "tensor"`. Both get the
same model (burnt in for a few steps), batch, trigger (poisoned before) and S_val, and make C steps.

Measured on a CPU, in turns, the order swapped at every repetition; medians, and the median, smallest and largest ratio
of the pairs:

- seconds of a whole batch, and of a plain training pass (forward and backward) of as many images;
- passes: floating-point operations of all convolutions and matrix products (torch's own counter) over those of one
  forward pass of the batch, so that a training pass is 3. Beside them the seconds that so many passes would take at the
  speed of the training pass: what is above that is overhead;
- the share of pixels that are the same in both, in single precision, and once in double precision at `--check-width`,
  there with noise of 0.01 on the images: in flat regions of 8-bit images the maxima of a pool are equal, and rounding
  decides which one a slope goes through;
- with `--compile`, ours once more with compiled inner steps (`compile = true`), in turns with ours without, and apart
  from it what the first batch took, in which they are traced and compiled: minutes at full size;
- peak memory, each way in a process of its own: after a warm-up on a few images, the kernel's high-water mark of
  resident memory is reset, the batch is made, and the rise of the mark above what was resident before is what it took
  (Linux only. `ru_maxrss` would not do: a child inherits its parent's).

    MITHRIDATE_DATA=... python benchmarks/crafting.py --widths 16 64 --threads 1 2 --json crafting.json
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mithridate.attacks.accumulative import Accumulative
from mithridate.attacks.trigger import TRIGGER
from mithridate.core.batch import Batch
from mithridate.core.model import WhiteBox
from mithridate.core.view import Need, View
from mithridate.data import DatasetInfo, dataset_info, load_images
from mithridate.maths.norms import Ball
from mithridate.models import build_model
from peak_memory import peak_memory

DATA = "cifar10"
TRAINING_STEPS = 5
EPS = 16 / 255


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="resnet18", help="a registered model")
    parser.add_argument("--widths", type=int, nargs="+", default=[16], help="its widths")
    parser.add_argument("--norm", default="batch", help="its normalisation layers: batch or group")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads of torch")
    parser.add_argument("--batch", type=int, default=100, help="images in the batch, and in the trigger")
    parser.add_argument("--validation", type=int, default=500, help="images of S_val")
    parser.add_argument("--steps", type=int, default=10, help="inner steps, C")
    parser.add_argument("--chunk", type=int, default=Accumulative().chunk, help="images we compute at a time")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of timings")
    parser.add_argument("--compile", action="store_true", help="measure compiled inner steps, too")
    parser.add_argument("--check-width", type=int, default=8, help="width for the comparison in double precision")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--memory-of", choices=list(WAYS), default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


class Scene:
    """A model and the images that both ways get."""

    def __init__(self, args: argparse.Namespace, info: DatasetInfo, width: int, dtype: torch.dtype) -> None:
        sizes = [args.batch, args.batch, args.validation]
        everything, self.source = images(info, sum(sizes))
        if dtype == torch.float64:
            noise = torch.rand(everything.x.shape, generator=torch.Generator().manual_seed(2))
            everything = Batch(0.98 * everything.x + 0.01 * noise, everything.y)
        parts = zip(torch.split(everything.x.to(dtype), sizes), torch.split(everything.y, sizes), strict=True)
        self.batch, clean, self.validation = (Batch(x, y) for x, y in parts)
        noise = torch.rand(clean.x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        self.trigger = Batch((clean.x + EPS * (2 * noise - 1)).clamp(0, 1), clean.y)
        self.model = build_model({"name": args.model, "width": width, "norm": args.norm}, info, seed=0).to(dtype)
        optimiser = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.model.train()
        for _ in range(TRAINING_STEPS):
            optimiser.zero_grad()
            torch.autograd.backward(F.cross_entropy(self.model(self.batch.x), self.batch.y))
            optimiser.step()
        self.model.eval()
        self.attack = Accumulative(
            eps=EPS, steps=args.steps, normalise="tensor", trigger_mode="fixed", chunk=args.chunk
        )


def images(info: DatasetInfo, n: int) -> tuple[Batch, str]:
    """Test images of CIFAR-10 where MITHRIDATE_DATA has them, else random pixels; and which."""
    if os.environ.get("MITHRIDATE_DATA"):
        found = load_images(DATA, "test")
        return Batch(torch.from_numpy(found.x[:n].copy()).float() / 255, torch.from_numpy(found.y[:n].copy())), DATA
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(n, *info.shape, generator=rng)
    return Batch(x, torch.randint(len(info.classes), (n,), generator=rng)), "random pixels"


# The two ways.


def released(scene: Scene) -> Tensor:
    """The batch as the released code makes it."""
    model = scene.model
    parameters = list(model.parameters())

    def slope(x: Tensor, y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True))

    def unit(g: list[Tensor]) -> list[Tensor]:
        return [t / t.norm() for t in g]

    def product(a: list[Tensor], b: list[Tensor]) -> Tensor:
        return torch.stack([(s * t).sum() for s, t in zip(a, b, strict=True)]).sum()

    of_trigger, of_validation = unit(slope(*scene.trigger)), unit(slope(*scene.validation))
    pull = unit(list(torch.autograd.grad(product(of_trigger, of_validation), parameters)))
    clean = unit([t.detach() for t in slope(*scene.batch)])
    w = [a + b for a, b in zip(clean, pull, strict=True)]
    ball, x = Ball("linf", EPS), scene.batch.x
    for _ in range(scene.attack.steps):
        leaf = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(product(unit(slope(leaf, scene.batch.y)), w), leaf)
        moved = x + 2 * EPS / scene.attack.steps * g.sign()
        x = (scene.batch.x + ball.project(moved - scene.batch.x)).clamp(0, 1)
    return x.detach()


def ours(scene: Scene, *, compiled: bool = False) -> Tensor:
    """The batch as a run makes it."""
    attack = replace(scene.attack, compile=compiled)
    available = {
        Need.MODEL: WhiteBox(scene.model, F.cross_entropy),
        Need.VALIDATION: scene.validation,
        Need.TRIGGER: scene.trigger,
        Need.ACCURACY: (1.0, 1.0),
    }
    view = View(1, {TRIGGER: scene.trigger.x}, available, attack.needs)
    sent: Tensor = attack.poison(scene.batch, view, rng=torch.Generator().manual_seed(0)).x
    return sent


WAYS: Mapping[str, Callable[[Scene], Tensor]] = {"ours": ours, "released": released}


# Figures.


def training_pass(scene: Scene) -> None:
    """A forward and a backward pass of the batch, in the mode of training."""
    scene.model.train()
    torch.autograd.backward(F.cross_entropy(scene.model(scene.batch.x), scene.batch.y))
    scene.model.zero_grad()
    scene.model.eval()


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives it no types
    """Counts floating-point operations of convolutions and matrix products (FlopCounterMode does not bear `grad`)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.total: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401  (torch's protocol, which types nothing)
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def passes(scene: Scene, run: Callable[[Scene], object]) -> float:
    """Operations over those of a forward pass of the batch."""
    with torch.no_grad(), Operations() as one:
        scene.model(scene.batch.x)
    with Operations() as all_of_it:
        run(scene)
    counted: float = all_of_it.total / one.total
    return counted


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def speed(scene: Scene, repeats: int) -> dict[str, Any]:
    """Both ways and the training pass, in turns."""
    times: dict[str, list[float]] = {"ours": [], "released": [], "training": []}
    calls: list[tuple[str, Callable[[Scene], object]]] = [*WAYS.items(), ("training", training_pass)]
    training_pass(scene)
    for i in range(repeats):
        for name, run in calls if i % 2 == 0 else reversed(calls):
            times[name].append(seconds(lambda run=run: run(scene)))  # type: ignore[misc]
    ratios = [b / a for a, b in zip(times["ours"], times["released"], strict=True)]
    counts = {name: passes(scene, run) for name, run in calls}
    medians = {name: statistics.median(values) for name, values in times.items()}
    a, b = (way(scene) for way in WAYS.values())
    return {
        "seconds": medians,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "passes": counts,
        "floor_s": {name: counts[name] / 3 * medians["training"] for name in WAYS},
        "same_pixels": float((a == b).double().mean()),
        "all": times,
    }


def compiled_speed(scene: Scene, repeats: int) -> dict[str, Any]:
    """Inner steps that are compiled against those that are not, in turns, after a first batch that is timed apart."""
    times: dict[bool, list[float]] = {False: [], True: []}
    first = seconds(lambda: ours(scene, compiled=True))
    for i in range(repeats):
        for compiled in (False, True) if i % 2 == 0 else (True, False):
            times[compiled].append(seconds(lambda compiled=compiled: ours(scene, compiled=compiled)))  # type: ignore[misc]
    ratios = [a / b for a, b in zip(times[False], times[True], strict=True)]
    return {
        "first_batch_s": first,
        "seconds": statistics.median(times[True]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "same_pixels": float((ours(scene) == ours(scene, compiled=True)).double().mean()),
        "all": {"compiled": times[True], "not compiled": times[False]},
    }


def memory(args: argparse.Namespace, width: int) -> dict[str, int]:
    """Peak of each way, each in a fresh process."""
    found = {}
    given = ["--model", args.model, "--norm", args.norm, "--steps", "1", "--chunk", str(args.chunk)]
    given += ["--batch", str(args.batch), "--validation", str(args.validation), "--widths", str(width)]
    for name in WAYS:
        done = subprocess.run(  # noqa: S603  (this very file)
            [sys.executable, __file__, *given, "--memory-of", name], capture_output=True, text=True, check=True
        )
        found[name] = int(done.stdout)
    return found


def show(figures: Mapping[str, Any], console: Console) -> None:
    """The table."""
    title = "One accumulative batch: {model}, {norm} norm, batch {batch} of {data}, |S_val| {validation}, C = {steps}"
    table = Table(title=title.format(**figures["setting"]), title_justify="left")
    for column in ("width", "threads", "way", "seconds", "passes", "floor (s)", "MiB"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in figures["rows"]:
        for way in WAYS:
            mib = row["memory_bytes"].get(way)
            table.add_row(
                str(row["width"]),
                str(row["threads"]),
                way,
                f"{row['seconds'][way]:.2f}",
                f"{row['passes'][way]:.1f}",
                f"{row['floor_s'][way]:.2f}",
                "" if mib is None else f"{mib / 2**20:.0f}",
            )
        ratio = f"{row['ratio']:.2f} times as fast ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
        table.add_row("", "", f"{ratio}; same pixels {100 * row['same_pixels']:.2f} %", end_section=True)
    console.print(table)
    for row in figures["rows"]:
        if compiled := row.get("compiled"):
            console.print(
                f"width {row['width']}, threads {row['threads']}, ours compiled: {compiled['seconds']:.2f} s, "
                f"{compiled['ratio']:.2f} times as fast as not compiled ({compiled['ratio_min']:.2f} to "
                f"{compiled['ratio_max']:.2f}); same pixels {100 * compiled['same_pixels']:.2f} %; the first batch, in "
                f"which it is compiled: {compiled['first_batch_s']:.0f} s"
            )
    console.print(f"Same pixels in double precision: {100 * figures['same_pixels_double']:.4f} %")


def main() -> None:
    """Measure, print, and write where asked."""
    args = arguments()
    info = dataset_info(DATA)
    if args.memory_of is not None:
        scene, few = (Scene(args, info, args.widths[0], torch.float32) for _ in range(2))
        few.batch, few.trigger, few.validation = (b.take(slice(4)) for b in (few.batch, few.trigger, few.validation))
        WAYS[args.memory_of](few)
        print(peak_memory(lambda: WAYS[args.memory_of](scene)))
        return
    rows: list[dict[str, Any]] = []
    for width in args.widths:
        peaks = memory(args, width) if sys.platform == "linux" else {}
        for threads in args.threads:
            torch.set_num_threads(threads)
            scene = Scene(args, info, width, torch.float32)
            row = {"width": width, "threads": threads, "memory_bytes": peaks, **speed(scene, args.repeats)}
            rows.append({**row, "compiled": compiled_speed(scene, args.repeats)} if args.compile else row)
    small = Scene(args, info, args.check_width, torch.float64)
    a, b = (way(small) for way in WAYS.values())
    figures = {
        "rows": rows,
        "same_pixels_double": float((a == b).double().mean()),
        "setting": {
            **{key: value for key, value in vars(args).items() if key not in {"json", "memory_of"}},
            "data": small.source,
            "torch": torch.__version__,
            "cpu": platform.processor() or platform.machine(),
        },
    }
    show(figures, Console())
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
