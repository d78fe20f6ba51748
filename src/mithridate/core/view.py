"""What a component sees: what it declared, and its own notes."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from torch import Tensor

from mithridate.core.batch import Batch
from mithridate.core.domain import PIXELS, Domain
from mithridate.core.errors import ThreatModelError
from mithridate.core.model import WhiteBox
from mithridate.core.past import Past, PastOf

Memory = dict[str, Tensor]
"""A component's private notes between steps. The loop saves them, so a resumed run remembers."""


class Need(StrEnum):
    """What a component may ask to see. An honest comparison names these beside each result."""

    MODEL = "white-box model"
    VALIDATION = "validation batch"
    TRIGGER = "the clean trigger batch in advance"
    ACCURACY = "the accuracy that the service publishes"
    TRUSTED = "trusted set"
    HISTORY = "history of the model's own past"
    TRAINING = "clean samples that the model was trained on before the stream"
    SURROGATE = "surrogate model of the attacker's own"


@dataclass(frozen=True)
class View:
    """What one component sees at one step: its own notes, and what it declared in `needs`.

    Args:
        step: Updates that the learner has made since the stream began.
        memory: The component's private notes; writing to it is how a component remembers.
        available: What this learner and stream have to show, by need.
        granted: The needs that this component may look at, since it declared them.
        owner: The component's name, for messages.
        domain: What a valid input is; that of images unless the loop says otherwise.

    Raises:
        ThreatModelError: On looking at something that was not declared, or that learner and stream do not have.
    """

    step: int = 0
    memory: Memory = field(default_factory=dict)
    available: Mapping[Need, Any] = field(default_factory=dict)
    granted: frozenset[Need] = frozenset(Need)
    owner: str = "this component"
    domain: Domain = PIXELS

    @contextmanager
    def inside(self, prefix: str, needs: frozenset[Need], owner: str) -> "Iterator[View]":
        """What a part of this component sees: what the part declares, and its own notes.

        Args:
            prefix: Under which the part's notes stand among this component's; they are put back when the block ends.
            needs: What the part declares.
            owner: Its name, for messages.
        """
        notes = {key.removeprefix(prefix): t for key, t in self.memory.items() if key.startswith(prefix)}
        try:
            yield replace(self, memory=notes, granted=needs, owner=owner)
        finally:
            for key in [key for key in self.memory if key.startswith(prefix)]:
                del self.memory[key]
            self.memory.update({prefix + key: t for key, t in notes.items()})

    def _get(self, need: Need) -> Any:  # noqa: ANN401  (typed by the properties below)
        if need not in self.granted:
            raise ThreatModelError(f"{self.owner} looked at the {need}, but does not declare it: add it to `needs`.")
        if need not in self.available:
            raise ThreatModelError(f"{self.owner} needs the {need}, and this learner or stream has none: supply one.")
        return self.available[need]

    @property
    def model(self) -> WhiteBox:
        """The victim's model (`Need.MODEL`)."""
        box: WhiteBox = self._get(Need.MODEL)
        return box

    @property
    def validation(self) -> Batch:
        """The attacker's own validation samples, S_val (`Need.VALIDATION`)."""
        batch: Batch = self._get(Need.VALIDATION)
        return batch

    @property
    def clean_trigger(self) -> Batch:
        """The batch S_T that will be the trigger, before poisoning (`Need.TRIGGER`)."""
        batch: Batch = self._get(Need.TRIGGER)
        return batch

    @property
    def accuracy(self) -> tuple[float, float]:
        """Published accuracy at the start and now, fractions (`Need.ACCURACY`)."""
        pair: tuple[float, float] = self._get(Need.ACCURACY)
        return pair

    @property
    def history(self) -> "Past":
        """The model's own past (`Need.HISTORY`); at the first step, an old model must not be the current one."""
        past = self.history_and_now
        box: WhiteBox | None = self.available.get(Need.MODEL)
        # Later, looking would cost and find nothing: a model that has learned is no longer what it was.
        return past if self.step or box is None else PastOf(past, box.module)

    @property
    def history_and_now(self) -> "Past":
        """The same, unchecked: for those who compare the old model with one that has gone a step further."""
        past: Past = self._get(Need.HISTORY)
        return past

    @property
    def trusted(self) -> Batch:
        """Samples that the defender knows to be clean (`Need.TRUSTED`)."""
        batch: Batch = self._get(Need.TRUSTED)
        return batch

    @property
    def training(self) -> Iterable[Batch]:
        """Batches that the model was trained on before the stream; may be iterated again (`Need.TRAINING`)."""
        batches: Iterable[Batch] = self._get(Need.TRAINING)
        return batches

    @property
    def surrogate(self) -> WhiteBox:
        """Another model than the victim's, which an attacker without access to the victim holds (`Need.SURROGATE`)."""
        box: WhiteBox = self._get(Need.SURROGATE)
        return box
