from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mithridate.bench.store import Run
from mithridate.report.figures.images_by_budget import images_by_budget
from mithridate.report.rows import rows

Make = Callable[..., Run]
BUDGETS = (8 / 255, 16 / 255, 0.1)


def at(make_run: Make, eps: float, **how: object) -> Run:
    return make_run(label=f"accu+eps-{eps:.3g}", eps=eps, channels=3, **how)


def test_one_seed_that_every_budget_has(make_run: Make) -> None:
    runs = [at(make_run, eps, seed=seed) for eps in BUDGETS for seed in (0, 1, 2)]
    runs[0] = replace(runs[0], images={})  # the least budget stored nothing with seed 0
    (drawing,) = images_by_budget(rows(runs))
    assert "defence none, seed 1." in drawing.caption
    assert "clean above, below them poisoned at eps 0.0314, 0.0627 and 0.1." in drawing.alt


def test_the_caption_measures_the_change(make_run: Make) -> None:
    runs = []
    for eps in BUDGETS:
        run = at(make_run, eps)
        clean = np.full((3, 1, 8, 8), 0.5, dtype=np.float32)
        images = {"accumulative.clean": clean, "accumulative.poisoned": clean + np.float32(eps)}
        runs.append(replace(run, images=images))
    (drawing,) = images_by_budget(rows(runs))
    assert "0.031 at eps 0.0314, 0.063 at eps 0.0627 and 0.100 at eps 0.1." in drawing.caption
    assert "3 images" in drawing.alt


def test_an_attack_that_poisons_its_trigger_alone_shows_that(make_run: Make) -> None:
    runs = [at(make_run, eps) for eps in BUDGETS]
    only = [replace(run, images={key: x for key, x in run.images.items() if key.startswith("trigger")}) for run in runs]
    (drawing,) = images_by_budget(rows(only))
    assert drawing.alt.startswith("Trigger batch:")


@pytest.mark.parametrize("how", ["one budget", "other images", "defended"])
def test_nothing_to_compare_is_not_drawn(make_run: Make, how: str) -> None:
    runs = [at(make_run, eps, defence="clip" if how == "defended" else "none") for eps in BUDGETS]
    if how == "one budget":
        runs = runs[:1]
    if how == "other images":
        runs = [
            replace(run, images={k: np.roll(x, i, -1) for k, x in run.images.items()}) for i, run in enumerate(runs)
        ]
    assert images_by_budget(rows(runs)) == []
