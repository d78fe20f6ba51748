import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from mithridate.report.figures.drawing import (
    COLOURS,
    DASHES,
    LABEL_LENGTH,
    MARKERS,
    Look,
    draw_mean,
    fitting,
    looks_of,
    over_seeds,
    style,
)


def test_mean_covers_only_what_all_runs_have() -> None:
    assert over_seeds([{-1: 1.0, 0: 2.0}, {0: 4.0}]) == {0: (3.0, 2.0, 4.0)}
    assert over_seeds([]) == {}


def test_labels_are_cut_to_fit() -> None:
    assert len(fitting("x" * 300)) == LABEL_LENGTH
    assert fitting("eps 8/255 ± ε") == "eps 8/255 ± ε"
    assert fitting("漢") == "?"


def test_style_is_scoped() -> None:
    before = mpl.rcParams["text.parse_math"]
    with style():
        assert not mpl.rcParams["text.parse_math"]
    assert mpl.rcParams["text.parse_math"] == before


def test_drawn_bands_hold_the_numbers() -> None:
    ax = Figure().subplots()
    draw_mean(ax, {1.0: (2.0, 1.5, 3.0), 4.0: (5.0, 4.0, 6.0)}, Look(COLOURS[0], DASHES[0], MARKERS[0]))
    (line,) = ax.lines
    assert np.asarray(line.get_xydata(), dtype=float).tolist() == [[1, 2], [4, 5]]
    (band,) = ax.collections
    corners = np.asarray(band.get_paths()[0].vertices, dtype=float)
    assert {tuple(point) for point in corners.tolist()} >= {(1, 1.5), (1, 3), (4, 4), (4, 6)}


def test_looks_differ_far_beyond_the_colours() -> None:
    looks = looks_of(map(str, range(4 * len(COLOURS))))
    assert len({(look.colour, str(look.dashes), look.marker) for look in looks.values()}) == 4 * len(COLOURS)
    assert len({look.colour for look in list(looks.values())[: len(COLOURS)]}) == len(COLOURS)
