"""Clean and poisoned images with their amplified difference."""

from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mithridate.bench.store import Run
from mithridate.report.figures.drawing import Drawing, saved, style
from mithridate.report.rows import Row, seed
from mithridate.report.wording import counted, decimal, listed

MAX_IMAGES = 6
"""Images shown of each phase."""

FACTORS = (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100)
"""Amplifications of a difference; 0.5 fits every difference of pixels in [0, 1]."""

SIDE = 64
"""Pixels that an image's longer side has at least, each of its own repeated equally often."""

GAP = 6
"""Transparent pixels between images."""

PHASES = {"accumulative": "Accumulative phase", "trigger": "Trigger batch"}

Pairs = Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Clean and poisoned images by phase."""


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
        runs = ((row, run) for row in cells for run in sorted(row.runs, key=lambda run: seed(run) or 0))
        stored = ((row, run, pairs) for row, run in runs if (pairs := pairs_of(run.images)))
        drawings += [_drawn(row, run, pairs) for row, run, pairs in islice(stored, 1)]
    return drawings


def amplification(largest: float) -> float:
    """The largest of `FACTORS` at which a difference fits between black and white around mid-grey.

    Args:
        largest: Largest absolute difference of two pixels in [0, 1].

    >>> amplification(0.2), amplification(1.0)
    (2, 0.5)
    """
    return max((factor for factor in FACTORS if factor * largest <= 0.5), default=FACTORS[0])


def mosaic(clean: NDArray[np.float32], poisoned: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """Three rows of images side by side: clean, poisoned, mid-grey + factor * difference.

    Args:
        clean: (n, c, h, w) in [0, 1], c = 1 or 3; of other images the mean over the channels is shown.
        poisoned: (n, c, h, w) in [0, 1], the same images after poisoning.
        factor: Amplification of the difference.

    Returns:
        (height, width, 4) in [0, 1]: red, green, blue and opacity.
    """
    return stacked([clean, poisoned, 0.5 + factor * (poisoned - clean)])


def stacked(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Rows of images, side by side and above each other.

    Args:
        rows: (n, c, h, w) each, pixels outside [0, 1] shown as the nearest inside; c = 1 or 3; of other images the mean
            over the channels is shown.

    Returns:
        (height, width, 4) in [0, 1]: red, green, blue and opacity.
    """
    strips = []
    for images in rows:
        shown = np.clip(np.nan_to_num(images), 0, 1)
        if shown.shape[1] != 3:
            shown = np.repeat(shown.mean(axis=1, keepdims=True), 3, axis=1)
        times = max(1, -(-SIDE // max(shown.shape[2:])))
        shown = shown.repeat(times, axis=2).repeat(times, axis=3)
        opaque = np.concatenate([shown, np.ones_like(shown[:, :1])], axis=1)
        padded = np.pad(opaque, ((0, 0), (0, 0), (0, GAP), (0, GAP)))
        strips.append(np.concatenate(list(padded.transpose(0, 2, 3, 1)), axis=1))
    return np.concatenate(strips, axis=0)[:-GAP, :-GAP].astype(np.float32)


def draw_tiles(ax: Axes, tiles: NDArray[np.float32], labels: Sequence[str]) -> None:
    """What `stacked` made, each of its rows named at the left.

    Args:
        ax: Where.
        tiles: (height, width, 4) in [0, 1].
        labels: One a row of images, from above.
    """
    ax.imshow(tiles, interpolation="none")
    height = len(tiles) / len(labels)
    ax.set_yticks([height * (i + 0.5) for i in range(len(labels))], labels)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)


def pairs_of(images: Mapping[str, NDArray[np.float32]]) -> Pairs:
    """Clean and poisoned images of the phases that have both, in the same shape."""
    nothing = np.empty(0, dtype=np.float32)
    both = {phase: [images.get(f"{phase}.{kind}", nothing) for kind in ("clean", "poisoned")] for phase in PHASES}
    return {
        phase: (clean[:MAX_IMAGES], poisoned[:MAX_IMAGES])
        for phase, (clean, poisoned) in both.items()
        if clean.shape == poisoned.shape and clean.ndim == 4 and len(clean)
    }


@style()
def _drawn(row: Row, run: Run, pairs: Pairs) -> Drawing:
    largest = max(float(np.abs(np.nan_to_num(poisoned - clean)).max()) for clean, poisoned in pairs.values())
    factor = amplification(largest)
    most = max(len(clean) for clean, _ in pairs.values())
    figure = Figure(layout="constrained")
    figure.set_size_inches(1.0 + len(pairs) * (0.5 + 0.62 * most), 2.35)
    axes = figure.subplots(1, len(pairs), squeeze=False)[0]
    for ax, (phase, (clean, poisoned)) in zip(axes, pairs.items(), strict=True):
        draw_tiles(ax, mosaic(clean, poisoned, factor), ["clean", "poisoned", f"difference\n\u00d7 {factor:g}"])
        ax.set_title(PHASES[phase], loc="left")
    where = f"{row.attack}, defence {row.defence}, seed {seed(run)}"
    return saved(
        figure,
        row,
        "images",
        heading=row.attack,
        caption=f"{where}. Bottom row: difference, amplified {factor:g} times around mid-grey (grey: unchanged); "
        f"the largest change of a pixel shown is {decimal(largest, 3)} of the range [0, 1].",
        alt=f"{listed([PHASES[phase] for phase in pairs])}: {counted(most, 'image')} each, clean above, "
        f"poisoned below, and their difference amplified {factor:g} times. {where}.",
        attack=row.attack,
    )
