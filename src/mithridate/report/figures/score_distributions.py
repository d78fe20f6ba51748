"""Figures of what detectors say: distributions, backtracking interval, budget, loss, steps of the stream.

Each figure has a function that prepares its numbers and one that draws them. Discrepancies and losses are drawn as
such, not as scores (their scores are minus them).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from mithridate.bench.store import Run
from mithridate.report.figures.drawing import (
    AFTER,
    COLOURS,
    DASHES,
    MARKERS,
    MAX_COLUMNS,
    Drawing,
    Look,
    aligned,
    common,
    fitting,
    legend,
    looks_of,
    mark_batches,
    saved,
    style,
    trigger_width,
)
from mithridate.report.rows import Row, Statistic, flattened, seeds, shared, varying
from mithridate.report.scores import (
    ACCUMULATIVE,
    CLEAN,
    OOD,
    POISONED,
    DetectorInfo,
    Samples,
    Scores,
    curve,
    detectors,
    looking_back,
    mean,
    poisoned_phase,
    reference,
    representatives,
    samples,
    samples_of,
    strongest,
)
from mithridate.report.wording import decimal, file_stem, listed, number

BINS = 30

TAIL = 0.01
"""The share of clean or poisoned samples beyond either end of a histogram; the outermost bins hold them."""

FLOOR = 1e-7
"""The smallest discrepancy or loss that a logarithmic axis shows: below it float32 has nothing left to say."""

MAX_BANDS = 4
"""Lines with bands in one panel; more would hide each other."""

STREAM = "clean stream"
"""The line of a run that nobody attacked."""

LOOKS = {
    CLEAN: Look(COLOURS[1], DASHES[1], MARKERS[0]),
    POISONED: Look(COLOURS[3], DASHES[0], MARKERS[1]),
    OOD: Look(COLOURS[4], DASHES[2], MARKERS[2]),
    STREAM: Look(COLOURS[0], DASHES[3], MARKERS[4]),
}
"""How each kind of sample is drawn in every figure."""

NAMES = {CLEAN: "clean", POISONED: "poisoned", OOD: "other images", STREAM: "clean stream, no attack"}
WHERE = {ACCUMULATIVE: "accumulative phase", "trigger": "trigger batch"}

MAX_PANELS = 12
"""Detectors drawn in one figure; tables have all."""

Band = tuple[float, float, float]
"""Mean over seeds, lowest and highest seed."""

Line = Mapping[float, Band]
"""A band at each position."""


@dataclass(frozen=True)
class Distribution:
    """Scores of one detector, all seeds together, in the unit in which they are drawn.

    Args:
        info: The detector.
        found: By kind of sample; finite ones only.
        auroc: Of each seed by itself.
    """

    info: DetectorInfo
    found: Samples
    auroc: Statistic


def score_drawings(rows: Sequence[Row]) -> list[Drawing]:
    """Every figure that the scores of these runs allow.

    Args:
        rows: Rows of one data set and model.
    """
    drawings = [
        draw(rows)
        for draw in (
            score_distributions,
            discrepancy_by_interval,
            discrepancy_by_budget,
            discrepancy_and_loss,
            scores_by_budget,
            discrepancy_along_steps,
        )
    ]
    return [drawing for drawing in drawings if drawing is not None]


def quantity(info: DetectorInfo, *, epoch: bool = True) -> str:
    """What is drawn of a detector, with its unit.

    Args:
        info: The detector.
        epoch: Whether to name the old model.
    """
    old = f" to epoch {info.epoch}" if epoch and info.epoch is not None else ""
    if info.is_discrepancy:
        return f"discrepancy{old}" + {"l2": " (logits)", "tv": ""}.get(info.divergence, " (nats)")
    if info.is_loss:
        return "loss (nats)" if info.epoch is None else f"rise of loss{old.replace(' to', ' since')} (nats)"
    return "score"


def shown(info: DetectorInfo, scores: Scores) -> Scores:
    """Scores as they are drawn: discrepancies and losses instead of minus them."""
    return -scores if info.is_discrepancy or info.is_loss else scores


def distributions(row: Row, phase: str) -> list[Distribution]:
    """What `score_distributions` draws."""
    made = []
    for info in representatives(detectors([row]))[:MAX_PANELS]:
        runs = [samples(run, info.key, phase) for run in row.runs]
        curves = [one for run in runs if (one := curve(run.clean, run.poisoned)) is not None]
        pooled = (shown(info, np.concatenate(parts)) for parts in zip(*runs, strict=True))
        found = Samples(*(scores[np.isfinite(scores)] for scores in pooled))
        if len(found.clean) and len(found.poisoned):
            made.append(Distribution(info, found, Statistic(tuple(one.auroc for one in curves))))
    return made


def interval_lines(row: Row, family: Sequence[DetectorInfo], phase: str) -> dict[str, Line]:
    """Mean discrepancy by backtracking interval k, for each kind of sample that there is.

    Args:
        row: One cell.
        family: Detectors that differ in their epoch alone.
        phase: Whose samples.
    """
    lines = {}
    for kind in Samples._fields:
        curves = []
        for run in row.runs:
            means = {info.interval: mean(getattr(samples(run, info.key, phase), kind)) for info in family}
            curves.append({k: -middle for k, middle in means.items() if k is not None and middle is not None})
        lines[kind] = _line(curves)
    return {kind: line for kind, line in lines.items() if line}


def variants(rows: Sequence[Row]) -> dict[str, dict[float, Row]]:
    """Undefended cells whose attacks differ in nothing but `eps`, by `eps`; only those with scored poisoned samples.

    The step size counts as a share of `eps`, so that one which grows with it is no difference.

    Args:
        rows: Rows of one data set and model.

    Returns:
        By the attack's name, and by what tells it apart where several variants have it.
    """
    tables: dict[str, list[dict[str, str]]] = {}
    members: dict[tuple[str, str], tuple[dict[str, str], dict[float, Row]]] = {}
    for row in rows:
        attack = row.runs[0].config.get("attack", {})
        eps = number(attack.get("eps"))
        if row.defence_name != "none" or not row.attacking or eps is None or poisoned_phase(row) is None:
            continue
        settings = {key: value for key, value in attack.items() if key not in {"label", "eps"}}
        if "step_size" in settings and eps > 0:
            settings["step_size"] = f"{settings['step_size'] / eps:.4g} eps"
        flat = flattened(settings)
        key = (row.attack_name, str(sorted(flat.items())))
        if key not in members:
            tables.setdefault(row.attack_name, []).append(flat)
        members.setdefault(key, (flat, {}))[1].setdefault(eps, row)
    named = {}
    for (name, _), (flat, by_eps) in members.items():
        apart = varying([flat], shared(tables[name])) if len(tables[name]) > 1 else {}
        what = ", ".join(f"{key} {value}" for key, value in apart.items())
        named[f"{name} ({what})" if what else name] = dict(sorted(by_eps.items()))
    return named


def budget_lines(by_eps: Mapping[float, Row], info: DetectorInfo) -> dict[str, Line]:
    """Mean of what a detector says by `eps`, of poisoned and of clean samples; see `scores.poisoned_phase`.

    Args:
        by_eps: Cells by their budget.
        info: The detector.
    """
    lines: dict[str, dict[float, Band]] = {CLEAN: {}, POISONED: {}}
    for eps, row in by_eps.items():
        runs = [samples(run, info.key, poisoned_phase(row) or ACCUMULATIVE) for run in row.runs]
        for kind, line in lines.items():
            means = [middle for run in runs if (middle := mean(shown(info, getattr(run, kind)))) is not None]
            if means:
                line[eps] = (float(np.mean(means)), min(means), max(means))
    return {kind: line for kind, line in lines.items() if line}


def loss_points(
    row: Row, family: Sequence[DetectorInfo], losses: Sequence[DetectorInfo], phase: str
) -> dict[str, dict[int, tuple[float, float]]]:
    """(loss then - loss now of the clean samples, mean discrepancy) by epoch, for clean and poisoned samples.

    Args:
        row: One cell.
        family: Discrepancy detectors.
        losses: Loss detectors with an epoch; epochs that only one of the two has are left out.
        phase: Whose samples.

    Returns:
        Means over the runs that have all numbers; the latest epoch first.
    """
    at = {info.epoch: info for info in losses}
    points: dict[str, dict[int, tuple[float, float]]] = {CLEAN: {}, POISONED: {}}
    for info in family:
        if info.epoch is None or info.epoch not in at:
            continue
        for kind, line in points.items():
            pairs = [
                (x, -y)
                for run in row.runs
                if (x := mean(samples(run, at[info.epoch].key, phase).clean)) is not None
                and (y := mean(getattr(samples(run, info.key, phase), kind))) is not None
            ]
            if pairs:
                line[info.epoch] = (float(np.mean([x for x, _ in pairs])), float(np.mean([y for _, y in pairs])))
    return points


def step_lines(attacked: Row, quiet: Row | None, info: DetectorInfo) -> dict[str, Line]:
    """Mean discrepancy at each step, aligned at the trigger as in `figures.aligned`.

    Args:
        attacked: Gives poisoned samples and their clean twins.
        quiet: The same stream without an attack, if there is such a run.
        info: The detector.
    """

    def along(runs: Iterable[Run], kind: str) -> list[dict[int, float]]:
        return [
            {
                place: -middle
                for place, step in aligned(run, "step").items()
                if (middle := mean(getattr(samples_of(run, info.key, [int(step)]), kind))) is not None
            }
            for run in runs
        ]

    lines = {CLEAN: _line(along(attacked.runs, CLEAN)), POISONED: _line(along(attacked.runs, POISONED))}
    lines[STREAM] = _line(along(quiet.runs, CLEAN)) if quiet else {}
    return {kind: line for kind, line in lines.items() if line}


def clean_lines(rows: Sequence[Row]) -> dict[str, Line]:
    """Test accuracy after each step of a stream that nobody attacks, by defence.

    Args:
        rows: Rows of one data set and model. Where several `clean` cells have the same defence, the one with the most
            steps is taken.
    """
    lines: dict[str, Line] = {}
    for row in rows:
        if row.attacking:
            continue
        curves = [
            {int(step["step"]): value for step in run.trace if (value := number(step["accuracy"])) is not None}
            for run in row.runs
        ]
        line = _line(curves)
        if len(line) > max(1, len(lines.get(row.defence, {}))):
            lines[row.defence] = line
    return lines


def score_distributions(rows: Sequence[Row]) -> Drawing | None:
    """Histograms of what each detector says of clean and poisoned samples, under the strongest attack.

    Args:
        rows: Rows of one data set and model.

    Source:
        After Zhu et al., ICML 2023, Figs. 1 and 5 (a).
    """
    row = strongest(rows)
    phase = poisoned_phase(row) if row else None
    panels = distributions(row, phase) if row and phase else []
    if row is None or phase is None or not panels:
        return None
    with style():
        figure, axes = _panels(len(panels), height=2.3)
        for ax, panel in zip(axes, panels, strict=True):
            edges = bins(panel.info, panel.found)
            for kind, scores in panel.found._asdict().items():
                if len(scores):
                    _draw_histogram(ax, scores, edges, LOOKS[kind], filled=kind != OOD)
            spread = "" if panel.auroc.std is None else f" \u00b1 {decimal(panel.auroc.std, 2)}"
            ax.set_title(fitting(panel.info.label), loc="left", fontweight="bold", pad=16)
            if panel.auroc.mean is not None:
                text = f"AUROC {decimal(panel.auroc.mean, 2)}{spread}"
                ax.text(0, 1.03, text, transform=ax.transAxes, fontsize=8.5)
            if logarithmic(panel.info):
                ax.set_xscale("log")
                ax.xaxis.set_major_locator(LogLocator(numticks=5))
                ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                ax.xaxis.set_minor_locator(NullLocator())
            ax.set_xlabel(quantity(panel.info))
        for ax in axes[::MAX_COLUMNS]:
            ax.set_ylabel("share of samples (%)")
        kinds = [kind for kind in Samples._fields if any(len(getattr(panel.found, kind)) for panel in panels)]
        legend(figure, {NAMES[kind]: LOOKS[kind] for kind in kinds}, [])
        return saved(
            figure,
            row,
            stem=file_stem("score-distributions", *row.group),
            heading="Scores of clean and poisoned samples",
            caption=f"{_cell(row)}, {WHERE[phase]}; samples of all seeds together, AUROC mean \u00b1 standard "
            "deviation of the single seeds (0.5: a coin). Clean: the same samples before poisoning. The outermost bins "
            "hold all that lies beyond; axes of discrepancies and losses are logarithmic. Of detectors that look back "
            "at several epochs, the latest (\u201cstatic\u201d) and the one nearest to half the burn-in are shown. "
            "Suspicious is a low score, a high discrepancy or loss.",
            alt="Histograms of clean and poisoned samples, one panel a detector. "
            + " ".join(
                f"{panel.info.label}: AUROC {decimal(panel.auroc.mean, 2)}."
                for panel in panels
                if panel.auroc.mean is not None
            ),
        )


def discrepancy_by_interval(rows: Sequence[Row]) -> Drawing | None:
    """Mean Memorization Discrepancy against the backtracking interval k, one panel a divergence.

    Args:
        rows: Rows of one data set and model.

    Source:
        After Zhu et al., ICML 2023, Figs. 2, 5 (b), 7 and 10.
    """
    row = strongest(rows)
    phase = poisoned_phase(row) if row else None
    if row is None or phase is None:
        return None
    families = [family for family in looking_back(detectors([row]), "discrepancy") if len(family) > 1]
    panels = [
        (family, lines) for family in families[:MAX_PANELS] if POISONED in (lines := interval_lines(row, family, phase))
    ]
    if not panels:
        return None
    with style():
        figure, axes = _panels(len(panels), height=2.7)
        for ax, (family, lines) in zip(axes, panels, strict=True):
            for kind, line in lines.items():
                draw_band(ax, line, LOOKS[kind])
            ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            ax.set_xlabel("backtracking interval k (epochs)")
            ax.set_ylabel(f"mean {quantity(family[0], epoch=False)}")
            if len(panels) > 1:
                ax.set_title(fitting(family[0].divergence or family[0].label), loc="left", fontweight="bold")
        kinds = dict.fromkeys(kind for _, lines in panels for kind in lines)
        legend(figure, {NAMES[kind]: LOOKS[kind] for kind in kinds}, [])
        return saved(
            figure,
            row,
            stem=file_stem("discrepancy-by-interval", *row.group),
            heading="Discrepancy by backtracking interval",
            caption=f"{_cell(row)}, {WHERE[phase]}: distance between the current model's answers and those of the "
            "model k epochs before the end of the burn-in; updates of the stream are not counted in k. Line: mean "
            "over seeds; band: from the lowest to the highest. Clean: the same samples before poisoning. Means do not "
            "show how far single samples overlap.",
            alt="Line chart of the mean discrepancy by backtracking interval. " + _ends(panels[0][1], "k"),
        )


def discrepancy_by_budget(rows: Sequence[Row]) -> Drawing | None:
    """Mean Memorization Discrepancy against eps, one panel an attack, a colour an old epoch.

    Args:
        rows: Rows of one data set and model.

    Source:
        After Zhu et al., ICML 2023, Figs. 4 (a) and 7.
    """
    panels = {name: by_eps for name, by_eps in variants(rows).items() if len(by_eps) > 1}
    members = [row for by_eps in panels.values() for row in by_eps.values()]
    families = looking_back(detectors(members), "discrepancy")
    if not panels or not families:
        return None
    family = families[0]
    ends_and_middle = (family[0], reference(family), family[-1])
    chosen = list({info.epoch: info for info in ends_and_middle if info is not None}.values())
    with style():
        figure, axes = _panels(len(panels), height=2.7, share=True)
        looks = looks_of([f"to epoch {info.epoch}" for info in chosen])
        for ax, (name, by_eps) in zip(axes, panels.items(), strict=True):
            for info, look in zip(chosen, looks.values(), strict=True):
                for kind, line in budget_lines(by_eps, info).items():
                    solid = kind == POISONED
                    draw_band(ax, line, Look(look.colour, DASHES[not solid], look.marker), band=solid)
            ax.set_title(fitting(name), loc="left", fontweight="bold")
            _eps_axis(ax, panels.values())
        axes[0].set_ylim(bottom=min(0, axes[0].get_ylim()[0]))
        for ax in axes[::MAX_COLUMNS]:
            ax.set_ylabel(f"mean {quantity(family[0], epoch=False)}")
        legend(figure, _undashed(looks) | {NAMES[CLEAN]: Look("#444444", DASHES[1], "")}, [])
        return saved(
            figure,
            members[0],
            stem=file_stem("discrepancy-by-budget", *members[0].group),
            heading="Discrepancy by budget",
            caption=f"Undefended runs of {_which(panels)}. Solid: poisoned samples ({_sources(panels)}); dashed: "
            "the same samples before poisoning. Colour: the burn-in epoch of the old model. Line: mean over seeds; "
            "band, of the poisoned: from the lowest to the highest. Equal axes. Means do not show how far single "
            "samples overlap.",
            alt="Line charts of the mean discrepancy by eps, one panel an attack. "
            + " ".join(
                f"{name}: {_ends(budget_lines(by_eps, reference(family) or family[0]), 'eps')}"
                for name, by_eps in panels.items()
            ),
        )


def discrepancy_and_loss(rows: Sequence[Row]) -> Drawing | None:
    """Mean Memorization Discrepancy against how far the loss has fallen since the same old model, a point an epoch.

    Args:
        rows: Rows of one data set and model.

    Source:
        After Zhu et al., ICML 2023, Fig. 8.
    """
    row = strongest(rows)
    phase = poisoned_phase(row) if row else None
    if row is None or phase is None:
        return None
    families = looking_back(detectors([row]), "discrepancy")
    losses = looking_back(detectors([row]), "loss")
    points = loss_points(row, families[0], losses[0], phase) if families and losses else {}
    if len(points.get(CLEAN, {})) < 2 or not points[POISONED]:
        return None
    with style():
        figure, axes = _panels(1, height=3.2)
        ax = axes[0]
        for kind, line in points.items():
            look = LOOKS[kind]
            x, y = zip(*line.values(), strict=True)
            ax.plot(x, y, color=look.colour, linestyle=look.dashes, marker=look.marker, markersize=5, linewidth=1.2)
        ax.margins(0.08, 0.12)
        for epoch in _with_room(points[POISONED], ax):
            ax.annotate(
                str(epoch), points[POISONED][epoch], (0, 6), textcoords="offset points", ha="center", fontsize=8
            )
        ax.set_xlabel("loss then \u2212 loss now, of clean samples (nats)")
        ax.set_ylabel(f"mean {quantity(families[0][0], epoch=False)}")
        legend(figure, {NAMES[kind]: LOOKS[kind] for kind in points}, [])
        return saved(
            figure,
            row,
            stem=file_stem("discrepancy-and-loss", *row.group),
            heading="Discrepancy and loss",
            caption=f"{_cell(row)}, {WHERE[phase]}. A point an old model, with its burn-in epoch where there is room: "
            "how far the loss of the clean samples has fallen since, and the mean discrepancy to it; both axes mean "
            "over seeds. That the two rise together says nothing about single samples.",
            alt="Mean discrepancy against the fall of the loss since each old model. "
            + " ".join(
                f"Epoch {epoch}: {decimal(x, 2)} nats, clean {decimal(y, 2)}, poisoned "
                f"{decimal(points[POISONED][epoch][1], 2)}."
                for epoch, (x, y) in points[CLEAN].items()
                if epoch in points[POISONED]
            ),
        )


def scores_by_budget(rows: Sequence[Row]) -> Drawing | None:
    """Mean of what each detector says against eps, a line an attack, one panel a detector.

    Args:
        rows: Rows of one data set and model.

    Source:
        After Pang et al., NeurIPS 2021, Fig. 2.
    """
    attacks = variants(rows)
    members = [row for by_eps in attacks.values() for row in by_eps.values()]
    panels = representatives(detectors(members))[:MAX_PANELS]
    if not panels or max(map(len, attacks.values()), default=0) < 2:
        return None
    with style():
        figure, axes = _panels(len(panels), height=2.2)
        looks = looks_of(attacks)
        for ax, info in zip(axes, panels, strict=True):
            for name, by_eps in attacks.items():
                for kind, line in budget_lines(by_eps, info).items():
                    solid, look = kind == POISONED, looks[name]
                    draw_band(ax, line, Look(look.colour, DASHES[not solid], look.marker), band=solid)
            ax.set_title(fitting(info.label), loc="left", fontweight="bold")
            ax.set_ylabel(quantity(info, epoch=False))
            _eps_axis(ax, attacks.values())
        legend(figure, _undashed(looks) | {NAMES[CLEAN]: Look("#444444", DASHES[1], "")}, [])
        return saved(
            figure,
            members[0],
            stem=file_stem("scores-by-budget", *members[0].group),
            heading="Detectors by budget",
            caption=f"Undefended runs of {_which(attacks)}. Mean of what each detector says of poisoned samples "
            f"(solid; {_sources(attacks)}) and of the same samples before poisoning (dashed). Line: mean over seeds; "
            "band, of the poisoned: from the lowest to the highest. Suspicious is a low score, a high discrepancy or "
            "loss. Vertical axes differ and do not start at zero; a gap between means is not yet a detector, see AUROC "
            "in the table.",
            alt="Line charts of detector scores by eps, one panel a detector, a line an attack. "
            + " ".join(
                f"{info.label}, {name}: {_ends(budget_lines(by_eps, info), 'eps')}"
                for info in panels
                for name, by_eps in attacks.items()
            ),
        )


def discrepancy_along_steps(rows: Sequence[Row]) -> Drawing | None:
    """Mean Memorization Discrepancy of what the learner received, step by step.

    Args:
        rows: Rows of one data set and model.

    Source:
        After Zhu et al., ICML 2023, Fig. 6, left.
    """
    row = strongest(rows)
    families = looking_back(detectors([row]), "discrepancy") if row else []
    info = reference(families[0]) if families else None
    if row is None or info is None:
        return None
    quiet = max(
        (r for r in rows if not r.attacking and r.defence == row.defence and any(run.scores for run in r.runs)),
        key=lambda r: len(r.runs[0].trace),
        default=None,
    )
    lines = step_lines(row, quiet, info)
    if POISONED not in lines:
        return None
    longest = 1 - int(min(place for line in lines.values() for place in line))
    with style():
        figure, axes = _panels(1, height=2.9)
        ax = axes[0]
        for kind, line in lines.items():
            placed = {trigger_width(longest) if place == AFTER else place: band for place, band in line.items()}
            draw_band(ax, placed, LOOKS[kind])
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
        mark_batches(ax, longest)
        ax.set_xlabel("batches until the trigger")
        ax.set_ylabel(f"mean {quantity(info)}")
        legend(figure, {NAMES[kind]: LOOKS[kind] for kind in lines}, [])
        return saved(
            figure,
            row,
            stem=file_stem("discrepancy-along-steps", *row.group),
            heading="Discrepancy along the stream",
            caption=f"{_cell(row)}: mean discrepancy of each batch to the model of burn-in epoch {info.epoch}, before "
            "the step on it, aligned at the trigger (shaded); mean over the seeds where all have a value, band from "
            "the lowest to the highest. Clean: the same samples before poisoning, to the same model."
            + (f" Clean stream: {_cell(quiet)}." if quiet and STREAM in lines else ""),
            alt="Line chart of the mean discrepancy by batches until the trigger. " + _ends(lines, "step"),
        )


def clean_stream_accuracy(rows: Sequence[Row]) -> Drawing | None:
    """Accuracy along the steps of a stream that nobody attacks: what defences cost. Needs no scores.

    Args:
        rows: Rows of one data set and model.

    Returns:
        None unless at least two defences ran on a clean stream.

    Source:
        After Zhu et al., ICML 2023, Fig. 6, right.
    """
    lines = clean_lines(rows)
    members = [row for row in rows if not row.attacking and row.defence in lines]
    if len(lines) < 2:
        return None
    with style():
        figure, axes = _panels(1, height=3.4, width=6.8)
        ax = axes[0]
        looks, bands = looks_of(lines), len(lines) <= MAX_BANDS
        for name, line in lines.items():
            percent = {place: (100 * m, 100 * low, 100 * high) for place, (m, low, high) in line.items()}
            draw_band(ax, percent, looks[name], band=bands)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.set_xlabel("clean batches learned")
        ax.set_ylabel("test accuracy (%)")
        legend(figure, looks, [])
        floor = float(ax.get_ylim()[0])
        last = {name: line[max(line)][0] for name, line in lines.items()}
        return saved(
            figure,
            members[0],
            stem=file_stem("clean-stream", *members[0].group),
            heading="Accuracy on a clean stream",
            caption="Nobody attacks: what a defence costs by itself; "
            f"{listed(list(dict.fromkeys(map(_seeds, members))))}. Line: mean over seeds at the steps that all of them "
            f"have{'; band: from the lowest to the highest' if bands else ''}; lines that agree hide each other. The "
            f"vertical axis starts at {decimal(floor, 1)} %.",
            alt="Line chart of test accuracy by clean batches learned, a line a defence. At the end: "
            + ", ".join(f"{name} {decimal(100 * value)} percent" for name, value in last.items())
            + ".",
        )


def bins(info: DetectorInfo, found: Samples) -> NDArray[np.float64]:
    """Edges of histogram bins that all kinds of samples share; logarithmic for what is never negative.

    Args:
        info: The detector.
        found: What is drawn, as it is drawn.
    """
    ends = [np.quantile(scores, [TAIL, 1 - TAIL]) for scores in (found.clean, found.poisoned)]
    low, high = min(float(end[0]) for end in ends), max(float(end[1]) for end in ends)
    if logarithmic(info):
        low, high = max(low, FLOOR), max(high, 10 * FLOOR)
        return np.geomspace(min(low, high / 10), high, BINS + 1)
    if not high > low:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, BINS + 1)


def logarithmic(info: DetectorInfo) -> bool:
    """Whether a detector's histogram has a logarithmic axis: most discrepancies and losses are tiny, a few are not."""
    return info.is_discrepancy or (info.is_loss and info.epoch is None)


def draw_band(ax: Axes, line: Line, look: Look, *, band: bool = True) -> None:
    """A mean line with its band."""
    x = list(line)
    ax.plot(
        x,
        [middle for middle, _, _ in line.values()],
        color=look.colour,
        linestyle=look.dashes,
        marker=look.marker,
        markersize=4.5,
        linewidth=1.8,
        zorder=3,
    )
    if band:
        low, high = ([values[side] for values in line.values()] for side in (1, 2))
        ax.fill_between(x, low, high, color=look.colour, alpha=0.15, linewidth=0, zorder=1)


def _draw_histogram(ax: Axes, scores: Scores, edges: NDArray[np.float64], look: Look, *, filled: bool) -> None:
    counts, _ = np.histogram(np.clip(scores, edges[0], edges[-1]), edges)
    shares = 100 * counts / len(scores)
    if filled:
        ax.stairs(shares, edges, fill=True, color=look.colour, alpha=0.25)
    ax.stairs(shares, edges, color=look.colour, linestyle=look.dashes, linewidth=1.4)


def _panels(n: int, *, height: float, width: float = 3.3, share: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with n panels, at most `MAX_COLUMNS` side by side."""
    columns = min(n, MAX_COLUMNS)
    lines = -(-n // columns)
    figure = Figure(layout="constrained")
    figure.set_size_inches(max(5.6, width * columns), 0.6 + height * lines)
    axes = figure.subplots(lines, columns, sharex=share, sharey=share, squeeze=False)
    for ax in list(axes.flat)[n:]:
        ax.remove()
    return figure, list(axes.flat)[:n]


def _line(curves: Sequence[Mapping[int, float]]) -> Line:
    """Means and bands at the positions that all curves have; curves without any position do not count."""
    return {float(place): band for place, band in common([curve for curve in curves if curve]).items()}


def _cell(row: Row) -> str:
    return f"{row.attack}, defence {row.defence}, {_seeds(row)}"


def _seeds(row: Row) -> str:
    return f"seeds {seeds(row.runs)} (n = {len(row.runs)})"


def _undashed(looks: Mapping[str, Look]) -> dict[str, Look]:
    return {name: Look(look.colour, DASHES[0], look.marker) for name, look in looks.items()}


def _eps_axis(ax: Axes, attacks: Iterable[Mapping[float, Row]]) -> None:
    """Ticks at the budgets themselves."""
    ticks = sorted({eps for by_eps in attacks for eps in by_eps})
    ax.set_xticks(ticks, [f"{eps:.3g}" for eps in ticks])
    ax.set_xlabel("eps")


def _phase(by_eps: Mapping[float, Row]) -> str:
    """Where the poisoned samples of a variant come from: its cells differ in their budget alone, so one tells."""
    return poisoned_phase(next(iter(by_eps.values()))) or ACCUMULATIVE


def _sources(attacks: Mapping[str, Mapping[float, Row]]) -> str:
    return listed([f"{WHERE[_phase(by_eps)]} of {name}" for name, by_eps in attacks.items()])


def _with_room(points: Mapping[int, tuple[float, float]], ax: Axes) -> list[int]:
    """Epochs whose points are far enough from those labelled before them, the oldest model first."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    kept: list[int] = []
    for epoch in sorted(points):
        x, y = points[epoch]
        if all(math.hypot((x - points[k][0]) / (right - left), (y - points[k][1]) / (high - low)) > 0.06 for k in kept):
            kept.append(epoch)
    return kept


def _which(attacks: Mapping[str, Mapping[float, Row]]) -> str:
    cells = dict.fromkeys(_seeds(row) for by_eps in attacks.values() for row in by_eps.values())
    return f"{listed(list(attacks))}, {'; '.join(cells)}"


def _ends(lines: Mapping[str, Line], axis: str) -> str:
    """First and last mean of each line in words."""
    return " ".join(
        f"{NAMES[kind]}: {line[first][0]:.3g} at {axis} {first:g}, {line[last][0]:.3g} at {axis} {last:g}."
        for kind, line in lines.items()
        for first, last in [(min(line), max(line))]
    )
