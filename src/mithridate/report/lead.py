"""What a page is about beyond its runs: a published table or figure, its claim and what the runs say to it."""

from collections.abc import Sequence
from dataclasses import dataclass

from mithridate.report.figures import FigureSection
from mithridate.report.findings import KeyNumber
from mithridate.report.tables.section import TableSection


@dataclass(frozen=True)
class Lead:
    """What stands at the head of a page.

    Args:
        title: Of the page.
        headline: The result in a sentence.
        details: Further sentences.
        parts: Tables and figures that come first.
        drawn: Names of figures that are among them, and are left out below.
        numbers: Seen before anything is read; at most two.
        files: Names of files beside the page that belong to it, other than those of every page.
    """

    title: str
    headline: str
    details: Sequence[str]
    parts: Sequence[TableSection | FigureSection]
    drawn: Sequence[str] = ()
    numbers: Sequence[KeyNumber] = ()
    files: Sequence[str] = ()
