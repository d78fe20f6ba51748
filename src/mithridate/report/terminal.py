"""The table that the command line prints."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from mithridate.report.tables import Row, displayed, groups

HEADINGS = ("attack", "defence", "start", "before", "after", "drop", "batches")
"""The columns that fit on 80 characters: the first ones of `tables.COLUMNS`, and n."""


def summary_table(rows: Sequence[Row]) -> Table:
    """All rows as a table for the terminal; names are shown as they are, never as markup.

    Args:
        rows: As made by `tables.rows`.
    """
    several = len(groups(rows)) > 1
    table = Table(
        box=None,
        pad_edge=False,
        caption="accuracy in % at the start, before and after the trigger; drop in points; mean±std over n seeds",
        caption_justify="left",
    )
    for name in (*(("data set", "model") if several else ()), *HEADINGS[:2]):
        table.add_column(name, overflow="fold")
    for column in (*HEADINGS[2:], "n"):
        table.add_column(column, justify="right", no_wrap=True)
    for previous, row in zip([None, *rows], rows, strict=False):
        if previous is not None and (previous.group, previous.defence) != (row.group, row.defence):
            table.add_section()
        shown = [cell.replace(" ± ", "±") for cell in displayed(row)]
        cells = (*(row.group if several else ()), *shown[: len(HEADINGS)], shown[len(HEADINGS) + 1])
        table.add_row(*map(Text, cells))
    return table
