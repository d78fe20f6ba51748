"""What a server asks of a client's reply before any defence looks at it: arrays that fit, numbers that may count.

Nothing here knows of a transport: states are arrays by name, and `guard.flower` carries them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from statistics import median_low
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from mithridate.core.errors import ConfigError
from mithridate.core.registry import settings

State = Mapping[str, NDArray[Any]]
"""A model as arrays by name: parameters and buffers, whatever the clients exchange."""

COUNTER_LIMIT = 1e9
"""How far an integer array (BatchNorm's count of batches) may move in one round; it takes no part in lengths."""

ABSURD = 1e9
"""An l2 length beyond what any training round can do."""

STATISTICS = ("*running_mean", "*running_var")
"""Patterns of what torch's BatchNorm keeps of the images that it saw."""


@settings
class ReplyLimits:
    """What a client's reply must keep to before any defence looks at it. The default stops the malformed and absurd.

    It bounds no update that a training round could make: without a defence, one hostile client decides what the model
    becomes, and the guard says so when it is made. `RECOMMENDED` are limits that need no knowledge of the model.

    An update is what a client changed of the weights. Statistics that a model keeps of its inputs (BatchNorm's) are no
    part of it: they have another unit, may be far longer, and no gradient moves them, so that no defence bounds them.
    They have a bound of their own here. Everything else that a client reports is believed only where a limit holds it.

    What breaks it: statistics without `statistics_clip_norm` or `max_norm_ratio`, which one client may move as far as
    `max_update_norm`, and which alone are enough to ruin a model; as many hostile as honest clients, which decide what
    is ordinary in a round; and a strategy that weights clients by numbers of theirs that are neither examples nor the
    loss that it names.

    Args:
        max_update_norm: A reply whose update is longer than this in l2, or whose statistics moved farther, is refused,
            not bounded, > 0. The default is beyond what any training round can do; `inf` is off.
        max_examples: The largest number of examples that a client's report counts for, >= 1; unset: no fixed cap.
        max_examples_ratio: A reported number counts for at most so many times the median of the round, >= 1; `inf` is
            off. On by default: the number is the client's weight in the average, and nobody else can check it.
        max_norm_ratio: An update counts for at most so many times the median l2 length of the round's updates, and the
            change of the statistics for so many times the median of theirs, >= 1; a longer one is scaled down. `inf` is
            off.
        max_loss_ratio: Where the strategy weights clients by their losses (QFedAvg), a reported one counts for at most
            so many times the median of the round, and at least for that part of it, >= 1; `inf` is off. One below 0 or
            that is no number is refused in any case.
        statistics: Names of the arrays that are statistics; `*` and `?` stand for any text, as in names of files. Only
            for a server that has no module: one that has knows its buffers.
        statistics_clip_norm: Longest l2 change of the statistics, all together, in their own unit, > 0; a longer one is
            scaled down. `inf` is off.

    Source:
        Engineering practice.
    """

    max_update_norm: Annotated[float, Field(gt=0, allow_inf_nan=True)] = ABSURD
    max_examples: Annotated[int, Field(ge=1)] | None = None
    max_examples_ratio: Annotated[float, Field(ge=1, allow_inf_nan=True)] = 10.0
    max_norm_ratio: Annotated[float, Field(ge=1)] = math.inf
    max_loss_ratio: Annotated[float, Field(ge=1, allow_inf_nan=True)] = 10.0
    statistics: tuple[str, ...] = STATISTICS
    statistics_clip_norm: Annotated[float, Field(gt=0)] = math.inf

    @property
    def bound_updates(self) -> bool:
        """Whether an update of a length that training can have may be too long for them."""
        return not math.isinf(self.max_norm_ratio) or self.max_update_norm < ABSURD

    def longest(self, lengths: Sequence[float]) -> float:
        """How long a change may be.

        Args:
            lengths: The l2 lengths of the round's changes, of all clients; at least one.
        """
        return math.inf if math.isinf(self.max_norm_ratio) else self.max_norm_ratio * median_low(lengths)

    def bounded_losses(self, losses: Sequence[float]) -> list[float]:
        """What each reported loss counts for; one that lies within the bounds is returned as it is.

        Args:
            losses: As reported by the clients of one round, each >= 0.
        """
        middle = median_low(losses) if losses else 0
        if math.isinf(self.max_loss_ratio) or not middle:
            return list(losses)
        low, high = middle / self.max_loss_ratio, middle * self.max_loss_ratio
        return [loss if low <= loss <= high else min(max(loss, low), high) for loss in losses]

    def capped(self, counts: Sequence[float]) -> list[float]:
        """What each reported number of examples counts for; one that no cap touches is returned as it is.

        Args:
            counts: As reported by the clients of one round, each > 0.
        """
        if not counts:
            return []
        cap = math.inf if self.max_examples is None else float(self.max_examples)
        if not math.isinf(self.max_examples_ratio):
            middle = median_low(counts)  # of integers that may be too large for a float
            cap = min(cap, self.max_examples_ratio * middle if middle < COUNTER_LIMIT**2 else math.inf)
        # A number that a float cannot hold would stop any average, capped or not.
        cap = min(cap, 1e300)
        return [count if count <= cap else cap for count in counts]


RECOMMENDED = ReplyLimits(max_norm_ratio=2.0, max_examples_ratio=3.0, max_loss_ratio=3.0)
"""Limits that fit any model, since the round itself gives their unit: nobody's update, statistics, number of examples
or loss counts for much more than what is ordinary among the clients."""


@dataclass(frozen=True)
class Layout:
    """What each array of a federation's model is.

    Args:
        born: The type of each array when the federation began. BatchNorm's count is whole, whatever an average made of
            it. The types that an average gives later are wider, and no measure of what a client must send.
        trained: The arrays that updates are made of.
        statistics: The arrays of floats that no gradient moves, and that clients change all the same.
        frozen: Parameters that are not trained: no client may change them.
    """

    born: Mapping[str, np.dtype[Any]]
    trained: tuple[str, ...]
    statistics: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    @classmethod
    def of(cls, state: State, limits: ReplyLimits, module: nn.Module | None = None) -> "Layout":
        """That of a model, when a federation begins.

        Args:
            state: The global arrays; perhaps those that an earlier federation ended with.
            limits: Name the statistics, if there is no module.
            module: Of the federation's architecture.

        Raises:
            ConfigError: An array holds no real numbers, or none is trained; a pattern of the limits fits no array; or
                arrays and module are of different models.
        """
        for name, array in state.items():
            if array.dtype.kind not in "biuf":
                raise ConfigError(
                    f"the model's array '{name}' is {array.dtype}, and only real numbers can be measured; send its "
                    "real and imaginary parts as two arrays, or leave GuardedStrategy out."
                )
        whole = np.dtype(np.int64)
        born = {name: whole if _last(name) == "num_batches_tracked" else array.dtype for name, array in state.items()}
        floats = [name for name, dtype in born.items() if not _counts(dtype)]
        if module is None:
            _check_patterns(limits.statistics, state)
            apart = {name for name in floats if is_statistic(name, limits.statistics)}
            layout = cls(born, tuple(n for n in floats if n not in apart), tuple(n for n in floats if n in apart))
        else:
            _check_module(state, module)
            parameters = {name: p.requires_grad for name, p in module.named_parameters()}
            layout = cls(
                born,
                tuple(name for name, trained in parameters.items() if trained),
                tuple(name for name in floats if name not in parameters),
                tuple(name for name in floats if parameters.get(name) is False),
            )
        if not layout.trained:
            raise ConfigError(f"no array of the model is trained, so there is nothing to guard: {_listed(state)}.")
        return layout

    def fault(self, received: State, model: State) -> str:
        """What makes arrays unfit to be averaged with those of the model; empty if nothing does.

        Args:
            received: What a client sent. An array must be able to hold what its type held when the federation began:
                server optimisers and averages widen types, and a narrower one would lose precision for everybody;
                float32 does for float64. No wider than 64 bits and in the machine's own order of bytes, as torch wants
                it.
            model: The global arrays that it was sent.
        """
        missing, extra = sorted(model.keys() - received.keys()), sorted(received.keys() - model.keys())
        if missing:
            return f"array '{missing[0]}' is missing" + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
        if extra:
            return f"unknown array {extra[0][:80]!r}" + (f", and {len(extra) - 1} more" if len(extra) > 1 else "")
        faults = (
            _array_fault(received[name], expected, self.born[name]) or _variance_fault(received[name], expected, name)
            for name, expected in model.items()
        )
        return next((f"array '{name}' {fault}" for name, fault in zip(model, faults, strict=True) if fault), "")


def is_statistic(name: str, patterns: Iterable[str] = STATISTICS) -> bool:
    """Whether an array's name fits one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def difference(received: State, model: State, names: Iterable[str]) -> NDArray[np.float64]:
    """What a client changed: the differences of the arrays of these names, laid end to end."""
    with np.errstate(over="ignore"):  # an infinite difference has an infinite length, and is refused for it
        pieces = [np.subtract(received[name], model[name], dtype=np.float64).reshape(-1) for name in names]
    return np.concatenate([np.empty(0), *pieces])


def moved(model: State, change: NDArray[np.float64], like: State, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """The arrays of these names, moved away from the model's.

    Args:
        model: Where they start.
        change: By how much, laid end to end as `difference` gives it.
        like: Gives the types.
        names: Which arrays.
    """
    made, start = {}, 0
    for name in names:
        now = model[name]
        made[name] = np.asarray(now + change[start : start + now.size].reshape(now.shape)).astype(like[name].dtype)
        start += now.size
    return made


def excess(change: NDArray[np.float64], limit: float, what: str) -> str:
    """Why a change of this l2 length is refused; empty if it is not."""
    with np.errstate(over="ignore"):
        length = float(np.linalg.norm(change))
    return "" if math.isfinite(length) and length <= limit else f"{what} of l2 length {length:.4g}, limit {limit:g}"


def loss_fault(loss: object) -> str:
    """Why a self-reported loss is refused where it is a weight; empty if it may count, up to the bounds."""
    if isinstance(loss, bool) or not isinstance(loss, int | float):
        return f"loss is a {type(loss).__name__}, not a number"
    return "" if 0 <= loss < math.inf else f"loss is {str(loss)[:20]}: it must be 0 or more"


def count_fault(count: object) -> str:
    """Why a self-reported number of examples is refused; empty if it may count, up to the caps."""
    if isinstance(count, bool) or not isinstance(count, int | float):
        return f"number of examples is a {type(count).__name__}, not a number"
    if isinstance(count, float) and not math.isfinite(count):
        return f"number of examples is {count}"
    if count <= 0:
        return f"number of examples is {str(count)[:20]}: it must be above 0"
    return ""


def _check_patterns(patterns: tuple[str, ...], state: State) -> None:
    """Those of torch fit a model with BatchNorm, and any other pattern was written for this model."""
    for pattern in patterns:
        if pattern not in STATISTICS and not any(fnmatchcase(name, pattern) for name in state):
            raise ConfigError(
                f"statistics = '{pattern}' fits no array of the model, which are: {_listed(state)}; correct the "
                "pattern, or take it out."
            )


def _check_module(state: State, module: nn.Module) -> None:
    parameters = dict(module.named_parameters())
    known = {**parameters, **dict(module.named_buffers())}
    for name, array in state.items():
        shape = None if name not in known else tuple(known[name].shape)
        if shape != array.shape:
            differs = f"{array.shape} and {shape} in the module" if shape is not None else "not in the module, or tied"
            raise ConfigError(
                f"the model's array '{name}' is {differs}; give a module of the federation's own architecture, and let "
                "clients exchange a tied parameter under one name."
            )
    lacking = [name for name, p in parameters.items() if p.requires_grad and name not in state]
    if lacking:
        raise ConfigError(
            f"the module trains '{lacking[0]}', which is not among the model's arrays: {_listed(state)}; give a module "
            "of the federation's own architecture, in which what clients do not exchange does not require gradients."
        )


def _listed(state: State) -> str:
    return ", ".join(sorted(state))[:500] or "there are none"


def _array_fault(array: NDArray[Any], expected: NDArray[Any], born: np.dtype[Any]) -> str:
    if array.shape != expected.shape:
        return f"has shape {array.shape}, not {expected.shape}"
    if not _holds(array.dtype, born):
        return f"is {array.dtype}, not {born}"
    finite = np.isfinite(array)
    if not _counts(born):
        with np.errstate(over="ignore"):  # what overflows in the model's own type is found out by this very check
            finite &= np.isfinite(array.astype(born))
    if not finite.all():
        return f"holds {int((~finite).sum())} of {array.size} values that are NaN or infinite"
    if _counts(born) and np.abs(array.astype(np.float64) - expected).max(initial=0) > COUNTER_LIMIT:
        return f"counts, and moved by more than {COUNTER_LIMIT:g}"
    return ""


def _variance_fault(array: NDArray[Any], expected: NDArray[Any], name: str) -> str:
    """A variance below zero makes every answer NaN, and takes but a short update where variances are small."""
    if _last(name) != "running_var" or (expected < 0).any() or not (array < 0).any():
        return ""
    return f"holds {int((array < 0).sum())} of {array.size} variances that are negative"


def _holds(dtype: np.dtype[Any], born: np.dtype[Any]) -> bool:
    if dtype.kind not in "biuf" or dtype.itemsize > 8 or not dtype.isnative:
        return False
    return np.can_cast(born, dtype, "safe") or (born == np.float64 and dtype == np.float32)


def _counts(dtype: np.dtype[Any]) -> bool:
    return dtype.kind != "f"


def _last(name: str) -> str:
    return name.rpartition(".")[2]
