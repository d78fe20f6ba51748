"""The page: everything put into one HTML file that loads nothing."""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import escape

from mithridate.bench.store import Run
from mithridate.report.doubts import Examined, examine, tally
from mithridate.report.figures import FigureSection
from mithridate.report.figures.drawing import FORMATS, PALETTE, Drawing
from mithridate.report.findings import findings
from mithridate.report.glossary import explained
from mithridate.report.lead import Lead
from mithridate.report.records import run_records
from mithridate.report.rows import Row, groups, seeds, step_noun
from mithridate.report.settings import flattened, settings, shared, varying
from mithridate.report.tables.section import TableSection
from mithridate.report.wording import MISSING, one_line, with_step_noun

FIGURES = "figures"
"""The folder beside a page that holds its figures as files."""

LOCK = ".report.lock"
"""Held by the process that writes a report in a folder."""

MAX_EVENTS_A_RUN = 5
"""Alarms and refused steps shown of one run; the trace has all."""

_TAG = re.compile(r"<[^>]+>")
_STYLE_OF_ALL = re.compile(r"<defs>\s*<style.*?</style>\s*</defs>", re.DOTALL)
_COLOUR = re.compile("|".join(f"(?<=: ){colour}" for colour in PALETTE.values()))
_PROPERTIES = {colour: name for name, colour in PALETTE.items()}
"""Names of the page's colours, for those of a figure's file."""

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


def page(
    rows: Sequence[Row],
    parts: Sequence[FigureSection | TableSection],
    unfinished: Sequence[str] = (),
    lead: Lead | None = None,
    failed: Mapping[str, str] | None = None,
    charts: Sequence[Drawing] = (),
    files: Sequence[str] = (),
    stems: Mapping[Drawing, str] | None = None,
) -> str:
    """The whole report as HTML. Every value from the store is escaped.

    Args:
        rows: All rows.
        parts: What stands between the doubts and the alarms, in order; empty ones are left out.
        unfinished: Names of runs that have not ended, and are not among the rows.
        lead: What stands at the head; the findings alone if None.
        failed: Why others failed, by name.
        charts: Each stands under the headline of the data set and model that it is of.
        files: Names of the files beside the page, which it links.
        stems: Names of the figures' files, without ending; of those that are not there none is linked.
    """
    answers = examine(rows)
    shown = findings(rows)
    runs = [run for row in rows for run in row.runs]
    events, left_out, eventful = _events(rows)
    tables, machines = [settings(run) for run in runs], [flattened(run.environment) for run in runs]
    common_settings, common_environment = shared(tables), shared(machines)
    return _rendered(
        "page.html.j2",
        title=lead.title if lead else f"Poisoning report: {'; '.join(finding.subject for finding in shown)}",
        lead=lead,
        lead_parts=[part for part in (lead.parts if lead else ()) if not part.empty],
        subtitle=", ".join(dict.fromkeys(one_line(run.config["title"]) for run in runs if run.config.get("title"))),
        findings=[(finding, [chart for chart in charts if chart.subject == finding.subject]) for finding in shown],
        names=explained(rows),
        files=_by_stem(files),
        stems=stems or {},
        doubtful=[_doubtful(answer) for answer in answers if answer.doubts],
        passed=[answer for answer in answers if not answer.doubts],
        tally=tally(answers),
        unfinished=[one_line(name) for name in unfinished],
        failed=[(one_line(name), one_line(message)) for name, message in (failed or {}).items()],
        parts=[part for part in parts if not part.empty],
        several=len(groups(rows)) > 1,
        events=events,
        left_out=left_out,
        eventful=eventful,
        common_settings=common_settings,
        cell_settings=list(_cell_settings(rows, common_settings)),
        common_environment=common_environment,
        differing_environment=varying(machines, common_environment),
        run_columns=[with_step_noun(step_noun(rows), name) for name in _RUN_COLUMNS.values()],
        runs=[[_written(record[name]) for name in _RUN_COLUMNS] for record in run_records(rows)],
    )


def board(lead: Lead, names: Mapping[str, str] | None = None) -> str:
    """A page of tables and figures alone.

    Args:
        lead: All that it shows.
        names: Short names on it, and what they mean.
    """
    return _rendered("board.html.j2", lead=lead, several=False, names=names or {}, files=_by_stem(lead.files), stems={})


def _by_stem(files: Sequence[str]) -> dict[str, list[str]]:
    """Names of files by what stands before their ending."""
    by_stem: dict[str, list[str]] = {}
    for name in files:
        by_stem.setdefault(name.rpartition(".")[0], []).append(name)
    return by_stem


def _rendered(template: str, **values: object) -> str:
    """A page whose style and script are inside it, and which may load or run nothing else."""
    environment = Environment(
        loader=PackageLoader("mithridate.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    here = files("mithridate.report")
    css, js = (here.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode()
    return environment.get_template(template).render(
        css=css,
        js=js,
        script_hash=f"sha256-{digest}",
        card=_card,
        figures=FIGURES,
        formats=FORMATS,
        **values,
    )


def _doubtful(answer: Examined) -> dict[str, Any]:
    anchor = "doubt-" + answer.title.lower().replace(" ", "-").replace(",", "")
    return {"id": anchor, "title": answer.title, "severity": answer.doubts[0].severity.value, "doubts": answer.doubts}


def _card(drawing: Drawing, name: str) -> dict[str, Any]:
    """A figure in the page, and its least and most width in rem."""
    width = float(drawing.svg.partition('width="')[2].partition("pt")[0]) / 72
    return {"svg": inline(drawing, name), "least": round(min(5.2 * width, 52), 1), "most": round(6.6 * width, 1)}


def inline(drawing: Drawing, prefix: str) -> str:
    """A drawing as an element of a page: named for screen readers, its ids its own, its colours those of the page.

    Args:
        drawing: The figure.
        prefix: Put before every id, so that two figures in one page do not share any.
    """

    def adapted(tag: re.Match[str]) -> str:
        text = re.sub(r'\bid="', f'id="{prefix}-', tag[0])
        text = re.sub(r'(href="|url\()#', rf"\g<1>#{prefix}-", text)
        return _COLOUR.sub(lambda colour: f"var(--{_PROPERTIES[colour[0]]})", text)

    body = drawing.svg[drawing.svg.index("<svg") :]
    body = _STYLE_OF_ALL.sub("", body, count=1)  # it would be one of the whole page; the page's own style has it
    body = _TAG.sub(adapted, body)  # texts are not touched: they are names that could say anything
    return body.replace("<svg", f'<svg role="img" aria-label="{escape(drawing.alt)}"', 1)


def _events(rows: Sequence[Row]) -> tuple[list[Mapping[str, Any]], int, int]:
    """Alarms and refused steps, how many were left out, and how many runs have any."""
    shown: list[Mapping[str, Any]] = []
    left_out = eventful = 0
    for row in rows:
        for run in row.runs:
            events = [{"cell": row.cell, "seed": seeds([run]), **event} for event in _events_of(run)]
            shown += events[:MAX_EVENTS_A_RUN]
            left_out += len(events[MAX_EVENTS_A_RUN:])
            eventful += bool(events)
    return shown, left_out, eventful


def _events_of(run: Run) -> Iterator[Mapping[str, Any]]:
    for step in run.trace:
        place = {"step": step["step"], "phase": one_line(step["phase"])}
        if step.get("alarms"):
            yield {**place, "what": f"alarm: {one_line(step['alarms'])}"}
        if step.get("admitted") is False:
            yield {**place, "what": f"step refused: {one_line(step.get('verdict') or 'no reason given')}"}


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
