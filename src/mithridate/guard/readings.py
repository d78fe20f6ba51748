"""The numbers that trackers show of a guard's steps. Imports no torch."""

from collections import Counter
from collections.abc import Mapping

from mithridate.guard.record import WORDS, StepRecord


class Readings:
    """Makes named numbers of each record, the same for every tracker that draws curves."""

    def __init__(self) -> None:
        self._verdicts: Counter[str] = Counter(dict.fromkeys(WORDS, 0))

    def of(self, record: StepRecord) -> Mapping[str, float]:
        """What there is to be drawn at `record.attempt`; what the defence does not measure is left out.

        Args:
            record: Of a step, or of several that were judged at once.

        Returns:
            By name: `guard/admitted`, `guard/shortened`, `guard/refused` (how many steps so far), `guard/seconds`,
            `guard/refusals_in_a_row`, `guard/quarantined` and `guard/flagged` (samples of this record),
            `guard/trusted_loss`, `guard/trusted_worst`.
        """
        self._verdicts[record.verdict] += record.steps
        measured = {"trusted_loss": record.trusted_loss, "trusted_worst": record.trusted_worst}
        counted = {
            **self._verdicts,
            "seconds": record.seconds,
            "refusals_in_a_row": record.refusals_in_a_row,
            "quarantined": record.quarantined,
            "flagged": record.flagged,
        }
        return {f"guard/{name}": float(value) for name, value in {**counted, **measured}.items() if value is not None}
