"""The tables that the command line prints."""

from collections.abc import Sequence
from itertools import chain

from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mithridate.report.doubts import examine, tally
from mithridate.report.doubts.doubt import Severity
from mithridate.report.findings import strongest
from mithridate.report.measures import Measures, measures
from mithridate.report.rows import Row, groups, step_noun
from mithridate.report.statistic import Statistic, signed, spread, times
from mithridate.report.tables.results import displayed
from mithridate.report.tables.section import TableSection
from mithridate.report.wording import MISSING, one_line, with_step_noun

GROUP = ("data set", "model")
"""The columns that are shown only if several data sets or models are compared."""

LEFT_OUT = {"mean along (%)", "clean stream (%)", "clean steps as bad"}
"""The columns of the results for which 80 characters have no room; settings stand behind the labels."""

HEADINGS = (
    "attack",
    "defence",
    "start\n%",
    "before\ntrigger\n%",
    "after\ntrigger\n%",
    "drop\nin it\npoints",
    "phase\nbatches",
    "n",
)
"""What the other columns of the results are called here, with their units."""

COLOURS = {"near": "green", "apart": "red", "absent": "dim"}
"""By the tone of a cell."""

LEAST_NAME = 10
"""Characters of a line that a name must have; a longer one is folded."""

MEASURED = (
    "clean:\naccuracy\n%",
    "clean:\nagainst\nnone",
    "clean:\nsamples\nfixed %",
    "attack:\naccuracy\n%",
    "attack:\nagainst\nnone",
    "poison\nlet\npass %",
    "update\ntime /\nnone's",
)
"""What is said of each defence: three columns on a clean stream, three under the strongest attack, and time."""


def summary_table(rows: Sequence[Row]) -> Table:
    """All rows as a table for the terminal; names are shown as they are, never as markup.

    Args:
        rows: All rows.
    """
    several = len(groups(rows)) > 1
    table = _empty(
        "Accuracy, mean±std over n seeds",
        (*(GROUP if several else ()), *HEADINGS[:2]),
        [with_step_noun(step_noun(rows), name) for name in HEADINGS[2:]],
    )
    for previous, row in zip([None, *rows], rows, strict=False):
        if previous is not None and (previous.group, previous.defence) != (row.group, row.defence):
            table.add_section()
        shown = [_tight(cell) for name, cell in displayed(row, rows).items() if name not in {*LEFT_OUT, *row.apart}]
        table.add_row(*map(Text, (*(row.group if several else ()), *shown)))
    return table


def measures_table(rows: Sequence[Row]) -> Table | None:
    """One line a defence: a clean stream, the strongest attack, the time of an update; None if nothing is defended.

    Args:
        rows: All rows.
    """
    measured = measures(rows)
    if not measured:
        return None
    several = len(groups(rows)) > 1
    attacks = {group: strongest(members) for group, members in groups(rows).items()}
    names = one_line("; ".join(dict.fromkeys(row.attack for row in attacks.values() if row is not None)))
    table = _empty(
        f"Each defence at the end of a clean stream, and after the trigger of {names or 'an attack'}",
        (*(GROUP if several else ()), "defence"),
        MEASURED,
    )
    for group, strong in attacks.items():
        members = [cell for cell in measured if cell.row.group == group]
        table.add_section()
        for defence in dict.fromkeys(cell.row.defence for cell in members):
            under = [cell for cell in members if cell.row.defence == defence]
            clean = max(
                (cell for cell in under if not cell.row.attacking), key=lambda cell: cell.row.mean_steps, default=None
            )
            attacked = next((cell for cell in under if strong is not None and cell.row.attack == strong.attack), None)
            table.add_row(*map(Text, (*(group if several else ()), defence, *_line(clean, attacked))))
    return table


def section_table(section: TableSection) -> Table:
    """A table of a page, without its words; what the page tells by a colour has that here.

    Args:
        section: With at least one row.
    """
    section = section.flat
    table = Table(box=None, pad_edge=False)
    for number, heading in enumerate(section.head):
        table.add_column(heading, justify="left" if number < section.names else "right", overflow="fold")
    for row in chain.from_iterable(section.rows.values()):
        table.add_row(*(Text(cell, style=COLOURS.get(getattr(cell, "tone", ""), "")) for cell in row))
    return table


def doubt_lines(rows: Sequence[Row]) -> list[str]:
    """How many doubts the report has, and each serious one, as lines of text.

    Args:
        rows: All rows.
    """
    answers = examine(rows)
    serious = [
        f"serious: {answer.title}: {doubt.cell}: {doubt.text}"
        for answer in answers
        for doubt in answer.doubts
        if doubt.severity is Severity.SERIOUS
    ]
    return [tally(answers), *serious]


def fitted(table: Table, width: int) -> RenderableType:
    """A table as it is, or its rows as text where a terminal has no room for its numbers: none of them is ever cut.

    Args:
        table: Columns that are not to be cut are `no_wrap`; others may fold.
        width: Characters in a line of the terminal.
    """
    cells = [[str(cell) for cell in (column.header, *column.cells)] for column in table.columns]
    widest = [max(cell_len(line) for cell in column for line in cell.splitlines()) for column in cells]
    needed = [w if column.no_wrap else min(w, LEAST_NAME) for w, column in zip(widest, table.columns, strict=True)]
    if sum(needed) + 2 * (len(needed) - 1) <= width:
        return table
    rows = (zip(*(column[1:] for column in cells), strict=True)) if cells else ()
    headings = [" ".join(column[0].split()) for column in cells]
    lines = [", ".join(f"{head} {cell}" for head, cell in zip(headings, row, strict=True)) for row in rows]
    return Text("\n".join([*([str(table.title)] if table.title else []), *lines]))


def _line(clean: Measures | None, attacked: Measures | None) -> tuple[str, ...]:
    unmeasured = (MISSING,) * 3
    on_clean = unmeasured if clean is None else (*_accuracy(clean), _mean(clean.flagged_clean))
    under_attack = unmeasured if attacked is None else (*_accuracy(attacked), _mean(attacked.attack_success))
    timed = clean if clean is not None and clean.time_ratio.n else attacked  # the clean one has more steps to average
    ratio = MISSING if timed is None else times(timed.time_ratio).partition(" ")[0]
    return tuple(map(_tight, (*on_clean, *under_attack, ratio)))


def _empty(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, title=Text(title), title_justify="left")
    for name in names:
        table.add_column(name, overflow="fold")
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table


def _accuracy(cell: Measures) -> tuple[str, str]:
    return spread(cell.accuracy_after_trigger), signed(cell.against_none)


def _mean(statistic: Statistic) -> str:
    return spread(statistic).partition(" ")[0]


def _tight(cell: str) -> str:
    return cell.replace(" ± ", "±")
