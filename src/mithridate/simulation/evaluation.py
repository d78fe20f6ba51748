"""What accuracy is measured on: the whole test part, or one fixed subset of it at the steps between."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mithridate.core.batch import AnyBatch
from mithridate.core.errors import ConfigError
from mithridate.core.past import Weights
from mithridate.core.seeding import derived_seed
from mithridate.data.part import Part
from mithridate.training.burn_in import EVALUATION_BATCH
from mithridate.training.learner import EvaluationPrecision, Learner


class EvaluationSettings(Protocol):
    """What a run says of its measurements."""

    @property
    def evaluate_size(self) -> int | None:
        """Samples of the test part that are measured at the steps between; None: all."""

    @property
    def evaluate_precision(self) -> EvaluationPrecision:
        """Of the model's forward passes in a measurement."""


class Measurement(NamedTuple):
    """The columns of a trace row that a measurement fills.

    Args:
        accuracy: A fraction; None where nothing was measured.
        loss: Mean loss.
        test_samples: Samples that it was measured on.
    """

    accuracy: float | None
    loss: float | None
    test_samples: int | None


NOT_MEASURED = Measurement(None, None, None)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A run's test samples, ready as batches, and how they are measured.

    Args:
        whole: The test part.
        between: What is measured at the steps between start and trigger: `whole` itself, or batches of a subset.
        precision: Of the model's forward passes.
        classes_unread: Classes of the test part without a sample in `between`.
    """

    whole: Sequence[AnyBatch]
    between: Sequence[AnyBatch]
    precision: EvaluationPrecision
    classes_unread: int

    @classmethod
    def of(cls, test: Part, run: EvaluationSettings, seed: int, device: torch.device) -> "Evaluation":
        """Draw the subset that a run asks for, and make the batches.

        Args:
            test: The test part.
            run: Says how many, and how.
            seed: The run's: it draws the subset, which is the same at every step.
            device: Where the batches go.

        Raises:
            ConfigError: The subset is larger than the test part.
        """
        require_evaluation(test, run)
        whole = list(test.batches(EVALUATION_BATCH, device=device))
        if run.evaluate_size is None or run.evaluate_size == len(test):
            return cls(whole, whole, run.evaluate_precision, 0)
        chosen = test.take("test subset", spread_over_classes(test.y, run.evaluate_size, seed))
        unread = len(np.unique(test.y)) - len(np.unique(chosen.y)) if _of_classes(test.y) else 0
        between = list(chosen.batches(EVALUATION_BATCH, device=device))
        return cls(whole, between, run.evaluate_precision, unread)

    @property
    def size(self) -> int:
        """Samples of the whole test part."""
        return sum(batch.size for batch in self.whole)

    def measure(self, learner: Learner, *, whole: bool, weights: Weights | None = None) -> Measurement:
        """Accuracy and mean loss of the model that a learner serves.

        Args:
            learner: Whose model.
            whole: On the whole test part, in place of what is measured at the steps between.
            weights: Weights to measure in place of those that are served.
        """
        batches = self.whole if whole else self.between
        score = learner.evaluate(batches, weights, precision=self.precision)
        return Measurement(*score, sum(batch.size for batch in batches))


def require_evaluation(test: Part, run: EvaluationSettings) -> None:
    """Refuse a subset that is larger than the test part.

    Args:
        test: The test part.
        run: Says how large the subset is.

    Raises:
        ConfigError: It is; says how large it may be.
    """
    if run.evaluate_size is not None and run.evaluate_size > len(test):
        raise ConfigError(
            f"evaluate_size = {run.evaluate_size}: the test part has {len(test)} samples; take fewer, a larger "
            "[data] test, or leave evaluate_size out, which measures all of them."
        )


def spread_over_classes(y: NDArray[Any], size: int, seed: int) -> NDArray[np.int64]:
    """Draw samples of which each class has its share, to less than one sample.

    Args:
        y: Targets. Where they are no class numbers, samples are drawn whatever their targets.
        size: How many, from 1 to `len(y)`.
        seed: Draws them.

    Shape:
        y (n, ...); returns (size,) positions, ascending.

    Source:
        Systematic sampling: samples in the order of their classes, taken at equal distances from a random place on
        (Cochran, Sampling Techniques, 1977, chapter 8).
    """
    rng = np.random.default_rng(derived_seed("evaluation subset", seed))
    order = rng.permutation(len(y))
    if _of_classes(y):
        order = order[np.argsort(y[order], kind="stable")]
    places = (np.arange(size) * len(y) + int(rng.integers(len(y)))) // size  # whole numbers: no place comes twice
    chosen: NDArray[np.int64] = np.sort(order[places])
    return chosen


def _of_classes(y: NDArray[Any]) -> bool:
    return y.ndim == 1 and np.issubdtype(y.dtype, np.integer)
