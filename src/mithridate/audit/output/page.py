"""An audit as one self-contained page: ten lines first, the evidence below."""

from mithridate.audit.output.evidence import headline, lines, tables
from mithridate.audit.result import Audited
from mithridate.report.lead import Lead
from mithridate.report.page import board


def page(audited: Audited) -> str:
    """The page as HTML; every value is escaped."""
    return board(Lead(f"Audit of {audited.target}", headline(audited), lines(audited), tables(audited)))
