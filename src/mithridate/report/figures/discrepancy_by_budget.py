"""Mean Memorization Discrepancy against eps."""

from collections.abc import Sequence

from mithridate.report.detectors import detectors, looking_back, reference
from mithridate.report.figures.budgets import (
    budget_axis,
    budget_legend,
    budget_lines,
    cells_of,
    draw_budgets,
    sources,
    variants,
)
from mithridate.report.figures.drawing import Drawing, from_zero, label_left, looks_of, panels, saved, style, title
from mithridate.report.figures.scored import ends, quantity
from mithridate.report.rows import Row


@style()
def discrepancy_by_budget(rows: Sequence[Row]) -> Drawing | None:
    """Mean Memorization Discrepancy against eps, one panel an attack, a colour an old epoch.

    Args:
        rows: Rows of one data set and model.

    Source:
        After Zhu et al., ICML 2023, Figs. 4 (a) and 7.
    """
    attacks = {name: by_eps for name, by_eps in variants(rows).items() if len(by_eps) > 1}
    members = [row for by_eps in attacks.values() for row in by_eps.values()]
    families = looking_back(detectors(members), "discrepancy")
    if not families:
        return None
    family = families[0]
    middle = reference(family)
    chosen = list({info.epoch: info for info in (family[0], middle, family[-1])}.values())
    figure, axes = panels(len(attacks), height=2.7, share=True)
    looks = looks_of([f"to epoch {info.epoch}" for info in chosen])
    for ax, (name, by_eps) in zip(axes, attacks.items(), strict=True):
        for info, look in zip(chosen, looks.values(), strict=True):
            draw_budgets(ax, by_eps, info, look)
        title(ax, name)
        budget_axis(ax, attacks.values())
    from_zero(axes[0])
    label_left(axes, f"mean {quantity(family[0], epoch=False)}")
    budget_legend(figure, looks)
    return saved(
        figure,
        members[0],
        "discrepancy-by-budget",
        heading="Discrepancy by budget",
        caption=f"Undefended runs of {cells_of(attacks)}. Solid: poisoned samples ({sources(attacks)}); dashed: "
        "the same samples before poisoning. Colour: the burn-in epoch of the old model. Line: mean over seeds; "
        "band, of the poisoned: from the lowest to the highest. Equal axes. Means do not show how far single "
        "samples overlap.",
        alt="Line charts of the mean discrepancy by eps, one panel an attack. "
        + " ".join(f"{name}: {ends(budget_lines(by_eps, middle), 'eps')}" for name, by_eps in attacks.items()),
    )
