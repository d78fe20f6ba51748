"""Mean of what each detector says against eps."""

from collections.abc import Sequence

from mithridate.report.detectors import detectors, representatives
from mithridate.report.figures.budgets import (
    budget_axis,
    budget_legend,
    budget_lines,
    cells_of,
    draw_budgets,
    sources,
    variants,
)
from mithridate.report.figures.drawing import Drawing, looks_of, panels, saved, style, title
from mithridate.report.figures.scored import MAX_PANELS, ends, quantity
from mithridate.report.rows import Row


@style()
def scores_by_budget(rows: Sequence[Row]) -> Drawing | None:
    """Mean of what each detector says against eps, a line an attack, one panel a detector.

    Args:
        rows: Rows of one data set and model.

    Source:
        After Pang et al., NeurIPS 2021, Fig. 2.
    """
    attacks = variants(rows)
    members = [row for by_eps in attacks.values() for row in by_eps.values()]
    infos = representatives(detectors(members))[:MAX_PANELS]
    if not infos or max(map(len, attacks.values()), default=0) < 2:
        return None
    figure, axes = panels(len(infos), height=2.2)
    looks = looks_of(attacks)
    for ax, info in zip(axes, infos, strict=True):
        for name, by_eps in attacks.items():
            draw_budgets(ax, by_eps, info, looks[name])
        title(ax, info.label)
        ax.set_ylabel(quantity(info, epoch=False))
        budget_axis(ax, attacks.values())
    budget_legend(figure, looks)
    return saved(
        figure,
        members[0],
        "scores-by-budget",
        heading="Detectors by budget",
        caption=f"Undefended runs of {cells_of(attacks)}. Mean of what each detector says of poisoned samples "
        f"(solid; {sources(attacks)}) and of the same samples before poisoning (dashed). Line: mean over seeds; "
        "band, of the poisoned: from the lowest to the highest. Suspicious is a low score, a high discrepancy or "
        "loss. Vertical axes differ and do not start at zero; a gap between means is not yet a detector, see AUROC "
        "in the table.",
        alt="Line charts of detector scores by eps, one panel a detector, a line an attack. "
        + " ".join(
            f"{info.label}, {name}: {ends(budget_lines(by_eps, info), 'eps')}"
            for info in infos
            for name, by_eps in attacks.items()
        ),
    )
