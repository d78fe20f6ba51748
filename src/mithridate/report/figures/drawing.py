"""What every figure is drawn with: looks, panels, mean lines, a legend; and how it becomes SVG, PNG and PDF."""

import functools
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D

from mithridate.report.rows import Row
from mithridate.report.wording import file_stem

PALETTE: Mapping[str, str] = {
    "ink": "#000000",
    "blue": "#0072b2",
    "orange": "#b87d00",
    "red": "#d55e00",
    "green": "#009e73",
    "pink": "#c4699a",
    "sky": "#2889c4",
    "edge": "#444444",
    "faint": "#858585",
    "grid": "#e4e4e4",
    "shade": "#f0f0f0",
    "paper": "#ffffff",
}
"""Every colour that a figure may have, as its files show it. A page has its own for each name, light and dark."""

COLOURS = tuple(PALETTE[name] for name in ("ink", "blue", "orange", "red", "green", "pink", "sky"))
"""After Okabe and Ito, told apart by colour-blind readers; the pale ones darker, so that their lines stand out on
white, and without yellow."""

DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

MARKS = {"halted": "x", "diverged": "*"}
"""Where a run ended early, by its status."""

FORMATS = ("svg", "png", "pdf")
"""What a `Drawing` holds, and what it is written as: one file each."""

MAX_COLUMNS = 3
"""Panels side by side."""

LABEL_LENGTH = 32
"""Longer names are cut in figures; tables have them in full."""

Band = tuple[float, float, float]
"""Mean over seeds, lowest and highest seed."""

Line = Mapping[float, Band]
"""A band at each position."""

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": PALETTE["edge"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALETTE["grid"],
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "svg.hashsalt": "mithridate",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "text.parse_math": False,
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Drawing:
    """A figure ready to be put in a page or in files.

    Args:
        stem: File name without ending; safe.
        subject: The model and the data set.
        heading: What the figure shows.
        caption: How to read it.
        alt: What people who do not see it are told.
        svg: SVG source, self-contained; its text is text.
        png: PNG bytes.
        pdf: PDF bytes.
    """

    stem: str
    subject: str
    heading: str
    caption: str
    alt: str
    svg: str
    png: bytes
    pdf: bytes


@dataclass(frozen=True)
class Look:
    """How a line is told from the others, in colour and without.

    Args:
        colour: One of `COLOURS`.
        dashes: One of `DASHES`.
        marker: One of `MARKERS`.
    """

    colour: str
    dashes: Any
    marker: str


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's defaults with this report's changes, whatever the user's settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        for name, value in _STYLE.items():
            mpl.rcParams[name] = value
        yield


def looks_of(names: Iterable[str]) -> dict[str, Look]:
    """A look for each name, those that occur twice once; the first 28 all differ, beyond colour after the seventh."""
    return {
        name: Look(
            COLOURS[i % len(COLOURS)],
            DASHES[(i % len(COLOURS) + i // len(COLOURS)) % len(DASHES)],
            MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
        )
        for i, name in enumerate(dict.fromkeys(names))
    }


def fitting(text: str) -> str:
    """Text that the figures' font can show, cut to `LABEL_LENGTH`; other characters become `?`."""
    known = _characters()
    shown = "".join(c if ord(c) in known else "?" for c in text)
    return shown if len(shown) <= LABEL_LENGTH else f"{shown[: LABEL_LENGTH - 1]}…"


@functools.cache
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def panels(
    n: int, *, height: float, width: float = 3.3, least: float = 5.6, top: float = 0.6, share: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with n panels, at most `MAX_COLUMNS` side by side.

    Args:
        n: How many panels.
        height: Height of one panel, in inches.
        width: Width of one panel, in inches.
        least: Width of the figure at least, in inches.
        top: Room for the legend, in inches.
        share: Whether all have the same axes.
    """
    columns = min(n, MAX_COLUMNS)
    lines = -(-n // columns)
    figure = Figure(layout="constrained")
    figure.set_size_inches(max(least, width * columns), top + height * lines)
    axes = figure.subplots(lines, columns, sharex=share, sharey=share, squeeze=False)
    for ax in axes.flat[n:]:
        ax.remove()
    return figure, list(axes.flat[:n])


def title(ax: Axes, text: str, *, pad: float | None = None) -> None:
    """The heading of a panel, at its left."""
    ax.set_title(fitting(text), loc="left", fontweight="bold", pad=pad)


def label_left(axes: Sequence[Axes], text: str) -> None:
    """One label for the vertical axes of all `panels`: beside the leftmost ones."""
    for ax in axes[::MAX_COLUMNS]:
        ax.set_ylabel(text)


def from_zero(ax: Axes) -> None:
    """Let the vertical axis hold zero."""
    ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))


def over_seeds(curves: Iterable[Mapping[float, float]]) -> dict[float, Band]:
    """Mean, lowest and highest value at the positions that all curves have; empty curves do not count."""
    curves = [curve for curve in curves if curve]
    places = sorted(set.intersection(*map(set, curves))) if curves else []
    columns = {place: [curve[place] for curve in curves] for place in places}
    return {place: (float(np.mean(values)), min(values), max(values)) for place, values in columns.items()}


def percent(line: Line) -> dict[float, Band]:
    """A line of fractions in percent."""
    return {place: (100 * mean, 100 * low, 100 * high) for place, (mean, low, high) in line.items()}


def draw_mean(
    ax: Axes, line: Line, look: Look, *, width: float = 1.8, marked: int | list[int] = 1, band: bool = True
) -> None:
    """A mean line, and its band from the lowest to the highest seed.

    Args:
        ax: Where.
        line: The numbers.
        look: How the line is told from others.
        width: Width of the line, in points.
        marked: Which positions have a marker: every so many, or these.
        band: Whether the band is drawn.
    """
    mean, low, high = ([values[side] for values in line.values()] for side in range(3))
    ax.plot(
        list(line),
        mean,
        color=look.colour,
        linestyle=look.dashes,
        linewidth=width,
        marker=look.marker,
        markersize=4.5,
        markevery=marked,
        zorder=3,
    )
    if band:
        ax.fill_between(list(line), low, high, color=look.colour, alpha=0.15, linewidth=0, zorder=1)


def legend(figure: Figure, looks: Mapping[str, Look], rows: Sequence[Row] = ()) -> None:
    """One legend for all panels, above them.

    Args:
        figure: Where.
        looks: By name.
        rows: Explains the marks of halted and diverged runs if there are such among them.
    """
    handles = [
        Line2D([], [], color=look.colour, linestyle=look.dashes, marker=look.marker, markersize=4.5)
        for look in looks.values()
    ]
    names = [f" {fitting(name)}" for name in looks]
    for status, mark in MARKS.items():
        if any(row.with_status(status) for row in rows):
            handles.append(
                Line2D([], [], color=PALETTE["edge"], linestyle="", marker=mark, markersize=8, markeredgewidth=1.6)
            )
            names.append(f" {status}")
    width = 0.6 + 0.075 * max(map(len, names))
    columns = max(1, min(len(names), int(figure.get_figwidth() / width)))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=2.6)


def saved(figure: Figure, row: Row, name: str, *, heading: str, caption: str, alt: str, attack: str = "") -> Drawing:
    """A figure of runs, ready for a page and for files.

    Args:
        figure: What was drawn.
        row: Gives model and data set.
        name: What its file name begins with.
        heading: What it shows.
        caption: How to read it.
        alt: What people who do not see it are told.
        attack: What its file name ends with, where each attack has its own figure.
    """
    stem = file_stem(name, *row.group, attack)
    return rendered(figure, stem=stem, subject=row.subject, heading=heading, caption=caption, alt=alt)


def rendered(figure: Figure, *, stem: str, heading: str, caption: str, alt: str, subject: str = "") -> Drawing:
    """A figure as SVG, PNG and PDF, without dates or versions, so that the same numbers give the same bytes.

    Args:
        figure: What was drawn; it is of no use afterwards.
        stem: File name without ending; safe.
        heading: What it shows.
        caption: How to read it.
        alt: What people who do not see it are told.
        subject: The model and the data set; empty where a page is about one alone.
    """
    vector, raster, printed = io.BytesIO(), io.BytesIO(), io.BytesIO()
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasAgg(figure)
    figure.savefig(vector, format="svg", metadata=nothing)  # lays it out, too
    figure.set_layout_engine("none")
    # `savefig` would draw each of these once more, for a layout that is there already.
    undated = dict.fromkeys(("Creator", "Producer", "CreationDate"))
    canvas: Any = FigureCanvasPdf(figure)  # of whose methods matplotlib says no types
    canvas.print_pdf(printed, metadata=undated)
    figure.set_dpi(160)
    canvas = FigureCanvasAgg(figure)
    canvas.print_png(raster, metadata={"Software": None})
    return Drawing(
        stem, subject, heading, caption, alt, vector.getvalue().decode(), raster.getvalue(), printed.getvalue()
    )
