"""Defences against every attack that was tried on them: the worst one first, and what a clean stream pays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import sub
from pathlib import Path
from typing import NamedTuple

from mithridate.bench.store import Run
from mithridate.core.errors import StoreError
from mithridate.core.files import locked, path_of, write_atomically
from mithridate.report.comparisons import undefended
from mithridate.report.lead import Lead
from mithridate.report.measures import Measures, measures
from mithridate.report.page import board
from mithridate.report.records import Record, to_csv
from mithridate.report.rows import Row, groups, rows
from mithridate.report.statistic import Statistic, signed, spread, times
from mithridate.report.tables.section import TableSection
from mithridate.report.wording import MISSING, counted, decimal, listed, points

PAPERS = {"none": "ST", "clip": "GC", "at": "AT", "dsc": "DSC"}
"""What Zhu et al. call the defences of their Table 1."""

LOCK = ".leaderboard.lock"


class Printed(NamedTuple):
    """A defence in a paper, in percent.

    Args:
        reported: What the paper prints.
        reproduced: What our runs gave, and their number; empty without any.
    """

    reported: str
    reproduced: str


@dataclass(frozen=True)
class Ranked:
    """One defence on one model and data set.

    Args:
        defence: Its label.
        attacked: Its cells under attack, by label of the attack.
        clean: Its clean stream; None if none was run.
        worst: The attack that left the lowest mean accuracy.
    """

    defence: str
    attacked: dict[str, Measures]
    clean: Measures | None
    worst: str

    @property
    def left(self) -> float:
        """Mean accuracy after the trigger of the worst attack, a fraction."""
        return self.attacked[self.worst].accuracy_after_trigger.mean or 0.0


def standings(members: Sequence[Row]) -> list[Ranked]:
    """Every defence that was attacked, the one that its worst attack leaves the highest first.

    Args:
        members: Rows of one data set and model.
    """
    measured = measures(members)
    found = []
    for defence in dict.fromkeys(row.defence for row in members):
        cells = [cell for cell in measured if cell.row.defence == defence]
        attacked = {c.row.attack: c for c in cells if c.row.claims_drop and c.accuracy_after_trigger.n}
        if not attacked:
            continue
        worst = min(attacked, key=lambda attack: attacked[attack].accuracy_after_trigger.mean or 0.0)
        clean = [cell for cell in cells if not cell.row.attacking]
        found.append(Ranked(defence, attacked, clean[0] if clean else None, worst))
    return sorted(found, key=lambda s: -s.left)


def board_of(members: Sequence[Row], reported: Mapping[str, Printed], number: int) -> TableSection:
    """The table of one model and data set.

    Args:
        members: Rows of one data set and model.
        reported: What a paper prints for a defence and we got for it, by its label.
        number: Of the table on its page, from 1.
    """
    order = standings(members)
    attacks = list(dict.fromkeys(row.attack for row in members if row.claims_drop))
    cells = []
    for place, s in enumerate(order, start=1):
        worst, clean = s.attacked[s.worst], s.clean
        cells.append(
            {
                "": str(place),
                "defence": s.defence,
                "worst attack": s.worst,
                "left by it (%)": spread(worst.accuracy_after_trigger),
                "largest trigger drop": _largest([c.drop for c in s.attacked.values()]),
                "largest phase cost": _largest([_phase_cost(c.row) for c in s.attacked.values()]),
                **{attack: _after(s, attack) for attack in attacks},
                "clean: against none": _against_none(s, members),
                "clean: steps refused (%)": MISSING if clean is None else spread(clean.refused),
                "clean: samples touched (%)": MISSING if clean is None else spread(clean.flagged_clean),
                "time / none": MISSING if clean is None else times(clean.time_ratio),
                "reported": reported[s.defence].reported if s.defence in reported else "",
                "reproduced": reported[s.defence].reproduced if s.defence in reported else "",
                "n": str(worst.accuracy_after_trigger.n),
            }
        )
    return TableSection(
        id=f"board-{number}",
        heading=members[0].subject,
        intro="Accuracy after the trigger in %, mean ± standard deviation over seeds; of every defence its worst "
        "attack decides the place. Largest: mean of the attack for which it is largest, in points. Clean: on the "
        "stream that nobody attacks, final accuracy against that without a defence, in points; share of steps refused "
        "and of samples corrected, dropped or weighed less. Reported: accuracy after accumulative poison in Zhu et "
        "al., Table 1 (CIFAR-10, ResNet-18 at full width), where the defence is in it; reproduced: ours of that "
        "table at the scale that was run.",
        names=3,
        bold=3,
    ).filled([("", line) for line in cells])


def _after(s: Ranked, attack: str) -> str:
    return spread(s.attacked[attack].accuracy_after_trigger) if attack in s.attacked else MISSING


def _phase_cost(row: Row) -> Statistic:
    return row.difference("accuracy_start", "accuracy_before_trigger")


def _largest(several: Sequence[Statistic]) -> str:
    means = [statistic.mean for statistic in several if statistic.mean is not None]
    return points(max(means)) if means else MISSING


def _against_none(s: Ranked, members: Sequence[Row]) -> str:
    if s.clean is None:
        return MISSING
    none = undefended(s.clean.row, members)
    if none is None:
        return "0.0" if s.clean.row.defence_name == "none" else MISSING
    return signed(s.clean.row.against(none, "accuracy_after_trigger", sub))


def board_records(members: Sequence[Row]) -> list[Record]:
    """One record a defence and attack, in full precision."""
    return [
        {
            "dataset": c.row.dataset,
            "model": c.row.model,
            "defence": s.defence,
            "attack": attack,
            "worst": attack == s.worst,
            "accuracy_after_trigger": c.accuracy_after_trigger.mean,
            "std": c.accuracy_after_trigger.std,
            "drop": c.drop.mean,
            "phase_cost": _phase_cost(c.row).mean,
            "n": c.accuracy_after_trigger.n,
            "seeds": " ".join(f"{value:.6g}" for value in c.accuracy_after_trigger.values),
        }
        for s in standings(members)
        for attack, c in s.attacked.items()
    ]


def write_leaderboard(runs: Sequence[Run], out: str | Path, reported: Mapping[str, Printed]) -> Path:
    """The page, and its numbers as CSV.

    Args:
        runs: From a store or from records.
        out: A folder; made if missing.
        reported: What a paper prints for a defence and we got for it, by its label.

    Raises:
        StoreError: No run attacks a defence.
        WriteError: The page cannot be written there.
    """
    out = path_of(out)
    by_group = [members for members in groups(rows(runs)).values() if standings(members)]
    if not by_group:
        raise StoreError("no run has an attack on anything; a leaderboard needs some.")
    tables = [board_of(members, reported, number) for number, members in enumerate(by_group, start=1)]
    best = [f"{standings(members)[0].defence} on {members[0].subject}" for members in by_group]
    attacks = len({row.attack for members in by_group for row in members if row.claims_drop})
    lead = Lead(
        title="Which defence holds against every attack",
        headline=f"Best under its worst attack: {listed(best)}.",
        details=[
            f"{counted(len(runs), 'run')}, {counted(attacks, 'attack')}. A place is decided by means; where intervals "
            "overlap, neighbours may change places with other seeds."
        ],
        parts=tables,
    )
    page, numbers = board(lead), to_csv([record for members in by_group for record in board_records(members)])
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / LOCK):
        write_atomically(out / "leaderboard.csv", lambda part: part.write_text(numbers, encoding="utf-8"))
        write_atomically(out / "leaderboard.html", lambda part: part.write_text(page, encoding="utf-8"))
    return out / "leaderboard.html"


def reported_accuracies(runs: Sequence[Run]) -> dict[str, Printed]:
    """What Zhu et al., Table 1, print for their methods on CIFAR-10, and what our runs of that table gave.

    Args:
        runs: Those of our own that reproduce it; may be none.
    """
    from mithridate.reproduce.comparison import compared
    from mithridate.reproduce.item import read_item

    printed = {}
    for c in compared(read_item("zhu2023-table1"), runs):
        names = {label for label, name in PAPERS.items() if name in c.cell.keys.values()}
        if c.cell.value is None or not names or "CIFAR-10" not in c.cell.keys.values():
            continue
        if c.cell.measure == "after" and any("Accu" in value for value in c.cell.keys.values()):
            ours = "" if c.interval is None else f"{decimal(c.interval.mean)} (n = {len(c.seeds)})"
            printed[names.pop()] = Printed(f"{c.cell.value:g}", ours)
    return printed
