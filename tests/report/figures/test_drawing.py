import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from html import escape
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pytest

from mithridate.bench.store import Run
from mithridate.report.figures.drawing import (
    LABEL_LENGTH,
    accuracy_curves,
    aligned,
    amplification,
    common,
    fitting,
    inline,
    loss_and_norms,
    mosaic,
    poisoned_images,
    spread_out,
    style,
)
from mithridate.report.rows import Row, rows

Make = Callable[..., Run]
MakeRow = Callable[..., Row]


def test_runs_of_any_length_meet_at_the_trigger(make_run: Make) -> None:
    long, short = make_run(accuracies=(0.9, 0.8, 0.7), after=0.5), make_run(accuracies=(0.6,), after=0.4)
    assert aligned(long, "accuracy") == {-2: 0.9, -1: 0.8, 0: 0.7, 1: 0.5}
    assert aligned(short, "accuracy") == {0: 0.6, 1: 0.4}
    assert common([aligned(long, "accuracy"), aligned(short, "accuracy")])[1] == pytest.approx((0.45, 0.4, 0.5))


def test_a_halted_run_ends_before_the_trigger(make_run: Make) -> None:
    assert aligned(make_run(accuracies=(0.9, 0.8), after=None, status="halted"), "accuracy") == {-1: 0.9, 0: 0.8}


def test_what_is_not_finite_is_left_out(make_run: Make) -> None:
    run = make_run(accuracies=(0.9, 0.8), after=0.1, status="diverged")
    assert max(aligned(run, "batch_loss")) == 0
    assert aligned(replace(run, trace=[]), "accuracy") == {}


def test_mean_covers_only_what_all_runs_have() -> None:
    assert common([{-1: 1.0, 0: 2.0}, {0: 4.0}]) == {0: (3.0, 2.0, 4.0)}
    assert common([]) == {}


def test_labels_never_touch() -> None:
    placed = spread_out([5.0, 5.1, 9.9, 10.0], 1.0, 0.0, 10.0)
    assert all(b - a >= 1.0 - 1e-9 for a, b in pairwise(placed))
    assert max(placed) <= 10.0


@pytest.mark.parametrize(("largest", "factor"), [(0.0, 100), (8 / 255, 10), (0.2, 2), (0.51, 0.5), (1.0, 0.5)])
def test_amplified_difference_fits(largest: float, factor: float) -> None:
    assert amplification(largest) == factor


def test_mosaic_shows_exact_pixels() -> None:
    clean = np.array([[[[0.0, 1.0], [0.5, 0.25]]]], dtype=np.float32)
    poisoned = np.clip(clean + 0.1, 0, 1)
    tiles = mosaic(clean, poisoned, 2, side=4, gap=2)
    assert tiles.shape == (3 * 4 + 2 * 2, 4, 3)
    assert np.array_equal(tiles[:4, :4, 0], clean[0, 0].repeat(2, 0).repeat(2, 1))
    assert tiles[6:10, :4, 0] == pytest.approx(poisoned[0, 0].repeat(2, 0).repeat(2, 1))
    assert tiles[12:, :, 0] == pytest.approx((0.5 + 2 * (poisoned - clean))[0, 0].repeat(2, 0).repeat(2, 1))
    assert (tiles[4:6] == 1).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_mosaic_takes_any_channels(channels: int) -> None:
    images = np.random.default_rng(0).random((2, channels, 5, 7), dtype=np.float32)
    tiles = mosaic(images, images, 1)
    assert tiles.shape[2] == 3
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


def test_figures_are_deterministic_and_leave_no_trace(make_row: MakeRow) -> None:
    before = dict(mpl.rcParams)
    row = make_row(0.2, 0.21, channels=1)
    first, second = ([accuracy_curves([row]), loss_and_norms([row]), *poisoned_images([row])] for _ in range(2))
    assert first == second
    assert dict(mpl.rcParams) == before
    for drawing in first:
        assert drawing is not None
        assert "<dc:date>" not in drawing.svg
        assert drawing.png.startswith(b"\x89PNG")


def test_the_users_style_does_not_matter(make_row: MakeRow) -> None:
    row = make_row(0.2, 0.21)
    plain = accuracy_curves([row])
    with mpl.rc_context({"font.size": 20, "text.color": "red"}):
        assert accuracy_curves([row]) == plain


@pytest.mark.parametrize("label", ["$\\frac{", "_hidden", "漢字 \U0001f600", "--> <script>", "x" * 300, "a\\nb %s {}"])
def test_any_label_can_be_drawn(make_row: MakeRow, label: str) -> None:
    drawing = accuracy_curves([make_row(0.2, label=label, defence_label=label)])
    assert drawing is not None
    ET.fromstring(drawing.svg.partition("?>")[2].partition('.dtd">')[2])  # noqa: S314  (written by this test)
    assert "<script" not in drawing.svg


def test_labels_are_cut_to_fit() -> None:
    assert len(fitting("x" * 300)) == LABEL_LENGTH
    assert fitting("eps 8/255 ± ε") == "eps 8/255 ± ε"
    assert fitting("漢") == "?"


def test_extreme_norms_are_drawable(make_run: Make) -> None:
    run = make_run()
    trace = [dict(step) | {"gradient_norm": 10.0 ** (60 * i), "update_norm": 0.0} for i, step in enumerate(run.trace)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss_and_norms(rows([replace(run, trace=trace)])) is not None


def test_nothing_to_draw(make_run: Make) -> None:
    bare = rows([replace(make_run(), trace=[])])
    assert (accuracy_curves(bare), loss_and_norms(bare), poisoned_images(bare)) == (None, None, [])


@pytest.mark.parametrize(("attacks", "panels"), [(3, 2), (9, 9)])
def test_many_attacks_get_panels_of_their_own(make_run: Make, attacks: int, panels: int) -> None:
    runs = [make_run(label=f"a{i}", defence=d) for i in range(attacks) for d in ("none", "clip")]
    drawing = accuracy_curves(rows(runs))
    assert drawing is not None
    assert drawing.svg.count("<!-- before -->") == panels


def test_inlined_figures_share_no_ids(make_row: MakeRow) -> None:
    drawing = accuracy_curves([make_row(0.2)])
    assert drawing is not None
    first, second = (inline(drawing.svg, prefix, 'a "quoted" <alt>', escape) for prefix in ("one", "two"))
    assert first.startswith('<svg role="img" aria-label="a &quot;quoted&quot; &lt;alt&gt;"')
    ids = [{part.partition('"')[0] for part in svg.split(' id="')[1:]} for svg in (first, second)]
    assert len(ids[0]) == len(ids[1]) > 10
    assert not ids[0] & ids[1]
    used = {part.partition('"')[0] for part in first.split('xlink:href="#')[1:]}
    assert used
    assert used <= ids[0]


def test_style_is_scoped() -> None:
    before = mpl.rcParams["text.parse_math"]
    with style():
        assert not mpl.rcParams["text.parse_math"]
    assert mpl.rcParams["text.parse_math"] == before
