"""What watches: detectors score samples, monitors read what a service publishes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

from torch import Generator, Tensor

from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.component import Component, check_classes
from mithridate.core.view import Memory, Need, View


class Observed(NamedTuple):
    """What a model makes of samples, for detectors.

    Args:
        features: Pooled features (n, features): what goes into the last linear layer.
        logits: (n, classes).
        y: Labels as received (n,).
    """

    features: Tensor
    logits: Tensor
    y: Tensor

    @property
    def predicted(self) -> Tensor:
        """The most likely class of each sample (n,)."""
        return self.logits.argmax(1)

    def right(self) -> "Observed":
        """Only the samples that the model classifies as labelled."""
        keep = self.predicted == self.y
        return Observed(self.features[keep], self.logits[keep], self.y[keep])


class Detector(Component, ABC):
    """Scores samples: the lower, the more suspicious.

    A detector that compares with clean samples remembers them in tensors, so that they can be saved; it is fitted once,
    before the stream, and does not follow the model.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL})
    """What `score` sees besides the batch."""

    fits: ClassVar[bool] = True
    """Whether it must be fitted on clean samples."""

    def check_inputs(self, batch: AnyBatch) -> None:
        """Refuse targets that are no class numbers; override it where they do not matter.

        Raises:
            ConfigError: They are not one int64 a sample.
        """
        check_classes(batch, who=type(self).__name__)

    def fit(self, clean: Observed, *, rng: Generator) -> Memory:
        """What the detector remembers of clean samples.

        Args:
            clean: What the model makes of them; the detector itself uses only those that are classified as labelled.
            rng: Draws which samples are remembered, where not all are.

        Raises:
            DataError: Too few samples, or features that cannot be fitted; says what is needed.
        """
        return {}

    @abstractmethod
    def score(self, batch: Batch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        """One number a sample, whatever other samples are in the batch.

        Args:
            batch: The samples as received.
            view: What the detector declared.
            fitted: From `fit`.

        Returns:
            (n,); lower is more suspicious.
        """

    def moved(self, clean: Batch, received: Batch, view: View) -> Mapping[str, Tensor]:
        """How far poisoning moved samples in what the detector looks at; for measurement only.

        A deployed system never sees samples as they were before they were poisoned, so nothing may act on this.

        Args:
            clean: The samples before anyone poisoned them.
            received: The same samples as received.
            view: What the detector declared.

        Returns:
            Distances (n,) by name; none by default.
        """
        return {}


class Reading(NamedTuple):
    """What a service can watch after a step.

    Args:
        step: Updates since the stream began; 0 is the state before it, which is always measured.
        accuracy: On the service's test samples, a fraction; None where it was not measured after this step.
        loss: Mean loss on them; None as `accuracy`.
        batch_loss: Mean loss of the batch that was learned from; None if nothing was.
    """

    step: int
    accuracy: float | None
    loss: float | None
    batch_loss: float | None


class Monitor(ABC):
    """Watches a service's readings and raises an alarm."""

    @abstractmethod
    def alarm(self, readings: Sequence[Reading]) -> str | None:
        """The alarm's text, or None.

        Args:
            readings: All readings so far, the state before the stream first, the newest last.
        """
