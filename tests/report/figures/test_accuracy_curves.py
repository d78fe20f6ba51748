import xml.etree.ElementTree as ET
from collections.abc import Callable
from itertools import pairwise

import matplotlib as mpl
import pytest

from mithridate.bench.store import Run
from mithridate.report.figures.accuracy_curves import accuracy_curves, spread_out
from mithridate.report.rows import Row, rows

Make = Callable[..., Run]
MakeRow = Callable[..., Row]


def test_labels_never_touch() -> None:
    placed = spread_out([5.0, 5.1, 9.9, 10.0], 1.0, 0.0, 10.0)
    assert all(b - a >= 1.0 - 1e-9 for a, b in pairwise(placed))
    assert max(placed) <= 10.0


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


@pytest.mark.parametrize(("attacks", "panels"), [(3, 2), (9, 9)])
def test_many_attacks_get_panels_of_their_own(make_run: Make, attacks: int, panels: int) -> None:
    runs = [make_run(label=f"a{i}", defence=d) for i in range(attacks) for d in ("none", "clip")]
    drawing = accuracy_curves(rows(runs))
    assert drawing is not None
    assert drawing.svg.count(">before</text>") == panels
