"""Batch loss, gradient norm and update norm along the steps."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from mithridate.report.figures.drawing import Drawing, fitting, legend, looks_of, saved, style
from mithridate.report.figures.timeline import (
    aligned,
    draw_steps,
    lines_by_panel,
    longest_phase,
    mark_batches,
    mean_line,
    placed,
)
from mithridate.report.rows import Row, step_noun
from mithridate.report.wording import with_step_noun

MEASURES = {
    "batch_loss": "batch loss (nats)",
    "gradient_norm": "gradient norm (l2)",
    "update_norm": "update norm (l2)",
}
"""Columns of the trace beside accuracy, with their axis labels."""


@style()
def loss_and_norms(rows: Sequence[Row]) -> Drawing | None:
    """Batch loss, gradient norm and update norm along the steps, one column each.

    Args:
        rows: Rows of one data set and model.

    Returns:
        None if no run has such numbers.
    """
    lines, longest = lines_by_panel(rows), longest_phase(rows)
    values = {
        measure: [v for row in rows for run in row.runs for v in aligned(run, measure).values()] for measure in MEASURES
    }
    if longest is None or not any(values.values()):
        return None
    figure = Figure(layout="constrained")
    figure.set_size_inches(9.6, 0.8 + 2.1 * len(lines))
    axes = figure.subplots(len(lines), len(MEASURES), sharex=True, sharey="col", squeeze=False)
    looks = looks_of(name for members in lines.values() for name, _ in members)
    for column, (measure, label) in zip(axes.T, MEASURES.items(), strict=True):
        column[0].set_title(with_step_noun(step_noun(rows), label), loc="left")
        positive = [value for value in values[measure] if value > 0]
        for ax, members in zip(column, lines.values(), strict=True):
            for name, row in members:
                line = placed(mean_line(row, measure), longest)
                draw_steps(ax, line, looks[name], marked=[len(line) - 2, len(line) - 1])
            if positive and max(positive) > 100 * min(positive):
                ax.set_yscale("symlog", linthresh=min(positive))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            mark_batches(ax, longest)
    for ax, heading in zip(axes[:, 0], lines, strict=True):
        ax.set_ylabel(fitting(heading), fontweight="bold")
    federated = step_noun(rows) == "round"
    steps = "rounds" if federated else "batches"
    figure.supxlabel(f"{steps} until the trigger", fontsize=9)
    legend(figure, looks)
    measured = (
        "Mean loss of the honest clients' samples before the step; mean norm of the updates that clients sent; "
        if federated
        else "Loss of the batch as the model received it, before the step; norm of the gradient before the defence "
        "bounds it; "
    )
    return saved(
        figure,
        rows[0],
        "loss-and-norms",
        heading="Loss and norms",
        caption=measured + "length of the step that the parameters made. Mean over the seeds where all have a finite "
        "value; band: from the lowest to the highest.",
        alt=f"Line charts of batch loss, gradient norm and update norm by {steps} until the trigger.",
    )
