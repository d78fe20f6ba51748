"""One run of a grid: from its start, or from where it was killed, to the checksums of its directory."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from mithridate.bench import store
from mithridate.bench.journal import RunJournal
from mithridate.bench.place import Place, Standing
from mithridate.bench.prepare import Prepared, RunContext, burned_in_learner
from mithridate.bench.recipe import Cell
from mithridate.bench.watcher import Watcher
from mithridate.core.attack import Attack
from mithridate.core.defence import Calibration
from mithridate.core.environment import differing, environment
from mithridate.core.errors import CheckpointError
from mithridate.core.files import remove_parts, writing
from mithridate.core.registry import config_of
from mithridate.core.update_attack import UpdateAttack
from mithridate.simulation.clients import FederatedRun, federate
from mithridate.simulation.federated import run_federated
from mithridate.simulation.online import OnlineRun, run_online
from mithridate.simulation.run import Outcome, Progress
from mithridate.training.burn_in import BurnInResult
from mithridate.training.calibrate import calibrated
from mithridate.training.checkpoint import load_snapshot, save_snapshot
from mithridate.training.learner import Learner


@contextmanager
def deterministic() -> Iterator[None]:
    """Ask torch for algorithms that give the same bits twice, inside the block; the settings come back afterwards."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark


def run_cell(place: Place, prepared: Prepared, context: RunContext) -> dict[str, Any]:
    """Run a cell, or go on with it.

    Args:
        place: Where; its directory is locked by the caller.
        prepared: What the cell starts from.
        context: What all cells of the recipe share.

    Returns:
        The summary, as it was written.

    Raises:
        WriteError: The file system refuses.
        UserError: What calibration, attack, defence or the loop itself can raise.
    """
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
    with writing(directory):
        (directory / store.ERROR).unlink(missing_ok=True)
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
