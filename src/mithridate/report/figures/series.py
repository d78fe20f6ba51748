"""A number against a setting, a line a label: the figure of a sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from mithridate.report.figures.drawing import Drawing, legend, looks_of, panels, saved, style, title
from mithridate.report.rows import Row
from mithridate.report.wording import listed

Place = float | str
"""Where a point stands: a number, or one of several names."""


@dataclass(frozen=True)
class Point:
    """One point of a line.

    Args:
        values: Of single seeds; one at least.
        ends: Of the interval of their mean; None where they are too few for one.
    """

    values: Sequence[float]
    ends: tuple[float, float] | None = None

    @property
    def mean(self) -> float:
        """Where the line goes through."""
        return fmean(self.values)


@dataclass(frozen=True)
class Panel:
    """One panel.

    Args:
        title: Above it.
        x: What goes across, in words.
        y: What goes up, in words.
        lines: By name, at each place a point.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Mapping[Place, Point]]


def series(shown: Sequence[Panel], row: Row, name: str, *, heading: str, caption: str) -> Drawing:
    """Lines of means with bars for their intervals, and small dots for the seeds behind them.

    Args:
        shown: Panels, each with at least one point.
        row: Gives model and data set.
        name: What the file's name begins with.
        heading: What the figure shows.
        caption: How to read it.
    """
    looks = looks_of(line for panel in shown for line in panel.lines)
    with style():
        figure, axes = panels(len(shown), height=2.9, width=4.2)
        for ax, panel in zip(axes, shown, strict=True):
            places = list(dict.fromkeys(place for line in panel.lines.values() for place in line))
            numeric = all(isinstance(place, float) for place in places)
            if numeric:
                places.sort(key=float)
            at = {place: float(place) if numeric else float(i) for i, place in enumerate(places)}
            for line, points in panel.lines.items():
                look, ordered = looks[line], sorted(points, key=lambda place: at[place])
                means = [points[place].mean for place in ordered]
                ends = [points[place].ends or (points[place].mean,) * 2 for place in ordered]
                bars = [[m - low for m, (low, _) in zip(means, ends, strict=True)]]
                bars.append([high - m for m, (_, high) in zip(means, ends, strict=True)])
                ax.errorbar(
                    [at[place] for place in ordered],
                    means,
                    bars,
                    color=look.colour,
                    linestyle=look.dashes if numeric else "",
                    marker=look.marker,
                    markersize=4.5,
                    linewidth=1.8,
                    elinewidth=1,
                    capsize=2.5,
                )
                across = [at[place] for place in ordered for _ in points[place].values]
                up = [value for place in ordered for value in points[place].values]
                ax.scatter(across, up, s=7, color=look.colour, alpha=0.6, linewidths=0, zorder=3)
            if not numeric or len(places) <= 8:
                texts = [f"{place:.3g}" if isinstance(place, float) else place for place in places]
                crowded = max(map(len, texts)) * len(texts) > 40
                ax.set_xticks([at[place] for place in places], texts)
                if crowded:
                    ax.tick_params(axis="x", labelrotation=30)
            ax.set_xlabel(panel.x)
            if panel.title:
                title(ax, panel.title)
        for ax, panel in zip(axes, shown, strict=True):
            ax.set_ylabel(panel.y)
        legend(figure, looks)
        what = listed([f"{panel.y} against {panel.x}" for panel in shown])
        return saved(
            figure, row, name, heading=heading, caption=caption, alt=f"{what}, {listed(list(looks))}. {caption}"
        )
