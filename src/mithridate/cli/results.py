"""What is shown once runs have ended: the report, in files and in the terminal."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mithridate.cli.exit_codes import FAILED
from mithridate.cli.terminal import out, print_mistake
from mithridate.core.errors import ConfigError

if TYPE_CHECKING:
    from mithridate.bench.failure import Failure

MOST = 10
"""Runs that failed of which each is told why."""


def end_with(failures: Mapping[Path, "Failure"], of: int) -> None:
    """End the command if runs failed, and say which.

    Args:
        failures: Why, by directory.
        of: Runs in all.

    Raises:
        Exit: Runs failed.
    """
    if not failures:
        return
    from mithridate.bench.store import ERROR

    others = "; the others are kept" if of > len(failures) else ""
    lines = [
        f"{len(failures)} of {of} runs failed{others}. Mend what is wrong, and give the same command again (`run` with "
        "--resume)."
    ]
    for directory, failure in list(failures.items())[:MOST]:
        where = f" [{directory / ERROR}]" if failure.recorded else ""
        lines.append(f"  {directory.name}: {failure.message}{where}")
    lines += [f"  and {len(failures) - MOST} more"] if len(failures) > MOST else []
    print_mistake("\n".join(lines))
    raise typer.Exit(FAILED)


ENDINGS = {"md": ".md", "csv": ".csv", "latex": ".tex"}
"""What a table is printed as, and how the file that holds it ends."""


def print_files(paths: Iterable[Path], form: str) -> None:
    """Print those files that hold tables in a form, as they are.

    Args:
        paths: Files of any kind.
        form: One of `ENDINGS`.
    """
    for path in paths:
        if path.suffix == ENDINGS[form]:
            print(path.read_text(encoding="utf-8"), end="")


def report_on(directories: Sequence[Path], out_dir: Path, form: str = "html") -> None:
    """Write the report of finished runs, and print its tables, findings and gravest doubts.

    Args:
        directories: Run directories, or directories that hold them.
        out_dir: Where the report goes.
        form: `html`, or one of `ENDINGS`: the table of results alone is printed then, a row a cell.

    Raises:
        UserError: matplotlib cannot be loaded, a run is damaged or there is none, or the report cannot be written.
    """
    from mithridate.bench.failure import read_failures
    from mithridate.bench.store import read_runs, unfinished

    with _matplotlib():
        from mithridate.report import build_report
    from mithridate.report.findings import findings
    from mithridate.report.rows import rows
    from mithridate.report.terminal import doubt_lines, fitted, measures_table, summary_table

    paths = build_report(directories, out_dir)
    if form != "html":
        print_files([path for name, path in paths.files.items() if name.startswith("summary.")], form)
        return
    table = rows(read_runs(directories))
    out.print(fitted(summary_table(table), out.width))
    if (measured := measures_table(table)) is not None:
        out.print(fitted(measured, out.width))
    for finding in findings(table):
        out.print(finding.headline, markup=False, style="bold")
    for line in doubt_lines(table):
        out.print(line, markup=False, highlight=False)
    if failed := read_failures(directories):
        out.print(
            f"left out, for they failed: {', '.join(failed)}; `mithridate run --resume` tries them again.", markup=False
        )
    if missing := unfinished(directories):
        names = ", ".join(path.name for path in missing)
        out.print(f"left out, for they have not ended: {names}; `mithridate run --resume` finishes them.", markup=False)
    out.print(f"report: {paths.html}", soft_wrap=True, markup=False)


def tell_story(directory: Path) -> None:
    """Print what happened in the runs of a folder, in three lines.

    Args:
        directory: Of the runs.
    """
    from mithridate.bench.store import read_runs
    from mithridate.report.rows import rows
    from mithridate.report.story import story

    for number, line in enumerate(story(rows(read_runs([directory]))), start=1):
        out.print(f"{number}. {line}", style="bold", markup=False, highlight=False)


def open_page(page: Path) -> None:
    """Open a page in a browser, or say where it is.

    Args:
        page: The HTML file.
    """
    import webbrowser

    if not webbrowser.open(page.absolute().as_uri()):
        out.print(f"no browser was found here; open {page.absolute()} in one.", markup=False, soft_wrap=True)


def report_on_guard(directory: Path, out_dir: Path | None, form: str = "html") -> None:
    """Write the page of a guard's folder, and print what it says first and why steps were refused.

    Args:
        directory: The guard's folder.
        out_dir: Where the page goes; the folder itself if None.
        form: `html`, or one of `ENDINGS`: why steps were refused is printed then, and nothing else.

    Raises:
        UserError: matplotlib cannot be loaded, the folder is no guard's, or the page cannot be written.
    """
    with _matplotlib():
        from mithridate.report.guarded import build_guard_report
    from mithridate.report.tables.latex import latex
    from mithridate.report.tables.section import TableSection
    from mithridate.report.terminal import fitted, section_table

    built = build_guard_report(directory, out_dir)
    if form != "html":
        written = {"md": TableSection.markdown, "csv": TableSection.csv, "latex": latex}
        print("" if built.reasons.empty else written[form](built.reasons), end="")
        return
    out.print(built.headline, markup=False, style="bold")
    if not built.reasons.empty:
        out.print(fitted(section_table(built.reasons), out.width))
    out.print(f"report: {built.html}", soft_wrap=True, markup=False)


@contextmanager
def _matplotlib() -> Iterator[None]:
    """Imports that load matplotlib.

    Raises:
        ConfigError: It cannot be loaded.
    """
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"matplotlib cannot be loaded ({error}); mend its matplotlibrc. All runs are kept.") from None
