"""What a cell starts from: the burn-in, fitted detectors, the attacker's surrogate, the learner."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from mithridate.bench.recipe import Cell, Recipe
from mithridate.bench.watcher import Watcher
from mithridate.core import registry
from mithridate.core.attack import Attack
from mithridate.core.batch import Batch
from mithridate.core.defence import Defence
from mithridate.core.errors import ConfigError, DeviceError
from mithridate.core.model import Snapshot, WhiteBox
from mithridate.core.registry import config_of
from mithridate.core.update_attack import UpdateAttack
from mithridate.core.view import Need
from mithridate.core.watch import Detector
from mithridate.data.foreign import foreign_batches
from mithridate.data.stream import Loader, Stream
from mithridate.models import build_model
from mithridate.simulation.federated import federated_optimiser
from mithridate.simulation.online import EVALUATION_BATCH, OnlineRun, adopt_momentum, online_optimiser
from mithridate.simulation.scoring import Scorer, fit_scorers
from mithridate.training.burn_in import BurnInResult, burn_in
from mithridate.training.history import History
from mithridate.training.learner import Learner


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


def other_images(
    recipe: Recipe, stream: Stream, device: torch.device, data_root: str | Path | None, cache: str | Path | None
) -> list[Batch]:
    """Batches of the other image set that detectors score, if the recipe names one."""
    if not isinstance(recipe.run, OnlineRun) or recipe.run.ood is None:
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


@dataclass(frozen=True)
class Prepared:
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


def prepare(
    cell: Cell, stream: Stream, ood: Sequence[Batch], device: torch.device, cache: Path, watcher: Watcher
) -> Prepared:
    """Train or fetch what all cells of one seed share.

    Args:
        cell: Any of them.
        stream: Gives the burn-in images.
        ood: From `other_images`.
        device: Where to compute.
        cache: Directory of kept burn-ins.
        watcher: Follows progress.

    Raises:
        ConfigError: A checkpoint that somebody needs is not kept.
        DataError: Too few clean samples for a detector.
    """
    recipe = cell.recipe
    burned = _burn_in(cell, stream, device, cache, watcher)
    wanted = any(Need.SURROGATE in attack.component.needs for attack in recipe.attacks)
    surrogate = _surrogate(cell, stream, burned, device, cache, watcher) if wanted else None
    scorers: list[Scorer] = []
    if recipe.detectors:
        learner = online_learner(cell, cell.defence.component, stream, burned, device)
        detectors = {d.label: d.component for d in recipe.detectors}
        scorers = fit_scorers(detectors, learner, learner.training, seed=cell.seed)
    return Prepared(burned, surrogate, scorers, ood)


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
        learner = Learner(model, _optimiser(model, recipe))
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


def _optimiser(model: nn.Module, recipe: Recipe) -> SGD:
    """That of the recipe's loop."""
    run = recipe.run
    if isinstance(run, OnlineRun):
        return online_optimiser(model.parameters(), run)
    return federated_optimiser(model.parameters(), run)


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


def online_learner(cell: Cell, defence: Defence, stream: Stream, result: BurnInResult, device: torch.device) -> Learner:
    """A learner as the burn-in left the model, with the online phase's own optimiser."""
    model, burned = _model(cell, stream, device), result.final
    optimiser = _optimiser(model, cell.recipe)
    learner = Learner(
        model,
        optimiser,
        defence=defence,
        trusted=stream.trusted.all(device) if len(stream.trusted) else None,
        history=_history(cell, defence, result),
        training=Loader(stream.burn_in, EVALUATION_BATCH, device),
        update_mode=cell.recipe.run.update_mode if isinstance(cell.recipe.run, OnlineRun) else "train",
    )
    learner.restore(Snapshot(burned.parameters, burned.buffers, optimiser.state_dict(), step=0))
    if cell.recipe.run.restore_momentum:
        adopt_momentum(optimiser, burned)
    return learner


def _history(cell: Cell, defence: Defence, burned: BurnInResult) -> History | None:
    """A past for whoever looks back, as long as they need."""
    detectors = (d.component for d in cell.recipe.detectors)
    looking: list[Attack | UpdateAttack | Defence | Detector] = [defence, cell.attack.component, *detectors]
    if not any(Need.HISTORY in component.needs for component in looking):
        return None
    lookback = max(getattr(component, "lookback", 0) for component in looking)
    return History(keep=lookback + 1 if lookback else 0, checkpoints=burned.epochs)
