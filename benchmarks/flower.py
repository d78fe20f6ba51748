"""Federated rounds against Flower's own simulation: the same model, clients and rounds, on this machine.

Every client takes one SGD step on all of its images, BatchNorm in eval mode, and the server takes the mean of the
models: with the same learning rate that is the mean of the clients' gradients and one step of the server, which is what
`run_federated` does. Before anything is measured, both make two rounds of the fewest clients in double precision and
must come to the same model (`AGREEMENT`), or the benchmark raises. In the single precision that is measured, a ReLU at
its kink may fall to either side when images go through a model in other company, and a steep loss makes more of that:
how far apart the two end is shown.

Flower runs its Simulation Engine (Ray) as suits it best here: one actor a thread asked for, each with one thread of
torch; an actor keeps its model and maps the images from one file; nobody evaluates. Each point is a fresh process,
bound with all that it starts to as many processors as threads; the two sides take turns, and the order changes from
repetition to repetition. Measured are

- seconds a round, the first one left out (Ray's actors load torch in it), and processor seconds of all processes,
  which other work on the machine spoils less;
- seconds from the start of the process to the end of the first round;
- peak memory: the sum of proportional set sizes (what is shared counts once) over the process and all that it started,
  looked at four times a second (Linux only).

A point that takes longer than `--limit` seconds, or more memory than `--memory` GiB, is ended, and the table says so;
the rounds that it had finished count. Needs `flwr[simulation]`.

    python benchmarks/flower.py --threads 1 2 --json flower.json
    MITHRIDATE_DATA=... python benchmarks/flower.py --model resnet18 --data cifar10 --samples 1
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mithridate.data import dataset_info
from mithridate.data.stream import Stream, StreamSettings, open_stream
from mithridate.models import build_model
from mithridate.simulation.clients import FederatedRun, Federation
from mithridate.simulation.federated import run_federated
from mithridate.simulation.run import Progress, victim_optimiser
from mithridate.training.learner import Learner
from mithridate.update_attacks.clean import CleanUpdates

AGREEMENT = 1e-9
"""Largest distance of the two models in double precision, relative to how far they moved: many roundings of 1e-16."""

SIDES = ("mithridate", "flower")
BURN_IN, STEPS = 300, 20
LOOK = 0.25
"""Seconds between two looks at the memory of a point."""

SETTING = "MITHRIDATE_BENCHMARK_POINT"
"""The variable of the environment that tells a point's processes what to do."""


@dataclass(frozen=True)
class Point:
    """One measurement.

    Args:
        side: `mithridate` or `flower`.
        folder: Where the first weights and the images are, and where results go.
        data: An image set.
        model: A registered model.
        width: Its width.
        clients: How many there are; all take part in every round.
        samples: Images of each.
        rounds: How many.
        lr: Learning rate.
        threads: Processors.
        limit: Seconds that it may take.
        double: Whether in double precision.
    """

    side: str
    folder: str
    data: str
    model: str
    width: int
    clients: int
    samples: int
    rounds: int
    lr: float
    threads: int
    limit: float
    double: bool = False

    @property
    def log(self) -> Path:
        """Where time and processor seconds at the end of each round go, a line each."""
        return Path(self.folder, f"{self.side}.log")

    @property
    def end(self) -> Path:
        """Where the last weights go."""
        return Path(self.folder, f"{self.side}.safetensors")

    def note_round(self) -> None:
        """Write down that a round has ended, and the processor time of this process and what it started."""
        used = time.process_time() + sum(map(processor_seconds, family(os.getpid())[1:]))
        with self.log.open("a", encoding="ascii") as file:
            print(time.time(), used, file=file)

    def fresh(self) -> nn.Module:
        """The model with the weights that both sides start from."""
        model = build_model({"name": self.model, "width": self.width}, dataset_info(self.data), seed=0)
        model.load_state_dict(load_file(Path(self.folder, "start.safetensors")))
        return model.double().eval() if self.double else model.eval()

    def images_of(self, client: int, images: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Positions of a client's images among so many; clients share them where there are not enough."""
        return (np.arange(self.samples) + client * self.samples) % images


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="small_cnn", help="a registered model")
    parser.add_argument("--width", type=int, default=16, help="its width")
    parser.add_argument("--data", default="digits", help="an image set")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000, 10_000], help="of the federations")
    parser.add_argument("--samples", type=int, default=10, help="images of a client")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of each, >= 2: the first is not counted")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="processors")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each point")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that a point may take")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that a point may take")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds: the first round is not counted, so give at least 2.")
    return args


# What a point's processes do.


def point() -> None:
    """The process of a point: its side's run, from the environment's setting."""
    setting = Point(**json.loads(os.environ[SETTING]))
    {"mithridate": with_mithridate, "flower": with_flower}[setting.side](setting)


def opened(data: str, images: int) -> Stream:
    """So many images for the clients, or as many as there are."""
    splits = {"digits": 1400, "cifar10": 49_000}
    victim = min(images, splits[data])
    return open_stream(StreamSettings(name=data, burn_in=BURN_IN, victim=victim, trusted=0, validation=0, test=10))


def with_mithridate(setting: Point) -> None:
    """All rounds by `run_federated`; the last one is its trigger round, which a clean run makes like any other."""
    torch.set_num_threads(setting.threads)
    stream = opened(setting.data, setting.clients * setting.samples)
    shards = [setting.images_of(client, len(stream.victim)) for client in range(setting.clients)]
    run = FederatedRun(
        rounds=setting.rounds - 1, lr=setting.lr, momentum=0.0, batch_norm="frozen", evaluate_every=setting.rounds
    )
    model = setting.fresh()
    learner = Learner(model, victim_optimiser(model, run))

    def note(_: Progress) -> None:
        setting.note_round()

    run_federated(learner, Federation(stream, shards, seed=0), CleanUpdates(), run, on_step=note)
    setting.note_round()
    save_file(model.state_dict(), setting.end)


@lru_cache(maxsize=1)
def at_client() -> tuple[Point, nn.Module, Tensor, Tensor]:
    """What an actor keeps: the setting, a model, and the images, which are mapped and not read."""
    torch.set_num_threads(1)
    setting = Point(**json.loads(os.environ[SETTING]))
    images = load_file(Path(setting.folder, "images.safetensors"))
    return setting, setting.fresh(), images["x"], images["y"]


def with_flower(setting: Point) -> None:
    """All rounds by FedAvg in Flower's Simulation Engine."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client, server = ClientApp(), ServerApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        own, model, x, y = at_client()
        mine = torch.from_numpy(own.images_of(int(context.node_config["partition-id"]), len(y)))
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        optimiser = torch.optim.SGD(model.parameters(), lr=own.lr)
        optimiser.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(x[mine]), y[mine]))
        optimiser.step()
        metrics = MetricRecord({"num-examples": len(mine)})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    @server.main()
    def main(grid: Grid, _: Context) -> None:
        def note(number: int, __: ArrayRecord) -> None:
            if number > 0:
                setting.note_round()

        n = setting.clients
        result = FedAvg(fraction_evaluate=0.0, min_train_nodes=n, min_available_nodes=n).start(
            grid=grid,
            initial_arrays=ArrayRecord(setting.fresh().state_dict()),
            num_rounds=setting.rounds,
            timeout=setting.limit,
            evaluate_fn=note,
        )
        weights = result.arrays.to_torch_state_dict()
        save_file({name: t.contiguous() for name, t in weights.items()}, setting.end)

    # Ray's own files stay in the point's folder; its store need not hold a third of the machine's memory.
    init = {"num_cpus": setting.threads, "_temp_dir": f"{setting.folder}/ray", "object_store_memory": 2**29}
    backend: Any = {"init_args": init, "client_resources": {"num_cpus": 1}}  # nested further than Flower's type says
    run_simulation(server, client, setting.clients, backend_config=backend)


# What watches over them.


def family(pid: int) -> list[int]:
    """A process and what it started, and what that started in turn."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text(encoding="ascii", errors="replace")
                parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:  # grows as it goes
        found += [child for child, parent in parents.items() if parent == one]
    return found


def processor_seconds(pid: int) -> float:
    """What a process has used; 0 if it has ended."""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return sum(map(int, stat.rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def memory_of(pids: list[int]) -> int:
    """The sum of their proportional set sizes, in bytes."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def measured(setting: Point, memory: float) -> dict[str, Any]:
    """Run a point and watch it; what it came to."""
    for path in (setting.log, setting.end):
        path.unlink(missing_ok=True)
    places = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        SETTING: json.dumps(asdict(setting)),
        "PYTHONPATH": os.pathsep.join(places),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # how Ray leaves devices alone from now on; else it warns
    }
    processors = sorted(os.sched_getaffinity(0))[: setting.threads]
    peak, gave_up, began = 0, "", time.time()
    with Path(setting.folder, f"{setting.side}.txt").open("w", encoding="utf-8") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", "import flower; flower.point()"],
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, processors),  # noqa: PLW1509  (no threads here)
        )
        try:
            while process.poll() is None and not gave_up:
                peak = max(peak, memory_of(family(process.pid)))
                if peak > memory * 2**30:
                    gave_up = f"more than {memory:g} GiB"
                elif time.time() - began > setting.limit:
                    gave_up = f"more than {setting.limit:g} s"
                time.sleep(LOOK)
        finally:
            end(process)
    lines = setting.log.read_text(encoding="ascii").splitlines() if setting.log.exists() else []
    if not gave_up and (process.returncode != 0 or len(lines) < setting.rounds):
        raise RuntimeError(f"{setting.side} failed:\n" + Path(said.name).read_text(encoding="utf-8")[-3000:])
    wall, cpu = ([float(line.split()[column]) for line in lines] for column in (0, 1))
    return {
        "rounds": [b - a for a, b in pairwise(wall)],
        "cpu": [b - a for a, b in pairwise(cpu)],
        "start": wall[0] - began if wall else None,
        "bytes": peak,
        "gave_up": gave_up,
    }


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and, by their ids, all that it started."""
    for pid in family(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def prepare(args: argparse.Namespace, folder: str, clients: int) -> None:
    """The images and first weights of both sides: those of a model after a few steps."""
    stream = opened(args.data, clients * args.samples)
    images = stream.victim.all()
    save_file({"x": images.x, "y": images.y}, Path(folder, "images.safetensors"))
    model = build_model({"name": args.model, "width": args.width}, stream.info, seed=0)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    first = stream.burn_in.all()
    for _ in range(STEPS):
        optimiser.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(first.x), first.y))
        optimiser.step()
    save_file(model.state_dict(), Path(folder, "start.safetensors"))


def apart(folder: str, settings: Mapping[str, Point]) -> float:
    """How far the two sides' weights are from each other, relative to how far they moved."""
    start = load_file(Path(folder, "start.safetensors"))
    ends = {side: load_file(settings[side].end) for side in SIDES}
    learned = [name for name, t in start.items() if t.is_floating_point()]

    def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
        return float(torch.cat([(a[name] - b[name]).flatten().double() for name in learned]).norm())

    return distance(ends["mithridate"], ends["flower"]) / distance(ends["mithridate"], start)


def settings_of(args: argparse.Namespace, folder: str, clients: int, threads: int) -> dict[str, Point]:
    """A point of each side."""
    shared = {key: getattr(args, key) for key in ("data", "model", "width", "samples", "rounds", "lr", "limit")}
    return {side: Point(side, folder, clients=clients, threads=threads, **shared) for side in SIDES}


def agreement(args: argparse.Namespace) -> float:
    """How far the two sides end from each other in double precision; raises if they do not agree."""
    with tempfile.TemporaryDirectory(prefix="point") as folder:
        clients = min(args.clients)
        prepare(args, folder, clients)
        points = settings_of(args, folder, clients, min(args.threads))
        points = {side: replace(point, rounds=2, double=True) for side, point in points.items()}
        gave_up = {side: measured(point, args.memory)["gave_up"] for side, point in points.items()}
        if any(gave_up.values()):
            raise RuntimeError(
                f"whether the two sides agree could not be tested: {gave_up}; raise --limit or --memory."
            )
        found = apart(folder, points)
    if not found <= AGREEMENT:
        raise RuntimeError(f"the two sides end {found:.1e} of their way apart; this is a defect, report it.")
    return found


def compare(args: argparse.Namespace, clients: int, threads: int) -> dict[str, Any]:
    """Both sides at one number of clients and of threads, in turns."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    differences = []
    with tempfile.TemporaryDirectory(prefix="point") as folder:
        prepare(args, folder, clients)
        settings = settings_of(args, folder, clients, threads)
        for repeat in range(args.repeats):
            for side in SIDES[:: -1 if repeat % 2 else 1]:
                runs[side].append(measured(settings[side], args.memory))
            if not any(runs[side][-1]["gave_up"] for side in SIDES):
                differences.append(apart(folder, settings))
    return {
        "clients": clients,
        "threads": threads,
        "apart": max(differences, default=None),
        **{side: summary(runs[side]) for side in SIDES},
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds of all runs; the largest memory."""
    rounds, cpu = ([seconds for run in runs for seconds in run[clock]] for clock in ("rounds", "cpu"))
    starts = [run["start"] for run in runs if run["start"] is not None]
    return {
        "seconds": statistics.median(rounds) if rounds else None,
        "least": min(rounds, default=None),
        "most": max(rounds, default=None),
        "cpu": statistics.median(cpu) if cpu else None,
        "start": statistics.median(starts) if starts else None,
        "bytes": max(run["bytes"] for run in runs),
        "gave_up": next((run["gave_up"] for run in runs if run["gave_up"]), ""),
    }


def rows(points: list[dict[str, Any]]) -> Iterator[list[str]]:
    """The table's rows."""
    for found in points:
        ours, theirs = (found[side] for side in SIDES)
        for side in SIDES:
            f = found[side]
            faster = ours["seconds"] and theirs["seconds"] and side == "mithridate"
            yield [
                str(found["threads"]),
                f"{found['clients']:,}",
                side,
                "" if f["seconds"] is None else f"{1 / f['seconds']:.3g}",
                "" if f["seconds"] is None else f"{f['seconds']:.3f} ({f['least']:.3f} to {f['most']:.3f})",
                f"{theirs['seconds'] / ours['seconds']:.3g}" if faster else "",
                "" if f["cpu"] is None else f"{f['cpu']:.3f}",
                f"{theirs['cpu'] / ours['cpu']:.3g}" if faster else "",
                "" if f["start"] is None else f"{f['start']:.1f}",
                f"{f['bytes'] / 2**20:,.0f}",
                f"{found['apart']:.0e}" if side == "flower" and found["apart"] is not None else "",
                f["gave_up"],
            ]


def main() -> None:
    """Measure, print, and write where asked."""
    args = arguments()
    console = Console(width=140)
    points: list[dict[str, Any]] = []
    agreed = agreement(args)
    console.print(f"in double precision the two sides end {agreed:.0e} of their way apart")
    for threads in args.threads:
        for clients in args.clients:
            points.append(compare(args, clients, threads))
            console.print(*(" | ".join(row) for row in rows(points[-1:])), sep="\n")
    title = f"{args.model} width {args.width}, {args.data}, {args.samples} images a client"
    table = Table(title=title, title_justify="left")
    columns = "threads clients side rounds/s s/round faster cpu-s/round less first MiB apart gave-up"
    for column in columns.split():
        table.add_column(column.replace("-", " "), justify="left" if column in {"side", "gave-up"} else "right")
    for row in rows(points):
        table.add_row(*row)
    console.print(table)
    if args.json is not None:
        from importlib.metadata import version

        setting = {
            **{key: value for key, value in vars(args).items() if key != "json"},
            **{name: version(name) for name in ("torch", "flwr", "ray")},
            "cpu": platform.processor() or platform.machine(),
            "processors": os.cpu_count(),
        }
        args.json.write_text(
            json.dumps({"points": points, "apart_in_double_precision": agreed, "setting": setting}, indent=2) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
