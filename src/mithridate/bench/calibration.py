"""Measure the threshold of DSC for a recipe, and check it on clean batches that were not used for it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mithridate.bench.engine import deterministic
from mithridate.bench.prepare import choose_device, online_learner, prepare
from mithridate.bench.recipe import Cell, Labelled, Recipe
from mithridate.bench.watcher import Watcher
from mithridate.core.defence import Defence
from mithridate.core.errors import ConfigError, nearest
from mithridate.core.files import cache_directory
from mithridate.data.stream import open_stream
from mithridate.defences.dsc import DSC
from mithridate.training.calibrate import Calibration, Share, calibrated, share_above


@dataclass(frozen=True)
class Checked:
    """One seed's calibration.

    Args:
        seed: Of the burn-in and the stream.
        calibration: Measured on the trusted set.
        unseen: The share above that threshold on clean batches of the victim stream.
    """

    seed: int
    calibration: Calibration
    unseen: Share


def calibrate_recipe(
    recipe: Recipe,
    *,
    defence: str | None = None,
    rate: float | None = None,
    unseen: int = 10,
    device: str = "auto",
    data_root: str | Path | None = None,
    cache: str | Path | None = None,
    watcher: Watcher | None = None,
) -> Iterator[Checked]:
    """Calibrate one DSC of a recipe, seed by seed; nothing is written but the burn-in's cache.

    Args:
        recipe: What it defends.
        defence: Its label; unset: the recipe's only DSC.
        rate: Share of clean samples to be corrected, in (0, 1); unset: the recipe's `target_rate`, or 0.05.
        unseen: Clean batches of the victim stream to check it on, >= 1.
        device: `auto`, `cpu` or `cuda`.
        data_root: As in `load_images`.
        cache: As in `run_recipe`.
        watcher: Follows burn-ins.

    Raises:
        UserError: There is no such DSC, the stream is too short, or whatever the burn-in and the data can raise.
    """
    chosen = _dsc(recipe, defence)
    wanted = chosen.component.target_rate or 0.05 if rate is None else rate
    if not 0 < wanted < 1:
        raise ConfigError(f"rate = {wanted:g}: give a share of clean samples between 0 and 1, such as 0.05.")
    settings = replace(chosen.component, target_rate=wanted)
    where = choose_device(device)
    stream = open_stream(recipe.data, data_root=data_root, cache=cache)
    stream.require(unseen - 1)
    with deterministic():
        for seed in recipe.seeds:
            cell = Cell(
                recipe.attacks[0], Labelled[Defence](chosen.label, settings), seed, replace(recipe, detectors=())
            )
            burned = prepare(cell, stream, [], where, cache_directory(cache), watcher or Watcher()).burned
            learner = online_learner(cell, settings, stream, burned, where)
            (found,) = calibrated(learner, stream.batch_size)
            clean = list(stream.victim_batches(unseen, seed=seed, device=where))
            yield Checked(seed, found, share_above(learner, clean, found.defence))


def _dsc(recipe: Recipe, label: str | None) -> Labelled[DSC]:
    known: Sequence[Labelled[DSC]] = [
        Labelled(d.label, d.component) for d in recipe.defences if isinstance(d.component, DSC)
    ]
    if not known:
        raise ConfigError("the recipe has no defence dsc to calibrate; add a [[defence]] with that name.")
    if label is None and len(known) > 1:
        names = ", ".join(d.label for d in known)
        raise ConfigError(f"the recipe has several: {names}; say which with --defence.")
    named = {d.label: d for d in known}
    if label is not None and label not in named:
        raise ConfigError(f"no dsc '{label}' in the recipe: {nearest(label, named)}")
    return named[label] if label is not None else known[0]
