"""One phase of one round, training or evaluation: what a guard does in it, counted by kind, and kept in its journal."""

from collections import Counter
from collections.abc import Mapping

from mithridate.guard.events import KINDS, Event, Journal


class Phase:
    """What a guard does in one phase of one round.

    Args:
        journal: Keeps every event.
        server_round: Which round, from 1.
        name: `train` or `evaluate`.
    """

    def __init__(self, journal: Journal, server_round: int, name: str) -> None:
        self.journal = journal
        self.server_round = server_round
        self.name = name
        self.counts = Counter[str]()

    def note(
        self, event: str, node: int | None = None, reason: str = "", measures: Mapping[str, float] | None = None
    ) -> None:
        """Take in one deed.

        Args:
            event: One of `events.KINDS`.
            node: Flower's id of the client; None: it is about the whole round.
            reason: Why.
            measures: How good the aggregate is on trusted samples, by name, where that was measured.
        """
        self.counts[event] += 1
        self.journal.note(Event(self.server_round, self.name, event, node, reason, measures=measures or {}))

    def close(self, accepted: int, measures: Mapping[str, float]) -> dict[str, float]:
        """End the phase with a summary.

        Args:
            accepted: How many replies were fit.
            measures: How good the aggregate is on trusted samples, by name, where that was measured.

        Returns:
            The numbers accepted and of each kind of event, and the measures, by name.
        """
        counts = {"accepted": accepted, **{kind: self.counts[kind] for kind in KINDS}}
        self.journal.note(Event(self.server_round, self.name, "closed", counts=counts, measures=measures))
        return {**counts, **measures}
