"""What targets mean to a model and its criterion: classes, labels, probabilities or numbers; and their mean loss."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mithridate.core.errors import ConfigError, DataError

Criterion = Callable[[Tensor, Tensor], Tensor]
"""(logits, targets) -> mean loss, a scalar."""

IGNORED = -100
"""The label that torch's cross-entropy leaves out (`ignore_index`)."""


def loss_of(criterion: Criterion, logits: Tensor, y: Tensor, *, where: str) -> Tensor:
    """The mean loss, a scalar.

    Args:
        criterion: (logits, targets) -> mean loss.
        logits: What a model said.
        y: Targets.
        where: Names the samples in messages.

    Raises:
        DataError: The targets do not fit the model, or the criterion.
        ConfigError: The criterion gives no scalar.
    """
    check_labels(logits, y, where=where)
    check_probabilities(criterion, y, where=where)
    return mean_loss(criterion, logits, y, where=where)


def mean_loss(criterion: Criterion, logits: Tensor, y: Tensor, *, where: str) -> Tensor:
    """The mean loss, a scalar, of targets that have been looked at before (`check_labels`, `check_probabilities`).

    Args:
        criterion: (logits, targets) -> mean loss.
        logits: What a model said.
        y: Targets.
        where: Names the samples in messages.

    Raises:
        DataError: The criterion cannot compare the two.
        ConfigError: The criterion gives no scalar.
    """
    try:
        # Of outputs (n, 1) and targets (n,) torch makes n * n pairs, and only warns.
        spread = y.is_floating_point() and logits.shape != y.shape
        with _as_error("Using a target size") if spread else nullcontext():
            loss = criterion(logits, y)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, UserWarning) as error:
        if isinstance(error, NotImplementedError):  # of forward mode, which is none of the targets' faults
            raise
        raise DataError(
            f"{where}: the criterion cannot compare outputs {logits.dtype} {tuple(logits.shape)} with targets "
            f"{y.dtype} {tuple(y.shape)}: {error}; give targets, or a model, of the shape and type that the criterion "
            "takes (class numbers are int64: `y.long()`)."
        ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ConfigError(
            f"the criterion gives {shape}, and a loss is one number: give one that averages over samples "
            '(reduction="mean").'
        )
    return loss.reshape(())


@contextmanager
def _as_error(message: str) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=message)
        yield


def check_labels(logits: Tensor, y: Tensor, *, where: str) -> None:
    """Refuse class numbers that a model has no output for.

    Args:
        logits: (n, classes) or (n, positions, classes).
        y: (n,) or (n, positions) int64, `IGNORED` ones left out; targets that are no class numbers of such a model
            (`names_classes`) are not looked at.
        where: Named in the message.

    Raises:
        DataError: There are some.
    """
    if not names_classes(logits, y):
        return
    outputs = logits.shape[-1]
    if bool(unknown_labels(outputs, y).any()):
        labels = y[y != IGNORED]
        raise DataError(
            f"{where}: labels span [{int(labels.min())}, {int(labels.max())}], but the model has {outputs} outputs; "
            "give labels of the model's own classes, or build it with as many outputs as there are classes."
        )


def check_probabilities(criterion: Criterion, y: Tensor, *, where: str) -> None:
    """Refuse targets outside [0, 1] where the criterion reads them as probabilities.

    Args:
        criterion: (logits, targets) -> mean loss.
        y: Targets.
        where: Names the samples in messages.

    Raises:
        DataError: There are some.
    """
    bad = improbable(criterion, y)
    if bad is not None and bool(bad.any()):
        raise DataError(
            f"{where}: {int(bad.sum())} of {len(y)} targets hold numbers outside [0, 1], and the criterion reads them "
            "as probabilities; give such, or a criterion that takes any number (F.mse_loss)."
        )


def unknown_labels(outputs: float, y: Tensor) -> Tensor:
    """Which class numbers a model has no output for: (n, ...) int64 -> (n,) bool; `IGNORED` ones are known.

    Args:
        outputs: How many the model has; infinite if targets are no class numbers.
        y: Class numbers.
    """
    unknown = ((y < 0) & (y != IGNORED)) | (y >= outputs)
    return unknown.flatten(1).any(1) if y.ndim > 1 else unknown


def names_classes(logits: Tensor, y: Tensor) -> bool:
    """Whether targets are class numbers of a model that gives such logits.

    Args:
        logits: (n, classes) or (n, positions, classes).
        y: (n,) or (n, positions) int64.
    """
    return (
        y.dtype == torch.int64 and logits.ndim == y.ndim + 1 and logits.shape[:-1] == y.shape and logits.shape[-1] > 1
    )


def counted(logits: Tensor, y: Tensor) -> int:
    """How many targets a mean loss is over: class numbers that are not `IGNORED`; of other targets, all samples.

    Args:
        logits: What a model said.
        y: Targets (n, ...).
    """
    return int((y != IGNORED).sum()) if names_classes(logits, y) else len(y)


def right_answers(logits: Tensor, y: Tensor) -> Tensor | None:
    """Which targets are hit; None where that has no meaning, as in regression.

    Args:
        logits: (n, classes) or (n, positions, classes) for class numbers, shaped like `y` for many labels.
        y: Class numbers int64, (n,) or (n, positions), `IGNORED` ones left out; or many labels, floats of 0 and 1.

    Returns:
        (targets,) bool.
    """
    if y.dtype == torch.int64 and logits.shape[:-1] == y.shape:
        counted = y != IGNORED
        return (logits.argmax(-1) == y)[counted]
    if y.is_floating_point() and logits.shape == y.shape and bool(((y == 0) | (y == 1)).all()):
        return ((logits > 0) == (y > 0.5)).flatten()
    return None


_OF_CLASSES = (F.cross_entropy, nn.CrossEntropyLoss)
_OF_LABELS = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits, nn.BCELoss, nn.BCEWithLogitsLoss)


def labels_apart(criterion: object, logits: Tensor, y: Tensor) -> bool:
    """Whether each output is the log-odds of a label by itself; if not, all outputs together are one distribution.

    Of torch's cross-entropies it is known. Under a function of the user's own, targets of 0 and 1 that are shaped like
    the outputs are labels, as in `right_answers`.

    Args:
        criterion: (logits, targets) -> mean loss.
        logits: What a model said.
        y: Targets.

    Raises:
        ConfigError: Outputs are no probabilities, as in regression.
    """
    if names_classes(logits, y):
        return False
    kind = _kind(criterion)
    if y.is_floating_point() and kind in (*_OF_LABELS, *_OF_CLASSES):
        return kind in _OF_LABELS
    if y.is_floating_point() and right_answers(logits, y) is not None:
        return True
    raise ConfigError(
        f"beside outputs of shape {tuple(logits.shape)}, targets {y.dtype} of shape {tuple(y.shape)} are neither class "
        "numbers nor labels: the model's answers are no probabilities, between which there could be a divergence; "
        'where there is the choice, set divergence = "l2".'
    )


def _kind(criterion: object) -> object:
    """The function or class that a criterion is of, whatever a `partial` of it sets."""
    while isinstance(criterion, partial):
        criterion = criterion.func
    return criterion if criterion in (*_OF_CLASSES, *_OF_LABELS) else type(criterion)


def improbable(criterion: object, y: Tensor) -> Tensor | None:
    """Which targets hold a number outside [0, 1] where the criterion reads it as a probability.

    That is known of torch's cross-entropies, and of a `partial` of one; of a function of the user's own it is not.
    Rows need not sum to 1: with many labels they do not, and torch counts a sample as much as its row sums to.

    Args:
        criterion: (logits, targets) -> mean loss.
        y: Targets: (n, classes, ...) probabilities of classes, (n, ...) of labels that may hold at once.

    Returns:
        (n,) bool; None where targets are no probabilities.
    """
    kind = _kind(criterion)
    if not y.is_floating_point() or not (kind in _OF_LABELS or (kind in _OF_CLASSES and y.ndim > 1)):
        return None
    outside = ~((y >= 0) & (y <= 1))
    return outside.flatten(1).any(1) if y.ndim > 1 else outside
