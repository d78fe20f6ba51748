"""What defences cost: seconds an update of DSC, AT, gate and clip against standard training (ST), and peak memory.

Measured on a CPU, in one run, on real CIFAR-10: a ResNet-18 is trained for a few epochs (the checkpoint halfway is
DSC's old model), DSC's threshold is calibrated on a trusted set, by default to 5 % of clean samples and to the 28 %
that Zhu et al., Table 12, report for their own (a stream that moves on is corrected more often: the table counts); a
gate looks at 100 trusted samples (its default) or at 500. Every defence learns

- from the same clean batches, one after the other, as a stream goes on (the threshold rises with it), and
- from batches that the accumulative attack crafted against the model as the burn-in left it, each from that state.

The defences take turns, the order changing from repetition to repetition. The table shows medians, and the median,
smallest and largest ratio to ST on the same batch in the same repetition.

Memory: each defence in a process of its own makes one update on the poisoned batch; the rise of the kernel's high-water
mark above what was resident before is its peak (Linux only). Beside it, the size of one old model and what one forward
pass of the batch keeps for its backward pass: DSC may need that much more than ST.

    MITHRIDATE_DATA=... python benchmarks/defences.py --threads 2 --json defences.json
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from mithridate.attacks.accumulative import Accumulative
from mithridate.core.batch import Batch
from mithridate.core.defence import Defence
from mithridate.core.past import Weights
from mithridate.core.view import Need, View
from mithridate.data.stream import Stream, StreamSettings, open_stream
from mithridate.defences.at import AT
from mithridate.defences.clip import Clip
from mithridate.defences.dsc import DSC
from mithridate.defences.gate import Gate
from mithridate.models import build_model
from mithridate.simulation.online import OnlineRun
from mithridate.simulation.run import victim_optimiser
from mithridate.training.burn_in import BurnIn, burn_in
from mithridate.training.calibrate import calibrate
from mithridate.training.history import History
from mithridate.training.learner import Learner
from peak_memory import peak_memory

BF16 = ", bfloat16"
"""Of a defence whose passes for the correction are made in it."""

FIXED: Mapping[str, Defence] = {
    "AT": AT(),
    f"AT{BF16}": AT(precision="bfloat16"),
    "clip": Clip(),
    "gate 100": Gate(),
    "gate 500": Gate(trusted_size=500),
}
"""The other defences."""


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=64, help="of the ResNet-18")
    parser.add_argument("--images", type=int, default=5000, help="burn-in images")
    parser.add_argument("--epochs", type=int, default=4, help="burn-in epochs; the old model is from half of them")
    parser.add_argument("--trusted", type=int, default=1000, help="images that DSC is calibrated on")
    parser.add_argument("--batches", type=int, default=5, help="different batches, clean and poisoned")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each")
    parser.add_argument(
        "--lr", type=float, default=0.1, help="of the stream; the larger, the faster it leaves a threshold behind"
    )
    parser.add_argument("--eps", type=float, default=0.1, help="of the attack")
    parser.add_argument("--steps", type=int, default=10, help="inner steps of the attack")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0.05, 0.28], help="shares of clean samples that DSC is to correct"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--cache", type=Path, default=None, help="keep the burn-in here")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def fresh(model: nn.Module, defence: Defence, history: History, trusted: Batch, lr: float) -> Learner:
    """A learner of that model at the start of the stream."""
    optimiser = victim_optimiser(model, OnlineRun(lr=lr))
    return Learner(model, optimiser, defence=defence, history=history, trusted=trusted)


def poisoned_batches(learner: Learner, stream: Stream, args: argparse.Namespace) -> list[Batch]:
    """Accumulative batches, all crafted against the model as it is."""
    attack = Accumulative(eps=args.eps, steps=args.steps, trigger_update="after_step")
    available: dict[Need, Any] = {
        Need.MODEL: learner.white_box,
        Need.VALIDATION: stream.validation.all(),
        Need.TRIGGER: stream.trigger_batch(args.batches, 0),
        Need.ACCURACY: (1.0, 1.0),
    }
    view, rng = View(0, {}, available, attack.needs), torch.Generator().manual_seed(0)
    return [attack.poison(batch, view, rng=rng) for batch in stream.victim_batches(args.batches, seed=0)]


def timed(
    learners: Mapping[str, Learner], batches: list[Batch], repeats: int, *, follow: bool
) -> dict[str, dict[str, Any]]:
    """Seconds of single updates, the defences in turn; each from the same state, or one after the other (`follow`)."""
    start = next(iter(learners.values())).snapshot()
    seconds: dict[str, list[float]] = {name: [] for name in learners}
    flagged: dict[str, list[float]] = {name: [] for name in learners}
    names = list(learners)
    for repeat in range(repeats + 1):  # the first round warms up
        for number, batch in enumerate(batches):
            for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                if number == 0 or not follow:
                    learners[name].restore(start)
                done = learners[name].update(batch)
                if repeat:
                    seconds[name].append(done.seconds)
                    if done.flagged is not None:
                        flagged[name].append(float(done.flagged.float().mean()))
    for learner in learners.values():
        learner.restore(start)
    found: dict[str, dict[str, Any]] = {}
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds["ST"], strict=True)]
        found[name] = {
            "seconds": statistics.median(own),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "corrected": statistics.fmean(flagged[name]) if flagged[name] else None,
        }
    return found


def kept_for_backward(model: nn.Module, batch: Batch) -> int:
    """Bytes that one forward pass saves for its backward pass, the parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        F.cross_entropy(model(batch.x), batch.y)
    return sum(saved.values())


def memory(defences: Mapping[str, Defence], learner: Learner, old: Weights, batch: Batch) -> dict[str, int]:
    """Peak of one update under each defence, each in a fresh process."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state.safetensors"
        tensors = {f"now.{k}": t for k, t in learner.model.state_dict().items()}
        tensors |= {f"old.{k}": t.detach().clone() for k, t in {**old.parameters, **old.buffers}.items()}
        assert learner.trusted is not None
        trusted = {"trusted.x": learner.trusted.x, "trusted.y": learner.trusted.y}
        safetensors.torch.save_file({**tensors, **trusted, "x": batch.x, "y": batch.y}, state)
        for name in defences:
            defence = defences[name]
            threshold = (defence.mu, defence.tau) if isinstance(defence, DSC) else (0.0, 0.0)
            more = ["--memory-of", f"{name}:{threshold[0]}:{threshold[1]}", "--state", str(state)]
            done = subprocess.run(  # noqa: S603  (this very file, with the arguments it was given)
                [sys.executable, __file__, *sys.argv[1:], *more], capture_output=True, text=True, check=True
            )
            found[name] = int(done.stdout)
    return found


def peak_of(args: argparse.Namespace, model: nn.Module) -> int:
    """Peak memory of one update, in this process."""
    name, mu, tau = args.memory_of.split(":")
    tensors = safetensors.torch.load_file(args.state)
    model.load_state_dict({k.removeprefix("now."): t for k, t in tensors.items() if k.startswith("now.")})
    parameters = {name: tensors[f"old.{name}"] for name, _ in model.named_parameters()}
    buffers = {name: tensors[f"old.{name}"] for name, _ in model.named_buffers()}
    history = History(checkpoints={0: Weights(parameters, buffers, "old")})
    batch = Batch(tensors["x"], tensors["y"])
    defence = {"ST": Defence(), **FIXED}.get(
        name, DSC(mu=float(mu), tau=float(tau), precision="bfloat16" if name.endswith(BF16) else "float32")
    )
    trusted = Batch(tensors["trusted.x"], tensors["trusted.y"])
    learner = fresh(model, defence, history, trusted, args.lr)
    learner.update(Batch(batch.x[:2], batch.y[:2]))
    return peak_memory(lambda: learner.update(batch))


def show(figures: Mapping[str, Any], console: Console) -> None:
    """The tables."""
    about = "ResNet-18 width {width}, batch 100 of cifar10, {threads} threads, torch {torch}".format(
        **figures["setting"]
    )
    table = Table(title=f"Seconds an update: {about}", title_justify="left")
    for column in ("stream", "defence", "seconds", "times ST", "samples corrected"):
        table.add_column(column, justify="left" if column in {"stream", "defence"} else "right")
    for stream, defences in figures["speed"].items():
        for name, f in defences.items():
            corrected = "" if f["corrected"] is None else f"{f['corrected']:.1%}"
            ratio = f"{f['ratio']:.2f} ({f['ratio_min']:.2f} to {f['ratio_max']:.2f})"
            table.add_row(stream, name, f"{f['seconds']:.3f}", ratio, corrected)
    console.print(table)
    for name, found in figures["calibration"].items():
        text = "P = {mu:.3g} + {tau:.3g} m, above it {rate:.1%} of {samples} trusted samples".format(**found)
        console.print(f"{name}: {text}")
    table = Table(title="Peak memory of one update, above what was resident before", title_justify="left")
    for column in ("", "MiB", "more than ST"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, size in figures["memory_bytes"].items():
        more = (size - figures["memory_bytes"]["ST"]) / 2**20
        table.add_row(name, f"{size / 2**20:.0f}", f"{more:+.0f}")
    for name, size in figures["allowance_bytes"].items():
        table.add_row(name, f"{size / 2**20:.0f}", "")
    console.print(table)


def main() -> None:
    """Measure, print, and write where asked."""
    args = arguments()
    torch.set_num_threads(args.threads)
    stream = open_stream(
        StreamSettings(name="cifar10", burn_in=args.images, victim=100 * (args.batches + 1), trusted=args.trusted)
    )
    config = {"name": "resnet18", "width": args.width}
    model = build_model(config, stream.info, seed=0)
    if args.memory_of is not None:
        print(peak_of(args, model))
        return
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        how = BurnIn(epochs=args.epochs, checkpoints=(args.epochs // 2,))
        kept = burn_in(model, stream, how, seed=0, model_config=config, cache=args.cache or Path(folder))
        history = History(checkpoints=kept.epochs)
        old = history.checkpoint(args.epochs // 2)
    assert old is not None
    trusted = stream.trusted.all()
    plain = fresh(model, Defence(), history, trusted, args.lr)
    known = list(trusted.split(100))
    measured = {f"DSC {rate:.0%}": calibrate(plain, known, rate) for rate in args.rates}
    dscs = {name: dsc for name, (dsc, _) in measured.items()}
    dscs |= {f"{name}{BF16}": replace(dsc, precision="bfloat16") for name, dsc in dscs.items()}
    defences: dict[str, Defence] = {"ST": Defence(), **dscs, **FIXED}
    learners = {name: fresh(model, defence, history, trusted, args.lr) for name, defence in defences.items()}
    streams: dict[str, Callable[[], list[Batch]]] = {
        "clean": lambda: list(stream.victim_batches(args.batches, seed=0)),
        "poisoned": lambda: poisoned_batches(plain, stream, args),
    }
    batches = {name: make() for name, make in streams.items()}
    figures: dict[str, Any] = {
        "speed": {
            name: timed(learners, several, args.repeats, follow=name == "clean") for name, several in batches.items()
        },
        "calibration": {name: found.summary() for name, (_, found) in measured.items()},
        "memory_bytes": memory(defences, plain, old, batches["poisoned"][0]) if sys.platform == "linux" else {},
        "allowance_bytes": {
            "one old model": sum(t.nbytes for t in {**old.parameters, **old.buffers}.values()),
            "one batch of activations": kept_for_backward(model, batches["clean"][0]),
        },
        "setting": {
            **{k: v for k, v in vars(args).items() if k not in {"json", "memory_of", "state", "cache"}},
            "torch": torch.__version__,
            "cpu": platform.processor() or platform.machine(),
        },
    }
    show(figures, console)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
