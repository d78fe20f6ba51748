"""The page: everything put into one HTML file that loads nothing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from mithridate.bench.store import Run
from mithridate.report.doubts.rules import Examined, Severity, examine
from mithridate.report.figures.drawing import Drawing, inline
from mithridate.report.findings import findings
from mithridate.report.rows import (
    COLUMNS,
    Row,
    columns,
    displayed,
    flattened,
    groups,
    markdown_table,
    run_records,
    seeds,
    settings,
    shared,
    step_noun,
    varying,
)
from mithridate.report.wording import MISSING, counted, plain, said_of

MAX_EVENTS_A_RUN = 5
"""Alarms and refused steps shown of one run; the trace has all."""


_RUN_COLUMNS = {
    "run": "run",
    "status": "status",
    "stopped_by": "phase ended by",
    "seed": "seed",
    "accuracy_start": "start",
    "accuracy_before_trigger": "before trigger",
    "accuracy_after_trigger": "after trigger",
    "accuracy_after_buffers": "only buffers",
    "drop": "drop",
    "steps": "phase (batches)",
    "alarms": "alarms",
    "seconds": "seconds",
}


@dataclass(frozen=True)
class Section:
    """A part of the page that holds figures.

    Args:
        id: Its anchor.
        heading: Its heading.
        absent: Said instead of figures if there are none.
        subheadings: Whether each figure has a heading of its own.
        drawings: Its figures.
    """

    id: str
    heading: str
    absent: str
    subheadings: bool
    drawings: Sequence[Drawing]


@dataclass(frozen=True)
class TableSection:
    """A part of the page that holds one table.

    Args:
        id: Its anchor.
        heading: Its heading.
        intro: What the table shows, above it.
        head: The headings of its columns.
        rows: Its rows by what they are about (`Row.subject`, which is written only if there are several), each as long
            as `head`, as text.
        note: Said below it; nothing if empty.
        names: How many columns on the left hold names, which are set to the left; numbers are set to the right.
        line: The column whose change draws a line between rows; None draws none.
        bold: The column that the eye should find; None for none.
    """

    id: str
    heading: str
    intro: str
    head: Sequence[str]
    rows: Mapping[str, Sequence[Sequence[str]]]
    note: str = ""
    names: int = 2
    line: int | None = None
    bold: int | None = None

    def markdown(self) -> str:
        """The table for GitHub, without heading and words."""
        several = len(self.rows) > 1
        return markdown_table(
            [*(["model and data set"] if several else []), *self.head],
            [(*([subject] if several else []), *row) for subject, rows in self.rows.items() for row in rows],
            names=self.names + several,
        )


def page(rows: Sequence[Row], parts: Sequence[Section | TableSection]) -> str:
    """The whole report as HTML. Every value from the store is escaped.

    Args:
        rows: All rows.
        parts: What stands between the results and the alarms, in order; a table without rows is left out.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    here = files("mithridate.report")
    template = environment.from_string(here.joinpath("page.html.j2").read_text(encoding="utf-8"))
    answers = examine(rows)
    compared = groups(rows)
    found = findings(rows)
    runs = [run for row in rows for run in row.runs]
    events, left_out = _events(rows)
    tables, machines = [settings(run) for run in runs], [flattened(run.environment) for run in runs]
    common_settings, common_environment = shared(tables), shared(machines)
    records = run_records(rows)
    return template.render(
        title=f"Poisoning report: {'; '.join(finding.subject for finding in found)}",
        subtitle=", ".join(dict.fromkeys(plain(run.config["title"]) for run in runs if run.config.get("title"))),
        css=Markup(here.joinpath("page.css").read_text(encoding="utf-8")),  # noqa: S704  (our own file)
        findings=found,
        doubtful=[_doubtful(answer) for answer in answers if answer.doubts],
        passed=[answer for answer in answers if not answer.doubts],
        tally=_tally(answers),
        parts=[
            _figures(part, several=len(compared) > 1) if isinstance(part, Section) else {"table": part}
            for part in (_results(rows), *parts)
            if isinstance(part, Section) or part.rows
        ],
        events=events,
        left_out=left_out,
        common_settings=common_settings,
        cell_settings=list(_cell_settings(rows, common_settings)),
        common_environment=common_environment,
        differing_environment=varying(machines, common_environment),
        run_columns=[said_of(step_noun(rows), name) for name in _RUN_COLUMNS.values()],
        runs=[[_written(record[name]) for name in _RUN_COLUMNS] for record in records],
    )


def _results(rows: Sequence[Row]) -> TableSection:
    return TableSection(
        id="results",
        heading="Results",
        intro="Accuracy on the test part, mean ± standard deviation over seeds (none for a single run). Drop: accuracy "
        "before the trigger step minus after it. n: runs with a drop.",
        head=columns(rows),
        rows={members[0].subject: [displayed(row) for row in members] for members in groups(rows).values()},
        line=COLUMNS.index("defence"),
        bold=COLUMNS.index("drop (points)"),
    )


def _figures(section: Section, *, several: bool) -> dict[str, Any]:
    return {
        "id": section.id,
        "heading": section.heading,
        "absent": section.absent,
        "subheadings": section.subheadings or len(section.drawings) > 1,
        "figures": [
            _shown(drawing, f"{section.id}-{i}", several=several) for i, drawing in enumerate(section.drawings, 1)
        ],
    }


def _doubtful(answer: Examined) -> dict[str, Any]:
    ranks = list(Severity)
    doubts = sorted(answer.doubts, key=lambda doubt: ranks.index(doubt.severity))
    anchor = "doubt-" + answer.title.lower().replace(" ", "-").replace(",", "")
    return {"id": anchor, "title": answer.title, "severity": doubts[0].severity.value, "doubts": doubts}


def _tally(answers: Sequence[Examined]) -> str:
    severities = [doubt.severity for answer in answers for doubt in answer.doubts]
    counts = [(severity, severities.count(severity)) for severity in Severity]
    total = counted(str(len(severities)), "doubt")
    return f"{total}: {', '.join(f'{count} {severity.value}' for severity, count in counts if count)}."


def _shown(drawing: Drawing, name: str, *, several: bool) -> dict[str, Any]:
    width = float(drawing.svg.partition('width="')[2].partition("pt")[0]) / 72
    return {
        "id": name,
        "heading": f"{drawing.subject}: {drawing.heading}" if several else drawing.heading,
        "caption": drawing.caption,
        "svg": Markup(inline(drawing.svg, name, drawing.alt, lambda text: str(escape(text)))),  # noqa: S704  (drawn by us, texts escaped)
        "least": round(min(5.2 * width, 52), 1),
        "most": round(6.6 * width, 1),
    }


def _events(rows: Sequence[Row]) -> tuple[list[Mapping[str, Any]], int]:
    """Alarms and refused steps, and how many were left out."""
    shown: list[Mapping[str, Any]] = []
    left_out = 0
    for row in rows:
        for run in row.runs:
            every = list(_events_of(run))
            kept = every[:MAX_EVENTS_A_RUN]
            left_out += len(every) - len(kept)
            shown += [{"cell": row.cell, "seed": seeds([run]), **event} for event in kept]
    return shown, left_out


def _events_of(run: Run) -> Iterator[Mapping[str, Any]]:
    for step in run.trace:
        place = {"step": step["step"], "phase": plain(step["phase"])}
        if step.get("alarms"):
            yield {**place, "what": f"alarm: {plain(step['alarms'])}"}
        if step.get("admitted") is False:
            yield {**place, "what": f"step refused: {plain(step.get('verdict') or 'no reason given')}"}


def _cell_settings(rows: Sequence[Row], common: Mapping[str, str]) -> Iterator[tuple[str, Mapping[str, str]]]:
    several = len(groups(rows)) > 1
    for row in rows:
        entries = varying([settings(run) for run in row.runs], common)
        if entries:
            yield (f"{row.subject}: " if several else "") + row.cell, entries


def _written(value: str | float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.4g}" if isinstance(value, float) else str(value)
