"""Reports: from a run store to tables, figures and one self-contained HTML file. Imports no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mithridate.bench.failure import read_failures
from mithridate.bench.store import read_runs, unfinished
from mithridate.core.files import locked, path_of, remove_parts, write_atomically
from mithridate.report.figures import FigureSection, figure_sections
from mithridate.report.figures.drawing import Drawing
from mithridate.report.lead import Lead
from mithridate.report.measures import measure_records, measures
from mithridate.report.page import page
from mithridate.report.records import run_records, summary_records, to_csv
from mithridate.report.rows import Row, rows
from mithridate.report.scores import averaged, run_score_records
from mithridate.report.tables.clipping import clipping_table
from mithridate.report.tables.defences import defence_tables
from mithridate.report.tables.detectors import detector_tables
from mithridate.report.tables.results import to_markdown
from mithridate.report.tables.section import TableSection, markdown

__all__ = ["ReportPaths", "build_report"]

LOCK = ".report.lock"
"""Held by the process that writes a report in a folder."""

FORMATS = ("svg", "png", "pdf")
"""What a figure is written as: one file each."""


@dataclass(frozen=True)
class ReportPaths:
    """The files of a report.

    Args:
        html: The page, self-contained.
        summary_csv: One row a cell: means, standard deviations, n.
        runs_csv: One row a run.
        markdown: The table of the page.
        figures: Every figure as SVG, PNG and PDF.
        measures_csv: One row a defence and attack: what the defence cost and prevented; None if nothing is defended.
        measures_markdown: Tables of the measures; None if nothing is defended.
        scores: Scores of detectors by cell and by run, and tables of them; empty without detectors.
    """

    html: Path
    summary_csv: Path
    runs_csv: Path
    markdown: Path
    figures: tuple[Path, ...]
    measures_csv: Path | None = None
    measures_markdown: Path | None = None
    scores: tuple[Path, ...] = ()


def build_report(
    directories: str | Path | Sequence[str | Path], out: str | Path, lead: Callable[[Sequence[Row]], Lead] | None = None
) -> ReportPaths:
    """Read finished runs and write their report. The same runs give the same bytes.

    Args:
        directories: One or several run directories, or directories that hold some.
        out: Where the files go; made if missing.
        lead: What stands at the head of the page, from the rows; the findings alone if None.

    Raises:
        StoreError: A directory does not exist, a file of a run is damaged, or there is none.
        WriteError: The report cannot be written there.
    """
    out = path_of(out)
    cells = rows(read_runs(directories))
    measured, scored = measures(cells), run_score_records(cells)
    scores = averaged(scored)
    of_defences, of_detectors = defence_tables(measured), detector_tables(cells, scores)
    head = None if lead is None else lead(cells)
    sections = figure_sections(cells, () if head is None else head.drawn)
    score_files = {"scores.csv": to_csv(scores), "scores_runs.csv": to_csv(scored)} if scored else {}
    score_files |= {"scores.md": markdown(of_detectors)} if of_detectors else {}
    parts: list[TableSection | FigureSection] = [clipping_table(cells), *of_defences, *of_detectors, *sections]
    left_out = [path.name for path in unfinished(directories)]
    whole_page = page(cells, parts, left_out, head, failed=read_failures(directories))
    with locked(out / LOCK):  # what lies half-written there is then of a report that was killed
        for folder in (out, out / "figures"):
            remove_parts(folder)
        return ReportPaths(
            summary_csv=_write(out / "summary.csv", to_csv(summary_records(cells))),
            runs_csv=_write(out / "runs.csv", to_csv(run_records(cells))),
            markdown=_write(out / "summary.md", to_markdown(cells)),
            figures=_write_figures(_drawings([*(head.parts if head else ()), *sections]), out / "figures"),
            measures_csv=_write(out / "measures.csv", to_csv(measure_records(measured))) if measured else None,
            measures_markdown=_write(out / "measures.md", markdown(of_defences)) if measured else None,
            scores=tuple(_write(out / name, text) for name, text in score_files.items()),
            html=_write(out / "report.html", whole_page),
        )


def _drawings(parts: Sequence[TableSection | FigureSection]) -> list[Drawing]:
    return [drawing for part in parts if isinstance(part, FigureSection) for drawing in part.drawings]


def _write_figures(drawings: Sequence[Drawing], folder: Path) -> tuple[Path, ...]:
    paths: list[Path] = []
    taken: set[str] = set()
    for drawing in drawings:
        stem = drawing.stem
        while stem.lower() in taken:
            stem += "_"
        taken.add(stem.lower())
        paths += [_write(folder / f"{stem}.{kind}", getattr(drawing, kind)) for kind in FORMATS]
    return tuple(paths)


def _write(path: Path, content: str | bytes) -> Path:
    data = content.encode("utf-8") if isinstance(content, str) else content
    write_atomically(path, lambda part: part.write_bytes(data))
    return path
