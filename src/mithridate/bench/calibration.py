"""Measure the threshold of DSC for a recipe, and check it on clean batches that were not used for it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from mithridate.bench.prepare import RunContext, burned_in_learner, choose_device, prepare
from mithridate.bench.recipe import Cell, Labelled, Recipe
from mithridate.bench.running import deterministic
from mithridate.bench.watcher import Watcher
from mithridate.core.defence import Calibration, Defence
from mithridate.core.errors import ConfigError, DataError, nearest
from mithridate.core.files import cache_directory
from mithridate.data.stream import open_stream
from mithridate.defences.dsc import DSC
from mithridate.defences.threshold import Share
from mithridate.training.calibrate import calibrate, share_above


@dataclass(frozen=True)
class Checked:
    """One seed's calibration.

    Args:
        seed: Decides burn-in and stream.
        calibration: Measured on the trusted set.
        unseen: The share above the calibrated threshold on clean batches of the victim stream.
    """

    seed: int
    calibration: Calibration
    unseen: Share


class CalibrationOptions(TypedDict, total=False):
    """What callers of `calibrate_recipe` hand on to it; it says what each is."""

    defence: str | None
    rate: float | None
    unseen: int
    device: str
    data_root: str | Path | None
    cache: str | Path | None


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
        defence: Label of the DSC; unset: the recipe's only one.
        rate: Share of clean samples to be corrected, in (0, 1); unset: the recipe's `target_rate`, or 0.05.
        unseen: Clean batches of the victim stream to check it on, >= 1.
        device: `auto`, `cpu` or `cuda`.
        data_root: A local mirror of the hub's image sets; see `data.load_images`.
        cache: Directory for decoded images and burn-ins; the user's cache by default.
        watcher: Follows burn-ins.

    Raises:
        UserError: There is no such DSC, the stream is too short, or whatever the burn-in and the data can raise.
    """
    if recipe.variants:
        raise ConfigError(
            f"the recipe has {len(recipe.variants)} variants, each with a threshold of its own; calibrate one: take "
            "the grid out by --set grid=none, and set its values."
        )
    chosen = _dsc(recipe, defence)
    wanted = chosen.component.target_rate or 0.05 if rate is None else rate
    if not 0 < wanted < 1:
        raise ConfigError(f"rate = {wanted:g}: give a share of clean samples between 0 and 1, such as 0.05.")
    where = choose_device(device)
    stream = open_stream(recipe.data, data_root=data_root, cache=cache)
    stream.require(unseen - 1)
    context = RunContext(stream, [], where, cache_directory(cache), watcher or Watcher())
    with deterministic():
        for seed in recipe.seeds:
            cell = Cell(
                recipe.attacks[0],
                Labelled[Defence](chosen.label, chosen.component),
                seed,
                replace(recipe, detectors=()),
            )
            learner = burned_in_learner(cell, chosen.component, prepare(cell, context).burned, context)
            if learner.trusted is None:
                raise DataError(
                    "dsc: its threshold is measured on the trusted set, and [data] trusted has no sample; give it some."
                )
            trusted = [b for b in learner.trusted.split(stream.batch_size) if b.size > 1]
            calibrated, calibration = calibrate(learner, trusted, wanted, defence=chosen.component)
            clean = list(stream.victim_batches(unseen, seed=seed, device=where))
            yield Checked(seed, calibration, share_above(learner, clean, calibrated))


def _dsc(recipe: Recipe, label: str | None) -> Labelled[DSC]:
    named: dict[str, Labelled[DSC]] = {
        d.label: Labelled(d.label, d.component)  # type: ignore[arg-type]  # whatever has a `target_rate` is measured like DSC
        for d in recipe.defences
        if hasattr(d.component, "target_rate")
    }
    if not named:
        raise ConfigError("the recipe has no defence dsc to calibrate; add a [[defence]] with that name.")
    if label is None and len(named) > 1:
        raise ConfigError(f"the recipe has several: {', '.join(named)}; say which with --defence.")
    if label is not None and label not in named:
        raise ConfigError(f"no dsc '{label}' in the recipe: {nearest(label, named)}")
    return named[label] if label is not None else next(iter(named.values()))
