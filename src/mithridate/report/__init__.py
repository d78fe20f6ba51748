"""Reports: from a run store to tables, figures and one self-contained HTML file. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mithridate.bench.store import read_runs
from mithridate.core.files import write_atomically
from mithridate.report.federated_figures import clipping_table, federated_drawings
from mithridate.report.figures import Drawing, accuracy_curves, loss_and_norms, poisoned_images
from mithridate.report.measures import measure_sections, measures, measures_csv, measures_markdown
from mithridate.report.page import Section, page
from mithridate.report.score_figures import clean_stream_accuracy, score_drawings
from mithridate.report.scores import score_report
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
        measures_csv: One row a defence and attack: what it cost, what it held; None if nothing is defended.
        measures_markdown: The tables of that; None if nothing is defended.
        scores: What detectors made of the samples, by cell and by run, and the tables of it; empty without detectors.
    """

    html: Path
    summary_csv: Path
    runs_csv: Path
    markdown: Path
    figures: tuple[Path, ...]
    measures_csv: Path | None = None
    measures_markdown: Path | None = None
    scores: tuple[Path, ...] = ()


def build_report(directories: str | Path | Sequence[str | Path], out: str | Path) -> ReportPaths:
    """Read finished runs and write what they show. The same runs give the same bytes.

    Args:
        directories: One or several run directories, or directories that hold some.
        out: Where the files go; made if missing.

    Raises:
        StoreError: A directory does not exist, a run is unreadable, or there is none.
    """
    out = Path(out)
    found = rows(read_runs(directories))
    compared = groups(found)
    by_group = compared.values()
    measured = measures(found)
    tables = measure_sections(measured)
    scored = score_report(found)
    sections = [
        Section(
            "accuracy",
            "Accuracy along the steps",
            "No run has a trace.",
            False,
            [
                drawing
                for members in by_group
                for drawing in (accuracy_curves(members), clean_stream_accuracy(members))
                if drawing
            ],
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
    if all(row.federated for row in found):
        sections = [section for section in sections if section.id != "images"]  # updates are poisoned, not images
    if drawings := [drawing for members in by_group for drawing in score_drawings(members)]:
        sections.insert(1, Section("scores", "What detectors see", "", True, drawings))
    if drawings := [drawing for members in by_group for drawing in federated_drawings(members)]:
        sections.insert(1, Section("federation", "Rounds of the federation", "", True, drawings))
    figures = _write_figures([drawing for section in sections for drawing in section.drawings], out / "figures")
    return ReportPaths(
        html=_write(out / "report.html", page(found, [clipping_table(compared), *tables, *scored.tables, *sections])),
        summary_csv=_write(out / "summary.csv", to_csv(summary_records(found))),
        runs_csv=_write(out / "runs.csv", to_csv(run_records(found))),
        markdown=_write(out / "summary.md", to_markdown(found)),
        figures=tuple(figures),
        measures_csv=_write(out / "measures.csv", measures_csv(measured)) if measured else None,
        measures_markdown=_write(out / "measures.md", measures_markdown(tables)) if measured else None,
        scores=tuple(_write(out / name, text) for name, text in scored.files.items()),
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
