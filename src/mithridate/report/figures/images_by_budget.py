"""The same images, clean and poisoned within one budget eps after the other."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mithridate.report.figures.budgets import variants
from mithridate.report.figures.drawing import Drawing, saved, style
from mithridate.report.figures.poisoned_images import PHASES, Pairs, draw_tiles, pairs_of, stacked
from mithridate.report.rows import Row, seed
from mithridate.report.wording import counted, decimal, listed


def images_by_budget(rows: Sequence[Row]) -> list[Drawing]:
    """The same images, clean and poisoned within one budget eps after the other; one drawing an attack.

    Args:
        rows: Rows of one data set and model. Of each attack the undefended cells are shown, and of those the lowest
            seed that all of its budgets stored images of.

    Returns:
        A drawing for every attack that stored images at two budgets or more.

    Source:
        After Pang et al., NeurIPS 2021, Fig. 5.
    """
    drawings = []
    for name, by_eps in variants(rows, has_images).items():
        stored = [_by_seed(row) for row in by_eps.values()]
        for number in sorted(set.intersection(*map(set, stored)))[:1]:
            pairs = {eps: images[number] for eps, images in zip(by_eps, stored, strict=True)}
            phase = next((phase for phase in PHASES if _same_images(pairs, phase)), None)
            if len(pairs) > 1 and phase:
                drawings.append(_drawn(next(iter(by_eps.values())), name, number, pairs, phase))
    return drawings


def has_images(row: Row) -> bool:
    """Whether any of its runs stored clean and poisoned images."""
    return bool(_by_seed(row))


def _by_seed(row: Row) -> dict[int, Pairs]:
    return {number: pairs for run in row.runs if (number := seed(run)) is not None and (pairs := pairs_of(run.images))}


def _same_images(pairs: Mapping[float, Pairs], phase: str) -> bool:
    """Whether every budget has images of that phase, of the same clean ones."""
    clean = [of_phase[phase][0] for of_phase in pairs.values() if phase in of_phase]
    return len(clean) == len(pairs) and all(np.array_equal(images, clean[0]) for images in clean)


@style()
def _drawn(row: Row, name: str, number: int, pairs: Mapping[float, Pairs], phase: str) -> Drawing:
    clean = next(iter(pairs.values()))[phase][0]
    poisoned = {eps: of_phase[phase][1] for eps, of_phase in pairs.items()}
    figure = Figure(layout="constrained")
    figure.set_size_inches(1.2 + 0.75 * len(clean), 0.4 + 0.75 * (1 + len(pairs)))
    ax = figure.subplots()
    draw_tiles(ax, stacked([clean, *poisoned.values()]), ["clean", *(f"eps {eps:.3g}" for eps in pairs)])
    ax.set_title(PHASES[phase], loc="left")
    changes = listed(
        [f"{decimal(float(np.sqrt(np.square(x - clean).mean())), 3)} at eps {eps:.3g}" for eps, x in poisoned.items()]
    )
    where = f"{name}, defence {row.defence}, seed {number}"
    return saved(
        figure,
        row,
        "images-by-budget",
        heading=f"{name}, by budget",
        caption=f"{where}. The same images, poisoned within one budget after the other. Root mean square change of a "
        f"pixel, in the range [0, 1]: {changes}.",
        alt=f"{PHASES[phase]}: {counted(len(clean), 'image')}, clean above, below them poisoned at "
        f"eps {listed([f'{eps:.3g}' for eps in pairs])}. {where}.",
        attack=name,
    )
