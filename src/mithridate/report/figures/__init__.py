"""The figures of a report, one file a figure, and their sections. Drawn without pyplot or a screen."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from mithridate.core.errors import ConfigError, nearest
from mithridate.report.figures.accuracy_curves import accuracy_curves
from mithridate.report.figures.answers_moved import answers_moved
from mithridate.report.figures.burn_in_curves import burn_in_curves
from mithridate.report.figures.clean_stream_accuracy import clean_stream_accuracy
from mithridate.report.figures.convergence import convergence
from mithridate.report.figures.discrepancy_along_steps import discrepancy_along_steps
from mithridate.report.figures.discrepancy_and_loss import discrepancy_and_loss
from mithridate.report.figures.discrepancy_by_budget import discrepancy_by_budget
from mithridate.report.figures.discrepancy_by_interval import discrepancy_by_interval
from mithridate.report.figures.drawing import Drawing
from mithridate.report.figures.images_by_budget import images_by_budget
from mithridate.report.figures.loss_and_norms import loss_and_norms
from mithridate.report.figures.poisoned_images import poisoned_images
from mithridate.report.figures.score_distributions import score_distributions
from mithridate.report.figures.scores_by_budget import scores_by_budget
from mithridate.report.figures.secrecy import secrecy
from mithridate.report.rows import Row, groups

SCORES = (
    score_distributions,
    discrepancy_by_interval,
    answers_moved,
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


FIGURES: Mapping[str, Callable[[Sequence[Row]], Drawing | Sequence[Drawing] | None]] = {
    figure.__name__: figure
    for figure in (
        accuracy_curves,
        clean_stream_accuracy,
        convergence,
        secrecy,
        *SCORES,
        poisoned_images,
        images_by_budget,
        loss_and_norms,
        burn_in_curves,
    )
}
"""Every figure by name: what can be drawn of rows of one data set and model; of all rows, if it is in `ACROSS`."""

CHART = accuracy_curves.__name__
"""The figure that stands under the headline of its data set and model."""

ACROSS = frozenset({"burn_in_curves"})
"""The figures that compare data sets and models with each other."""


def drawn(name: str, rows: Sequence[Row]) -> list[Drawing]:
    """A figure by name, of every data set and model that it can be drawn of, or of all together.

    Args:
        name: One of `FIGURES`.
        rows: All rows of the report.

    Raises:
        ConfigError: There is no such figure.
    """
    if name not in FIGURES:
        raise ConfigError(f"there is no figure '{name[:80]}': {nearest(name, FIGURES)}")
    several: list[Drawing] = []
    for members in [rows] if name in ACROSS else groups(rows).values():
        drawing = FIGURES[name](members)
        several += [] if drawing is None else [drawing] if isinstance(drawing, Drawing) else drawing
    return several


def figure_sections(rows: Sequence[Row], left_out: Collection[str] = ()) -> list[FigureSection]:
    """Every figure that these rows allow but for the `CHART`, in the order of the page.

    Args:
        rows: All rows of the report.
        left_out: Names of figures that the page shows elsewhere.
    """

    def drawn_of(*figures: Callable[..., object]) -> list[Drawing]:
        names = [figure.__name__ for figure in figures if figure.__name__ not in left_out]
        return sorted((d for name in names for d in drawn(name, rows)), key=lambda d: subjects.index(d.subject))

    subjects = [members[0].subject for members in groups(rows).values()]

    return [
        FigureSection(
            "clean-stream",
            "Accuracy on a clean stream",
            drawn_of(clean_stream_accuracy),
            subheadings=False,
        ),
        FigureSection(
            "burn-in",
            "Accuracy along the burn-in",
            [] if "burn_in_curves" in left_out else drawn("burn_in_curves", rows),
            subheadings=False,
        ),
        FigureSection("federation", "Rounds of the federation", drawn_of(convergence, secrecy)),
        FigureSection("scores", "What detectors see", drawn_of(*SCORES)),
        FigureSection(
            "images",
            "Images",
            drawn_of(poisoned_images, images_by_budget),
            absent="" if left_out or all(row.federated for row in rows) else "No attacked run stored images.",
        ),
        FigureSection(
            "norms",
            "Loss and norms",
            drawn_of(loss_and_norms),
            absent="" if left_out else "No run recorded losses or norms.",
            subheadings=False,
        ),
    ]
