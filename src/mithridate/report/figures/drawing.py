"""The figures: accuracy along the steps, losses and norms, poisoned images. Drawn without pyplot or a screen."""

import functools
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from mithridate.bench.store import Run
from mithridate.report.rows import Row, seed, step_noun
from mithridate.report.wording import counted, decimal, file_stem, listed, number, points, said_of

COLOURS = ("#000000", "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
"""Okabe and Ito's colours, told apart by colour-blind readers; their yellow is too pale for lines on white."""

DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

MAX_LINES = len(COLOURS)
"""More attacks than this, and each gets its own panel with a line a defence."""

MAX_COLUMNS = 3
"""Panels side by side."""

LABEL_LENGTH = 32
"""Longer names are cut in figures; tables have them in full."""

MAX_IMAGES = 6
"""Images shown of each phase."""

FACTORS = (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100)
"""Amplifications of a difference; 0.5 fits every difference of pixels in [0, 1]."""

MAX_MARKED, MAX_DASHED = 30, 200
"""Lines of more points have markers only at their end, or no dashes and are thin: anything else would hide them."""

DRAWABLE = 1e30
"""Larger numbers come from a model that has blown up; no axis holds them."""

PHASES = {"accumulative": "Accumulative phase", "trigger": "Trigger batch"}

MEASURES = {
    "batch_loss": "batch loss (nats)",
    "gradient_norm": "gradient norm (l2)",
    "update_norm": "update norm (l2)",
}
"""Columns of the trace beside accuracy, with their axis labels."""

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "svg.hashsalt": "mithridate",
    "svg.fonttype": "path",
    "text.parse_math": False,
    "savefig.facecolor": "white",
}

BEFORE, AFTER = 0, 1
"""Where the states before and after the trigger step stand; earlier states are negative: minus the steps to go."""


@dataclass(frozen=True)
class Drawing:
    """A figure ready to be put in a page or in files.

    Args:
        stem: File name without ending; safe.
        subject: The model and the data set.
        heading: What it shows of them.
        caption: How to read it.
        alt: The same for people who do not see it.
        svg: SVG source, self-contained.
        png: PNG bytes.
    """

    stem: str
    subject: str
    heading: str
    caption: str
    alt: str
    svg: str
    png: bytes


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's defaults with this report's changes, whatever the user's settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        for name, value in _STYLE.items():
            mpl.rcParams[name] = value
        yield


def accuracy_curves(rows: Sequence[Row]) -> Drawing | None:
    """Accuracy along the steps, every run aligned at its trigger.

    Args:
        rows: Rows of one data set and model.

    Returns:
        None if no run has a trace.

    Source:
        After Pang et al., NeurIPS 2021, Fig. 1.
    """
    panels = _panels(rows)
    if _longest(rows) is None:
        return None
    with style():
        figure = Figure(layout="constrained")
        n_columns = min(len(panels), MAX_COLUMNS)
        n_lines = -(-len(panels) // n_columns)
        figure.set_size_inches(max(6.4, 3.9 * n_columns), 0.7 + 3.0 * n_lines)
        axes = figure.subplots(n_lines, n_columns, sharex=True, sharey=True, squeeze=False)
        looks = looks_of(name for members in panels.values() for name, _ in members)
        for ax, (title, members) in zip(axes.flat, panels.items(), strict=False):
            ax.set_title(fitting(title), loc="left", fontweight="bold")
            for name, row in members:
                _draw_runs(ax, row, _longest(rows) or 0, looks[name])
        _percent_axis(axes)
        for ax, (_, members) in zip(axes.flat, panels.items(), strict=False):
            _mark_trigger(ax, _longest(rows) or 0)
            ax.xaxis.set_tick_params(labelbottom=True)
            _label_changes(ax, members, _longest(rows) or 0)
        for ax in list(axes.flat)[len(panels) :]:
            ax.remove()
        for ax in axes[:, 0]:
            ax.set_ylabel("test accuracy (%)")
        figure.supxlabel("steps until the trigger", fontsize=9)
        legend(figure, looks, rows)
        floor = float(axes[0, 0].get_ylim()[0])
        return saved(
            figure,
            rows[0],
            stem=file_stem("accuracy", *rows[0].group),
            heading="Accuracy along the steps",
            caption="Every run ends at its trigger step (shaded), however long its phase. Thick: mean over seeds at "
            "steps that all of them have; band: from the lowest to the highest seed; thin: single runs. Numbers: "
            "mean change in the trigger step, in points; runs that a monitor halted have none and enter no mean. "
            f"The vertical axis starts at {decimal(floor, 0)} %.",
            alt="Line chart of test accuracy by steps until the trigger. "
            + " ".join(
                f"{row.cell}: from {points(before)} to {points(after)} percent in the trigger step."
                for row in rows
                if (before := row.statistic("accuracy_before_trigger").mean) is not None
                and (after := row.statistic("accuracy_after_trigger").mean) is not None
            ),
        )


def loss_and_norms(rows: Sequence[Row]) -> Drawing | None:
    """Batch loss, gradient norm and update norm along the steps.

    Args:
        rows: Rows of one data set and model.

    Returns:
        None if no run has such numbers.
    """
    panels = _panels(rows)
    longest = _longest(rows)
    if longest is None or not any(aligned(run, measure) for row in rows for run in row.runs for measure in MEASURES):
        return None
    with style():
        figure = Figure(layout="constrained")
        figure.set_size_inches(9.6, 0.8 + 2.1 * len(panels))
        axes = figure.subplots(len(panels), len(MEASURES), sharex=True, sharey="col", squeeze=False)
        looks = looks_of(name for members in panels.values() for name, _ in members)
        for column, (measure, label) in zip(axes.T, MEASURES.items(), strict=True):
            column[0].set_title(said_of(step_noun(rows), label), loc="left")
            values = [v for row in rows for run in row.runs for v in aligned(run, measure).values() if v > 0]
            for ax, members in zip(column, panels.values(), strict=True):
                for name, row in members:
                    _draw_mean(ax, row, measure, longest, looks[name])
                if values and max(values) > 100 * min(values):
                    ax.set_yscale("symlog", linthresh=min(values))
                ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                mark_batches(ax, longest)
        for ax, title in zip(axes[:, 0], panels, strict=True):
            ax.set_ylabel(fitting(title), fontweight="bold")
        federated = step_noun(rows) == "round"
        figure.supxlabel(f"{'rounds' if federated else 'batches'} until the trigger", fontsize=9)
        legend(figure, looks, [])
        return saved(
            figure,
            rows[0],
            stem=file_stem("loss-and-norms", *rows[0].group),
            heading="Loss and norms",
            caption=(
                "Mean loss of the honest clients' samples before the step; mean norm of the updates that clients sent; "
                if federated
                else "Loss of the batch as the model received it, before the step; norm of the gradient before the "
                "defence bounds it; "
            )
            + "length of the step that the parameters made. Mean over the seeds where all have a "
            "finite value; band: from the lowest to the highest.",
            alt="Line charts of batch loss, gradient norm and update norm by "
            f"{'rounds' if federated else 'batches'} until the trigger.",
        )


def poisoned_images(rows: Sequence[Row]) -> list[Drawing]:
    """Clean and poisoned images with their amplified difference, one drawing an attack.

    Args:
        rows: Rows of one data set and model. Of each attack the undefended cell is shown (another if there is none),
            and of that the lowest seed that stored images.

    Source:
        After Pang et al., NeurIPS 2021, Figs. 4 and 5.
    """
    drawings = []
    for attack in dict.fromkeys(row.attack for row in rows if row.attacking):
        cells = sorted((row for row in rows if row.attack == attack), key=lambda row: row.defence_name != "none")
        shown = next(
            (
                (row, run, pairs)
                for row in cells
                for run in sorted(row.runs, key=lambda run: seed(run) or 0)
                if (pairs := _pairs(run.images))
            ),
            None,
        )
        if shown is not None:
            drawings.append(_images(*shown))
    return drawings


def aligned(run: Run, column: str) -> dict[int, float]:
    """A column of the trace by position: `AFTER` the trigger, `BEFORE` it, negative numbers for the steps to go.

    A run without a trigger ends at `BEFORE`. Values that are missing, not finite or beyond `DRAWABLE` are left out.

    Args:
        run: The run.
        column: One of the trace's columns.
    """
    steps = [int(step["step"]) for step in run.trace]
    triggers = [int(step["step"]) for step in run.trace if step["phase"] == "trigger"]
    if not steps:
        return {}
    end = triggers[0] - 1 if triggers else max(steps)
    found = ((int(step["step"]) - end, number(step.get(column))) for step in run.trace)
    return {place: value for place, value in found if value is not None and abs(value) < DRAWABLE and place <= AFTER}


def common(runs: Sequence[Mapping[int, float]]) -> dict[int, tuple[float, float, float]]:
    """Mean, lowest and highest value at the positions that all runs have."""
    places = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    columns = {place: [run[place] for run in runs] for place in places}
    return {place: (float(np.mean(values)), min(values), max(values)) for place, values in columns.items()}


def amplification(largest: float) -> float:
    """The largest of `FACTORS` at which a difference fits between black and white around mid-grey.

    Args:
        largest: Largest absolute difference of two pixels in [0, 1].

    >>> amplification(0.2), amplification(1.0)
    (2, 0.5)
    """
    return max((factor for factor in FACTORS if factor * largest <= 0.5), default=FACTORS[0])


def mosaic(
    clean: NDArray[np.float32], poisoned: NDArray[np.float32], factor: float, *, side: int = 64, gap: int = 6
) -> NDArray[np.float32]:
    """Three rows of images side by side: clean, poisoned, mid-grey + factor * difference.

    Args:
        clean: (n, c, h, w) in [0, 1], c = 1 or 3; of other images the mean over the channels is shown.
        poisoned: The same shape.
        factor: Amplification of the difference.
        side: Each image's longer side has at least so many pixels, every pixel repeated equally often.
        gap: White pixels between images.

    Returns:
        (height, width, 3) in [0, 1].
    """
    strips = []
    for images in (clean, poisoned, 0.5 + factor * (poisoned - clean)):
        shown = np.clip(np.nan_to_num(images), 0, 1)
        if shown.shape[1] != 3:
            shown = np.repeat(shown.mean(axis=1, keepdims=True), 3, axis=1)
        times = max(1, -(-side // max(shown.shape[2:])))
        shown = shown.repeat(times, axis=2).repeat(times, axis=3)
        padded = np.pad(shown, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=1.0)
        strips.append(np.concatenate(list(padded.transpose(0, 2, 3, 1)), axis=1))
    return np.concatenate(strips, axis=0)[:-gap, :-gap].astype(np.float32)


def fitting(text: str) -> str:
    """Text that the figures' font can show, cut to `LABEL_LENGTH`; other characters become `?`."""
    known = _characters()
    shown = "".join(c if ord(c) in known else "?" for c in text)
    return shown if len(shown) <= LABEL_LENGTH else f"{shown[: LABEL_LENGTH - 1]}…"


@functools.cache
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def _panels(rows: Sequence[Row]) -> dict[str, list[tuple[str, Row]]]:
    """Panels by title, each with its named lines: one a defence, or one an attack where there are too many attacks."""
    attacks, defences = {row.attack for row in rows}, {row.defence for row in rows}
    by_attack = len(attacks) > MAX_LINES >= len(defences)
    panels: dict[str, list[tuple[str, Row]]] = {}
    for row in rows:
        title, name = (row.attack, row.defence) if by_attack else (row.defence, row.attack)
        panels.setdefault(f"{'attack' if by_attack else 'defence'}: {title}", []).append((name, row))
    return panels


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


def _longest(rows: Sequence[Row]) -> int | None:
    """Steps before the trigger in the longest run; None if no run has a trace."""
    places = [place for row in rows for run in row.runs for place in aligned(run, "accuracy")]
    return max(0, -min(places)) if places else None


def trigger_width(longest: int) -> float:
    """Width of the trigger step in the drawing: one step, but never too narrow to see."""
    return max(1.0, 0.22 * longest)


def _draw(ax: Axes, values: Mapping[int, float], longest: int, **looks: Any) -> None:  # noqa: ANN401  (Line2D's options)
    x = [trigger_width(longest) if place == AFTER else place for place in values]
    ax.plot(x, list(values.values()), **looks)


def _draw_mean(ax: Axes, row: Row, column: str, longest: int, look: Look, *, scale: float = 1) -> None:
    """The mean line with its band, over the runs that have a trigger if any has."""
    curves = [aligned(run, column) for run in _triggered(row)]
    middle = common([curve for curve in curves if curve])
    n = len(middle)
    _draw(
        ax,
        {place: scale * mean for place, (mean, _, _) in middle.items()},
        longest,
        color=look.colour,
        linestyle=look.dashes if n <= MAX_DASHED else "-",
        linewidth=2.0 if n <= MAX_DASHED else 1.2,
        marker=look.marker,
        markersize=4.5,
        markevery=list(range(n)) if n <= MAX_MARKED else [n - 2, n - 1],
        zorder=3,
    )
    x = [trigger_width(longest) if place == AFTER else place for place in middle]
    low, high = ([scale * band[side] for band in middle.values()] for side in (1, 2))
    ax.fill_between(x, low, high, color=look.colour, alpha=0.15, linewidth=0, zorder=1)


def _draw_runs(ax: Axes, row: Row, longest: int, look: Look) -> None:
    for run in row.runs:
        curve = {place: 100 * value for place, value in aligned(run, "accuracy").items()}
        _draw(ax, curve, longest, color=look.colour, linewidth=0.8, alpha=0.45, zorder=2)
        mark = {"halted": "x", "diverged": "*"}.get(str(run.summary.get("status")))
        if mark and curve:
            last = max(curve)
            _draw(
                ax,
                {last: curve[last]},
                longest,
                marker=mark,
                color=look.colour,
                markersize=9,
                markeredgewidth=1.8 if mark == "x" else 0.5,
                markeredgecolor=look.colour if mark == "x" else "white",
                zorder=4,
            )
    _draw_mean(ax, row, "accuracy", longest, look, scale=100)


def _triggered(row: Row) -> list[Run]:
    """The runs with a trigger step, or all if none has one: a mean never mixes the two."""
    with_trigger = [run for run in row.runs if AFTER in aligned(run, "step")]
    return with_trigger or list(row.runs)


def _percent_axis(axes: NDArray[Any]) -> None:
    values = [y for ax in axes.flat for line in ax.lines for y in np.asarray(line.get_ydata(), dtype=float)]
    low, high = min(values, default=0.0), max(values, default=100.0)
    pad = max(1.0, 0.06 * (high - low))
    axes[0, 0].set_ylim(max(-1.0, low - pad), min(high + pad, 101.0))


def _mark_trigger(ax: Axes, longest: int) -> None:
    """The dashed line before the trigger, the shaded step, and ticks that count down to it."""
    width = trigger_width(longest)
    ax.axvspan(0, width, color="#f0f0f0", zorder=0)
    ax.axvline(0, color="#555555", linestyle="--", linewidth=1.2, zorder=1)
    ax.axvline(width, color="#bbbbbb", linewidth=0.8, zorder=1)
    early = _countdown(longest, 0, max(1.0, 0.12 * longest))
    ax.set_xticks([*(-steps for steps in early), 0, width], [*map(str, early), "before", "after"])
    ax.grid(visible=False, axis="x")
    ax.set_xlim(-longest - 0.06 * (longest + width), width + 0.16 * (longest + width))


def mark_batches(ax: Axes, longest: int) -> None:
    """The trigger batch shaded, and ticks that count the batches down to it; for what is measured of a batch."""
    width = trigger_width(longest)
    ax.axvspan(width / 2, width * 1.5, color="#f0f0f0", zorder=0)
    early = _countdown(longest, 1, max(1.0, 0.12 * longest))
    ax.set_xticks([*(1 - steps for steps in early), width], [*map(str, early), "trigger"])
    ax.grid(visible=False, axis="x")
    ax.set_xlim(min(0, 1 - longest) - 0.06 * (longest + width), width * 1.5)


def _countdown(longest: int, last: int, room: float) -> list[int]:
    """Round numbers from `longest` down, no nearer to `last` than `room` unless they are it."""
    ticks = MaxNLocator(5, integer=True).tick_values(0, longest) if longest else []
    return sorted({int(t) for t in ticks if last + room <= t <= longest} | ({last} if 0 < last <= longest else set()))[
        ::-1
    ]


def _label_changes(ax: Axes, members: Sequence[tuple[str, Row]], longest: int) -> None:
    """Mean change in the trigger step, to the right of each line's end, moved apart where they would overlap."""
    ends = []
    for _, row in members:
        change = row.difference("accuracy_after_trigger", "accuracy_before_trigger").mean
        after = common([curve for run in _triggered(row) if (curve := aligned(run, "accuracy"))]).get(AFTER)
        if change is not None and after is not None:
            ends.append((100 * after[0], f"{100 * change:+z.1f}"))
    low, high = ax.get_ylim()
    heights = spread_out([end for end, _ in ends], 0.065 * (high - low), low, high)
    for height, (end, text) in zip(heights, ends, strict=True):
        ax.annotate(
            text,
            (trigger_width(longest), end),
            (trigger_width(longest) + 0.035 * (longest + trigger_width(longest)), height),
            va="center",
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
        )


def spread_out(heights: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Heights moved as little as a sweep can so that neighbours are `distance` apart and, if there is room, inside.

    >>> spread_out([1.0, 1.0], 2.0, 0.0, 10.0)
    [1.0, 3.0]
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    floor = low
    for i in order:
        placed[i] = max(placed[i], floor)
        floor = placed[i] + distance
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - distance
    return placed


def legend(figure: Figure, looks: Mapping[str, Look], rows: Sequence[Row]) -> None:
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
    for status, mark, name in (("halted", "x", "halted"), ("diverged", "*", "diverged")):
        if any(row.with_status(status) for row in rows):
            handles.append(
                Line2D([], [], color="#444444", linestyle="", marker=mark, markersize=8, markeredgewidth=1.6)
            )
            names.append(f" {name}")
    width = 0.6 + 0.075 * max(map(len, names))
    columns = max(1, min(len(names), int(figure.get_figwidth() / width)))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=2.6)


def _pairs(images: Mapping[str, NDArray[np.float32]]) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Clean and poisoned images of the phases that have both, in the same shape."""
    pairs = {}
    for phase in PHASES:
        clean, poisoned = images.get(f"{phase}.clean"), images.get(f"{phase}.poisoned")
        if (
            clean is not None
            and poisoned is not None
            and clean.shape == poisoned.shape
            and clean.ndim == 4
            and len(clean)
        ):
            pairs[phase] = clean[:MAX_IMAGES], poisoned[:MAX_IMAGES]
    return pairs


def _images(row: Row, run: Run, pairs: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]) -> Drawing:
    largest = max(float(np.abs(np.nan_to_num(poisoned - clean)).max()) for clean, poisoned in pairs.values())
    factor = amplification(largest)
    with style():
        figure = Figure(layout="constrained")
        longest = max(len(clean) for clean, _ in pairs.values())
        figure.set_size_inches(1.0 + len(pairs) * (0.5 + 0.62 * longest), 2.35)
        for ax, (phase, (clean, poisoned)) in zip(
            figure.subplots(1, len(pairs), squeeze=False)[0], pairs.items(), strict=True
        ):
            tiles = mosaic(clean, poisoned, factor)
            ax.imshow(tiles, interpolation="none")
            height = len(tiles) / 3
            labels = ["clean", "poisoned", f"difference\n\u00d7 {factor:g}"]
            ax.set_yticks([height * (i + 0.5) for i in range(3)], labels)
            ax.set_xticks([])
            ax.tick_params(length=0)
            ax.grid(visible=False)
            ax.spines[:].set_visible(False)
            ax.set_title(PHASES[phase], loc="left")
        where = f"{row.attack}, defence {row.defence}, seed {seed(run)}"
        return saved(
            figure,
            row,
            stem=file_stem("images", *row.group, row.attack),
            heading=row.attack,
            caption=f"{where}. Bottom row: difference, amplified {factor:g} times around mid-grey (grey: unchanged); "
            f"the largest change of a pixel shown is {decimal(largest, 3)} of the range [0, 1].",
            alt=f"{listed([PHASES[phase] for phase in pairs])}: {counted(str(longest), 'image')} each, clean above, "
            f"poisoned below, and their difference amplified {factor:g} times. {where}.",
        )


def saved(figure: Figure, row: Row, *, stem: str, heading: str, caption: str, alt: str) -> Drawing:
    """Save as SVG and PNG, without dates or versions, so that the same runs give the same bytes."""
    vector, raster = io.BytesIO(), io.BytesIO()
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasAgg(figure)
    figure.savefig(vector, format="svg", metadata=nothing)
    figure.set_layout_engine("none")
    figure.savefig(raster, format="png", dpi=160, metadata={"Software": None})
    return Drawing(
        stem=stem,
        subject=row.subject,
        heading=heading,
        caption=caption,
        alt=alt,
        svg=vector.getvalue().decode("utf-8"),
        png=raster.getvalue(),
    )


def inline(svg: str, prefix: str, alt: str, escape: Callable[[str], str]) -> str:
    """An SVG document as an element of a page: named for screen readers, its ids its own.

    Args:
        svg: What matplotlib wrote.
        prefix: Put before every id, so that two figures in one page do not share any.
        alt: What the figure shows.
        escape: Makes text safe in an attribute.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'(href="|url\()#', rf"\g<1>#{prefix}-", body)
    return body.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)
