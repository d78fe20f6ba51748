"""Set the threshold of DSC from clean data, so that a stated share of clean samples is corrected."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.linear_model import QuantileRegressor

from mithridate.core.batch import Batch
from mithridate.core.defence import Defence
from mithridate.core.discrepancy import memorization_discrepancy
from mithridate.core.errors import ConfigError, DataError
from mithridate.defences.chain import Chain, chain
from mithridate.defences.dsc import DSC
from mithridate.training.history import History
from mithridate.training.learner import Learner


@dataclass(frozen=True)
class Share:
    """How many samples lie above a threshold.

    Args:
        rate: Their share.
        interval: 95 % confidence interval of it (Wilson), were the samples independent.
        samples: How many were looked at.
    """

    rate: float
    interval: tuple[float, float]
    samples: int


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Args:
        defence: The settings with `mu` and `tau` set, ready to be used.
        share: Of the clean samples that it was fitted to, those above the threshold.
    """

    defence: DSC
    share: Share

    def summary(self) -> dict[str, Any]:
        """Plain numbers for the store."""
        return {
            "mu": self.defence.mu,
            "tau": self.defence.tau,
            "rate": self.share.rate,
            "interval": list(self.share.interval),
            "samples": self.share.samples,
        }


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
    m, d = _discrepancies(learner, batches, defence)
    mu, tau = _line(m, d, rate)
    return Calibration(replace(defence, mu=mu, tau=tau, target_rate=None), _share(d > mu + tau * m))


def share_above(learner: Learner, batches: Sequence[Batch], defence: DSC) -> Share:
    """Which share of clean samples DSC would correct, as an undefended copy of the learner goes through them.

    Args:
        learner: As for `calibrate`; not changed.
        batches: Clean batches in the order of a stream; others than those of the calibration, for an honest check.
        defence: With its threshold set.

    Raises:
        ConfigError: There is no old model to compare with.
    """
    m, d = _discrepancies(learner, batches, defence)
    return _share(d > defence.mu + defence.tau * m)


def calibrated(learner: Learner, batch_size: int) -> list[Calibration]:
    """Measure the threshold of every DSC of a learner's defence that names a `target_rate`, on its trusted set.

    Args:
        learner: Its defence is replaced by the one with thresholds; unchanged if there is nothing to measure.
        batch_size: Samples of the trusted set a batch, as in the stream.

    Returns:
        One for each such DSC, in order.

    Raises:
        ConfigError: There is no old model to compare with.
        DataError: There is no trusted set, or it is too small.
    """
    defence, found = _filled_in(learner.defence, learner, batch_size)
    if found:
        learner.defence = defence
    return found


def _filled_in(defence: Defence, learner: Learner, batch_size: int) -> tuple[Defence, list[Calibration]]:
    if isinstance(defence, Chain):
        filled = [_filled_in(part, learner, batch_size) for part in defence.built]
        found = [calibration for _, several in filled for calibration in several]
        return (chain(*(part for part, _ in filled)) if found else defence), found
    if not isinstance(defence, DSC) or defence.target_rate is None:
        return defence, []
    if learner.trusted is None:
        raise DataError(
            "dsc: target_rate is measured on the trusted set, and there is none; give one, or set mu and tau."
        )
    x, y = learner.trusted
    pieces = zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True)
    batches = [Batch(*piece) for piece in pieces if len(piece[0]) > 1]  # BatchNorm has no variance of one value
    one = calibrate(learner, batches, defence.target_rate, defence=defence)
    return one.defence, [one]


def _discrepancies(
    learner: Learner, batches: Sequence[Batch], defence: DSC
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Batch number and discrepancy of each sample, as an undefended copy of the learner goes through clean batches."""
    model, optimiser = copy.deepcopy((learner.model, learner.optimiser))
    blind = replace(defence, mu=float("inf"), target_rate=None)
    twin = Learner(model, optimiser, criterion=learner.criterion, defence=blind, update_mode=learner.update_mode)
    twin.step = learner.step
    if learner.history is not None:
        twin.history = History(keep=defence.lookback + 1, checkpoints=learner.history.checkpoints)
        twin.history.load(learner.history.tensors())
    steps, scores = [], []
    for batch in batches:
        if twin.history is not None:
            twin.history.record(twin.step, twin.model)
        old = blind.old_model(twin.view())
        if old is not None:
            found = memorization_discrepancy(twin.model, old, batch.to(twin.device).x, kind=defence.divergence)
            scores.append(found.double().cpu().numpy())
            steps.append(np.full(len(found), twin.step))
        twin.update(batch)
    if not scores:
        raise ConfigError(
            "calibrate: the history holds no old model yet; give more batches than `back`, or look at a checkpoint."
        )
    return np.concatenate(steps), np.concatenate(scores)


def _share(above: NDArray[np.bool_]) -> Share:
    count = int(above.sum())
    interval = binomtest(count, len(above)).proportion_ci(method="wilson")
    return Share(count / len(above), (float(interval.low), float(interval.high)), len(above))


def _line(m: NDArray[Any], d: NDArray[Any], rate: float) -> tuple[float, float]:
    """Intercept and slope, both >= 0, of the (1 - rate) quantile of `d` over `m`."""
    if len(np.unique(m)) > 1:
        fit = QuantileRegressor(quantile=1 - rate, alpha=0.0, solver="highs").fit(m.reshape(-1, 1), d)
        mu, tau = float(fit.intercept_), float(fit.coef_[0])
        if mu >= 0 and tau >= 0:
            return mu, tau
    return float(np.quantile(d, 1 - rate)), 0.0
