"""The table of a federation's bounds, in the order of the paper's Tables 3 to 5."""

from collections import Counter
from collections.abc import Sequence

from mithridate.report.federation import NORMS, attack_setting, by_bound, by_strength
from mithridate.report.rows import Row, groups
from mithridate.report.statistic import spread
from mithridate.report.tables.section import TableSection
from mithridate.report.wording import MISSING, number


def clipping_table(rows: Sequence[Row]) -> TableSection:
    """Accuracy after the trigger round: a row an attack and its loss scaling, a column a bound.

    Args:
        rows: All rows of the report; those of federations are shown.

    Returns:
        Without rows where fewer than two defences stand side by side.

    Source:
        In the order of Pang et al., NeurIPS 2021, Tables 3 to 5.
    """
    federated = [row for row in rows if row.federated]
    bounds = {row.defence: _bound(row) for row in by_bound(federated)}
    times = Counter(bounds.values())
    defences = {label: bound if times[bound] == 1 else f"{bound} ({label})" for label, bound in bounds.items()}
    table: dict[str, list[list[str]]] = {}
    for members in groups(federated).values() if len(defences) > 1 else ():
        shown = [row for row in by_strength(members) if _method(row)]
        labels: dict[tuple[str, str], set[str]] = {}
        for row in shown:
            labels.setdefault((_method(row), _scaling(row)), set()).add(row.attack)
        cells: dict[tuple[str, str], dict[str, str]] = {}
        for row in shown:
            method, scaling = _method(row), _scaling(row)
            name = f"{method} ({row.attack})" if len(labels[method, scaling]) > 1 else method
            cells.setdefault((name, scaling), {})[row.defence] = spread(row.statistic("accuracy_after_trigger"))
        if cells:
            table[members[0].subject] = [
                [*names, *(values.get(defence, MISSING) for defence in defences)] for names, values in cells.items()
            ]
    return TableSection(
        id="clipping",
        heading="After the trigger round, by bound",
        intro="Test accuracy (%) after the trigger round, mean ± standard deviation over seeds. Loss scaling: of a "
        "poisoned trigger the factor of its update, of an accumulative phase the weight lam (the factor of its "
        "trigger stands behind the name). A bound that holds keeps a row near that of no attack; what it costs stands "
        "in that row.",
        head=("method", "loss scaling", *defences.values()),
        rows=table,
        line=0,
    )


def _bound(row: Row) -> str:
    """What a column of the table is called: its bound, or the label of a defence that is no clipping."""
    if row.defence_name == "none":
        return "no clip"
    bound, norm = number(row.defence_settings.get("clip_norm")), row.defence_settings.get("norm")
    if row.defence_name != "clip" or bound is None or norm not in NORMS:
        return row.defence
    return f"{norm} ≤ {bound:g}"


def _method(row: Row) -> str:
    """What a row of the table is called; empty for attacks that the paper's tables do not have."""
    if row.attack_name == "accumulative":
        times = attack_setting(row, "trigger_scale")
        longer = "" if times in {"", "1"} or attack_setting(row, "trigger_norm") else f", {times} times its length"
        return f"accumulative phase + {attack_setting(row, 'trigger') or 'clean'} trigger{longer}"
    return {"clean": "no attack", "direct": "poisoned trigger"}.get(row.attack_name, "")


def _scaling(row: Row) -> str:
    key = {"direct": "trigger_scale", "accumulative": "lam"}.get(row.attack_name)
    return MISSING if key is None else attack_setting(row, key) or MISSING
