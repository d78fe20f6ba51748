"""Run a recipe's grid on this machine: burn in once, run every cell, write the store, go on where it was killed."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch

from mithridate.bench import store
from mithridate.bench.journal import RunJournal
from mithridate.bench.origin import Origin, inputs_key, samples_key, settings_key
from mithridate.bench.place import Place, Standing
from mithridate.bench.prepare import (
    Prepared,
    RunContext,
    burned_in_learner,
    choose_device,
    other_images,
    prepare,
    with_surrogate,
)
from mithridate.bench.recipe import Cell, Recipe
from mithridate.bench.watcher import Watcher
from mithridate.core.attack import Attack
from mithridate.core.defence import Calibration
from mithridate.core.environment import differing, environment
from mithridate.core.errors import CheckpointError, DataError, StoreError
from mithridate.core.files import cache_directory, locked, path_of, remove_parts
from mithridate.core.registry import config_of
from mithridate.core.update_attack import UpdateAttack
from mithridate.core.view import Need
from mithridate.data.stream import Stream, open_stream
from mithridate.models import build_model
from mithridate.simulation.clients import FederatedRun, federate
from mithridate.simulation.evaluation import require_evaluation
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
    chosen, variants = choose_device(device), recipe.each()
    _check_place(out)

    @lru_cache(maxsize=1)  # one variant's samples in memory
    def opened(number: int) -> tuple[list[Place], RunContext]:
        """Where the runs of one variant are written, and what they share, checked."""
        variant = variants[number]
        stream = open_stream(variant.data, data_root=data_root, cache=cache)
        variant = replace(variant, data=stream.settings)  # sizes as numbers of samples
        cells = list(variant.cells())
        _check_runs(cells, stream)
        ood = other_images(variant, stream, chosen, data_root, cache)
        _check_needs(cells, stream)
        build_model(variant.model, stream.info, seed=0)
        samples = samples_key(stream, ood)
        places = [
            Place(cell, out / cell.run_id, Origin(settings_key(config), samples, inputs_key(samples, config)), resume)
            for cell in cells
            for config in [cell.config()]
        ]
        for place in places:
            place.standing()
        return places, RunContext(stream, ood, chosen, cache_directory(cache), watcher)

    of = sum(len(opened(number)[0]) for number in range(len(variants)))  # all are checked before the first is run
    directories: list[Path] = []
    skipped = 0
    with deterministic():
        for number in range(len(variants)):
            places, context = opened(number)
            prepared: dict[int, Prepared] = {}
            for place in places:
                cell = place.cell
                watcher.cell(cell, len(directories), of)
                directories.append(place.directory)
                if place.standing() is Standing.FINISHED:
                    store.tidy(place.directory)
                    skipped += 1
                    watcher.finished(cell, place.summary(), skipped=True)
                    continue
                if cell.seed not in prepared:
                    prepared = {cell.seed: prepare(cell, context)}
                with locked(place.directory / store.LOCK, timeout=0):
                    kept = place.standing() is Standing.FINISHED  # by another process, while this one prepared
                    ready = with_surrogate(prepared[cell.seed], cell, context)
                    summary = place.summary() if kept else _run_cell(place, ready, context)
                skipped += kept
                watcher.finished(cell, summary, skipped=kept)
    return Grid(directories, len(directories) - skipped, skipped)


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


def _check_place(out: Path) -> None:
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise StoreError(f"{nearest} is not a directory; choose another --out.")


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
        require_evaluation(stream.test, run)
        for component in (cell.attack.component, cell.defence.component, *(d.component for d in cell.recipe.detectors)):
            component.check_inputs(sample)
        if isinstance(run, OnlineRun):
            stream.require(run.steps)
        elif clients is not None:
            federate(stream, clients, seed=cell.seed).require(run)
            run.check(run.per_round or clients.clients, len(stream.trusted) > 0)
            cell.defence.component.check_federation(run, run.per_round or clients.clients)


def _run_cell(place: Place, prepared: Prepared, context: RunContext) -> dict[str, Any]:
    """Run a cell, or go on with it; its directory is locked."""
    cell, directory, run = place.cell, place.directory, place.cell.recipe.run
    here = environment(context.device, code=_foreign_code(cell))
    learner = burned_in_learner(cell, cell.defence.component, prepared.burned, context)
    calibrations = calibrated(learner, context.stream.batch_size)
    journal, state = RunJournal(directory / store.JOURNAL), directory / store.STATE
    resumed = _resumed(place, learner, journal, state, here, context.watcher)
    if resumed is None:
        store.clear(directory)
        journal.begin(place.origin)
        resumed = Progress(), _with_burn_ins(here, prepared)
    progress, record = resumed
    remove_parts(directory)
    sums = {
        store.CONFIG: store.write_toml(directory / store.CONFIG, cell.config()),
        store.ENVIRONMENT: store.write_json(directory / store.ENVIRONMENT, record),
    }

    def on_step(progress: Progress) -> None:
        done = len(progress.rows) - 1
        if done % run.save_every == 0:
            _save_progress(state, learner, progress, {"mark": journal.keep(progress), "environment": record})
        context.watcher.step(cell, done, run.steps, progress.newest.accuracy)

    outcome = _outcome(cell, learner, prepared, context, progress, on_step)
    summary = _summary(place, outcome, prepared.burned, calibrations)
    sums[store.TRACE] = store.write_trace(directory / store.TRACE, outcome.trace)
    if outcome.images:
        images = {n: t.float().numpy() for n, t in outcome.images.items()}
        sums[store.IMAGES] = store.write_arrays(directory / store.IMAGES, images)
    if prepared.scorers:
        sums[store.SCORES] = store.write_scores(directory / store.SCORES, outcome.scores)
    sums[store.SUMMARY] = store.write_json(directory / store.SUMMARY, summary)
    store.seal(directory, sums)
    store.tidy(directory)
    return summary


def _foreign_code(cell: Cell) -> list[str]:
    """The plug-ins of the recipe, and the modules of components that the cell names by where they are."""
    return [*cell.recipe.plugins, *_modules(cell.config())]


def _modules(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        name = value.get("name")
        if isinstance(name, str) and ":" in name:
            yield name.partition(":")[0]
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _modules(item)


def _with_burn_ins(here: Mapping[str, Any], prepared: Prepared) -> dict[str, Any]:
    """The environment of a run, and what was another when its burn-in, or that of its surrogate, was trained."""
    record = dict(here)
    for key, burned in (("burn_in", prepared.burned), ("surrogate", prepared.surrogate_burned)):
        there: dict[str, str] = {}
        for environment_then in burned.environments if burned is not None else ():
            there |= {k: v for k, v in differing(here, environment_then).items() if not k.startswith("code.")}
        record |= {key: there} if there else {}
    return record


def _resumed(
    place: Place, learner: Learner, journal: RunJournal, state: Path, here: Mapping[str, Any], watcher: Watcher
) -> tuple[Progress, dict[str, Any]] | None:
    """Where a killed run stood, with the learner put there, and its environment; None if it must begin anew."""
    standing = place.standing()
    if standing is not Standing.UNFINISHED or not state.exists():
        if standing is Standing.DAMAGED and (reason := place.damage()) is not None:
            watcher.redone(place.cell, reason)
        return None
    try:
        progress, record = _load_progress(state, learner, journal)
    except CheckpointError as error:
        watcher.redone(place.cell, str(error))
        return None
    if changed := differing(here, {k: v for k, v in record.items() if k not in {"burn_in", "surrogate", "resumed"}}):
        entry = {"after_step": len(progress.rows) - 1, **changed}
        record["resumed"] = [*record.get("resumed", []), entry]
    return progress, record


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


def _summary(
    place: Place, outcome: Outcome, burned: BurnInResult, calibrations: Sequence[Calibration]
) -> dict[str, Any]:
    cell = place.cell
    values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in outcome.summary().items()}
    return {
        **values,
        "seed": cell.seed,
        "attack": cell.attack.label,
        "defence": cell.defence.label,
        "dataset": cell.recipe.data.label,
        "model": config_of(cell.recipe.model)["name"],
        "settings_key": place.origin.settings,
        "samples_key": place.origin.samples,
        "inputs_key": place.origin.inputs,
        "burn_in_key": burned.key,
        "burn_in_seconds": burned.seconds,
        "burn_in_curve": [measured._asdict() for measured in burned.curve],
        "calibrations": [c.summary() for c in calibrations],
    }


def _save_progress(path: Path, learner: Learner, progress: Progress, note: Mapping[str, Any]) -> None:
    """Keep the state of model, optimiser, attack and defence: as large after the last step as after the first."""
    extra = {f"attack.{k}": v for k, v in progress.memory.items()}
    extra |= {f"defence.{k}": v for k, v in learner.memory.items()}
    extra |= {f"rule.{k}": v for k, v in progress.rule.items()}
    extra |= {f"image.{k}": v for k, v in progress.images.items()}
    if learner.history is not None:
        extra |= {f"history.{k}": v for k, v in learner.history.tensors().items()}
    on_cpu = [name for name, t in extra.items() if t.device.type == "cpu"]
    save_snapshot(path, learner.snapshot(), extra=extra, note={**note, "on_cpu": on_cpu})


def _load_progress(path: Path, learner: Learner, journal: RunJournal) -> tuple[Progress, dict[str, Any]]:
    """What `_save_progress` kept, the learner put there, and the environment of then.

    Raises:
        CheckpointError: A file is missing or damaged; the learner is then as it was.
    """
    snapshot, extra, note = load_snapshot(path)
    kinds = ("attack", "defence", "rule", "image", "history")
    parts: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in kinds}
    try:
        for name, tensor in extra.items():
            kind, _, key = name.partition(".")
            parts[kind][key] = tensor if name in note["on_cpu"] else tensor.to(learner.device)
        progress = Progress(memory=parts["attack"], rule=parts["rule"], images=parts["image"])
        journal.take_back(progress, note["mark"])
        record = dict(note["environment"])
    except (KeyError, TypeError) as error:  # a whole snapshot, of something else
        raise CheckpointError(f"{path} is no state of a run ({type(error).__name__}: {error}).") from error
    learner.restore(snapshot)
    learner.memory.update(parts["defence"])
    if learner.history is not None:
        learner.history.load(parts["history"])
    return progress, record
