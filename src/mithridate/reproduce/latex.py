"""Tables for a paper: LaTeX with booktabs."""

import re

from mithridate.report.tables.section import TableSection

_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "—": "---"}
_SPECIAL |= {c: f"\\{c}" for c in "&%$#_{}"}
_MARK = re.compile("|".join(map(re.escape, _SPECIAL)))


def escaped(text: str) -> str:
    r"""Text that LaTeX prints as it is.

    >>> escaped("5 % of a_b")
    '5 \\% of a\\_b'
    """
    return _MARK.sub(lambda mark: _SPECIAL[mark[0]], text)


def latex(table: TableSection) -> str:
    """A table as a `tabular` with booktabs' rules; its heading is the caption.

    Args:
        table: With or without rows.
    """
    columns = "l" * table.names + "r" * (len(table.head) - table.names)
    rows = [row for several in table.rows.values() for row in several]
    lines = [" & ".join(map(escaped, line)) + r" \\" for line in (table.head, *rows)]
    return "\n".join(
        [
            "% \\usepackage{booktabs}",
            r"\begin{table}",
            rf"\caption{{{escaped(table.heading)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )
