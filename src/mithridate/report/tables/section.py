"""What every table is: its words, its head and its rows, for the page and as Markdown."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from mithridate.report.wording import markdown_safe, spreadsheet_safe


class Toned(str):
    """Text of a cell with what a page shows by its colour, too.

    Args:
        text: The cell.
        tone: Name of a class of the page's style.
    """

    tone: str

    def __new__(cls, text: str, tone: str) -> "Toned":
        """A text; nothing else of it differs."""
        self = super().__new__(cls, text)
        self.tone = tone
        return self


@dataclass(frozen=True)
class TableSection:
    """A part of the page that holds one table.

    Args:
        id: Its anchor.
        heading: Its heading.
        intro: What the table shows, above it.
        head: The headings of its columns.
        rows: Its rows by what they are about (which is written only if that differs), each as long as `head`, as text.
        note: Said below it; nothing if empty.
        names: How many columns on the left hold names, which are set to the left; numbers are set to the right.
        line: The column whose change draws a line between rows; None draws none.
        bold: The column that the eye should find; None for none.
        about: What rows are about, as the heading of a column.
    """

    id: str
    heading: str
    intro: str
    head: Sequence[str] = ()
    rows: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    note: str = ""
    names: int = 2
    line: int | None = None
    bold: int | None = None
    about: str = "model and data set"

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not self.rows

    def filled(self, cells: Sequence[tuple[str, Mapping[str, str]]]) -> "TableSection":
        """The table with head and rows.

        Args:
            cells: Row by row what it is about, and its cells by heading; all rows have the same headings.
        """
        rows: dict[str, list[Sequence[str]]] = {}
        for subject, line in cells:
            rows.setdefault(subject, []).append(list(line.values()))
        return replace(self, head=list(cells[0][1]) if cells else (), rows=rows)

    @property
    def flat(self) -> "TableSection":
        """The table with what its rows are about as the first column, where that differs."""
        if len(self.rows) < 2:
            return self
        rows = [[subject, *row] for subject, rows in self.rows.items() for row in rows]
        return replace(self, head=[self.about, *self.head], rows={"": rows}, names=self.names + 1)

    def csv(self) -> str:
        """The table as CSV, its cells as people read them; no spreadsheet evaluates one."""
        table, text = self.flat, io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(table.head)
        for rows in table.rows.values():
            writer.writerows(map(spreadsheet_safe, row) for row in rows)
        return text.getvalue()

    def markdown(self) -> str:
        """The table for GitHub, without heading and words."""
        table = self.flat
        return markdown_table(table.head, chain.from_iterable(table.rows.values()), names=table.names)


def markdown(tables: Iterable[TableSection]) -> str:
    """Tables with their headings and words for GitHub; those without rows are left out."""
    return "\n".join(
        f"## {table.heading}\n\n{table.intro}\n\n{table.markdown()}" + (f"\n{table.note}\n" if table.note else "")
        for table in tables
        if not table.empty
    )


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, names: int) -> str:
    """A GitHub table; cells are shown as they are, never as markup.

    Args:
        head: The headings, which are ours.
        rows: Each as long as `head`.
        names: How many columns on the left hold names; the others hold numbers and are set to the right.
    """
    lines = [head, ["---"] * names + ["---:"] * (len(head) - names), *([*map(markdown_safe, row)] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
