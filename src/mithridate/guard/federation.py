"""What a server asks of a client's update before it aggregates it, and of the aggregate before it serves it.

Nothing here knows of a transport: states are arrays by name, and an engine's adapter (`guard.flower`) carries them.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mithridate.core.batch import Batch
from mithridate.core.defence import ADMITTED, Verdict
from mithridate.core.domain import PIXELS, check_domain
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.model import frozen_statistics
from mithridate.core.registry import settings
from mithridate.maths.divergence import Divergence, divergence
from mithridate.maths.norms import Norm, clip_rows, sample_norms

State = Mapping[str, NDArray[Any]]
"""A model as arrays by name: parameters and buffers, whatever the clients exchange."""

DTypes = Mapping[str, np.dtype[Any]]
"""The type of each array as it was when the federation began."""

COUNTER_LIMIT = 1e9
"""How far an integer array (BatchNorm's count of batches) may move in one round; it takes no part in lengths."""

STATISTICS = ("*running_mean", "*running_var")
"""Patterns of what torch's BatchNorm keeps of the images that it saw, for `Guard.apart`."""

Bound = Annotated[float, Field(gt=0)]
Rise = Annotated[float, Field(ge=0)]


@settings
class Guard:
    """How a server of a federation treats what its clients send. The default stops only the malformed and the absurd.

    An update is the client's arrays minus the global ones, laid end to end in float64. Integer counters are no part of
    it. BatchNorm's running statistics are, since arrays do not say what is a parameter: they have another unit and may
    be most of the length, so that an honest update is clipped to nearly nothing. `apart = STATISTICS` gives them a
    length and a bound of their own. Everything else that a client reports is believed only where a limit holds it.

    Discrepancy-aware clipping: the global model with one client's update applied is compared, on the server's trusted
    samples, with an old global model; the mean over samples is the update's Memorization Discrepancy. Updates above
    `max_discrepancy + discrepancy_rise * round` are flagged, and both clip norms then hold for them alone. Zhu et al.
    name the idea and measure it, but give no formula: the threshold is the one of their sample correction,
    P = mu + tau * m, and "selective" is read as leaving unflagged updates unclipped.

    The gate measures the aggregate on the trusted samples and vetoes the round if the loss rose or the accuracy fell
    too far; the old model then stays.

    What breaks it: hostile updates inside `clip_norm` in many rounds, which add up (clipping bounds the speed, not the
    distance); damage that the trusted samples do not show, such as a backdoor; for the gate, an accumulative phase,
    which hardly shows in accuracy before its trigger: it vetoes the trigger round, and every later one if the attacker
    goes on, so the federation stands still but is not destroyed; arrays `apart` without `apart_clip_norm`, which one
    client may then move as far as `max_update_norm`, whatever `clip_norm` is (the statistics alone are enough to ruin
    a model); more hostile than honest clients, which decide what counts as an ordinary number of examples; a strategy
    that weights clients by other numbers of theirs, such as the losses of QFedAvg; and encrypted (secure) aggregation,
    under which no server can look at single updates.

    Args:
        clip_norm: Longest update that is passed on, in the unit of the weights, > 0; longer ones are scaled down. `inf`
            is off.
        norm: How updates are measured: `l2`, or `linf` (the largest change of one weight).
        apart: Names of arrays that are measured by themselves, not with the rest of the update; `*` and `?` stand for
            any text, as in names of files, and each pattern must fit some array. Empty: all arrays are one update.
        apart_clip_norm: Longest change of the arrays `apart`, all together, in their own unit, > 0; a longer one is
            scaled down. `inf` is off: only `max_update_norm` and the gate then stand behind them.
        max_update_norm: An update longer than this, or arrays `apart` that moved farther, are refused, not clipped,
            > 0. The default is beyond what any training round can do; `inf` is off.
        max_examples: The largest number of examples that a client's report counts for, >= 1; unset: no fixed cap.
        max_examples_ratio: A reported number counts for at most so many times the median of the round, >= 1; `inf` is
            off. On by default: the number is the client's weight in the average, and nobody else can check it.
        max_discrepancy: mu, in nats (see `divergence`), >= 0; `inf` is off.
        discrepancy_rise: tau, by which the limit grows a round, >= 0: an honest model also moves away from its past.
        divergence: Distance between the two models' answers, as in `defences.dsc`.
        old: Which model is looked back at: that of the `start`, or the one `back` rounds ago.
        back: Rounds to look back, >= 1; younger federations look back at their start.
        flagged: What becomes of a flagged update: `clip` to `clip_norm`, or `refuse`.
        max_loss_rise: By how much the trusted mean cross-entropy may rise, in nats, >= 0; `inf` is off.
        max_accuracy_drop: By how much the trusted accuracy may fall, a fraction, >= 0; `inf` is off.
        reference: Compared with what: the `previous` model, the `best` loss and accuracy so far (small rises cannot add
            up), or the `start`.

    Raises:
        ConfigError: Flagged updates are to be clipped, but `clip_norm` is off; or `apart_clip_norm` is set, but no
            array is `apart`.

    Source:
        Clipping before aggregation: Pang et al., NeurIPS 2021, Appendix C.3. Discrepancy: Zhu et al., ICML 2023,
        Definition 3.3 and Appendix C.10. Gate: as `defences.gate`. The caps are engineering practice.
    """

    clip_norm: Bound = math.inf
    norm: Norm = "l2"
    apart: tuple[str, ...] = ()
    apart_clip_norm: Bound = math.inf
    max_update_norm: Bound = 1e9
    max_examples: Annotated[int, Field(ge=1)] | None = None
    max_examples_ratio: Annotated[float, Field(ge=1)] = 10.0
    max_discrepancy: Rise = math.inf
    discrepancy_rise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    divergence: Divergence = "kl"
    old: Literal["start", "back"] = "start"
    back: Annotated[int, Field(ge=1)] = 5
    flagged: Literal["clip", "refuse"] = "clip"
    max_loss_rise: Rise = math.inf
    max_accuracy_drop: Rise = math.inf
    reference: Literal["previous", "best", "start"] = "best"

    def __post_init__(self) -> None:
        if self.looks_back and self.flagged == "clip" and math.isinf(self.clip_norm):
            raise ConfigError(
                "guard: max_discrepancy flags updates that are then clipped, but clip_norm is off, so nothing would "
                'happen; set clip_norm, or flagged = "refuse".'
            )
        if not self.apart and not math.isinf(self.apart_clip_norm):
            raise ConfigError(
                "guard: apart_clip_norm bounds the arrays that `apart` names, but it names none; name some, such as "
                f"BatchNorm's statistics, {list(STATISTICS)}, or take apart_clip_norm out."
            )

    @property
    def looks_back(self) -> bool:
        """Whether updates are judged by their discrepancy."""
        return not math.isinf(self.max_discrepancy)

    @property
    def gated(self) -> bool:
        """Whether a limit of the gate is set."""
        return not (math.isinf(self.max_loss_rise) and math.isinf(self.max_accuracy_drop))

    @property
    def needs_trusted(self) -> bool:
        """Whether the server must hold trusted samples."""
        return self.looks_back or self.gated

    def discrepancy_limit(self, server_round: int) -> float:
        """The threshold P of one round, from 1."""
        return self.max_discrepancy + self.discrepancy_rise * server_round


class Measure(NamedTuple):
    """How good a model is on trusted samples: mean cross-entropy in nats, and accuracy, a fraction."""

    loss: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class Trusted:
    """Samples that the server knows to be clean, and how its models answer them.

    Args:
        logits: State -> (n, classes), the answers of a model in that state, in eval mode.
        y: (n,) int64, the right answers.
    """

    logits: Callable[[State], Tensor]
    y: Tensor

    def measure(self, state: State) -> Measure:
        """Loss and accuracy of a model in that state."""
        logits = self.logits(state).double()
        return Measure(float(F.cross_entropy(logits, self.y)), float((logits.argmax(1) == self.y).double().mean()))

    def discrepancy(self, old: State, now: State, kind: Divergence) -> float:
        """Mean distance between the answers of two models."""
        return float(divergence(self.logits(old).double(), self.logits(now).double(), kind).mean())


def trusted_module(module: nn.Module, batch: Batch) -> Trusted:
    """Trusted samples, answered by a torch module.

    Args:
        module: Of the federation's architecture. States are looked at through it; its own weights stay as they are.
        batch: The samples, on the module's device; of two classes or more.

    Raises:
        DataError: The samples must not reach a model, or are of one class, so that a model which forgets all others
            would pass.
    """
    check_domain(batch, PIXELS, where="trusted samples")
    if bool((batch.y == batch.y[0]).all()):
        raise DataError(
            f"the {len(batch.y)} trusted samples are of one class, so a model that forgets all others would pass; "
            "give trusted samples of at least two classes, better of all."
        )
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    @torch.no_grad()
    def logits(state: State) -> Tensor:
        tensors = {name: torch.from_numpy(np.array(a)).to(held[name]) for name, a in state.items()}
        with frozen_statistics(module, "eval"):
            answer: Tensor = functional_call(module, tensors, (batch.x,))
        return answer

    return Trusted(logits, batch.y)


def born_types(state: State, guard: Guard) -> dict[str, np.dtype[Any]]:
    """The type of each array when the federation begins. BatchNorm's count is whole, whatever an average made of it.

    Args:
        state: The global arrays; perhaps those that an earlier federation ended with.
        guard: Its `apart` must fit them.

    Raises:
        ConfigError: An array holds no real numbers, or a pattern of `apart` fits no array.
    """
    for name, array in state.items():
        if array.dtype.kind not in "biuf":
            raise ConfigError(
                f"guard: the model's array '{name}' is {array.dtype}, and only real numbers can be measured; send its "
                "real and imaginary parts as two arrays, or leave the guard out."
            )
    for pattern in guard.apart:
        if not any(fnmatchcase(name, pattern) for name in state):
            raise ConfigError(
                f"guard: apart = '{pattern}' fits no array of the model, which are: {', '.join(sorted(state))[:500]}; "
                "correct the pattern, or take it out."
            )
    whole = np.dtype(np.int64)
    return {name: whole if _last(name) == "num_batches_tracked" else array.dtype for name, array in state.items()}


def find_fault(received: State, model: State, born: DTypes) -> str:
    """What makes arrays unfit to be averaged with those of the model; empty if nothing does.

    Args:
        received: What a client sent.
        model: The global arrays that it was sent.
        born: Types of the global arrays when the federation began. An array must be able to hold what that type holds:
            server optimisers and averages widen types, and a narrower one would lose precision for everybody; float32
            does for float64. No wider than 64 bits and in the machine's own order of bytes, as torch wants it.
    """
    missing, extra = sorted(model.keys() - received.keys()), sorted(received.keys() - model.keys())
    if missing:
        return f"array '{missing[0]}' is missing" + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
    if extra:
        return f"unknown array {extra[0][:80]!r}" + (f", and {len(extra) - 1} more" if len(extra) > 1 else "")
    faults = (
        _array_fault(received[name], expected, born[name]) or _variance_fault(received[name], expected, name)
        for name, expected in model.items()
    )
    return next((f"array '{name}' {fault}" for name, fault in zip(model, faults, strict=True) if fault), "")


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


class Lengths(NamedTuple):
    """How long a client's update is, and the change of the arrays that are measured apart; 0 where there are none."""

    update: float = 0.0
    apart: float = 0.0


def names_of(born: DTypes, guard: Guard) -> tuple[list[str], list[str]]:
    """The arrays that are measured: those of the update, and those apart; counters are in neither."""
    measured = [name for name, dtype in born.items() if not _counts(dtype)]
    apart = [name for name in measured if any(fnmatchcase(name, pattern) for pattern in guard.apart)]
    return [name for name in measured if name not in apart], apart


def update_of(received: State, model: State, names: Sequence[str]) -> Tensor:
    """What a client changed: (1, weights) float64, the differences of the arrays of these names laid end to end."""
    with np.errstate(over="ignore"):  # an infinite difference has an infinite length, and is refused for it
        pieces = [
            torch.from_numpy(np.subtract(received[name], model[name], dtype=np.float64).reshape(-1)) for name in names
        ]
    return torch.cat([torch.empty(0, dtype=torch.float64), *pieces]).unsqueeze(0)


def lengths_of(received: State, model: State, born: DTypes, guard: Guard) -> Lengths:
    """How long a client's update is; 0 for a model without weights."""
    rows = [update_of(received, model, names) for names in names_of(born, guard)]
    return Lengths(*(float(sample_norms(row, guard.norm)) if row.numel() else 0.0 for row in rows))


def find_excess(lengths: Lengths, guard: Guard) -> str:
    """Why an update of these lengths is refused; empty if it is not."""
    return _beyond(lengths, Lengths(guard.max_update_norm, guard.max_update_norm), guard)


def find_overlength(lengths: Lengths, guard: Guard) -> str:
    """Why an update of these lengths is clipped; empty if it is not."""
    return _beyond(lengths, Lengths(guard.clip_norm, guard.apart_clip_norm), guard)


def _beyond(lengths: Lengths, limits: Lengths, guard: Guard) -> str:
    return "; ".join(
        f"{what} of {guard.norm} length {length:.4g}, limit {limit:g}"
        for what, length, limit in zip(("update", "arrays apart"), lengths, limits, strict=True)
        if not (math.isfinite(length) and length <= limit)
    )


def clipped(received: State, model: State, born: DTypes, guard: Guard) -> dict[str, NDArray[Any]]:
    """The client's arrays moved towards the model's until they keep to `clip_norm`, those apart to `apart_clip_norm`.

    What keeps to its bound, and counters, are as sent.
    """
    made = {name: received[name] for name in model}
    for names, bound in zip(names_of(born, guard), (guard.clip_norm, guard.apart_clip_norm), strict=True):
        row = update_of(received, model, names)
        if not row.numel() or float(sample_norms(row, guard.norm)) <= bound:
            continue
        pieces = torch.split(clip_rows(row, bound, guard.norm)[0], [model[name].size for name in names])
        for name, piece in zip(names, pieces, strict=True):
            now = model[name]
            made[name] = np.asarray(now + piece.numpy().reshape(now.shape)).astype(received[name].dtype)
    return made


def find_count_fault(count: object) -> str:
    """Why a self-reported number of examples is refused; empty if it may count, up to the caps."""
    if isinstance(count, bool) or not isinstance(count, int | float):
        return f"number of examples is a {type(count).__name__}, not a number"
    if isinstance(count, float) and not math.isfinite(count):
        return f"number of examples is {count}"
    if count <= 0:
        return f"number of examples is {str(count)[:20]}: it must be above 0"
    return ""


def capped_counts(counts: Sequence[float], guard: Guard) -> list[float]:
    """What each reported number of examples counts for; one that no cap touches is returned as it is.

    Args:
        counts: As reported by the clients of one round, each > 0.
        guard: Gives the caps.
    """
    if not counts:
        return []
    cap = math.inf if guard.max_examples is None else float(guard.max_examples)
    if not math.isinf(guard.max_examples_ratio):
        middle = statistics.median_low(counts)  # of integers that may be too large for a float
        cap = min(cap, guard.max_examples_ratio * middle if middle < COUNTER_LIMIT**2 else math.inf)
    # A number that a float cannot hold would stop any average, capped or not.
    cap = min(cap, 1e300)
    return [count if count <= cap else cap for count in counts]


def judge(before: Measure, after: Measure, guard: Guard) -> Verdict:
    """The gate's word on an aggregate.

    Args:
        before: What is compared with (see `Guard.reference`).
        after: The aggregate's measure.
        guard: Gives the limits.
    """
    if not guard.gated:
        return ADMITTED
    if not math.isfinite(after.loss):
        return Verdict(admit=False, reason=f"the trusted loss is {after.loss}")
    faults = []
    if after.loss - before.loss > guard.max_loss_rise:
        faults.append(f"trusted loss {before.loss:.4g} to {after.loss:.4g}, limit +{guard.max_loss_rise:g}")
    if before.accuracy - after.accuracy > guard.max_accuracy_drop + 1e-9:  # fractions of counts are not exact
        faults.append(
            f"trusted accuracy {before.accuracy:.3f} to {after.accuracy:.3f}, limit -{guard.max_accuracy_drop:g}"
        )
    return Verdict(admit=False, reason="; ".join(faults)) if faults else ADMITTED


def best_of(a: Measure, b: Measure) -> Measure:
    """The lower loss (NaN is none) and the higher accuracy of two."""
    loss = a.loss if a.loss <= b.loss or math.isnan(b.loss) else b.loss
    return Measure(loss, max(a.accuracy, b.accuracy))
