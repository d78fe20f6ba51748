"""Run a recipe's grid on this machine: burn in once, run every cell, write the store, go on where it was killed."""

import math
import os
import platform
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mithridate import registry
from mithridate.bench import store
from mithridate.bench.recipe import Cell, Recipe
from mithridate.bench.watcher import Watcher
from mithridate.core import Attack, Batch, Defence, Detector, Need, Snapshot, WhiteBox
from mithridate.data.foreign import foreign_batches
from mithridate.data.stream import Loader, Stream, open_stream
from mithridate.errors import ConfigError, DataError, DeviceError, StoreError
from mithridate.files import cache_directory
from mithridate.learning.burn_in import BurnInResult, burn_in
from mithridate.learning.calibrate import Calibration, calibrated
from mithridate.learning.checkpoint import load_snapshot, save_snapshot
from mithridate.learning.history import History
from mithridate.learning.learner import Learner
from mithridate.learning.online import (
    EVALUATION_BATCH,
    Outcome,
    Progress,
    adopt_momentum,
    online_optimiser,
    run_online,
)
from mithridate.learning.scoring import Scorer, fit_scorers
from mithridate.models import build_model
from mithridate.registry import config_of


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


def choose_device(name: str) -> torch.device:
    """The device called `auto`, `cpu` or `cuda`.

    Raises:
        DeviceError: CUDA was asked for and is not there, or the name is another.
    """
    if name not in {"auto", "cpu", "cuda"}:
        raise DeviceError(f"unknown device '{name}'; use auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("CUDA was asked for, and torch sees none on this machine; use --device auto or cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


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
    out: Path,
    *,
    device: str = "auto",
    resume: bool = False,
    data_root: Path | None = None,
    cache: Path | None = None,
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
    watcher = watcher or Watcher()
    cells = list(recipe.cells())
    chosen = choose_device(device)
    _check_directories(cells, out, resume=resume)
    stream = open_stream(recipe.data, data_root=data_root, cache=cache)
    stream.require(recipe.run.steps)
    ood = _ood(recipe, stream, chosen, data_root, cache)
    _check_needs(cells, stream)
    build_model(recipe.model, stream.info, seed=0)
    with deterministic():
        skipped = 0
        prepared: dict[int, _Prepared] = {}
        for number, cell in enumerate(cells):
            watcher.cell(cell, number, len(cells))
            directory = out / cell.run_id
            if store.finished(directory):
                skipped += 1
                watcher.finished(cell, store.read_run(directory).summary, skipped=True)
                continue
            if cell.seed not in prepared:
                prepared = {cell.seed: _prepare(cell, stream, ood, chosen, cache_directory(cache), watcher)}
            summary = _run_cell(cell, directory, stream, prepared[cell.seed], chosen, watcher)
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
            held = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} is unreadable ({error}); delete {directory}.") from None
        differing = _differences(held, cell.config())
        if differing:
            raise StoreError(
                f"{directory} was made with other settings ({', '.join(differing[:5])}); resume with the same ones, or "
                "choose another --out."
            )


def _ood(
    recipe: Recipe, stream: Stream, device: torch.device, data_root: Path | None, cache: Path | None
) -> list[Batch]:
    """Batches of the other image set that detectors score, if the recipe names one."""
    if recipe.run.ood is None:
        return []
    if not recipe.detectors:
        raise ConfigError(f"[run] ood = '{recipe.run.ood}': nothing scores those images; add a [[detector]].")
    return [
        batch.to(device)
        for batch in foreign_batches(
            recipe.run.ood,
            stream.info,
            batches=recipe.run.steps + 1,
            batch_size=stream.batch_size,
            data_root=data_root,
            cache=cache,
        )
    ]


def _check_needs(cells: Sequence[Cell], stream: Stream) -> None:
    """Refuse components that need a part of the stream which the recipe leaves empty."""
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


def _differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    flat_held, flat_wanted = _flat(held), _flat(wanted)
    keys = sorted(flat_held.keys() | flat_wanted.keys())
    return [k for k in keys if flat_held.get(k) != flat_wanted.get(k) and k != "title"]


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if isinstance(value, Mapping):
        return {
            k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: value}


@dataclass(frozen=True)
class _Prepared:
    """What all cells of one seed share.

    Args:
        burned: The victim's burn-in.
        surrogate: What attackers without access to the victim's model craft on, if any attack does.
        scorers: Detectors, fitted to the model as the burn-in left it.
        ood: Batches of another image set.
    """

    burned: BurnInResult
    surrogate: WhiteBox | None
    scorers: Sequence[Scorer]
    ood: Sequence[Batch]


def _prepare(
    cell: Cell, stream: Stream, ood: Sequence[Batch], device: torch.device, cache: Path, watcher: Watcher
) -> _Prepared:
    recipe = cell.recipe
    burned = _burn_in(cell, stream, device, cache, watcher)
    wanted = any(Need.SURROGATE in attack.component.needs for attack in recipe.attacks)
    surrogate = _surrogate(cell, stream, burned, device, cache, watcher) if wanted else None
    scorers: list[Scorer] = []
    if recipe.detectors:
        learner = _learner(cell, cell.defence.component, stream, burned, device)
        detectors = {d.label: d.component for d in recipe.detectors}
        scorers = fit_scorers(detectors, learner, learner.training, seed=cell.seed)
    return _Prepared(burned, surrogate, scorers, ood)


def _surrogate(
    cell: Cell, stream: Stream, burned: BurnInResult, device: torch.device, cache: Path, watcher: Watcher
) -> WhiteBox:
    """An older state of the victim's model, or a model trained apart."""
    how, recipe = cell.recipe.surrogate, cell.recipe
    if how.kind == "checkpoint":
        held = History(checkpoints=burned.epochs).checkpoint(how.epoch)
        if held is None:
            which = "no checkpoint" if how.epoch is None else f"no checkpoint of epoch {how.epoch}"
            raise ConfigError(f"[surrogate]: the burn-in keeps {which}; add it to `checkpoints` in [burn_in].")
        model = _model(cell, stream, device)
        learner = Learner(model, online_optimiser(model.parameters(), recipe.run))
        learner.restore_parameters(held.parameters)
        learner.restore_buffers(held.buffers)
        return learner.white_box
    own = recipe.model if how.model is None else registry.build("model", how.model, where="[surrogate] model")
    seed = (cell.seed if recipe.burn_in.seed is None else recipe.burn_in.seed) + how.seed_offset
    model = build_model(own, stream.info, seed=seed).to(device)
    burn_in(
        model,
        stream,
        replace(recipe.burn_in, seed=seed, checkpoints=(), checkpoint=None),
        seed=seed,
        model_config=config_of(own),
        cache=cache,
        on_epoch=lambda done, epochs: watcher.burn_in(seed, done, epochs),
    )
    return WhiteBox(model, F.cross_entropy)


def _model(cell: Cell, stream: Stream, device: torch.device) -> nn.Module:
    seed = cell.recipe.burn_in.seed
    return build_model(cell.recipe.model, stream.info, seed=cell.seed if seed is None else seed).to(device)


def _burn_in(cell: Cell, stream: Stream, device: torch.device, cache: Path, watcher: Watcher) -> BurnInResult:
    return burn_in(
        _model(cell, stream, device),
        stream,
        cell.recipe.burn_in,
        seed=cell.seed,
        model_config=config_of(cell.recipe.model),
        cache=cache,
        on_epoch=lambda done, epochs: watcher.burn_in(cell.seed, done, epochs),
    )


def _run_cell(
    cell: Cell, directory: Path, stream: Stream, prepared: _Prepared, device: torch.device, watcher: Watcher
) -> dict[str, Any]:
    run, burned = cell.recipe.run, prepared.burned
    learner = _learner(cell, cell.defence.component, stream, burned, device)
    calibrations = calibrated(learner, stream.batch_size)
    store.write_toml(directory / store.CONFIG, cell.config())
    store.write_json(directory / store.ENVIRONMENT, environment(device))
    state = directory / store.STATE
    progress = _load_progress(state, learner) if state.exists() else Progress()

    def on_step(progress: Progress) -> None:
        done = len(progress.rows) - 1
        if done % run.save_every == 0:
            _save_progress(state, learner, progress)
        watcher.step(cell, done, run.steps, progress.rows[-1]["accuracy"])

    outcome = run_online(
        learner,
        stream,
        cell.attack.component,
        run,
        monitors=[m.component for m in cell.recipe.monitors],
        seed=cell.seed,
        progress=progress,
        on_step=on_step,
        scorers=prepared.scorers,
        ood=prepared.ood,
        surrogate=prepared.surrogate,
    )
    summary = _summary(cell, outcome, burned, calibrations)
    store.write_trace(directory / store.TRACE, outcome.trace)
    if outcome.images:
        store.write_arrays(directory / store.IMAGES, {n: t.float().numpy() for n, t in outcome.images.items()})
    if prepared.scorers:
        store.write_scores(directory / store.SCORES, outcome.scores)
    store.write_json(directory / store.SUMMARY, summary)
    state.unlink(missing_ok=True)
    return summary


def _learner(cell: Cell, defence: Defence, stream: Stream, result: BurnInResult, device: torch.device) -> Learner:
    """A learner as the burn-in left the model, with the online phase's own optimiser."""
    model, burned = _model(cell, stream, device), result.final
    optimiser = online_optimiser(model.parameters(), cell.recipe.run)
    learner = Learner(
        model,
        optimiser,
        defence=defence,
        trusted=stream.trusted.all(device) if len(stream.trusted) else None,
        history=_history(cell, defence, result),
        training=Loader(stream.burn_in, EVALUATION_BATCH, device),
        update_mode=cell.recipe.run.update_mode,
    )
    learner.restore(Snapshot(burned.parameters, burned.buffers, optimiser.state_dict(), step=0))
    if cell.recipe.run.restore_momentum:
        adopt_momentum(optimiser, burned)
    return learner


def _history(cell: Cell, defence: Defence, burned: BurnInResult) -> History | None:
    """A past for whoever looks back, as long as they need."""
    detectors = (d.component for d in cell.recipe.detectors)
    looking: list[Attack | Defence | Detector] = [defence, cell.attack.component, *detectors]
    if not any(Need.HISTORY in component.needs for component in looking):
        return None
    lookback = max(getattr(component, "lookback", 0) for component in looking)
    return History(keep=lookback + 1 if lookback else 0, checkpoints=burned.epochs)


def _summary(cell: Cell, outcome: Outcome, burned: BurnInResult, calibrations: Sequence[Calibration]) -> dict[str, Any]:
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in outcome.summary().items()}
    return {
        **plain,
        "seed": cell.seed,
        "attack": cell.attack.label,
        "defence": cell.defence.label,
        "dataset": cell.recipe.data.name,
        "model": config_of(cell.recipe.model)["name"],
        "burn_in_key": burned.key,
        "burn_in_seconds": burned.seconds,
        "calibrations": [c.summary() for c in calibrations],
    }


def _save_progress(path: Path, learner: Learner, progress: Progress) -> None:
    extra = {f"attack.{k}": v for k, v in progress.memory.items()}
    extra |= {f"defence.{k}": v for k, v in learner.memory.items()}
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
    kinds = ("attack", "defence", "image", "history", "score", "changed")
    parts: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in kinds}
    for name, tensor in extra.items():
        kind, _, key = name.partition(".")
        parts[kind][key] = tensor if name in note["on_cpu"] else tensor.to(learner.device)
    learner.memory.update(parts["defence"])
    if learner.history is not None:
        learner.history.load(parts["history"])
    return Progress(note["rows"], parts["attack"], parts["image"], parts["score"], parts["changed"])
