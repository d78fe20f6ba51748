"""Reports: from a run store to tables, figures and one self-contained HTML file. Imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mithridate.bench.failure import read_failures
from mithridate.bench.store import read_runs, unfinished
from mithridate.core.files import locked, path_of, remove_parts, write_whole
from mithridate.report.figures import CHART, FigureSection, drawn, figure_sections
from mithridate.report.figures.drawing import FORMATS, Drawing
from mithridate.report.lead import Lead
from mithridate.report.measures import measure_records, measures
from mithridate.report.page import FIGURES, LOCK, page
from mithridate.report.records import as_files, run_records, summary_records
from mithridate.report.rows import Row, rows
from mithridate.report.scores import averaged, run_score_records
from mithridate.report.tables.clipping import clipping_table
from mithridate.report.tables.defences import defence_tables
from mithridate.report.tables.detectors import detector_tables
from mithridate.report.tables.latex import latex
from mithridate.report.tables.results import results_table, to_markdown
from mithridate.report.tables.section import TableSection, markdown

__all__ = ["ReportPaths", "build_report"]


@dataclass(frozen=True)
class ReportPaths:
    """The files of a report.

    Args:
        html: The page, self-contained.
        files: The rows and tables beside it, by name: `summary` (a row a cell), `runs` (a row a run), where anything is
            defended `measures` (a row a defence and attack), and `scores`, `scores_runs` of detectors; rows as `.csv`
            and `.parquet`, tables as `.md` and `.tex`.
        figures: Every figure in each of `FORMATS`.
    """

    html: Path
    files: Mapping[str, Path]
    figures: tuple[Path, ...]


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
    charts = [] if head is not None and CHART in head.drawn else drawn(CHART, cells)
    sections = figure_sections(cells, () if head is None else head.drawn)
    results = results_table(cells)
    parts: list[TableSection | FigureSection] = [clipping_table(cells), *of_defences, *of_detectors, *sections]
    files: dict[str, str | bytes] = {
        **as_files("summary", summary_records(cells)),
        "summary.md": to_markdown(cells),
        "summary.tex": latex(results),
        **as_files("runs", run_records(cells)),
        **as_files("measures", measure_records(measured)),
        **({"measures.md": markdown(of_defences), "measures.tex": _latex(of_defences)} if measured else {}),
        **as_files("scores", scores),
        **as_files("scores_runs", scored),
        **({"scores.md": markdown(of_detectors), "scores.tex": _latex(of_detectors)} if of_detectors else {}),
    }
    stems = _stems([*_drawings(head.parts if head else ()), *charts, *_drawings(sections)])
    whole_page = page(
        cells,
        [results, *parts],
        [path.name for path in unfinished(directories)],
        head,
        failed=read_failures(directories),
        charts=charts,
        files=[*files, *(head.files if head else ())],
        stems=stems,
    )
    with locked(out / LOCK):  # what lies half-written there is then of a report that was killed
        for folder in (out, out / FIGURES):
            remove_parts(folder)
        return ReportPaths(
            files={name: _write(out / name, content) for name, content in files.items()},
            figures=tuple(
                _write(out / FIGURES / f"{stem}.{kind}", getattr(drawing, kind))
                for drawing, stem in stems.items()
                for kind in FORMATS
            ),
            html=_write(out / "report.html", whole_page),
        )


def _latex(tables: Sequence[TableSection]) -> str:
    return "\n".join(latex(table) for table in tables if not table.empty)


def _drawings(parts: Sequence[TableSection | FigureSection]) -> list[Drawing]:
    return [drawing for part in parts if isinstance(part, FigureSection) for drawing in part.drawings]


def _stems(drawings: Sequence[Drawing]) -> dict[Drawing, str]:
    """The names of the drawings' files, all different on every file system."""
    stems: dict[Drawing, str] = {}
    taken: set[str] = set()
    for drawing in dict.fromkeys(drawings):
        stem = drawing.stem
        while stem.lower() in taken:
            stem += "_"
        taken.add(stem.lower())
        stems[drawing] = stem
    return stems


def _write(path: Path, content: str | bytes) -> Path:
    write_whole(path, content)
    return path
