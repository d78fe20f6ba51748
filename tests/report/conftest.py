"""Synthetic runs, in memory and in a store, shaped like those that the library writes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mithridate.bench import store
from mithridate.bench.store import Run
from mithridate.report.rows import Row, rows

MakeRun = Callable[..., Run]
MakeRow = Callable[..., Row]
Said = Mapping[int, Mapping[str, Sequence[float]]]
"""Scores by step and kind of sample; `same` are received samples that nobody changed."""

ENVIRONMENT = {"mithridate": "0.1.0", "python": "3.11.9", "torch": "2.12.0", "device": "cpu", "threads": 2}


def images(eps: float, seed: int, channels: int) -> dict[str, NDArray[np.float32]]:
    """Blurred strokes, and the same within eps of them."""
    rng = np.random.default_rng(seed)
    side = 8 if channels == 1 else 32
    y, x = np.mgrid[0:side, 0:side] / (side - 1) - 0.5
    made: dict[str, NDArray[np.float32]] = {}
    for phase in ("accumulative", "trigger"):
        angles, radii = rng.uniform(0, np.pi, (4, channels, 1, 1)), rng.uniform(0.15, 0.4, (4, 1, 1, 1))
        ring = np.abs(np.hypot(x * (1 + np.abs(np.cos(angles))), y) - radii)
        clean = np.clip(np.exp(-((ring / 0.09) ** 2)), 0, 1).astype(np.float32)
        made[f"{phase}.clean"] = clean
        noise = eps * rng.choice([-1.0, 1.0], clean.shape)
        made[f"{phase}.poisoned"] = np.clip(clean + noise, 0, 1).astype(np.float32)
    return made


def in_memory(
    *,
    attack: str = "accumulative",
    defence: str = "none",
    seed: int = 0,
    accuracies: tuple[float, ...] = (0.98, 0.97, 0.96, 0.96),
    after: float | None = 0.76,
    after_buffers: float | None = None,
    status: str = "finished",
    label: str | None = None,
    defence_label: str | None = None,
    dataset: str = "digits",
    model: str = "small_cnn",
    eps: float = 0.2,
    alarms: Mapping[int, str] | None = None,
    environment: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
    channels: int | None = None,
    poisoned_trigger: bool = True,
    folder: Path = Path("store"),
) -> Run:
    """One run; `accuracies` are those at the start and after each batch of the phase."""
    alarms = alarms or {}
    steps, before = len(accuracies) - 1, accuracies[-1]
    poisons = 0.0 if attack == "clean" else 1.0
    measured = [(a, "accumulative" if step else "start") for step, a in enumerate(accuracies)]
    measured += [] if after is None else [(after, "trigger")]
    trace = []
    for step, (accuracy, phase) in enumerate(measured):
        row: dict[str, Any] = dict.fromkeys(store.TRACE_SCHEMA.names)
        row |= {"step": step, "phase": phase, "accuracy": accuracy, "loss": 3 * (1 - accuracy), "verdict": ""}
        row |= {"alarms": alarms.get(step, ""), "admitted": True, "seconds": 0.5}
        if phase != "start":
            changed = poisons if phase == "accumulative" or poisoned_trigger else 0.0
            row |= {
                "batch_loss": 0.2 + 0.1 * min(step, 8) + 0.02 * seed,
                "poisoned": changed,
                "poison_linf": eps * changed,
            }
            norm = 2.0 ** min(step, 8)
            row |= {"gradient_norm": norm, "bounded_norm": min(norm, 4), "update_norm": 0.1 * norm**0.5}
        trace.append(row)
    if status == "diverged":
        trace[-1] |= {"loss": float("nan"), "batch_loss": float("inf")}
    name = f"{label or attack}__{defence_label or defence}__seed{seed}"
    return Run(
        path=folder / name.replace("/", "_"),
        config={
            "data": {"name": dataset, "batch_size": 100},
            "model": {"name": model, "width": 16},
            "burn_in": {"epochs": 12, "lr": 0.1},
            "attack": {"name": attack, "eps": eps} | ({"label": label} if label else {}),
            "defence": {"name": defence} | ({"label": defence_label} if defence_label else {}),
            "monitor": {"name": "accuracy_floor", "floor": 0.8},
            "run": {"seeds": [seed], "steps": 5},
            "title": "A trial",
        }
        | dict(config or {}),
        summary={
            "accuracy_start": accuracies[0],
            "accuracy_before_trigger": before,
            "accuracy_after_trigger": after,
            "drop": None if after is None else before - after,
            "accuracy_after_buffers": before if after_buffers is None else after_buffers,
            "steps": steps,
            "seconds": 12.25 + seed,
            "seed": seed,
            "status": status,
            "stopped_by": "monitor" if status == "halted" else "steps",
            "alarms": len(alarms),
            "first_alarm_step": min(alarms, default=None),
            "rolled_back": 0,
            "quarantined": 0,
            "flagged_clean": None,
            "flagged_poisoned": None,
            "update_seconds": 0.004,
            "calibrations": [],
            "attack": label or attack,
            "defence": defence_label or defence,
            "dataset": dataset,
            "model": model,
            "something_new": {"unknown": [1, 2]},
        }
        | dict(summary or {}),
        trace=trace,
        environment=dict(ENVIRONMENT if environment is None else environment),
        images={} if channels is None else images(eps, seed, channels),
    )


def save(run: Run) -> Run:
    """Write a run with the store's own functions."""
    sums = {
        store.CONFIG: store.write_toml(run.path / store.CONFIG, run.config),
        store.TRACE: store.write_trace(run.path / store.TRACE, run.trace),
        store.ENVIRONMENT: store.write_json(run.path / store.ENVIRONMENT, run.environment),
        store.SUMMARY: store.write_json(run.path / store.SUMMARY, run.summary),
    }
    if run.images:
        sums[store.IMAGES] = store.write_arrays(run.path / store.IMAGES, run.images)
    if run.scores:
        sums[store.SCORES] = store.write_scores(run.path / store.SCORES, run.scores)
    store.seal(run.path, sums)
    return run


def demonstration(folder: Path) -> list[Run]:
    """Five attacks, two defences, three seeds; one run diverged, one halted, one alarmed."""
    runs = []
    for defence, kept in (("none", 0.0), ("clip", 0.75)):
        for seed, wobble in enumerate((0.0, 0.006, -0.004)):
            start = 0.975 + wobble
            common: dict[str, Any] = {"defence": defence, "seed": seed, "folder": folder}
            steady = tuple(start + 0.001 * step for step in range(6))
            noisy = tuple(start - 0.001 * step for step in range(6))
            quiet = tuple(start - (0.004 + abs(wobble)) * step for step in range(4 + seed % 2))
            runs.append(in_memory(attack="clean", accuracies=steady, after=start + 0.006, **common))
            runs.append(in_memory(attack="noise", accuracies=noisy, after=start - 0.009 - wobble, channels=1, **common))
            runs.append(
                in_memory(
                    attack="vanilla",
                    accuracies=(start,),
                    after=start - (1 - kept) * (0.012 + wobble),
                    channels=1,
                    **common,
                )
            )
            lost = (1 - kept) * (0.19 + 4 * wobble)
            halted = defence == "clip" and seed == 1
            runs.append(
                in_memory(
                    accuracies=quiet,
                    after=None if halted else quiet[-1] - lost,
                    after_buffers=quiet[-1] - 0.02,
                    status="halted" if halted else "finished",
                    alarms={len(quiet) - 1: "accuracy below the floor"}
                    if halted
                    else {len(quiet): "loss grew 5 times"},
                    channels=1,
                    **common,
                )
            )
            loud = (start, start - 0.05, start - 0.12 + wobble, start - 0.2)
            broken = defence == "none" and seed == 2
            runs.append(
                in_memory(
                    attack="pgd",
                    label="pgd, loud",
                    accuracies=loud,
                    after=0.1 if broken else start - 0.26,
                    status="diverged" if broken else "finished",
                    channels=1,
                    **common,
                )
            )
    return [save(run) for run in runs]


def scored(run: Run, said: Mapping[str, Said], tables: Sequence[Mapping[str, Any]] = ()) -> Run:
    """The run with the scores of some detectors, which `tables` describe."""
    lines = [
        (step, {"poisoned": "received", "same": "received"}.get(kind, kind), detector, i, kind == "poisoned", value)
        for detector, steps in said.items()
        for step, kinds in steps.items()
        for kind, values in kinds.items()
        for i, value in enumerate(values)
    ]
    names = ("step", "source", "detector", "sample", "poisoned", "score")
    kinds = (np.int64, object, object, np.int64, np.bool_, np.float64)
    columns: dict[str, Any] = {
        name: np.array(column, dtype=kind)
        for name, column, kind in zip(names, zip(*lines, strict=True), kinds, strict=True)
    }
    known = list(tables) or [{"name": "gda", "label": label} for label in said]
    return replace(run, scores=columns, config={**run.config, "detector": known})


CLIPS: dict[str, dict[str, Any]] = {
    "none": {"name": "none"},
    "linf-1": {"name": "clip", "clip_norm": 1.0, "norm": "linf", "label": "linf-1"},
    "narrow": {"name": "clip", "clip_norm": 0.1, "norm": "l2", "label": "narrow"},
    "wide": {"name": "clip", "clip_norm": 10.0, "norm": "l2", "label": "wide"},
}


def in_rounds(
    attack: str = "accumulative",
    *,
    defence: str = "none",
    seed: int = 0,
    rounds: int = 3,
    before: float = 0.95,
    after: float = 0.7,
    folder: Path = Path("store"),
    label: str | None = None,
    **attack_settings: Any,
) -> Run:
    """One run of a federation under one of `CLIPS`, from 0.98 to `before` in its rounds and to `after` in the last."""
    steps = 0 if attack == "direct" else rounds
    run = in_memory(
        attack=attack,
        defence=defence,
        seed=seed,
        accuracies=(0.98,) * (steps or 1) + ((before,) if steps else ()),
        after=after,
        label=label,
        folder=folder / f"{rounds}",
        config={
            "attack": {"name": attack, "poison_ratio": 1.0, **attack_settings} | ({"label": label} if label else {}),
            "defence": CLIPS[defence],
            "clients": {"clients": 25, "partition": "iid"},
            "federated": {"rounds": rounds, "seeds": [seed]},
        },
    )
    config = {key: value for key, value in run.config.items() if key != "run"}
    return replace(run, config=config, trace=[{**step, "poison_linf": None} for step in run.trace])


DEFENDED_SEEDS = (0, 1, 2)


def defended(folder: Path = Path("store")) -> list[Run]:
    """A grid of three defences over clean stream, noise and attack, with every measure a different, known number.

    Per seed s: an undefended clean stream ends at 0.97 - 0.01 s, dsc 0.01 (s + 1) below it, gate at the same; the
    attack leaves no defence 0.70, dsc 0.90 + 0.01 s, gate 0.95. Updates take 4 + s ms undefended, 10 (12 under attack)
    with dsc, 6 with gate.
    """
    runs = []
    for s in DEFENDED_SEEDS:
        end = 0.97 - 0.01 * s
        how: dict[str, Any] = {"seed": s, "folder": folder}
        clean: dict[str, Any] = {
            "attack": "clean",
            "label": "clean-trigger",
            "accuracies": (0.98, 0.98, 0.98, 0.98, end),
        }
        quiet = (0.98, 0.97, 0.96)
        alarmed = {3: "accuracy below the floor"}
        none = {"update_seconds": 0.004 + 0.001 * s}
        dsc = {"update_seconds": 0.010, "flagged_clean": 0.04 + 0.01 * s}
        caught = {"update_seconds": 0.012, "flagged_poisoned": 0.7 + 0.1 * s, "quarantined": s}
        gate, refused = {"update_seconds": 0.006, "rolled_back": s}, {"update_seconds": 0.006, "rolled_back": 2}
        lower = (*clean["accuracies"][:-1], end - 0.01 * (s + 1))
        runs += [
            in_memory(**how, **clean, after=end, summary=none),
            in_memory(**how, **clean | {"accuracies": lower}, after=lower[-1], defence="dsc", summary=dsc),
            in_memory(**how, **clean, after=end, defence="gate", summary=gate),
            in_memory(**how, accuracies=quiet, after=0.70, alarms=alarmed, summary=none),
            in_memory(**how, accuracies=quiet, after=0.90 + 0.01 * s, defence="dsc", summary=caught),
            in_memory(
                **how, accuracies=quiet, after=0.95, defence="gate", summary=refused, alarms=alarmed if s else None
            ),
            in_memory(**how, attack="noise", accuracies=quiet, after=0.955),
            in_memory(**how, attack="noise", accuracies=quiet, after=0.955, defence="dsc"),
            in_memory(**how, attack="noise", accuracies=quiet, after=0.955, defence="gate"),
        ]
    return runs


@pytest.fixture(scope="session")
def defended_rows() -> list[Row]:
    return rows(defended())


@pytest.fixture(scope="session")
def defended_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("defended")
    for run in defended(folder):
        save(run)
    return folder


@pytest.fixture(scope="session")
def make_run() -> MakeRun:
    return in_memory


@pytest.fixture(scope="session")
def save_run() -> Callable[[Run], Run]:
    return save


@pytest.fixture(scope="session")
def with_scores() -> Callable[..., Run]:
    return scored


@pytest.fixture(scope="session")
def federated() -> MakeRun:
    return in_rounds


@pytest.fixture(scope="session")
def clips() -> Mapping[str, Mapping[str, Any]]:
    return CLIPS


@pytest.fixture(scope="session")
def make_row() -> MakeRow:
    """One cell with a seed for each of `drops`, from 0.96 before the trigger unless `accuracies` say otherwise."""

    def make(*drops: float, **how: Any) -> Row:
        before = how.get("accuracies", (0.96,))[-1]
        runs = [
            in_memory(**{"accuracies": (0.98, 0.97, 0.96, 0.96), "seed": seed, "after": before - drop} | how)
            for seed, drop in enumerate(drops)
        ]
        (row,) = rows(runs)
        return row

    return make


@pytest.fixture(scope="session")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("store")
    demonstration(folder)
    return folder
