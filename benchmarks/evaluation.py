"""Seconds of measuring a test part, in turns: as it is, in channels last, in bfloat16, and on a subset.

    python benchmarks/evaluation.py [--widths 16 64] [--threads 1] [--repeats 5] [--samples 10000] [--json times.json]

The images are CIFAR-10's test split where MITHRIDATE_DATA holds it, else random pixels; the model is a ResNet-18 after
a burn-in of one epoch (on random pixels, without one), so that accuracies mean something. Beside the seconds stands
how far each way's accuracy is from the first one's: rounding may move it by 0.1 point at most.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mithridate.core.batch import Batch
from mithridate.data.images import DATA_ROOT
from mithridate.data.stream import Part, Stream, StreamSettings, open_stream
from mithridate.models import build_model
from mithridate.simulation.evaluation import Evaluation
from mithridate.simulation.online import OnlineRun
from mithridate.training.burn_in import BurnIn, burn_in
from mithridate.training.learner import Learner, Score


def arguments() -> argparse.Namespace:
    """How much to measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--subset", type=int, default=1000)
    parser.add_argument("--burn-in", type=int, default=5000, help="images of the one epoch before")
    parser.add_argument("--json", type=Path, default=None, help="write the times here")
    return parser.parse_args()


def stream_of(samples: int, images: int) -> Stream:
    """CIFAR-10, or noise of its shape."""
    if os.environ.get(DATA_ROOT):
        return open_stream(StreamSettings(name="cifar10", burn_in=images, victim=100, validation=0, test=samples))
    rng, n = np.random.default_rng(0), samples + 400
    x = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    return Stream.from_arrays(x, np.arange(n) % 10, burn_in=100, victim=100, validation=0, trusted=100, test=samples)


def channels_last(batches: Sequence[Batch]) -> list[Batch]:
    """The same batches, laid out otherwise."""
    return [Batch(batch.x.contiguous(memory_format=torch.channels_last), batch.y) for batch in batches]


def ways(stream: Stream, width: int, subset: int, epochs: int) -> dict[str, Callable[[], Score]]:
    """Each way of measuring one model, by name; the first is the usual one."""
    model = build_model({"name": "resnet18", "width": width}, stream.info, seed=0)
    if epochs:
        burn_in(model, stream, BurnIn(epochs=epochs, batch_size=100, lr=0.1), seed=0)
    plain = Learner(model, torch.optim.SGD(model.parameters(), lr=0.1))
    turned = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its types
    last = Learner(turned, torch.optim.SGD(turned.parameters(), lr=0.1))
    test: Part = stream.test
    some = Evaluation.of(test, OnlineRun(evaluate_size=subset), 0, plain.device)
    laid_out = channels_last(some.whole)
    return {
        "whole, float32": lambda: plain.evaluate(some.whole),
        "channels last": lambda: last.evaluate(laid_out),
        "bfloat16": lambda: plain.evaluate(some.whole, precision="bfloat16"),
        "bfloat16, channels last": lambda: last.evaluate(laid_out, precision="bfloat16"),
        f"subset of {subset}": lambda: plain.evaluate(some.between),
    }


def in_turns(calls: dict[str, Callable[[], Score]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Wall and processor seconds, and the accuracy, of each call; each is called once a turn."""
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "processor": []} for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            began, processor = time.perf_counter(), time.process_time()
            accuracy = call().accuracy
            found[name]["seconds"].append(time.perf_counter() - began)
            found[name]["processor"].append(time.process_time() - processor)
            found[name]["accuracy"] = [accuracy]
    return found


def main() -> None:
    """Measure, print, and write where asked."""
    args = arguments()
    torch.set_num_threads(args.threads)
    real = bool(os.environ.get(DATA_ROOT))
    stream = stream_of(args.samples, args.burn_in)
    table = Table(box=None, caption=f"{args.samples} images, {args.threads} threads, torch {torch.__version__}")
    for column in ("width", "way", "seconds", "processor seconds", "of the first", "accuracy (%)", "change (points)"):
        table.add_column(column, justify="left" if column == "way" else "right")
    results = {}
    for width in args.widths:
        found = in_turns(ways(stream, width, args.subset, int(real)), args.repeats)
        results[width] = found
        first, *_ = found.values()
        for name, values in found.items():
            seconds, processor = values["seconds"], values["processor"]
            ratios = [a / b for a, b in zip(processor, first["processor"], strict=True)]
            accuracy, change = values["accuracy"][0], values["accuracy"][0] - first["accuracy"][0]
            table.add_row(
                str(width),
                name,
                f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
                f"{statistics.median(processor):.2f} ({min(processor):.2f} to {max(processor):.2f})",
                f"{statistics.median(ratios):.2f}",
                f"{100 * accuracy:.2f}",
                f"{100 * change:+.2f}",
            )
    Console(width=140).print(table)
    if args.json:
        args.json.write_text(json.dumps(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
