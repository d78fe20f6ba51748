"""The account that a guard keeps of a loop: what became of each step, for everybody who listens."""

import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from mithridate.core.batch import AnyBatch
from mithridate.core.defence import Verdict
from mithridate.guard.ranks import rank
from mithridate.guard.record import StepRecord, Tracker, Word
from mithridate.guard.trackers import Trackers


class Store(Protocol):
    """Where refused batches go."""

    def put(self, batch: AnyBatch, *, record: StepRecord) -> str:
        """Keep a batch; its id, empty if there was no room."""


class Ledger:
    """Counts refusals, keeps refused batches, and tells trackers of every judgement.

    Args:
        patience: Refusals in a row, >= 1, at which the owner is to be asked, and again whenever they have doubled.
        store: Where refused batches go; None: nowhere.
        trackers: Who listens.
    """

    def __init__(self, patience: int, store: Store | None, trackers: Sequence[Tracker]) -> None:
        self.patience, self.store, self.trackers = patience, store, Trackers(trackers)
        self.refused = 0
        self.in_a_row = 0
        # A loop that ends without `detach` still has what was told written.
        self._closing = weakref.finalize(self, self.trackers.close)

    @property
    def impatient(self) -> bool:
        """Whether it is time to ask the owner."""
        times = self.in_a_row / self.patience
        return times >= 1 and math.log2(times).is_integer()

    def note(self, verdict: Verdict, batches: Sequence[AnyBatch], **facts: Any) -> StepRecord:  # noqa: ANN401  (its fields)
        """Take in what became of a step, or of several that were judged at once.

        Args:
            verdict: Of all of them.
            batches: What they were made on.
            facts: The fields of the record that the guard knows.
        """
        self.in_a_row = 0 if verdict.admit else self.in_a_row + 1
        self.refused += not verdict.admit
        word: Word = "refused"
        if verdict.admit:
            word = "admitted" if verdict.parameters is None else "shortened"
        record = StepRecord(
            verdict=word,
            reason=verdict.reason,
            refusals_in_a_row=self.in_a_row,
            trusted_loss=verdict.measures.get("trusted_loss"),
            trusted_worst=verdict.measures.get("trusted_worst"),
            rank=rank(),
            **facts,
        )
        if not verdict.admit and self.store is not None:
            for batch in batches:
                record = replace(record, batch=self.store.put(batch, record=record) or record.batch)
        self.trackers.note(record)
        return record

    def close(self) -> None:
        """No step will follow."""
        self._closing()
