"""An audit as one self-contained page: ten lines first, the evidence below."""

from mithridate.audit.output.evidence import headline, lines, tables
from mithridate.audit.output.intervals import intervals
from mithridate.audit.result import Audited
from mithridate.report.figures import FigureSection
from mithridate.report.lead import Lead
from mithridate.report.page import board
from mithridate.report.tables.section import TableSection


def page(audited: Audited) -> str:
    """The page as HTML; every value is escaped."""
    pictured = FigureSection("intervals", "What each attack cost, in a picture", intervals(audited))
    evidence: list[TableSection | FigureSection] = list(tables(audited))
    if not pictured.empty:
        evidence.insert(1 if audited.findings else 0, pictured)
    return board(Lead(f"Audit of {audited.target}", headline(audited), lines(audited), evidence))
