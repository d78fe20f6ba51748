"""Set the threshold of DSC from clean data, so that a stated share of clean samples is corrected."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.linear_model import QuantileRegressor

from mithridate.core import Batch
from mithridate.defences.dsc import DSC
from mithridate.discrepancy import memorization_discrepancy
from mithridate.errors import ConfigError, DataError
from mithridate.learning.learner import Learner


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Args:
        defence: The settings with `mu` and `tau` set.
        rate: Share of the clean samples seen that lie above the threshold.
        interval: 95 % confidence interval of that share (Wilson), were the samples independent.
        samples: How many clean samples were seen.
    """

    defence: DSC
    rate: float
    interval: tuple[float, float]
    samples: int


def calibrate(
    learner: Learner, batches: Sequence[Batch], rate: float = 0.05, *, defence: DSC | None = None
) -> Calibration:
    """Fit P = mu + tau * m to clean batches, such that a share `rate` of clean samples lies above it.

    A copy of the learner learns from the batches in order, without defence, as a clean stream would go on; the line is
    the (1 - rate) quantile of the discrepancy over the batch number. The learner itself is not changed.

    Args:
        learner: After its burn-in, with a history that holds the old model.
        batches: Clean batches that the model has not learned from, at least two, in the order of a stream.
        rate: Share of clean samples to be corrected, in (0, 1).
        defence: Which old model and divergence; its `mu` and `tau` are replaced.

    Raises:
        ConfigError: `rate` is out of range, or there is no old model to compare with.
        DataError: Fewer than two batches, or too few samples to have one above the threshold.

    Source:
        Zhu et al., ICML 2023, section 4.1 "Threshold adjustment" and C.9 set P by hand from clean values, which
        the paper names as a limitation; the quantile line (Koenker and Bassett, Econometrica 1978) is ours.
    """
    defence = defence or DSC()
    if not 0 < rate < 1:
        raise ConfigError(f"calibrate: rate = {rate}; give a share of clean samples between 0 and 1, such as 0.05.")
    total = sum(len(b.x) for b in batches)
    if len(batches) < 2 or rate * total < 1:
        raise DataError(
            f"calibrate: {len(batches)} batches of {total} samples in all; a rate of {rate:g} needs at least two "
            f"batches and {int(np.ceil(1 / rate))} samples."
        )
    twin = copy.deepcopy(learner)
    twin.defence = replace(defence, mu=float("inf"))
    steps, scores = [], []
    for batch in batches:
        if twin.history is not None:
            twin.history.record(twin.step, twin.model)
        old = defence.old_model(twin.view())
        if old is not None:
            found = memorization_discrepancy(twin.model, old, batch.to(twin.device).x, kind=defence.divergence)
            scores.append(found.double().cpu().numpy())
            steps.append(np.full(len(found), twin.step))
        twin.update(batch)
    if not scores:
        raise ConfigError(
            "calibrate: the history holds no old model yet; give more batches than `back`, or look at a checkpoint."
        )
    m, d = np.concatenate(steps), np.concatenate(scores)
    mu, tau = _line(m, d, rate)
    above = int((d > mu + tau * m).sum())
    interval = binomtest(above, len(d)).proportion_ci(method="wilson")
    set_to = replace(defence, mu=mu, tau=tau)
    return Calibration(set_to, above / len(d), (float(interval.low), float(interval.high)), len(d))


def _line(m: NDArray[Any], d: NDArray[Any], rate: float) -> tuple[float, float]:
    """Intercept and slope, both >= 0, of the (1 - rate) quantile of `d` over `m`."""
    if len(np.unique(m)) > 1:
        fit = QuantileRegressor(quantile=1 - rate, alpha=0.0, solver="highs").fit(m.reshape(-1, 1), d)
        mu, tau = float(fit.intercept_), float(fit.coef_[0])
        if mu >= 0 and tau >= 0:
            return mu, tau
    return float(np.quantile(d, 1 - rate)), 0.0


def corrected_share(learner: Learner) -> float | None:
    """Share of all samples that DSC has corrected in this learner so far; None if it has seen none."""
    noted = learner.memory.get("corrected")
    if noted is None or int(noted[1]) == 0:
        return None
    return int(noted[0]) / int(noted[1])
