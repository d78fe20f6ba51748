import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from cycler import cycler

from mithridate.bench.store import Run
from mithridate.report.figures import SCORES, figure_sections
from mithridate.report.figures.convergence import convergence
from mithridate.report.figures.discrepancy_by_interval import discrepancy_by_interval
from mithridate.report.figures.drawing import PALETTE, Drawing, _characters
from mithridate.report.figures.poisoned_images import poisoned_images
from mithridate.report.figures.score_distributions import distributions, score_distributions
from mithridate.report.figures.secrecy import secrecy
from mithridate.report.rows import Row, rows
from mithridate.report.scores import TRIGGER

Make = Callable[..., Run]
MakeRow = Callable[..., Row]
HEADINGS = [
    "Scores of clean and poisoned samples",
    "Discrepancy by backtracking interval",
    "Discrepancy by budget",
    "Discrepancy and loss",
    "Detectors by budget",
    "Discrepancy along the stream",
]


def drawn(found: Sequence[Row]) -> list[Drawing]:
    return [drawing for figure in SCORES if (drawing := figure(found)) is not None]


@pytest.fixture(scope="module")
def scores(scored_rows: list[Row]) -> list[Drawing]:
    return drawn(scored_rows)


def test_every_figure_of_scores_says_where_it_comes_from(scores: list[Drawing]) -> None:
    drawings = {drawing.heading: drawing for drawing in scores}
    assert list(drawings) == HEADINGS
    assert len({drawing.stem for drawing in scores}) == len(scores)
    for drawing in scores:
        assert "seeds 0, 1, 2 (n = 3)" in drawing.caption
        assert len(drawing.alt) > 40
        assert {*re.findall(r"(?<=: )#[0-9a-f]{6}", drawing.svg)} <= {*PALETTE.values()}  # a page has its own for each
        ET.fromstring(drawing.svg.partition("?>")[2].partition('.dtd">')[2])  # noqa: S314  (written by this test)
    assert "acc-0.2, defence none" in drawings["Discrepancy by backtracking interval"].caption
    assert "poisoned: 5.4 at k 2, 23 at k 10" in drawings["Discrepancy by backtracking interval"].alt
    assert "trigger batch of vanilla" in drawings["Detectors by budget"].caption
    assert "gda: AUROC 1.00." in drawings["Scores of clean and poisoned samples"].alt
    assert "Epoch 2: 1.00 nats, clean 11.00, poisoned 23.00." in drawings["Discrepancy and loss"].alt
    assert "burn-in epoch 6" in drawings["Discrepancy along the stream"].caption


STRANGE: dict[Any, Any] = {
    **{"font.size": 25, "font.family": "serif", "font.weight": "bold", "font.style": "italic", "lines.linewidth": 7},
    **{"axes.facecolor": "black", "text.usetex": True, "axes.formatter.use_locale": True, "axes.unicode_minus": False},
    **{
        "savefig.bbox": "tight",
        "savefig.dpi": 333,
        "savefig.transparent": True,
        "figure.dpi": 30,
        "path.sketch": (5, 9, 2),
    },
    **{
        "image.cmap": "jet",
        "figure.autolayout": True,
        "svg.fonttype": "none",
        "svg.hashsalt": "x",
        "path.simplify": False,
    },
    **{
        "lines.antialiased": False,
        "text.hinting": "none",
        "xtick.direction": "in",
        "axes.xmargin": 0.4,
        "timezone": "Asia/Tokyo",
    },
    **{"axes.prop_cycle": cycler(color=["r", "g"]), "savefig.format": "pdf", "mathtext.default": "bf"},
}
"""What a user's matplotlibrc may say."""


@pytest.mark.slow
def test_figures_are_the_same_whatever_the_settings_of_the_user(scored_rows: list[Row], make_row: MakeRow) -> None:
    def drawings() -> list[Drawing | None]:
        _characters.cache_clear()
        images = poisoned_images([make_row(0.2, channels=1, dataset="mnist")])
        return [score_distributions(scored_rows), discrepancy_by_interval(scored_rows), *images]

    usual = drawings()
    assert None not in usual
    with mpl.rc_context():
        mpl.rcParams.update(STRANGE)
        assert drawings() == usual


@pytest.mark.slow
def test_the_same_runs_give_the_same_bytes_and_leave_no_trace(
    scored_rows: list[Row], scores: list[Drawing], make_row: MakeRow, federated: Make
) -> None:
    before = dict(mpl.rcParams)
    rounds = [federated(attack, defence=d, lam=0.02) for attack in ("clean", "accumulative") for d in ("none", "wide")]
    few = [*rows(rounds), make_row(0.2, 0.21, channels=1, dataset="mnist")]
    first, second = ([drawing for one in figure_sections(few) for drawing in one.drawings] for _ in range(2))
    assert first == second
    assert scores[:2] == [score_distributions(scored_rows), discrepancy_by_interval(scored_rows)]
    assert dict(mpl.rcParams) == before
    assert {drawing.stem.partition("-digits")[0].partition("-mnist")[0] for drawing in first} == {
        "clean-stream",
        "convergence",
        "secrecy",
        "images",
        "loss-and-norms",
    }
    for drawing in chain(first, scores):
        assert "<dc:date>" not in drawing.svg
        assert drawing.png.startswith(b"\x89PNG")
        assert drawing.pdf.startswith(b"%PDF")
        assert b"CreationDate" not in drawing.pdf


def test_nothing_to_draw(make_run: Make) -> None:
    sections = figure_sections(rows([replace(make_run(), trace=[])]))
    assert [drawing for one in sections for drawing in one.drawings] == []
    assert [one.id for one in sections if not one.empty] == ["images", "norms"]


def test_online_runs_have_no_figures_of_federations(make_run: Make) -> None:
    online = rows([make_run(), make_run(attack="clean"), make_run(attack="clean", defence="clip")])
    assert (convergence(online), secrecy(online)) == (None, None)


def test_federations_miss_no_images(federated: Make) -> None:
    (images,) = [one for one in figure_sections(rows([federated()])) if one.id == "images"]
    assert images.empty


@pytest.mark.parametrize("missing", ["scores", "poisoned", "undefended", "detectors"])
def test_nothing_is_drawn_of_scores_that_are_not_there(
    make_run: Make, scored: Callable[..., Run], missing: str
) -> None:
    run = make_run(defence="clip" if missing == "undefended" else "none")
    if missing == "poisoned":
        run = make_run(attack="clean")
    if missing != "scores":
        run = scored(run)
    if missing == "detectors":
        keep = run.scores["detector"] == "gda"
        run = replace(run, scores={name: column[keep] for name, column in run.scores.items()})
    assert [one.heading for one in drawn(rows([run]))] == (HEADINGS[:1] if missing == "detectors" else [])


@pytest.mark.slow
def test_a_trigger_alone_can_be_drawn(make_run: Make, scored: Callable[..., Run]) -> None:
    (row,) = rows([scored(make_run(attack="vanilla", accuracies=(0.96,)))])
    assert [panel.info.label for panel in distributions(row, TRIGGER)][-1] == "gda"
    headings = [drawing.heading for drawing in drawn([row])]
    assert "Discrepancy along the stream" in headings
    assert "Discrepancy by budget" not in headings


@pytest.mark.slow
def test_one_budget_is_no_line(scored_rows: list[Row]) -> None:
    single = [row for row in scored_rows if not row.attack.endswith("0.1")]
    headings = {drawing.heading for drawing in drawn(single)}
    assert set(HEADINGS) - headings == {"Discrepancy by budget", "Detectors by budget"}


@pytest.mark.slow
@pytest.mark.parametrize("value", [-np.inf, 0.0, -1e30, 5.0])
def test_degenerate_scores_can_be_drawn(make_run: Make, scored: Callable[..., Run], value: float) -> None:
    run = scored(make_run(), lambda table, kind, sample: value, ood=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawings = drawn(rows([run]))
    assert bool(drawings) is bool(np.isfinite(value))
