"""What a guard did in a federation: an event a deed, in memory and in a file; and to whom, how often and why."""

import logging
import re
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mithridate.core.errors import ConfigError
from mithridate.guard.json_lines import LARGEST_FILE, JsonLines

log = logging.getLogger("flwr.mithridate")
"""A child of Flower's own logger, so that what was refused stands beside what Flower reports."""

KINDS = ("vetoed", "skipped", "refused", "missing", "bounded", "capped")
"""What a guard does, the gravest first."""


KEPT_EVENTS = 10_000
"""Events in memory; the tallies count the older ones, too."""

KEPT_TALLIES = 10_000
"""Pairs of client and reason that are counted apart."""

KEPT_ROUNDS = 1_000
"""Rounds that a tally names."""


@dataclass(frozen=True)
class Event:
    """One deed of the guard.

    Args:
        round: Server round, from 1.
        phase: `train` or `evaluate`.
        event: `refused`, `missing` (no reply at all), `bounded` (the defence, or a limit, changed the update),
            `capped`, `vetoed`, `skipped` (no aggregate was made, so the old model stays), or `closed`, the summary of
            the phase.
        node: Flower's id of the client; None where the event is about the whole round.
        reason: Why.
        counts: How many of each, in a summary.
        measures: How good the aggregate is on trusted samples, where there are some.
    """

    round: int
    phase: str
    event: str
    node: int | None = None
    reason: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Tally:
    """How often the guard did one deed to one client for one reason.

    Args:
        node: Flower's id of the client; None: whole rounds.
        event: As in `Event`.
        phase: `train` or `evaluate`.
        times: How often; more than rounds if a client was refused several times in one.
        rounds: When, in order; the last thousand if there were more.
        reason: Why; where the reasons differ in their figures alone, that of the first time.
    """

    node: int | None
    event: str
    phase: str
    times: int
    rounds: tuple[int, ...]
    reason: str


@dataclass
class _Count:
    """How often there was an event like the first one, and in which rounds, the last ones if they are many."""

    first: Event
    times: int = 0
    rounds: deque[int] = field(default_factory=lambda: deque(maxlen=KEPT_ROUNDS))


class Journal:
    """Keeps the events, as many as there is room for: a federation may run for years.

    Args:
        path: A JSON-lines file that gains one line an event; None keeps them in memory alone. Once it is as large as
            `LARGEST_FILE` it becomes PATH.1, in place of an older one, and a new file begins.
        opening: What the first line of each file says.
        warning: What the first line and the table say besides.

    Raises:
        ConfigError: The file cannot be written. Later on that is said once, and the federation goes on.
    """

    def __init__(self, path: Path | None, opening: Mapping[str, Any], warning: str = "") -> None:
        self.path = path
        self.warning = warning
        self.events: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self.closed = 0
        self._tallies: dict[tuple[int, int, str, str], _Count] = {}
        self._times = Counter[str]()
        self._lines: JsonLines | None = None
        if path is not None:
            first = {"event": "opened", **opening, **({"warning": warning} if warning else {})}
            try:
                self._lines = JsonLines(path, first, log=log, largest=LARGEST_FILE, what="federation")
            except OSError as error:
                raise ConfigError(
                    f"{path} cannot be written ({error.strerror}); choose another report_path."
                ) from error

    def note(self, event: Event) -> None:
        """Take in one more."""
        self.events.append(event)
        self.closed += event.event == "closed" and event.phase == "train"
        if event.event in KINDS:
            self._count(event)
        if event.event in {"refused", "vetoed", "skipped"}:
            who = "the round" if event.node is None else f"node {event.node}"
            log.warning("guard: %s %s: %s", event.event, who, event.reason)
        if self._lines is not None:
            self._lines.write({key: value for key, value in asdict(event).items() if value not in (None, "", {})})

    def tallies(self) -> list[Tally]:
        """What was done so far: to whom, in which rounds and why; the gravest first."""
        return [
            Tally(
                count.first.node,
                count.first.event,
                count.first.phase,
                count.times,
                tuple(count.rounds),
                count.first.reason,
            )
            for _, count in sorted(self._tallies.items(), key=lambda item: item[0][:2])
        ]

    def table(self, most: int) -> Table:
        """The tallies as a table to print with rich.

        Args:
            most: How many rows it has at most; what is left out is counted under it.
        """
        counts = ", ".join(f"{self._times[kind]} {kind}" for kind in KINDS if self._times[kind])
        tallies = self.tallies()
        rest = len(tallies) - most
        table = Table(
            title=f"The guard in {self.closed} rounds: {counts or 'nothing to object to'}",
            caption="; ".join(filter(None, [f"and {rest} more rows" if rest > 0 else "", self.warning])) or None,
            min_width=60,
        )
        for column in ("node", "what", "times", "rounds", "why"):
            table.add_column(column, justify="right" if column == "times" else "left", overflow="fold")
        for tally in tallies[:most]:
            what = tally.event if tally.phase == "train" else f"{tally.event} ({tally.phase})"
            who = "all" if tally.node is None else str(tally.node)
            row = (who, what, str(tally.times), _spans(tally.rounds), tally.reason)
            table.add_row(*(Text(cell) for cell in row))  # as text: a client's words are no markup
        return table

    def _count(self, event: Event) -> None:
        self._times[event.event] += 1
        kind = re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", event.reason)
        key = (KINDS.index(event.event), event.node or 0, event.phase, kind)
        if key not in self._tallies and len(self._tallies) >= KEPT_TALLIES:  # clients write most of the reasons
            key, event = (
                (key[0], 0, event.phase, ""),
                replace(event, node=None, reason="clients or reasons beyond count"),
            )
        count = self._tallies.setdefault(key, _Count(event))
        count.times += 1
        if not count.rounds or count.rounds[-1] != event.round:
            count.rounds.append(event.round)


def _spans(rounds: Sequence[int]) -> str:
    """Rounds in short: 1-3, 5."""
    spans: list[list[int]] = []
    for number in rounds:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
