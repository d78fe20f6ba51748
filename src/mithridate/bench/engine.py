"""Run a recipe's grid on this machine: burn in once, run every cell, write the store, go on where it was killed."""

import math
import os
import platform
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch

from mithridate.bench import store
from mithridate.bench.prepare import Prepared, RunContext, burned_in_learner, choose_device, other_images, prepare
from mithridate.bench.recipe import Cell, Recipe
from mithridate.bench.watcher import Watcher
from mithridate.core.attack import Attack
from mithridate.core.defence import Calibration
from mithridate.core.errors import DataError, StoreError
from mithridate.core.files import cache_directory, path_of
from mithridate.core.registry import config_of
from mithridate.core.update_attack import UpdateAttack
from mithridate.core.view import Need
from mithridate.data.stream import Stream, open_stream
from mithridate.models import build_model
from mithridate.simulation.clients import FederatedRun, federate
from mithridate.simulation.federated import run_federated
from mithridate.simulation.online import OnlineRun, run_online
from mithridate.simulation.run import Outcome, Progress
from mithridate.training.burn_in import BurnInResult
from mithridate.training.calibrate import calibrated
from mithridate.training.checkpoint import load_snapshot, save_snapshot
from mithridate.training.learner import Learner


@dataclass(frozen=True)
class Grid:
    """The result of running a recipe.

    Args:
        directories: One a cell, in the order of the recipe.
        ran: Cells that were run now, wholly or from where they had been killed.
        skipped: Cells that were finished already.
    """

    directories: Sequence[Path]
    ran: int
    skipped: int


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and threads: what must be equal for two runs to give the same bits."""
    return {
        "mithridate": version("mithridate"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def run_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    data_root: str | Path | None = None,
    cache: str | Path | None = None,
    watcher: Watcher | None = None,
) -> Grid:
    """Run every cell of a recipe and write each to `out/<run id>/`.

    Args:
        recipe: What to run.
        out: Directory of the store; made if missing.
        device: `auto`, `cpu` or `cuda`.
        resume: Skip finished cells and continue killed ones. Without it a cell's directory must not exist.
        data_root: A local mirror of the hub's image sets; see `data.load_images`.
        cache: Directory for decoded images and burn-ins; the user's cache by default.
        watcher: Follows progress.

    Raises:
        UserError: Anything in the recipe, the data, the device or the store that cannot work; found before the first
            directory is made, wherever it can be found then.
    """
    watcher, out = watcher or Watcher(), path_of(out)
    chosen = choose_device(device)
    stream = open_stream(recipe.data, data_root=data_root, cache=cache)
    recipe = replace(recipe, data=stream.settings)  # sizes as numbers of samples
    cells = list(recipe.cells())
    _check_directories(cells, out, resume=resume)
    _check_runs(cells, stream)
    ood = other_images(recipe, stream, chosen, data_root, cache)
    _check_needs(cells, stream)
    context = RunContext(stream, ood, chosen, cache_directory(cache), watcher)
    build_model(recipe.model, stream.info, seed=0)
    with deterministic():
        skipped = 0
        prepared: dict[int, Prepared] = {}
        for number, cell in enumerate(cells):
            watcher.cell(cell, number, len(cells))
            directory = out / cell.run_id
            if store.finished(directory):
                skipped += 1
                watcher.finished(cell, store.read_run(directory).summary, skipped=True)
                continue
            if cell.seed not in prepared:
                prepared = {cell.seed: prepare(cell, context)}
            summary = _run_cell(cell, directory, prepared[cell.seed], context)
            watcher.finished(cell, summary, skipped=False)
    return Grid([out / cell.run_id for cell in cells], len(cells) - skipped, skipped)


class deterministic:
    """Ask torch for algorithms that give the same bits twice, and give the setting back afterwards."""

    def __enter__(self) -> None:
        self.before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        self.benchmark = torch.backends.cudnn.benchmark
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self.before[0], warn_only=self.before[1])
        torch.backends.cudnn.benchmark = self.benchmark


def _check_directories(cells: Sequence[Cell], out: Path, *, resume: bool) -> None:
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise StoreError(f"{nearest} is not a directory; choose another --out.")
    for cell in cells:
        directory = out / cell.run_id
        if not directory.exists():
            continue
        if not resume:
            raise StoreError(f"{directory} exists; go on with --resume, choose another --out, or delete it.")
        path = directory / store.CONFIG
        if not path.exists():
            continue
        try:
            stored = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} is unreadable ({error}); delete {directory}.") from None
        differing = _differences(stored, cell.config())
        if differing:
            raise StoreError(
                f"{directory} was made with other settings ({', '.join(differing[:5])}); resume with the same ones, or "
                "choose another --out."
            )


def _check_needs(cells: Sequence[Cell], stream: Stream) -> None:
    """Refuse components that need a part of the stream that the recipe leaves empty."""
    empty = {
        need for need, part in ((Need.VALIDATION, stream.validation), (Need.TRUSTED, stream.trusted)) if not len(part)
    }
    for cell in cells:
        for label, needs in (
            (cell.attack.label, cell.attack.component.needs),
            (cell.defence.label, cell.defence.component.needs),
        ):
            for need in needs & empty:
                raise DataError(f"{label} needs the {need}, and [data] {need.name.lower()} has no image; give it some.")


def _check_runs(cells: Sequence[Cell], stream: Stream) -> None:
    """Refuse a stream that is too short, inputs that a component cannot work on, and what a federation cannot do."""
    sample = stream.victim.batch(slice(1))
    for cell in cells:
        run, clients = cell.recipe.run, cell.recipe.clients
        for component in (cell.attack.component, cell.defence.component, *(d.component for d in cell.recipe.detectors)):
            component.check_inputs(sample)
        if isinstance(run, OnlineRun):
            stream.require(run.steps)
        elif clients is not None:
            federate(stream, clients, seed=cell.seed).require(run)
            run.check(run.per_round or clients.clients, len(stream.trusted) > 0)
            cell.defence.component.check_federation(run, run.per_round or clients.clients)


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    flat_stored, flat_wanted = _flat(stored), _flat(wanted)
    keys = sorted(flat_stored.keys() | flat_wanted.keys())
    return [k for k in keys if flat_stored.get(k) != flat_wanted.get(k) and k != "title"]


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if isinstance(value, Mapping):
        return {
            k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: value}


def _run_cell(cell: Cell, directory: Path, prepared: Prepared, context: RunContext) -> dict[str, Any]:
    run, burned = cell.recipe.run, prepared.burned
    learner = burned_in_learner(cell, cell.defence.component, burned, context)
    calibrations = calibrated(learner, context.stream.batch_size)
    store.write_toml(directory / store.CONFIG, cell.config())
    store.write_json(directory / store.ENVIRONMENT, environment(context.device))
    state = directory / store.STATE
    progress = _load_progress(state, learner) if state.exists() else Progress()

    def on_step(progress: Progress) -> None:
        done = len(progress.rows) - 1
        if done % run.save_every == 0:
            _save_progress(state, learner, progress)
        context.watcher.step(cell, done, run.steps, progress.rows[-1]["accuracy"])

    outcome = _outcome(cell, learner, prepared, context, progress, on_step)
    summary = _summary(cell, outcome, burned, calibrations)
    store.write_trace(directory / store.TRACE, outcome.trace)
    if outcome.images:
        store.write_arrays(directory / store.IMAGES, {n: t.float().numpy() for n, t in outcome.images.items()})
    if prepared.scorers:
        store.write_scores(directory / store.SCORES, outcome.scores)
    store.write_json(directory / store.SUMMARY, summary)
    state.unlink(missing_ok=True)
    return summary


def _outcome(
    cell: Cell,
    learner: Learner,
    prepared: Prepared,
    context: RunContext,
    progress: Progress,
    on_step: Callable[[Progress], None],
) -> Outcome:
    """The cell's loop, online or federated."""
    recipe, attack = cell.recipe, cell.attack.component
    options: dict[str, Any] = {
        "monitors": [m.component for m in recipe.monitors],
        "progress": progress,
        "on_step": on_step,
    }
    if recipe.clients is not None:
        federation = federate(context.stream, recipe.clients, seed=cell.seed)
        return run_federated(
            learner, federation, cast("UpdateAttack", attack), cast("FederatedRun", recipe.run), **options
        )
    return run_online(
        learner,
        context.stream,
        cast("Attack", attack),
        cast("OnlineRun", recipe.run),
        seed=cell.seed,
        scorers=prepared.scorers,
        ood=context.ood,
        surrogate=prepared.surrogate,
        **options,
    )


def _summary(cell: Cell, outcome: Outcome, burned: BurnInResult, calibrations: Sequence[Calibration]) -> dict[str, Any]:
    values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in outcome.summary().items()}
    return {
        **values,
        "seed": cell.seed,
        "attack": cell.attack.label,
        "defence": cell.defence.label,
        "dataset": cell.recipe.data.label,
        "model": config_of(cell.recipe.model)["name"],
        "burn_in_key": burned.key,
        "burn_in_seconds": burned.seconds,
        "calibrations": [c.summary() for c in calibrations],
    }


def _save_progress(path: Path, learner: Learner, progress: Progress) -> None:
    extra = {f"attack.{k}": v for k, v in progress.memory.items()}
    extra |= {f"defence.{k}": v for k, v in learner.memory.items()}
    extra |= {f"rule.{k}": v for k, v in progress.rule.items()}
    extra |= {f"image.{k}": v for k, v in progress.images.items()}
    extra |= {f"score.{k}": v for k, v in progress.scores.items()}
    extra |= {f"changed.{k}": v for k, v in progress.changed.items()}
    if learner.history is not None:
        extra |= {f"history.{k}": v for k, v in learner.history.tensors().items()}
    on_cpu = [name for name, t in extra.items() if t.device.type == "cpu"]
    save_snapshot(path, learner.snapshot(), extra=extra, note={"rows": progress.rows, "on_cpu": on_cpu})


def _load_progress(path: Path, learner: Learner) -> Progress:
    snapshot, extra, note = load_snapshot(path)
    learner.restore(snapshot)
    kinds = ("attack", "defence", "rule", "image", "history", "score", "changed")
    parts: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in kinds}
    for name, tensor in extra.items():
        kind, _, key = name.partition(".")
        parts[kind][key] = tensor if name in note["on_cpu"] else tensor.to(learner.device)
    learner.memory.update(parts["defence"])
    if learner.history is not None:
        learner.history.load(parts["history"])
    return Progress(note["rows"], parts["attack"], parts["rule"], parts["image"], parts["score"], parts["changed"])
