"""Start accuracy by schedule and seed: whether a burn-in ends well on every seed and every processor.

Trains the demo's burn-in (`small_cnn` on digits) once a seed under each schedule and prints what the test part says.
At a constant rate some seeds end on a spike of the loss, and which ones depends on the instructions that torch chose;
these can be set without another machine:

    python benchmarks/burn_in.py
    ATEN_CPU_CAPABILITY=avx2 python benchmarks/burn_in.py
    ATEN_CPU_CAPABILITY=default python benchmarks/burn_in.py --threads 2 --width 8 --json starts.json
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

from mithridate.data.stream import Stream, StreamSettings, open_stream
from mithridate.models import build_model
from mithridate.training.burn_in import BurnIn, Schedule, burn_in
from mithridate.training.learner import Learner

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def arguments() -> argparse.Namespace:
    """What to train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES)
    parser.add_argument("--seeds", type=int, default=20, help="0 to this, exclusive")
    parser.add_argument("--width", type=int, default=16, help="of the small_cnn; the demo's is 16")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--lr", type=float, default=0.1, help="of the first step")
    parser.add_argument("--floor", type=float, default=0.95, help="starts below it are counted")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--json", type=Path, default=None, help="write all start accuracies here")
    return parser.parse_args()


def start_accuracy(stream: Stream, how: BurnIn, width: int, seed: int) -> float:
    """Accuracy on the test part after a burn-in."""
    model = build_model({"name": "small_cnn", "width": width}, stream.info, seed=seed)
    burn_in(model, stream, how, seed=seed)
    return Learner(model, torch.optim.SGD(model.parameters(), lr=how.lr)).evaluate([stream.test.all()]).accuracy


def main() -> None:
    """Train, print, and write where asked."""
    args = arguments()
    torch.set_num_threads(args.threads)
    stream = open_stream(StreamSettings(name="digits"))
    capability = torch.backends.cpu.get_cpu_capability()
    starts: dict[str, list[float]] = {}
    for schedule in args.schedules:
        how = BurnIn(epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, schedule=schedule)
        starts[schedule] = [start_accuracy(stream, how, args.width, seed) for seed in range(args.seeds)]
    table = Table()
    for column in ("schedule", "smallest", "median", "largest", f"below {args.floor:.0%}"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for schedule, found in starts.items():
        cells = [f"{100 * value:.1f}" for value in (min(found), statistics.median(found), max(found))]
        table.add_row(schedule, *cells, str(sum(value < args.floor for value in found)))
    print(f"Start accuracy (%) on digits: small_cnn of width {args.width}, {args.epochs} epochs from lr {args.lr},")
    print(f"{args.seeds} seeds; {capability}, {args.threads} thread(s), torch {torch.__version__}")
    Console().print(table)
    if args.json is not None:
        setting = {key: value for key, value in vars(args).items() if key not in {"json", "schedules"}}
        setting |= {"capability": capability, "torch": torch.__version__}
        args.json.write_text(json.dumps({"setting": setting, "starts": starts}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
