import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from mithridate.bench.store import Run
from mithridate.report.figures.drawing import AFTER, COLOURS, looks_of
from mithridate.report.figures.score_distributions import (
    BINS,
    FLOOR,
    LOOKS,
    STREAM,
    bins,
    budget_lines,
    clean_lines,
    clean_stream_accuracy,
    discrepancy_along_steps,
    discrepancy_and_loss,
    discrepancy_by_budget,
    discrepancy_by_interval,
    distributions,
    draw_band,
    interval_lines,
    loss_points,
    quantity,
    score_distributions,
    score_drawings,
    scores_by_budget,
    step_lines,
    variants,
)
from mithridate.report.rows import Row, rows
from mithridate.report.scores import ACCUMULATIVE, CLEAN, OOD, POISONED, TRIGGER, Samples, detectors, looking_back

Make = Callable[..., Run]

EPOCHS = (2, 6, 10)
LAST = 12
TABLES: list[dict[str, Any]] = [
    *({"name": "discrepancy", "label": f"d{epoch}", "epoch": epoch} for epoch in EPOCHS),
    *({"name": "loss", "label": f"l{epoch}", "epoch": epoch} for epoch in EPOCHS),
    {"name": "loss"},
    {"name": "gda"},
]


def scored(run: Run, say: Callable[[dict[str, Any], int, str, int], float], *, n: int = 4, ood: bool = True) -> Run:
    """The run with scores of every detector of `TABLES`, step and kind of sample: `say(table, step, kind, sample)`."""
    poisons = run.config["attack"]["name"] != "clean"
    steps = [int(step["step"]) for step in run.trace if step["phase"] != "start" and (step["poisoned"] or not poisons)]
    lines = [
        (step, source, table.get("label", table["name"]), i, kind == POISONED, say(table, step, kind, i))
        for table in TABLES
        for step in steps
        for kind, source in ((CLEAN, "clean"), (POISONED if poisons else CLEAN, "received"), (OOD, "ood"))
        for i in range(n)
        if kind != OOD or ood
    ]
    names = ("step", "source", "detector", "sample", "poisoned", "score")
    kinds = (np.int64, object, object, np.int64, np.bool_, np.float64)
    columns: dict[str, Any] = {
        name: np.array(column, dtype=kind)
        for name, column, kind in zip(names, zip(*lines, strict=True), kinds, strict=True)
    }
    burn_in = {"epochs": LAST, "checkpoints": list(EPOCHS)}
    return replace(run, scores=columns, config={**run.config, "detector": TABLES, "burn_in": burn_in})


def said(seed: int, eps: float = 0.2) -> Callable[[dict[str, Any], int, str, int], float]:
    """Discrepancy = k (clean), (2 + eps) k (poisoned), k / 2 (ood), plus the seed; loss since = minus k / 10."""

    def say(table: dict[str, Any], step: int, kind: str, sample: int) -> float:
        k: int = LAST - table.get("epoch", LAST)
        if table["name"] == "discrepancy":
            return -(k * {CLEAN: 1.0, POISONED: 2.0 + eps, OOD: 0.5}[kind] + seed)
        if table["name"] == "loss":
            return 0.1 * k if "epoch" in table else -{CLEAN: 0.1, POISONED: 1.0, OOD: 3.0}[kind]
        return {CLEAN: 10.0, POISONED: -100 * eps, OOD: 0.0}[kind] + sample

    return say


@pytest.fixture
def store(make_run: Make) -> list[Row]:
    """Vanilla and accumulative at two budgets and a clean stream, three seeds, defended and not."""
    runs = []
    for defence in ("none", "clip"):
        for seed in range(3):
            common: dict[str, Any] = {"defence": defence, "seed": seed}
            runs.append(scored(make_run(attack="clean", after=0.97, **common), said(seed)))
            for eps in (0.1, 0.2):
                named: dict[str, Any] = {**common, "eps": eps}
                many = make_run(label=f"acc-{eps}", after=0.9 - eps, **named)
                single = make_run(attack="vanilla", label=f"vanilla-{eps}", accuracies=(0.96,), after=0.95, **named)
                runs += [scored(run, said(seed, eps)) for run in (many, single)]
    return rows(runs)


def cell(found: Sequence[Row], attack: str) -> Row:
    (row,) = (row for row in found if (row.attack, row.defence) == (attack, "none"))
    return row


def test_discrepancy_rises_with_the_interval_as_made(store: list[Row]) -> None:
    row = cell(store, "acc-0.2")
    (family,) = looking_back(detectors([row]), "discrepancy")
    lines = interval_lines(row, family, ACCUMULATIVE)
    assert list(lines[CLEAN]) == [2, 6, 10]
    for k in (2, 6, 10):
        assert lines[CLEAN][k] == pytest.approx((k + 1, k, k + 2))
        assert lines[POISONED][k] == pytest.approx((2.2 * k + 1, 2.2 * k, 2.2 * k + 2))
        assert lines[OOD][k] == pytest.approx((0.5 * k + 1, 0.5 * k, 0.5 * k + 2))


def test_budgets_of_an_attack_make_one_line(store: list[Row]) -> None:
    found = variants(store)
    assert {name: list(by_eps) for name, by_eps in found.items()} == {"vanilla": [0.1, 0.2], "accumulative": [0.1, 0.2]}
    assert {row.defence for by_eps in found.values() for row in by_eps.values()} == {"none"}
    info = next(info for info in detectors(store) if info.label == "d2")
    lines = budget_lines(found["vanilla"], info)
    assert lines[POISONED][0.1] == pytest.approx((22, 21, 23))
    assert lines[POISONED][0.2] == pytest.approx((23, 22, 24))
    assert lines[CLEAN][0.1] == lines[CLEAN][0.2] == pytest.approx((11, 10, 12))


def test_attacks_that_differ_in_more_than_eps_are_told_apart(make_run: Make) -> None:
    def made(eps: float, **settings: Any) -> Run:
        run = scored(make_run(label=f"a-{eps}-{len(settings)}-{settings.get('lam')}", eps=eps), said(0))
        return replace(run, config={**run.config, "attack": {**run.config["attack"], **settings}})

    scaled = variants(rows([made(0.1, step_size=0.02), made(0.2, step_size=0.04)]))
    assert [list(by_eps) for by_eps in scaled.values()] == [[0.1, 0.2]]
    apart = variants(rows([made(0.1, lam=1.0), made(0.2, lam=1.0), made(0.2, lam=0.5)]))
    assert {name: list(by_eps) for name, by_eps in apart.items()} == {
        "accumulative (lam 1.0)": [0.1, 0.2],
        "accumulative (lam 0.5)": [0.2],
    }


def test_loss_points_pair_epochs(store: list[Row]) -> None:
    row = cell(store, "acc-0.2")
    (family,), (losses,) = (looking_back(detectors([row]), name) for name in ("discrepancy", "loss"))
    points = loss_points(row, family, losses, ACCUMULATIVE)
    assert {epoch: pytest.approx(point) for epoch, point in points[CLEAN].items()} == {
        10: (0.2, 3.0),
        6: (0.6, 7.0),
        2: (1.0, 11.0),
    }
    assert points[POISONED][2] == pytest.approx((1.0, 23.0))
    assert list(loss_points(row, family, losses[:1], ACCUMULATIVE)[CLEAN]) == [10]


def test_steps_meet_at_the_trigger(store: list[Row]) -> None:
    attacked, quiet = cell(store, "acc-0.2"), cell(store, "clean")
    info = next(info for info in detectors(store) if info.label == "d6")
    lines = step_lines(attacked, quiet, info)
    assert list(lines[POISONED]) == list(lines[STREAM]) == [-2, -1, 0, AFTER]
    assert lines[POISONED][AFTER] == pytest.approx((14.2, 13.2, 15.2))
    assert lines[CLEAN][0] == lines[STREAM][0] == pytest.approx((7, 6, 8))
    assert STREAM not in step_lines(attacked, None, info)


def test_clean_stream_has_a_line_a_defence(store: list[Row], make_run: Make) -> None:
    lines = clean_lines([*store, *rows([make_run(attack="clean", label="short", accuracies=(0.98,), after=0.1)])])
    assert list(lines) == ["none", "clip"]
    assert {step: band[0] for step, band in lines["none"].items()} == pytest.approx(
        {0: 0.98, 1: 0.97, 2: 0.96, 3: 0.96, 4: 0.97}
    )
    assert clean_stream_accuracy(rows([make_run(attack="clean")])) is None
    unscored = rows([make_run(attack="clean", defence=defence) for defence in ("none", "clip")])
    assert clean_stream_accuracy(unscored) is not None


def test_distributions_show_each_detector_once(store: list[Row]) -> None:
    panels = {panel.info.label: panel for panel in distributions(cell(store, "acc-0.2"), ACCUMULATIVE)}
    assert list(panels) == ["d6", "d10", "l6", "l10", "loss", "gda"]  # the latest, and the one at half of 12 epochs
    assert len(panels["gda"].found.clean) == 3 * 3 * 4  # seeds, batches, samples
    assert panels["gda"].auroc.values == (1.0, 1.0, 1.0)
    assert set(panels["loss"].found.poisoned) == {1.0}
    assert (panels["d6"].found.poisoned > 0).all()


def test_bins_are_shared_and_logarithmic_where_nothing_is_negative(store: list[Row]) -> None:
    infos = {info.label: info for info in detectors(store)}
    spread = Samples(np.geomspace(1e-12, 1, 200), np.geomspace(1e-3, 10, 200), np.array([1e9]))
    edges = bins(infos["d2"], spread)
    assert (len(edges), edges[0]) == (BINS + 1, FLOOR)
    assert np.allclose(np.diff(np.log(edges)), np.log(edges[1] / edges[0]))
    assert 5 < edges[-1] < 10
    even = bins(infos["gda"], Samples(np.linspace(-9, 0, 200), np.linspace(-20, -5, 200), np.array([1e9])))
    assert np.allclose(np.diff(even), even[1] - even[0])
    assert (even[0] > -20, even[-1] < 0) == (True, True)
    assert (np.diff(bins(infos["gda"], Samples(np.ones(3), np.ones(3), np.empty(0)))) > 0).all()
    assert (np.diff(bins(infos["d2"], Samples(np.zeros(3), np.zeros(3), np.empty(0)))) > 0).all()


def test_drawn_bands_hold_the_numbers() -> None:
    ax = Figure().subplots()
    draw_band(ax, {1.0: (2.0, 1.5, 3.0), 4.0: (5.0, 4.0, 6.0)}, LOOKS[POISONED])
    (line,) = ax.lines
    assert np.asarray(line.get_xydata(), dtype=float).tolist() == [[1, 2], [4, 5]]
    (band,) = ax.collections
    corners = np.asarray(band.get_paths()[0].vertices, dtype=float)
    assert {tuple(point) for point in corners.tolist()} >= {(1, 1.5), (1, 3), (4, 4), (4, 6)}


def test_axes_say_what_is_drawn(store: list[Row]) -> None:
    found = {info.label: quantity(info) for info in detectors(store)}
    assert found["d2"] == "discrepancy to epoch 2 (nats)"
    assert found["l6"] == "rise of loss since epoch 6 (nats)"
    assert (found["loss"], found["gda"]) == ("loss (nats)", "score")


def test_every_figure_says_where_it_comes_from(store: list[Row]) -> None:
    drawings = {drawing.heading: drawing for drawing in score_drawings(store)}
    assert list(drawings) == [
        "Scores of clean and poisoned samples",
        "Discrepancy by backtracking interval",
        "Discrepancy by budget",
        "Discrepancy and loss",
        "Detectors by budget",
        "Discrepancy along the stream",
    ]
    assert len({drawing.stem for drawing in drawings.values()}) == len(drawings)
    for drawing in drawings.values():
        assert "seeds 0, 1, 2 (n = 3)" in drawing.caption
        assert len(drawing.alt) > 40
        assert drawing.png.startswith(b"\x89PNG")
        ET.fromstring(drawing.svg.partition("?>")[2].partition('.dtd">')[2])  # noqa: S314  (written by this test)
    assert "acc-0.2, defence none" in drawings["Discrepancy by backtracking interval"].caption
    assert "poisoned: 5.4 at k 2, 23 at k 10" in drawings["Discrepancy by backtracking interval"].alt
    assert "trigger batch of vanilla" in drawings["Detectors by budget"].caption
    assert "gda: AUROC 1.00." in drawings["Scores of clean and poisoned samples"].alt
    assert "Epoch 2: 1.00 nats, clean 11.00, poisoned 23.00." in drawings["Discrepancy and loss"].alt
    assert "burn-in epoch 6" in drawings["Discrepancy along the stream"].caption


def test_the_same_store_gives_the_same_bytes(store: list[Row]) -> None:
    before = dict(mpl.rcParams)
    draw = (score_distributions, discrepancy_by_interval)
    assert [one(store) for one in draw] == [one(store) for one in draw]
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("missing", ["scores", "poisoned", "undefended", "detectors"])
def test_nothing_is_drawn_of_what_is_not_there(make_run: Make, missing: str) -> None:
    run = make_run(defence="clip" if missing == "undefended" else "none")
    if missing == "poisoned":
        run = make_run(attack="clean")
    if missing != "scores":
        run = scored(run, said(0))
    if missing == "detectors":
        keep = run.scores["detector"] == "gda"
        run = replace(run, scores={name: column[keep] for name, column in run.scores.items()})
    found = [drawing.heading for drawing in score_drawings(rows([run]))]
    assert found == (["Scores of clean and poisoned samples"] if missing == "detectors" else [])


def test_one_budget_is_no_line(store: list[Row]) -> None:
    single = [row for row in store if not row.attack.endswith("0.1")]
    assert discrepancy_by_budget(single) is None
    assert scores_by_budget(single) is None
    assert discrepancy_and_loss(single) is not None
    assert discrepancy_along_steps(single) is not None


def test_a_trigger_alone_can_be_drawn(make_run: Make) -> None:
    run = scored(make_run(attack="vanilla", accuracies=(0.96,)), said(0))
    (row,) = rows([run])
    assert [panel.info.label for panel in distributions(row, TRIGGER)][-1] == "gda"
    headings = [drawing.heading for drawing in score_drawings([row])]
    assert "Discrepancy along the stream" in headings
    assert "Discrepancy by budget" not in headings


@pytest.mark.parametrize("value", [-np.inf, 0.0, -1e30, 5.0])
def test_degenerate_scores_can_be_drawn(make_run: Make, value: float) -> None:
    run = scored(make_run(), lambda table, step, kind, sample: value, ood=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawings = score_drawings(rows([run]))
    assert bool(drawings) is bool(np.isfinite(value))


def test_looks_differ_far_beyond_the_colours() -> None:
    looks: Mapping[str, Any] = looks_of(map(str, range(4 * len(COLOURS))))
    assert len({(look.colour, str(look.dashes), look.marker) for look in looks.values()}) == 4 * len(COLOURS)
    assert len({look.colour for look in list(looks.values())[: len(COLOURS)]}) == len(COLOURS)
