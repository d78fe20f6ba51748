"""A threshold that rises with the stream, P = mu + tau m, measured on clean samples."""

from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest
from sklearn.linear_model import QuantileRegressor
from torch import Tensor


class Share(NamedTuple):
    """How many samples lie above a threshold.

    Args:
        rate: Their share.
        interval: 95 % confidence interval of it (Wilson), were the samples independent.
        samples: How many were looked at.
    """

    rate: float
    interval: tuple[float, float]
    samples: int

    @classmethod
    def of(cls, above: Tensor) -> "Share":
        """From one bool a sample, at least one."""
        count = int(above.sum())
        interval = binomtest(count, len(above)).proportion_ci(method="wilson")
        return cls(count / len(above), (float(interval.low), float(interval.high)), len(above))


def quantile_line(m: Tensor, values: Tensor, rate: float) -> tuple[float, float]:
    """Intercept and slope, both >= 0, of the (1 - rate) quantile of values over the update number.

    Args:
        m: Update numbers (samples,).
        values: One a sample (samples,), float64.
        rate: Share of the values that shall lie above the line, in (0, 1).

    Source:
        Quantile regression: Koenker and Bassett, Econometrica 1978. Where it would fall or begin below zero, the plain
        quantile is taken.
    """
    x, d = m.numpy().reshape(-1, 1), values.numpy()
    if len(np.unique(x)) > 1:
        fit = QuantileRegressor(quantile=1 - rate, alpha=0.0, solver="highs").fit(x, d)
        mu, tau = float(fit.intercept_), float(fit.coef_[0])
        if mu >= 0 and tau >= 0:
            return mu, tau
    return max(0.0, float(np.quantile(d, 1 - rate))), 0.0  # a distance of zero may come out below it by rounding
