"""What a cell starts from: the burn-in, fitted detectors, the attacker's surrogate, the learner."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from mithridate.bench.recipe import Cell, Recipe
from mithridate.bench.watcher import Watcher
from mithridate.core import registry
from mithridate.core.batch import Batch
from mithridate.core.component import Component
from mithridate.core.defence import Defence
from mithridate.core.errors import ConfigError, DeviceError
from mithridate.core.model import WhiteBox
from mithridate.core.past import Snapshot
from mithridate.core.registry import config_of
from mithridate.core.view import Need
from mithridate.data.foreign import foreign_batches
from mithridate.data.stream import Loader, Stream
from mithridate.models import build_model
from mithridate.simulation.run import adopt_momentum, victim_optimiser
from mithridate.simulation.scoring import Scorer, fit_scorers
from mithridate.training.burn_in import EVALUATION_BATCH, BurnInResult, burn_in
from mithridate.training.history import History
from mithridate.training.learner import Learner
from mithridate.training.rollback import put_weights


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
    """Batches of the other image set that detectors score, if the recipe names one.

    Args:
        recipe: Names it, and says for how many steps.
        stream: Whose shape and size of batches they get.
        device: Where they go.
        data_root: A local mirror of the hub's image sets.
        cache: Directory for decoded images.

    Raises:
        ConfigError: The recipe names one and has no detector, or it is no other set of images with classes.
        DataError: The set is not to be had, or has too few images.
    """
    if recipe.ood is None:
        return []
    if not recipe.detectors:
        raise ConfigError(f"[run] ood = '{recipe.ood}': nothing scores those images; add a [[detector]].")
    return [
        batch.to(device)
        for batch in foreign_batches(
            recipe.ood,
            stream.info,
            batches=recipe.run.steps + 1,
            batch_size=stream.batch_size,
            data_root=data_root,
            cache=cache,
        )
    ]


@dataclass(frozen=True)
class RunContext:
    """What all cells of a recipe share while it runs.

    Args:
        stream: Gives the samples.
        ood: Batches of another image set that detectors score, if any.
        device: Where to compute.
        cache: Directory for burn-ins.
        watcher: Follows progress.
    """

    stream: Stream
    ood: Sequence[Batch]
    device: torch.device
    cache: Path
    watcher: Watcher


@dataclass(frozen=True)
class Prepared:
    """What all cells of one seed share.

    Args:
        burned: The victim's burn-in.
        surrogate: What an attacker without access to the victim's model crafts on; None until `with_surrogate` adds
            that of a cell.
        scorers: Detectors, fitted to the model as the burn-in left it.
        surrogate_burned: The surrogate's own burn-in; None if it had none.
    """

    burned: BurnInResult
    surrogate: WhiteBox | None
    scorers: Sequence[Scorer]
    surrogate_burned: BurnInResult | None = None


def prepare(cell: Cell, context: RunContext) -> Prepared:
    """Train or fetch what all cells of one seed share.

    Args:
        cell: Any cell of the seed.
        context: What all cells of the recipe share.

    Raises:
        CheckpointError: The file of a finished model does not fit.
        ConfigError: The burn-in keeps no checkpoint that a detector needs.
        DataError: There are too few clean samples for a detector.
        WriteError: The cache cannot be written to.
    """
    recipe = cell.recipe
    burned = burn_in(
        _model(cell, context),
        context.stream,
        recipe.burn_in,
        seed=cell.seed,
        model_config=config_of(recipe.model),
        cache=context.cache,
        on_epoch=lambda done, epochs: context.watcher.burn_in(cell, cell.seed, done, epochs),
    )
    scorers: list[Scorer] = []
    if recipe.detectors:
        learner = burned_in_learner(cell, cell.defence.component, burned, context)
        detectors = {d.label: d.component for d in recipe.detectors}
        scorers = fit_scorers(detectors, learner, learner.training, seed=cell.seed)
    return Prepared(burned, None, scorers)


def with_surrogate(prepared: Prepared, cell: Cell, context: RunContext) -> Prepared:
    """The same, with the model that the cell's attack crafts on, if it has no access to the victim's.

    Raises:
        ConfigError: The burn-in keeps no checkpoint that the surrogate needs.
    """
    wanted = Need.SURROGATE in cell.attack.component.needs
    if not wanted:
        return prepared
    surrogate, burned = _surrogate(cell, prepared.burned, context)
    return replace(prepared, surrogate=surrogate, surrogate_burned=burned)


def _surrogate(cell: Cell, burned: BurnInResult, context: RunContext) -> tuple[WhiteBox, BurnInResult | None]:
    """An older state of the victim's model, or another model that is trained on the same images, with its burn-in."""
    how, recipe = cell.recipe.surrogate, cell.recipe
    if how.kind == "checkpoint":
        history = History(checkpoints=burned.epochs, length=recipe.burn_in.epochs)
        old = history.checkpoint(how.epoch, who="[surrogate]")
        model = _model(cell, context)
        put_weights(model, old)
        return WhiteBox(model, F.cross_entropy), None
    config = recipe.model if how.model is None else registry.build("model", how.model, where="[surrogate] model")
    seed = cell.burn_in_seed + how.seed_offset
    model = build_model(config, context.stream.info, seed=seed).to(context.device)
    own = burn_in(
        model,
        context.stream,
        replace(recipe.burn_in, seed=seed, checkpoints=(), checkpoint=None, older={}, evaluate_every=None),
        seed=seed,
        model_config=config_of(config),
        cache=context.cache,
        on_epoch=lambda done, epochs: context.watcher.burn_in(cell, seed, done, epochs),
    )
    return WhiteBox(model, F.cross_entropy), own


def _model(cell: Cell, context: RunContext) -> nn.Module:
    return build_model(cell.recipe.model, context.stream.info, seed=cell.burn_in_seed).to(context.device)


def burned_in_learner(cell: Cell, defence: Defence, result: BurnInResult, context: RunContext) -> Learner:
    """A learner with the model as the burn-in left it, and with the run's optimiser.

    Args:
        cell: Which run.
        defence: What stands in the learner's steps.
        result: The burn-in.
        context: What all cells of the recipe share.
    """
    model, burned, run = _model(cell, context), result.final, cell.recipe.run
    stream, optimiser = context.stream, victim_optimiser(model, run)
    learner = Learner(
        model,
        optimiser,
        defence=defence,
        trusted=stream.trusted.all(context.device) if len(stream.trusted) else None,
        history=_history(cell, defence, result),
        training=Loader(stream.burn_in, EVALUATION_BATCH, context.device),
        domain=stream.domain,
        seed=cell.seed,
        update_mode=cell.recipe.update_mode,
    )
    learner.restore(Snapshot(burned.parameters, burned.buffers, optimiser.state_dict(), step=0))
    if run.restore_momentum:
        adopt_momentum(optimiser, burned)
    return learner


def _history(cell: Cell, defence: Defence, burned: BurnInResult) -> History | None:
    """A history as long as the components that look back need; None if none does."""
    components: list[Component] = [defence, cell.attack.component, *(d.component for d in cell.recipe.detectors)]
    if not any(Need.HISTORY in component.needs for component in components):
        return None
    lookback = max(component.lookback for component in components)
    return History(keep=lookback + 1 if lookback else 0, checkpoints=burned.epochs, length=cell.recipe.burn_in.epochs)
