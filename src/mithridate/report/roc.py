"""How well a threshold on scores parts two kinds of samples: ROC curves."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]


class Curve(NamedTuple):
    """What a threshold on the score can do, from flagging nothing to flagging everything (a ROC curve).

    Args:
        false: Share of clean samples flagged, ascending.
        true: Share of suspects flagged.
        n_clean: How many clean samples there are.
    """

    false: Scores
    true: Scores
    n_clean: int

    @property
    def auroc(self) -> float:
        """Chance that a suspect scores below a clean sample, ties counted half: 1 is perfect, 0.5 a coin."""
        from sklearn.metrics import auc

        return float(auc(self.false, self.true))

    def detected(self, rate: float) -> float | None:
        """Share of suspects flagged by the best threshold that flags at most `rate` of the clean samples.

        Args:
            rate: False-positive rate, in (0, 1).

        Returns:
            None if one clean sample is already more than `rate` of them: so few cannot resolve it.
        """
        if 1 / self.n_clean > rate:
            return None
        return float(self.true[self.false <= rate + 1e-12].max())


def curve(clean: Scores, suspects: Scores) -> Curve | None:
    """How well thresholds part two kinds of samples; None if either is missing.

    Args:
        clean: Scores of the negatives; infinite ones keep their place in the order.
        suspects: Scores of the positives, expected to be lower.
    """
    if not (len(clean) and len(suspects)):
        return None
    from sklearn.metrics import roc_curve

    _, ranks = np.unique(np.concatenate([clean, suspects]), return_inverse=True)
    labels = np.repeat([0, 1], [len(clean), len(suspects)])
    false, true, _ = roc_curve(labels, -ranks.astype(np.int64), drop_intermediate=False)
    return Curve(false, true, len(clean))
