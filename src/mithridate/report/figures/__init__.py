"""The figures of a report, one file a figure, and their sections. Drawn without pyplot or a screen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mithridate.report.figures.accuracy_curves import accuracy_curves
from mithridate.report.figures.clean_stream_accuracy import clean_stream_accuracy
from mithridate.report.figures.convergence import convergence
from mithridate.report.figures.discrepancy_along_steps import discrepancy_along_steps
from mithridate.report.figures.discrepancy_and_loss import discrepancy_and_loss
from mithridate.report.figures.discrepancy_by_budget import discrepancy_by_budget
from mithridate.report.figures.discrepancy_by_interval import discrepancy_by_interval
from mithridate.report.figures.drawing import Drawing
from mithridate.report.figures.loss_and_norms import loss_and_norms
from mithridate.report.figures.poisoned_images import poisoned_images
from mithridate.report.figures.score_distributions import score_distributions
from mithridate.report.figures.scores_by_budget import scores_by_budget
from mithridate.report.figures.secrecy import secrecy
from mithridate.report.rows import Row, groups

SCORES = (
    score_distributions,
    discrepancy_by_interval,
    discrepancy_by_budget,
    discrepancy_and_loss,
    scores_by_budget,
    discrepancy_along_steps,
)
"""The figures of what detectors say."""


@dataclass(frozen=True)
class FigureSection:
    """A part of the page that holds figures.

    Args:
        id: Its anchor.
        heading: Its heading.
        drawings: Its figures.
        absent: Said instead of figures if there are none; a section without figures and words is left out.
        subheadings: Whether each figure has a heading of its own even if it is the only one.
    """

    id: str
    heading: str
    drawings: Sequence[Drawing]
    absent: str = ""
    subheadings: bool = True

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not self.drawings and not self.absent


def figure_sections(rows: Sequence[Row]) -> list[FigureSection]:
    """Every figure that these rows allow, in the order of the page.

    Args:
        rows: All rows of the report.
    """
    compared = groups(rows).values()

    def drawn(*figures: Callable[[Sequence[Row]], Drawing | None]) -> list[Drawing]:
        return [drawing for members in compared for figure in figures if (drawing := figure(members))]

    return [
        FigureSection(
            "accuracy",
            "Accuracy along the steps",
            drawn(accuracy_curves, clean_stream_accuracy),
            absent="No run has a trace.",
            subheadings=False,
        ),
        FigureSection("federation", "Rounds of the federation", drawn(convergence, secrecy)),
        FigureSection("scores", "What detectors see", drawn(*SCORES)),
        FigureSection(
            "images",
            "Images",
            [drawing for members in compared for drawing in poisoned_images(members)],
            absent="" if all(row.federated for row in rows) else "No attacked run stored images.",
        ),
        FigureSection(
            "norms",
            "Loss and norms",
            drawn(loss_and_norms),
            absent="No run recorded losses or norms.",
            subheadings=False,
        ),
    ]
