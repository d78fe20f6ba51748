"""What a guard did in a federation: an event a deed, in memory and in a file; and to whom, how often and why."""

import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

log = logging.getLogger("flwr.mithridate")
"""A child of Flower's own logger, so that what was refused stands beside what Flower reports."""

KINDS = ("vetoed", "skipped", "refused", "missing", "bounded", "capped")
"""What a guard does, the gravest first."""


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
        rounds: When, in order.
        reason: Why; where the reasons differ in their figures alone, that of the first time.
    """

    node: int | None
    event: str
    phase: str
    times: int
    rounds: tuple[int, ...]
    reason: str


class Journal:
    """Keeps the events.

    Args:
        path: A JSON-lines file that gains one line an event; None keeps them in memory alone.
        opening: What the first line says.
    """

    def __init__(self, path: Path | None, opening: Mapping[str, Any]) -> None:
        self.path = path
        self.events: list[Event] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"event": "opened", **opening})

    def note(self, event: Event) -> None:
        """Take in one more."""
        self.events.append(event)
        if event.event in {"refused", "vetoed", "skipped"}:
            who = "the round" if event.node is None else f"node {event.node}"
            log.warning("guard: %s %s: %s", event.event, who, event.reason)
        self._write({key: value for key, value in asdict(event).items() if value not in (None, "", {})})

    def tallies(self) -> list[Tally]:
        """What was done so far: to whom, in which rounds and why; the gravest first."""
        alike: dict[tuple[Any, ...], list[Event]] = {}
        for event in self.events:
            if event.event in KINDS:
                kind = re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", event.reason)
                alike.setdefault((KINDS.index(event.event), event.node or 0, event.phase, kind), []).append(event)
        return [
            Tally(e[0].node, e[0].event, e[0].phase, len(e), tuple(dict.fromkeys(x.round for x in e)), e[0].reason)
            for _, e in sorted(alike.items(), key=lambda item: item[0][:2])
        ]

    def table(self, most: int) -> Table:
        """The tallies as a table to print with rich.

        Args:
            most: How many rows it has at most; what is left out is counted under it.
        """
        closed = sum(event.event == "closed" and event.phase == "train" for event in self.events)
        times = Counter(event.event for event in self.events)
        counts = ", ".join(f"{times[kind]} {kind}" for kind in KINDS if times[kind])
        tallies = self.tallies()
        rest = len(tallies) - most
        table = Table(
            title=f"The guard in {closed} rounds: {counts or 'nothing to object to'}",
            caption=f"and {rest} more rows" if rest > 0 else None,
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

    def _write(self, entry: Mapping[str, Any]) -> None:
        """Append one line in one write, so that a killed server leaves whole lines."""
        if self.path is None:
            return
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, (json.dumps(_for_json(entry)) + "\n").encode())
        finally:
            os.close(handle)


def _spans(rounds: Sequence[int]) -> str:
    """Rounds in short: 1-3, 5."""
    spans: list[list[int]] = []
    for number in rounds:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _for_json(value: Any) -> Any:  # noqa: ANN401  (JSON has no better type)
    """JSON knows no infinity and no NaN: they become text."""
    if isinstance(value, Mapping):
        return {key: _for_json(v) for key, v in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
