from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mithridate.bench.store import Run
from mithridate.report.figures.poisoned_images import GAP, SIDE, amplification, mosaic, poisoned_images
from mithridate.report.rows import rows

Make = Callable[..., Run]


@pytest.mark.parametrize(("largest", "factor"), [(0.0, 100), (8 / 255, 10), (0.2, 2), (0.51, 0.5), (1.0, 0.5)])
def test_amplified_difference_fits(largest: float, factor: float) -> None:
    assert amplification(largest) == factor


def test_mosaic_shows_exact_pixels() -> None:
    clean = np.array([[[[0.0, 1.0], [0.5, 0.25]]]], dtype=np.float32)
    poisoned = np.clip(clean + 0.1, 0, 1)
    tiles = mosaic(clean, poisoned, 2)
    assert tiles.shape == (3 * SIDE + 2 * GAP, SIDE, 4)
    for row, images in enumerate((clean, poisoned, 0.5 + 2 * (poisoned - clean))):
        top = row * (SIDE + GAP)
        pixels = images[0, 0].repeat(SIDE // 2, 0).repeat(SIDE // 2, 1)
        assert tiles[top : top + SIDE, :, 0] == pytest.approx(pixels)
    assert (tiles[SIDE : SIDE + GAP, :, 3] == 0).all()  # a page's own background is seen between images
    assert (tiles[:SIDE, :, 3] == 1).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_mosaic_takes_any_channels(channels: int) -> None:
    images = np.random.default_rng(0).random((2, channels, 5, 7), dtype=np.float32)
    tiles = mosaic(images, images, 1)
    assert tiles.shape[2] == 4
    assert (tiles.min(), tiles.max()) >= (0, 0)
    assert np.array_equal(tiles[..., 0], tiles[..., 1]) is (channels != 3)


def test_images_show_one_undefended_seed_an_attack(make_run: Make) -> None:
    runs = [make_run(seed=seed, defence=d, channels=1) for seed in (1, 0) for d in ("clip", "none")]
    drawings = poisoned_images(rows([*runs, make_run(attack="clean", channels=1), make_run(attack="vanilla")]))
    assert [d.heading for d in drawings] == ["accumulative"]
    assert drawings[0].caption.startswith("accumulative, defence none, seed 0.")
    assert "amplified 2 times" in drawings[0].caption


def test_images_of_another_defence_or_one_phase_will_do(make_run: Make) -> None:
    run = make_run(defence="clip", channels=3)
    only = {key: value for key, value in run.images.items() if key.startswith("trigger")}
    (drawing,) = poisoned_images(rows([replace(run, images=only)]))
    assert "defence clip" in drawing.caption
    assert "Accumulative phase" not in drawing.alt


@pytest.mark.parametrize("broken", ["shape", "missing", "empty", "flat"])
def test_images_that_do_not_fit_are_skipped(make_run: Make, broken: str) -> None:
    images = dict(make_run(channels=1).images)
    for phase in ("accumulative", "trigger"):
        clean = images[f"{phase}.clean"]
        if broken == "missing":
            del images[f"{phase}.poisoned"]
        else:
            images[f"{phase}.poisoned"] = {"shape": clean[:1], "empty": clean[:0], "flat": clean[0]}[broken]
        if broken == "empty":
            images[f"{phase}.clean"] = clean[:0]
    assert poisoned_images(rows([replace(make_run(), images=images)])) == []
