"""Reports: from a run store to tables, figures and one self-contained HTML file. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mithridate.bench.store import read_runs
from mithridate.files import write_atomically
from mithridate.report.figures import Drawing, accuracy_curves, loss_and_norms, poisoned_images
from mithridate.report.page import Section, page
from mithridate.report.tables import groups, rows, run_records, summary_records, to_csv, to_markdown

__all__ = ["ReportPaths", "build_report"]


@dataclass(frozen=True)
class ReportPaths:
    """The files of a report.

    Args:
        html: The page, self-contained.
        summary_csv: One row a cell: means, standard deviations, n.
        runs_csv: One row a run.
        markdown: The table of the page.
        figures: Every figure as SVG and as PNG.
    """

    html: Path
    summary_csv: Path
    runs_csv: Path
    markdown: Path
    figures: tuple[Path, ...]


def build_report(directories: Sequence[Path], out: Path) -> ReportPaths:
    """Read finished runs and write what they show. The same runs give the same bytes.

    Args:
        directories: Run directories, or directories that hold some.
        out: Where the files go; made if missing.

    Raises:
        StoreError: A directory does not exist, a run is unreadable, or there is none.
    """
    found = rows(read_runs(directories))
    by_group = groups(found).values()
    sections = [
        Section(
            "accuracy",
            "Accuracy along the steps",
            "No run has a trace.",
            False,
            [drawing for members in by_group if (drawing := accuracy_curves(members))],
        ),
        Section(
            "images",
            "Images",
            "No attacked run stored images.",
            True,
            [drawing for members in by_group for drawing in poisoned_images(members)],
        ),
        Section(
            "norms",
            "Loss and norms",
            "No run recorded losses or norms.",
            False,
            [drawing for members in by_group if (drawing := loss_and_norms(members))],
        ),
    ]
    figures = _write_figures([drawing for section in sections for drawing in section.drawings], out / "figures")
    return ReportPaths(
        html=_write(out / "report.html", page(found, sections)),
        summary_csv=_write(out / "summary.csv", to_csv(summary_records(found))),
        runs_csv=_write(out / "runs.csv", to_csv(run_records(found))),
        markdown=_write(out / "summary.md", to_markdown(found)),
        figures=tuple(figures),
    )


def _write_figures(drawings: Sequence[Drawing], folder: Path) -> list[Path]:
    paths: list[Path] = []
    taken: set[str] = set()
    for drawing in drawings:
        stem = drawing.stem
        while stem.lower() in taken:
            stem += "_"
        taken.add(stem.lower())
        paths += [_write(folder / f"{stem}.svg", drawing.svg), _write(folder / f"{stem}.png", drawing.png)]
    return paths


def _write(path: Path, content: str | bytes) -> Path:
    data = content.encode("utf-8") if isinstance(content, str) else content

    def fill(part: Path) -> None:
        part.write_bytes(data)

    write_atomically(path, fill)
    return path
