"""The samples of a batch in quarantine, where they are images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mithridate.guard.entry import INPUTS, Quarantined, known_targets
from mithridate.report.figures.drawing import Drawing, fitting, rendered, style
from mithridate.report.figures.poisoned_images import stacked
from mithridate.report.wording import counted, file_stem, one_line

COLUMNS = 10
"""Images side by side."""


def images_of(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32] | None:
    """The images among the tensors of a batch: (n, 1 or 3, height, width) of real numbers or bytes; None without.

    Args:
        arrays: By their names in the batch's file.

    Returns:
        As they are; bytes divided by 255.
    """
    for name, array in arrays.items():
        if name.partition(".")[0] == INPUTS and array.ndim == 4 and array.shape[1] in {1, 3} and array.size:
            if array.dtype == np.uint8:
                return array.astype(np.float32) / np.float32(255)
            if array.dtype.kind == "f":
                return array.astype(np.float32)
    return None


@style()
def quarantined_images(entry: Quarantined, arrays: Mapping[str, NDArray[Any]], *, most: int = 40) -> Drawing | None:
    """The images of a batch, each with its target and score.

    Args:
        entry: The batch's description.
        arrays: Its tensors.
        most: How many are shown.

    Returns:
        None if its inputs are no images.
    """
    images = images_of(arrays)
    if images is None:
        return None
    shown, unit = _as_pixels(images[:most])
    classes = known_targets(arrays)
    lines = -(-len(shown) // COLUMNS)
    columns = min(COLUMNS, len(shown))
    figure = Figure(layout="constrained")
    figure.set_size_inches(max(1.6, 0.95 * columns), 1.14 * lines + 0.1)
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for number, ax in enumerate(axes):
        ax.set_axis_off()
        if number < len(shown):
            ax.imshow(stacked([shown[number : number + 1]]), interpolation="none")
            ax.set_title(_label(number, classes, entry.scores), fontsize=7.5, pad=2)
    above = ["its target" if classes else "", "its score" if entry.scores else ""]
    which = counted(len(shown), "sample") if len(shown) == len(images) else f"the first {len(shown)} of {len(images)}"
    words = " and ".join(filter(None, above))
    why = one_line(f"{entry.verdict}: {entry.reason}").rstrip(".")
    caption = f"{why}. Shown: {which} of {entry.id}{f'; above each {words}' if words else ''}. {unit}"
    return rendered(
        figure,
        stem=file_stem("quarantined", entry.id),
        heading=f"Attempt {entry.attempt}",
        caption=f"{caption[:1].upper()}{caption[1:]}".strip(),
        alt=f"{counted(len(shown), 'image')} of the batch that was put into quarantine at attempt {entry.attempt}.",
    )


def _as_pixels(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], str]:
    """Images in [0, 1], and what was done for that: a user's own may be normalised to anything."""
    finite = images[np.isfinite(images)]
    if not finite.size:
        return np.zeros_like(images), "No value is finite; shown as black."
    low, high = np.percentile(finite, [1, 99])
    some = "" if finite.size == images.size else " Values that are not finite are shown as black or white."
    if low >= -0.01 and high <= 1.01:
        beyond = finite.min() < -0.01 or finite.max() > 1.01
        return images, ("Values outside [0, 1] are shown as the nearest inside." if beyond else "") + some
    span = max(float(high - low), 1e-12)
    return (images - float(low)) / span, f"Values from {low:.3g} to {high:.3g} are shown from black to white.{some}"


def _label(number: int, classes: Sequence[object] | None, scores: Sequence[float] | None) -> str:
    target = fitting(str(classes[number]))[:8] if classes and classes[number] is not None else ""
    score = f"{scores[number]:.3g}" if scores and number < len(scores) else ""
    return " · ".join(filter(None, (target, score)))
