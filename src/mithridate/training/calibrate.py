"""Measure a defence's thresholds on clean data, so that a stated share of clean samples is treated as poison."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mithridate.core.batch import AnyBatch
from mithridate.core.defence import Calibration, Rehearsal
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.view import Need, View
from mithridate.defences.dsc import DSC
from mithridate.defences.threshold import Share
from mithridate.training.learner import Learner


def rehearsal(learner: Learner, batches: Sequence[AnyBatch]) -> Rehearsal:
    """A function that lets an undefended twin of a learner go through clean batches, as through a clean stream.

    Args:
        learner: After its burn-in, with a history that holds the old model; not changed.
        batches: Clean batches that the model has not learned from, in the order of a stream.

    Returns:
        A function as `core.defence.Rehearsal` says; it raises ConfigError if no batch could be scored.
    """

    def rehearse(score: Callable[[AnyBatch, View], Tensor | None]) -> tuple[Tensor, Tensor]:
        model, optimiser = copy.deepcopy((learner.model, learner.optimiser))
        twin = Learner(
            model, optimiser, criterion=learner.criterion, seed=learner.seed, update_mode=learner.update_mode
        )
        twin.step = learner.step
        if learner.history is not None:
            twin.history = learner.history.empty()
            twin.history.load(learner.history.tensors())
        steps, scores = [], []
        for batch in batches:
            if twin.history is not None:
                twin.history.record(twin.step, twin.model)
            view = replace(twin.view(), granted=frozenset(Need), owner="calibrate")
            sample_scores = score(batch.to(twin.device), view)
            if sample_scores is not None:
                scores.append(sample_scores.double().cpu())
                steps.append(torch.full((len(sample_scores),), twin.step))
            twin.update(batch)
        if not scores:
            raise ConfigError(
                "calibrate: the history holds no old model yet; give more batches than `back`, or look at a checkpoint."
            )
        return torch.cat(steps), torch.cat(scores)

    return rehearse


def calibrate(
    learner: Learner, batches: Sequence[AnyBatch], rate: float = 0.05, *, defence: DSC | None = None
) -> tuple[DSC, Calibration]:
    """Fit P = mu + tau * m to clean batches, such that a share `rate` of clean samples lies above it.

    Args:
        learner: After its burn-in, with a history that holds the old model; not changed.
        batches: Clean batches that the model has not learned from, at least two, in the order of a stream.
        rate: Share of clean samples to be corrected, in (0, 1).
        defence: Which old model and divergence; its `mu` and `tau` are replaced.

    Returns:
        The defence with `mu` and `tau` set, ready to be used, and what was measured.

    Raises:
        ConfigError: `rate` is out of range, or there is no old model to compare with.
        DataError: Fewer than two batches, or too few samples to have one above the threshold.
    """
    if not 0 < rate < 1:
        raise ConfigError(f"calibrate: rate = {rate}; give a share of clean samples between 0 and 1, such as 0.05.")
    return (defence or DSC()).measured(rehearsal(learner, batches), rate)


def share_above(learner: Learner, batches: Sequence[AnyBatch], defence: DSC) -> Share:
    """Which share of clean samples DSC would correct, as an undefended twin of the learner goes through them.

    Args:
        learner: After its burn-in, with a history that holds the old model; not changed.
        batches: Clean batches in the order of a stream; others than those of the calibration, for an honest check.
        defence: With its threshold set.

    Raises:
        ConfigError: There is no old model to compare with.
    """
    return defence.above(rehearsal(learner, batches))


def calibrated(learner: Learner, batch_size: int) -> Sequence[Calibration]:
    """Measure every threshold that a learner's defence wants measured, on its trusted set.

    Args:
        learner: Its defence is replaced by the one with thresholds; unchanged if there is nothing to measure.
        batch_size: Samples of the trusted set a batch, as in the stream.

    Returns:
        A calibration for each threshold, in the order in which they were measured.

    Raises:
        ConfigError: There is no old model to compare with.
        DataError: There is no trusted set, or it is too small.
    """

    def rehearse(score: Callable[[AnyBatch, View], Tensor | None]) -> tuple[Tensor, Tensor]:
        if learner.trusted is None:
            raise DataError(
                "a target_rate is measured on the trusted set, and there is none; give one, or set the threshold "
                "yourself."
            )
        pieces = [b for b in learner.trusted.split(batch_size) if b.size > 1]  # BatchNorm has no variance of one value
        return rehearsal(learner, pieces)(score)

    defence, calibrations = learner.defence.calibrated(rehearse)
    if calibrations:
        learner.defence = defence
    return calibrations
