"""The tables that the command line prints."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from mithridate.report.findings import strongest
from mithridate.report.measures import Measures, measures, signed, times
from mithridate.report.rows import Row, Statistic, displayed, groups, spread, step_noun
from mithridate.report.wording import MISSING, plain, said_of

HEADINGS = ("attack", "defence", "start", "before", "after", "drop", "batches")
"""The columns that fit on 80 characters: the first ones of `rows.COLUMNS`, and n."""

MEASURED = ("clean", "vs none", "fixed", "after", "vs none", "passed", "time")
"""What is said of each defence: three columns on a clean stream, three under the strongest attack, and time."""


def summary_table(rows: Sequence[Row]) -> Table:
    """All rows as a table for the terminal; names are shown as they are, never as markup.

    Args:
        rows: As made by `rows.rows`.
    """
    several = len(groups(rows)) > 1
    table = _empty("accuracy in % at the start, before and after the trigger; drop in points; mean±std over n seeds")
    for name in (*(("data set", "model") if several else ()), *HEADINGS[:2]):
        table.add_column(name, overflow="fold")
    for column in (*(said_of(step_noun(rows), name) for name in HEADINGS[2:]), "n"):
        table.add_column(column, justify="right", no_wrap=True)
    for previous, row in zip([None, *rows], rows, strict=False):
        if previous is not None and (previous.group, previous.defence) != (row.group, row.defence):
            table.add_section()
        shown = [_tight(cell) for cell in displayed(row)]
        cells = (*(row.group if several else ()), *shown[: len(HEADINGS)], shown[len(HEADINGS) + 1])
        table.add_row(*map(Text, cells))
    return table


def measures_table(rows: Sequence[Row]) -> Table | None:
    """One line a defence: a clean stream, the strongest attack, the time of an update; None if nothing is defended.

    Args:
        rows: As made by `rows.rows`.
    """
    measured = measures(rows)
    if not measured:
        return None
    several = len(groups(rows)) > 1
    attacks = {group: strongest(members) for group, members in groups(rows).items()}
    names = plain("; ".join(dict.fromkeys(row.attack for row in attacks.values() if row is not None)))
    table = _empty(
        "clean, fixed: final accuracy on a clean stream, share of its samples corrected; after, passed: accuracy after "
        f"the trigger of {names or 'an attack'}, share of poisoned samples let pass; all in %. vs none: points against "
        "no defence. time: of an update, a multiple of no defence's"
    )
    for name in (*(("data set", "model") if several else ()), "defence"):
        table.add_column(name, overflow="fold")
    for column in MEASURED:
        table.add_column(column, justify="right", no_wrap=True)
    for group, strong in attacks.items():
        members = [one for one in measured if one.row.group == group]
        table.add_section()
        for defence in dict.fromkeys(one.row.defence for one in members):
            own = [one for one in members if one.row.defence == defence]
            clean = max((one for one in own if not one.row.attacking), key=_length, default=None)
            attacked = next((one for one in own if strong is not None and one.row.attack == strong.attack), None)
            table.add_row(*map(Text, (*(group if several else ()), defence, *_line(clean, attacked))))
    return table


def _line(clean: Measures | None, attacked: Measures | None) -> tuple[str, ...]:
    unmeasured = (MISSING,) * 3
    on_clean = unmeasured
    if clean is not None:
        on_clean = (spread(clean.accuracy_after_trigger), signed(clean.against_none), _mean(clean.flagged_clean))
    under_attack = unmeasured
    if attacked is not None:
        under_attack = (
            spread(attacked.accuracy_after_trigger),
            signed(attacked.against_none),
            _mean(attacked.attack_success),
        )
    timed = clean if clean is not None and clean.time_ratio.n else attacked  # the clean one has more steps to average
    ratio = MISSING if timed is None else times(timed.time_ratio).partition(" ")[0]
    return tuple(map(_tight, (*on_clean, *under_attack, ratio)))


def _empty(caption: str) -> Table:
    return Table(box=None, pad_edge=False, caption=Text(caption), caption_justify="left")


def _length(one: Measures) -> float:
    return one.steps.mean or 0


def _mean(statistic: Statistic) -> str:
    return spread(statistic).partition(" ")[0]


def _tight(cell: str) -> str:
    return cell.replace(" ± ", "±")
