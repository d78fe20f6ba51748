"""Defences, ranked by what the worst attack on each leaves; and what a clean stream pays for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import sub
from pathlib import Path
from typing import NamedTuple

from mithridate.bench.store import Run
from mithridate.core.errors import StoreError
from mithridate.core.files import locked, path_of, write_whole
from mithridate.report.comparisons import undefended
from mithridate.report.figures import FigureSection
from mithridate.report.figures.worst_cases import worst_cases
from mithridate.report.findings import KeyNumber
from mithridate.report.glossary import explained
from mithridate.report.lead import Lead
from mithridate.report.measures import Measures, measures
from mithridate.report.page import board
from mithridate.report.records import Record, as_files
from mithridate.report.rows import Row, groups, rows
from mithridate.report.statistic import Statistic, signed, spread, times
from mithridate.report.tables.section import TableSection
from mithridate.report.wording import MISSING, counted, decimal, listed, points

PAPERS = {"none": "ST", "clip": "GC", "at": "AT", "dsc": "DSC"}
"""What Zhu et al. call the defences of their Table 1."""

NAME = "leaderboard"
"""Of the page and of the files beside it."""

LOCK = f".{NAME}.lock"
"""Held by the process that writes a leaderboard in a folder."""


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
    ranked = []
    for defence in dict.fromkeys(row.defence for row in members):
        cells = [cell for cell in measured if cell.row.defence == defence]
        attacked = {c.row.attack: c for c in cells if c.row.claims_drop and c.accuracy_after_trigger.n}
        if not attacked:
            continue
        worst = min(attacked, key=lambda attack: attacked[attack].accuracy_after_trigger.mean or 0.0)
        clean = [cell for cell in cells if not cell.row.attacking]
        ranked.append(Ranked(defence, attacked, clean[0] if clean else None, worst))
    return sorted(ranked, key=lambda s: -s.left)


def boards_of(members: Sequence[Row], reported: Mapping[str, Printed], number: int) -> list[TableSection]:
    """The tables of one model and data set: who holds at what cost, and every attack on every defence.

    Args:
        members: Rows of one data set and model.
        reported: What a paper prints for a defence and we got for it, by its label.
        number: Of the model and data set on the page, from 1.
    """
    order = standings(members)
    attacks = list(dict.fromkeys(row.attack for row in members if row.claims_drop))
    printed = {s.defence: reported[s.defence] for s in order if s.defence in reported}
    ranks, each = [], []
    for place, s in enumerate(order, start=1):
        worst, clean = s.attacked[s.worst], s.clean
        ranks.append(
            {
                "defence": s.defence,
                "place": str(place),
                "worst attack": s.worst,
                "left by it (%)": spread(worst.accuracy_after_trigger),
                "largest trigger drop (points)": _largest([c.drop for c in s.attacked.values()]),
                "largest phase cost (points)": _largest([_phase_cost(c.row) for c in s.attacked.values()]),
                "clean stream: against none (points)": _against_none(s, members),
                "clean stream: steps refused (%)": MISSING if clean is None else spread(clean.refused),
                "clean stream: samples touched (%)": MISSING if clean is None else spread(clean.flagged_clean),
                "time / none": MISSING if clean is None else times(clean.time_ratio),
                "n": str(worst.accuracy_after_trigger.n),
            }
        )
        each.append({"defence": s.defence, "place": str(place), **{a: _after(s, a) for a in attacks}})
    subject = members[0].subject
    return [
        TableSection(
            id=f"board-{number}",
            heading=f"Places: {subject}",
            intro="A defence's place is decided by the attack that leaves it the lowest accuracy after the trigger; "
            "mean ± standard deviation over n seeds. Largest: mean of the attack for which it is largest. Clean "
            "stream: nobody attacks; final accuracy against that without a defence; share of steps refused, and of "
            "samples corrected, dropped or weighed less. Time: of an update, a multiple of that without a defence.",
            names=3,
            bold=3,
        ).filled([("", line) for line in ranks]),
        TableSection(
            id=f"attacks-{number}",
            heading=f"Every attack: {subject}",
            intro="Accuracy after the trigger (%), mean ± standard deviation over seeds; a column an attack.",
            names=2,
        ).filled([("", line) for line in each]),
        TableSection(
            id=f"papers-{number}",
            heading="The papers' own defences",
            intro="Accuracy after accumulative poison (%). Reported: in Zhu et al., Table 1, on CIFAR-10 with "
            "ResNet-18 at full width. Reproduced: ours of that table, at the scale that was run.",
            names=1,
        ).filled(
            [
                ("", {"defence": defence, "reported": p.reported, "reproduced": p.reproduced or MISSING})
                for defence, p in printed.items()
            ]
        ),
    ]


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
    """Write the page, and its numbers as CSV and Parquet.

    Args:
        runs: From a store or from records.
        out: A folder; made if missing.
        reported: What a paper prints for a defence and we got for it, by its label.

    Returns:
        The page's file.

    Raises:
        StoreError: No run attacks a defence.
        WriteError: The page cannot be written there.
    """
    out = path_of(out)
    by_group = [(members, order) for members in groups(rows(runs)).values() if (order := standings(members))]
    if not by_group:
        raise StoreError(
            "no run attacks a defence, and a leaderboard needs some; `mithridate leaderboard NAME` tries one."
        )
    tables = [
        table
        for i, (members, _) in enumerate(by_group, start=1)
        for table in boards_of(members, reported, i)
        if not table.empty
    ]
    best = [f"{order[0].defence} on {members[0].subject}" for members, order in by_group]
    drawings = [
        worst_cases(
            {s.defence: {attack: c.accuracy_after_trigger for attack, c in s.attacked.items()} for s in order},
            members[0],
        )
        for members, order in by_group
    ]
    ranked = [row for members, _ in by_group for row in members]
    attacks = len({row.attack for row in ranked if row.claims_drop})
    numbers = as_files(NAME, [record for members, _ in by_group for record in board_records(members)])
    lead = Lead(
        title="Which defence holds against every attack",
        headline=f"Best under its worst attack: {listed(best)}.",
        details=[
            f"{counted(len(runs), 'run')}, {counted(attacks, 'attack')}. A place is decided by means; where intervals "
            "overlap, neighbours may change places with other seeds."
        ],
        parts=[FigureSection("chart", "What each attack leaves", drawings, subheadings=False), *tables],
        numbers=_key_numbers(by_group[0][1]),
        files=list(numbers),
    )
    page = board(lead, explained(ranked))
    with locked(out / LOCK):
        for name, content in {**numbers, f"{NAME}.html": page}.items():
            write_whole(out / name, content)
    return out / f"{NAME}.html"


def _key_numbers(order: Sequence[Ranked]) -> list[KeyNumber]:
    """What the worst attack leaves of the best defence, and of none."""
    none = next((s for s in order if s.attacked[s.worst].row.defence_name == "none"), None)
    shown = [s for s in (order[0], none) if s is not None]
    return [KeyNumber(f"{points(s.left)} %", f"left by the worst attack ({s.worst}) under {s.defence}") for s in shown]


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
