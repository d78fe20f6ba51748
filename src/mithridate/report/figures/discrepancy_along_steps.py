"""Mean Memorization Discrepancy step by step."""

from collections.abc import Iterable, Iterator, Sequence

from mithridate.bench.store import Run
from mithridate.report.detectors import DetectorInfo, detectors, looking_back, reference
from mithridate.report.figures.drawing import Band, Drawing, draw_mean, from_zero, over_seeds, panels, saved, style
from mithridate.report.figures.scored import LOOKS, STREAM, cell_of, ends, kinds_legend, mean_shown, quantity
from mithridate.report.figures.timeline import aligned, mark_batches, placed
from mithridate.report.rows import Row
from mithridate.report.scores import CLEAN, POISONED, samples_of, strongest


@style()
def discrepancy_along_steps(rows: Sequence[Row]) -> Drawing | None:
    """Mean Memorization Discrepancy of what the learner received, step by step.

    Args:
        rows: Rows of one data set and model.

    Source:
        After Zhu et al., ICML 2023, Fig. 6, left.
    """
    attacked = strongest(rows)
    if attacked is None or not (families := looking_back(detectors([attacked[0]]), "discrepancy")):
        return None
    row, info = attacked[0], reference(families[0])
    quiet = max(
        (r for r in rows if not r.attacking and r.defence == row.defence and any(run.scores for run in r.runs)),
        key=lambda r: len(r.runs[0].trace),
        default=None,
    )
    lines = step_lines(row, quiet, info)
    if POISONED not in lines:
        return None
    longest = 1 - min(place for line in lines.values() for place in line)
    figure, (ax,) = panels(1, height=2.9)
    for kind, line in lines.items():
        draw_mean(ax, placed(line, longest), LOOKS[kind])
    from_zero(ax)
    mark_batches(ax, longest)
    ax.set_xlabel("batches until the trigger")
    ax.set_ylabel(f"mean {quantity(info)}")
    kinds_legend(figure, lines)
    return saved(
        figure,
        row,
        "discrepancy-along-steps",
        heading="Discrepancy along the stream",
        caption=f"{cell_of(row)}: mean discrepancy of each batch to the model of burn-in epoch {info.epoch}, before "
        "the step on it, aligned at the trigger (shaded); mean over the seeds where all have a value, band from "
        "the lowest to the highest. Clean: the same samples before poisoning, to the same model."
        + (f" Clean stream: {cell_of(quiet)}." if quiet and STREAM in lines else ""),
        alt="Line chart of the mean discrepancy by batches until the trigger. " + ends(lines, "step"),
    )


def step_lines(attacked: Row, quiet: Row | None, info: DetectorInfo) -> dict[str, dict[float, Band]]:
    """Mean discrepancy at each step, aligned at the trigger as in `timeline.aligned`.

    Args:
        attacked: The cell whose poisoned samples, and their clean twins, are shown.
        quiet: The same stream without an attack, if there is such a run.
        info: The detector.
    """

    def curves(runs: Iterable[Run], kind: str) -> Iterator[dict[float, float]]:
        for run in runs:
            means = {
                place: mean_shown(info, samples_of(run, info.key, [int(step)]), kind)
                for place, step in aligned(run, "step").items()
            }
            yield {place: mean for place, mean in means.items() if mean is not None}

    lines = {
        CLEAN: over_seeds(curves(attacked.runs, CLEAN)),
        POISONED: over_seeds(curves(attacked.runs, POISONED)),
        STREAM: over_seeds(curves(quiet.runs if quiet else (), CLEAN)),
    }
    return {kind: line for kind, line in lines.items() if line}
