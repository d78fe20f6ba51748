"""Tables for a paper: LaTeX with booktabs."""

import re
from collections.abc import Sequence

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
        table: With or without rows; where they are about several models and data sets, each is named above its own.
    """
    columns = "l" * table.names + "r" * (len(table.head) - table.names)
    lines = [_line(table.head)]
    for subject, rows in table.rows.items():
        if len(table.rows) > 1:
            lines += [rf"\multicolumn{{{len(table.head)}}}{{l}}{{{escaped(subject)}}} \\"]
        lines += map(_line, rows)
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


def _line(cells: Sequence[str]) -> str:
    return " & ".join(map(escaped, cells)) + r" \\"
