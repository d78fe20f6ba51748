"""What an audit's findings are called in the lists of others, from the audit itself."""

from collections.abc import Mapping

from mithridate.audit.identifiers import IDENTIFIERS, RULES, Kind
from mithridate.report.tables.section import markdown_table

POISONED: Mapping[Kind, str] = {
    "inputs": "Inputs that were changed, labels left as they are",
    "labels": "Labels that were turned",
    "samples": "Clean samples that were chosen",
    "updates": "Updates of a federation's clients",
}
"""What was poisoned, in words."""


def identifiers() -> str:
    """A table for each thing that can be poisoned, and one of the audit's own rules."""
    parts = []
    for kind, words in POISONED.items():
        lines = [[i.catalogue, i.id, i.title, "yes" if i.checked else "no"] for i in IDENTIFIERS[kind]]
        parts += [f"## {words}\n", markdown_table(["list, edition", "id", "title", "compared"], lines, names=4)]
    rules = [[rule.id, rule.summary, rule.mend] for rule in RULES]
    parts += ["## The audit's own rules\n", markdown_table(["id", "what it says", "what to do"], rules, names=3)]
    return "\n".join(parts)
