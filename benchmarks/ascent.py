"""How high an ascent comes for its passes: H_t of the accumulative attack by inner optimiser and number of steps.

On a ResNet-18 that was burnt in on CIFAR-10 (test images, since a run needs no more), products normalised a tensor. For
each batch of the stream, with the same poisoned trigger, every way starts at the clean batch. The table has H_t at the
start and at the end in single precision (means over the batches), passes (operations over those of one
forward pass of the batch, see `crafting.py`) and seconds.

Then equal strength: of each way, the fewest steps of those that were tried which come at least as high as constant
steps do in 100 (means over the batches), timed in turns against the released code's way with 100 steps.

    MITHRIDATE_DATA=... python benchmarks/ascent.py --cache CACHE --threads 1 --json ascent.json
"""

import argparse
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from crafting import Scene, ours, passes, released, seconds
from mithridate.attacks.accumulative import Accumulative
from mithridate.core.batch import Batch
from mithridate.core.model import WhiteBox
from mithridate.core.view import Need, View
from mithridate.data.stream import StreamSettings, open_stream
from mithridate.maths.alignment import alignment
from mithridate.maths.calculus import curved, gradient, product_gradient
from mithridate.maths.directions import add, unit
from mithridate.models import build_model
from mithridate.training.burn_in import BurnIn, burn_in

PUBLISHED: Mapping[str, Any] = {"optimiser": "pgd", "step_schedule": "constant", "precision": "float32"}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "pgd": PUBLISHED,
    "pgd, falling steps": {**PUBLISHED, "step_schedule": "cosine"},
    "pgd, falling steps, bfloat16": {**PUBLISHED, "step_schedule": "cosine", "precision": "bfloat16"},
    "mim": {**PUBLISHED, "optimiser": "mim"},
    "apgd": {**PUBLISHED, "optimiser": "apgd"},
}
LAST = 100
"""Steps of the strength that is to be reached, by constant ones."""


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=16, help="of the ResNet-18")
    parser.add_argument("--epochs", type=int, default=12, help="of the burn-in")
    parser.add_argument("--images", type=int, default=5000, help="of the burn-in")
    parser.add_argument("--seed", type=int, default=0, help="of burn-in and stream")
    parser.add_argument("--eps", type=float, default=16 / 255, help="of batches and trigger")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 35, 50, 65], help=f"beside {LAST}")
    parser.add_argument("--batches", type=int, default=3, help="that are crafted, each at the model as it is")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of timings")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--cache", type=Path, default=None, help="where the burn-in is kept")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    return parser.parse_args()


class BurntIn(Scene):
    """A model after its burn-in, one batch of its stream, S_val and the trigger, poisoned before."""

    def __init__(self, args: argparse.Namespace) -> None:
        settings = StreamSettings(name="cifar10", burn_in=args.images, victim=100 * (args.batches + 1))
        stream = open_stream(settings)
        config = {"name": "resnet18", "width": args.width}
        self.model = build_model(config, stream.info, seed=args.seed)
        burn_in(self.model, stream, BurnIn(epochs=args.epochs), seed=args.seed, model_config=config, cache=args.cache)
        self.model.eval()
        self.batches = list(stream.victim_batches(args.batches, seed=args.seed))
        self.validation = stream.validation.all()
        self.attack = Accumulative(eps=args.eps, steps=20, optimiser="apgd", normalise="tensor", trigger_mode="fixed")
        clean = stream.trigger_batch(args.batches, args.seed)
        view = self.view(clean)
        poisoned = self.attack.craft_trigger(clean, view, torch.ones(clean.size) > 0, torch.Generator().manual_seed(0))
        self.trigger = Batch(poisoned, clean.y)

    def view(self, trigger: Batch) -> View:
        """What the attack sees, with a trigger that it has not poisoned yet."""
        available: dict[Need, Any] = {
            Need.MODEL: WhiteBox(self.model, F.cross_entropy),
            Need.VALIDATION: self.validation,
            Need.TRIGGER: trigger,
            Need.ACCURACY: (1.0, 1.0),
        }
        return View(1, {}, available, self.attack.needs)

    def climbed(self, way: Mapping[str, Any], steps: int, batch: Batch) -> tuple[float, float]:
        """H_t of the clean and of the crafted batch, both in single precision."""
        self.attack, self.batch = replace(self.attack, steps=steps, **way), batch
        sent = ours(self)
        box = WhiteBox(self.model, F.cross_entropy)
        parameters = box.parameters
        with box.objective("eval") as objective:
            at = [curved(objective, parameters, *samples, chunk=100) for samples in (self.validation, self.trigger)]
            w = unit(product_gradient(*at, normalise="tensor"), "tensor")
            w = add(w, unit(gradient(objective, parameters, *batch), "tensor"))
            start, end = (
                float(alignment(objective, parameters, x, batch.y, w, normalise="tensor")) for x in (batch.x, sent)
            )
        return start, end


def main() -> None:
    """Measure, print, and write where asked."""
    args = arguments()
    torch.set_num_threads(args.threads)
    scene, rows = BurntIn(args), list[dict[str, Any]]()
    for steps in [*args.steps, LAST]:
        for name, way in WAYS.items():
            ends = [scene.climbed(way, steps, batch) for batch in scene.batches]
            start, end = (statistics.fmean(pair[i] for pair in ends) for i in (0, 1))
            found = {"way": name, "steps": steps, "start": start, "end": end, "ends": ends}
            rows.append({**found, "passes": passes(scene, ours), "seconds": seconds(lambda: ours(scene))})
    table = Table(title=f"H_t, ResNet-18 width {args.width}, eps {args.eps:.3g}", title_justify="left")
    for column in ("C", "way", "H_t at the start", "at the end", "passes", "seconds"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        numbers = (f"{row['start']:.2f}", f"{row['end']:.2f}", f"{row['passes']:.0f}", f"{row['seconds']:.2f}")
        table.add_row(str(row["steps"]), row["way"], *numbers)
    console = Console()
    console.print(table)
    equal = equally_strong(scene, rows, args.repeats, console)
    if args.json is not None:
        setting = {key: value for key, value in vars(args).items() if key not in {"json", "cache"}}
        setting |= {"torch": torch.__version__, "cpu": platform.processor() or platform.machine()}
        figures = {"rows": rows, "equal": equal, "setting": setting}
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def equally_strong(scene: BurntIn, rows: Sequence[Mapping[str, Any]], repeats: int, console: Console) -> dict[str, Any]:
    """For each way the fewest steps that come as high as the published 100, timed in turns against the released way."""
    aim = next(row["end"] for row in rows if (row["way"], row["steps"]) == ("pgd", LAST))
    attacks = {"released": replace(scene.attack, steps=LAST, **PUBLISHED)}
    for name, way in WAYS.items():
        enough = min((row["steps"] for row in rows if row["way"] == name and row["end"] >= aim), default=None)
        if enough is not None:
            attacks[name] = replace(scene.attack, steps=enough, **way)
    times: dict[str, list[float]] = {name: [] for name in attacks}
    for _ in range(repeats):
        for name, attack in attacks.items():
            scene.attack, run = attack, released if name == "released" else ours
            times[name].append(seconds(lambda run=run: run(scene)))  # type: ignore[misc]
    found: dict[str, Any] = {"aim": aim, "times": times}
    console.print(f"As high as {LAST} steps of pgd (H_t = {aim:.2f}), against the released way, in turns:")
    for name in WAYS:
        if name not in attacks:
            console.print(f"  {name}: not with the steps that were tried")
            continue
        ratios = [b / a for a, b in zip(times[name], times["released"], strict=True)]
        found[name] = {"steps": attacks[name].steps, "ratio": statistics.median(ratios), "ratios": ratios}
        spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        console.print(f"  {name}: {attacks[name].steps} steps, {found[name]['ratio']:.2f} times as fast {spread}")
    return found


if __name__ == "__main__":
    main()
