"""An audit as Markdown, for a pull request or a job's summary."""

from mithridate.audit.output.evidence import headline, lines, tables
from mithridate.audit.result import Audited
from mithridate.report.tables.section import markdown as tables_as_markdown
from mithridate.report.wording import markdown_safe


def markdown(audited: Audited) -> str:
    """The ten lines and the tables."""
    first = "".join(f"- {markdown_safe(line)}\n" for line in lines(audited))
    return f"# {markdown_safe(headline(audited))}\n\n{first}\n{tables_as_markdown(tables(audited))}"
