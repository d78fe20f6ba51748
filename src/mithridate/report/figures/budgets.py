"""Attacks that differ in nothing but their budget eps, and what detectors say of them: for figures along eps."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mithridate.report.detectors import DetectorInfo
from mithridate.report.figures.drawing import DASHES, PALETTE, Band, Look, draw_mean, legend, over_seeds
from mithridate.report.figures.scored import NAMES, mean_shown, seeds_of
from mithridate.report.rows import Row
from mithridate.report.scores import ACCUMULATIVE, CLEAN, POISONED, WHERE, poisoned_phase, samples
from mithridate.report.settings import flattened, shared, varying
from mithridate.report.wording import listed, number


def has_scores(row: Row) -> bool:
    """Whether detectors said something of its poisoned samples."""
    return poisoned_phase(row) is not None


def variants(rows: Sequence[Row], usable: Callable[[Row], bool] = has_scores) -> dict[str, dict[float, Row]]:
    """Undefended cells whose attacks differ in nothing but `eps`, by `eps`.

    The step size counts as a share of `eps`, so that one which grows with it is no difference.

    Args:
        rows: Rows of one data set and model.
        usable: Which cells are taken.

    Returns:
        By the attack's name, and by what tells it apart where several variants have it.
    """
    members: dict[tuple[str, frozenset[tuple[str, str]]], tuple[dict[str, str], dict[float, Row]]] = {}
    for row in rows:
        eps = number(row.attack_settings.get("eps"))
        if row.defence_name != "none" or not row.attacking or eps is None or not usable(row):
            continue
        settings = {key: value for key, value in row.attack_settings.items() if key not in {"label", "eps"}}
        if "step_size" in settings and eps > 0:
            settings["step_size"] = f"{settings['step_size'] / eps:.4g} eps"
        flat = flattened(settings)
        members.setdefault((row.attack_name, frozenset(flat.items())), (flat, {}))[1].setdefault(eps, row)
    named = {}
    for (name, _), (flat, by_eps) in members.items():
        alike = shared([settings for (other, _), (settings, _) in members.items() if other == name])
        what = ", ".join(f"{key} {value}" for key, value in varying([flat], alike).items())
        named[f"{name} ({what})" if what else name] = dict(sorted(by_eps.items()))
    return named


def budget_lines(by_eps: Mapping[float, Row], info: DetectorInfo) -> dict[str, dict[float, Band]]:
    """Mean of what a detector says by `eps`, of poisoned and of clean samples; see `scores.poisoned_phase`.

    Args:
        by_eps: Cells by their budget.
        info: The detector.
    """
    lines: dict[str, dict[float, Band]] = {CLEAN: {}, POISONED: {}}
    for eps, row in by_eps.items():
        phase = poisoned_phase(row) or ACCUMULATIVE
        for kind in lines:
            means = (mean_shown(info, samples(run, info.key, phase), kind) for run in row.runs)
            lines[kind] |= over_seeds({eps: mean} for mean in means if mean is not None)
    return {kind: line for kind, line in lines.items() if line}


def draw_budgets(ax: Axes, by_eps: Mapping[float, Row], info: DetectorInfo, look: Look) -> None:
    """What a detector says by `eps`: solid with a band of poisoned samples, dashed of clean ones."""
    for kind, line in budget_lines(by_eps, info).items():
        poisoned = kind == POISONED
        draw_mean(ax, line, replace(look, dashes=DASHES[not poisoned]), band=poisoned)


def budget_axis(ax: Axes, attacks: Iterable[Mapping[float, Row]]) -> None:
    """Ticks at the budgets themselves."""
    ticks = sorted({eps for by_eps in attacks for eps in by_eps})
    ax.set_xticks(ticks, [f"{eps:.3g}" for eps in ticks])
    ax.set_xlabel("eps")


def budget_legend(figure: Figure, looks: Mapping[str, Look]) -> None:
    """A legend: every look as poisoned samples have it, and the dashes of clean ones."""
    solid = {name: replace(look, dashes=DASHES[0]) for name, look in looks.items()}
    legend(figure, solid | {NAMES[CLEAN]: Look(PALETTE["edge"], DASHES[1], "")})


def sources(attacks: Mapping[str, Mapping[float, Row]]) -> str:
    """Where the poisoned samples of each variant come from; its cells differ in their budget alone, so one tells."""
    phases = {name: poisoned_phase(next(iter(by_eps.values()))) for name, by_eps in attacks.items()}
    return listed([f"{WHERE[phase or ACCUMULATIVE]} of {name}" for name, phase in phases.items()])


def cells_of(attacks: Mapping[str, Mapping[float, Row]]) -> str:
    """The variants by name, and the seeds of their cells."""
    cells = dict.fromkeys(seeds_of(row) for by_eps in attacks.values() for row in by_eps.values())
    return f"{listed(list(attacks))}, {'; '.join(cells)}"
