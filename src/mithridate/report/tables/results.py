"""The table of results: accuracy at the start, before and after the trigger, one row a cell."""

from collections.abc import Sequence

from mithridate.report.rows import Row, groups, step_noun
from mithridate.report.statistic import spread
from mithridate.report.steadiness import clean_falls, clean_range, mean_accuracy
from mithridate.report.tables.section import TableSection, markdown_table
from mithridate.report.wording import out_of, span, with_step_noun


def results_table(rows: Sequence[Row]) -> TableSection:
    """All rows as the page shows them.

    Args:
        rows: All rows of the report.
    """
    return TableSection(
        id="results",
        heading="Results",
        intro="Accuracy on the test part, mean ± standard deviation over seeds (none for a single run). Drop: accuracy "
        "before the trigger step minus after it. Mean along: over all steps. Clean stream: lowest and highest accuracy "
        "of the stream that nobody attacks, under the same defence; clean steps as bad: how many of its steps cost as "
        "much as the trigger. n: runs with a drop.",
        names=2 + len(rows[0].apart),
        line=1,
        bold=5 + len(rows[0].apart),
    ).filled([(row.subject, dict(zip(columns(rows), displayed(row, rows).values(), strict=True))) for row in rows])


def columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """The headings of `displayed`, with what one step of these rows takes in instead of a batch."""
    apart = rows[0].apart
    return tuple(name if name in apart else with_step_noun(step_noun(rows), name) for name in displayed(rows[0], rows))


def displayed(row: Row, rows: Sequence[Row]) -> dict[str, str]:
    """One row as people read it, by headings as of online runs; the first columns are names, `row.apart` among them.

    Args:
        row: The cell.
        rows: All rows, among which its clean stream is looked for.
    """
    drop = row.statistic("drop")
    return {
        "attack": row.attack,
        "defence": row.defence,
        **row.apart,
        "start (%)": spread(row.statistic("accuracy_start")),
        "before trigger (%)": spread(row.statistic("accuracy_before_trigger")),
        "after trigger (%)": spread(row.statistic("accuracy_after_trigger")),
        "drop (points)": spread(drop),
        "phase (batches)": span(row.statistic("steps").values),
        "mean along (%)": spread(row.each(mean_accuracy)),
        "clean stream (%)": clean_range(row, rows),
        "clean steps as bad": clean_falls(row, rows),
        "n": out_of(drop.n, len(row.runs)),
    }


def to_markdown(rows: Sequence[Row]) -> str:
    """The results as one GitHub table; data set and model are columns only where they differ."""
    several = len(groups(rows)) > 1
    return markdown_table(
        [*(("data set", "model") if several else ()), *columns(rows)],
        [(*(row.group if several else ()), *displayed(row, rows).values()) for row in rows],
        names=(4 if several else 2) + len(rows[0].apart),
    )
