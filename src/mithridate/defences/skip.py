"""Skip the step on a batch whose loss or gradient is far from what the last ones were."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mithridate.core.defence import ADMITTED, Defence, Rounds, Verdict
from mithridate.core.errors import ConfigError
from mithridate.core.past import Weights
from mithridate.core.registry import register, settings
from mithridate.core.updates import Updates
from mithridate.core.view import Memory, View
from mithridate.defences.median_bn import MAD_TO_STD

LEAST_SPREAD = 0.01
"""A spread below this share of the centre counts as this share: a few nearly equal readings make no outliers."""

WINDOW, PENDING = "window", "pending"
"""Notes: readings (k, 2) of loss and gradient norm; the last reading and its two scores."""


@register("defence", "skip")
@settings
class Skip(Defence):
    """Skip the step on a batch whose loss or gradient norm lies far above a rolling window of earlier ones.

    A reading is an outlier if it exceeds the window's centre by more than `threshold` spreads; only large ones count,
    since a small loss or gradient hardly moves the model. A loss or gradient that is NaN or infinite is always one, in
    the warm-up too. A skipped step moves nothing: momentum, weight decay and BatchNorm statistics are rolled back,
    which a zero gradient would not do. The window takes in a reading only when its step has been committed, so a step
    that another defence of a chain refused does not count either. In a chain, put it before what bounds gradients.

    What breaks it: poison of ordinary loss and gradient norm, as the accumulative phase is made to be; a slow ramp,
    each batch a little worse, which carries centre and spread along; poison from the first batches on, while it warms
    up. With `remember_outliers` an attacker needs only to repeat itself: after about half a window (robust) its batches
    are the normal ones. Without, a real change of the stream can lock learning for good, which an attacker may want
    too.

    Args:
        window: Readings remembered, >= 2.
        threshold: Spreads above the centre from which a step is skipped, >= 0; `inf` never skips.
        warmup: Readings needed before any (finite) step is skipped, >= 1, at most `window`.
        watch: `loss`, `gradient` (its l2 norm), or `either`.
        robust: Centre and spread are the median and 1.4826 times the median absolute deviation, which one bad batch
            hardly moves, but which skip more clean batches where readings are skewed (small batches of a model that is
            nearly always right: 8 % against 1 % on the toy stream); False: mean and standard deviation.
        remember_outliers: Let readings of refused steps enter the window too (finite ones).

    Raises:
        ConfigError: `warmup` is larger than `window`, so that it would never act.

    Source:
        Engineering practice: skipping batches at spikes of loss or gradient, as in Chowdhery et al., PaLM, JMLR 2023,
        arXiv:2204.02311, section 5.1. Median and MAD for outliers: Iglewicz and Hoaglin, 1993.
    """

    neutral: ClassVar[Mapping[str, Any]] = {"threshold": math.inf}
    active: ClassVar[Mapping[str, Any]] = {"threshold": 0.0, "warmup": 1}

    window: Annotated[int, Field(ge=2)] = 50
    threshold: Annotated[float, Field(ge=0)] = 4.0
    warmup: Annotated[int, Field(ge=1)] = 5
    watch: Literal["loss", "gradient", "either"] = "either"
    robust: bool = False
    remember_outliers: bool = False

    def __post_init__(self) -> None:
        if self.warmup > self.window:
            raise ConfigError(
                f"skip: warmup = {self.warmup} readings never fit into window = {self.window}, so it would never act; "
                "make warmup smaller or window larger."
            )

    def begin(self, view: View) -> None:
        """What the last step read, if that was refused, is remembered or forgotten."""
        refused = view.memory.pop(PENDING, None)
        if refused is not None and self.remember_outliers:
            self._take_in(refused, view.memory)

    def bound(self, updates: Updates, view: View) -> Updates:
        """The updates as they are; they are measured here."""
        loss = 0.0 if updates.losses is None else float(updates.losses.double().mean())
        reading = (loss, float(torch.linalg.vector_norm(updates.rows)))
        scores = [self._score(view.memory, column, value) for column, value in enumerate(reading)]
        view.memory[PENDING] = torch.tensor([*reading, *scores], dtype=torch.float64)
        return updates

    def admit(self, before: Weights, view: View) -> Verdict:
        """Refuse the step of an outlier."""
        if PENDING not in view.memory:
            return ADMITTED
        loss, norm, loss_score, norm_score = view.memory[PENDING].tolist()
        faults = []
        if self.watch != "gradient" and loss_score > self.threshold:
            faults.append(f"batch loss {loss:.4g} is {loss_score:.3g} spreads above its window")
        if self.watch != "loss" and norm_score > self.threshold:
            faults.append(f"gradient norm {norm:.4g} is {norm_score:.3g} spreads above its window")
        return Verdict(admit=False, reason=f"skip: {'; '.join(faults)}") if faults else ADMITTED

    def committed(self, view: View) -> None:
        """The window takes in the reading of a step that stays."""
        if PENDING in view.memory:
            self._take_in(view.memory.pop(PENDING), view.memory)

    def check_federation(self, run: Rounds, clients: int) -> None:
        """A server knows the one update of a round, but no loss.

        Raises:
            ConfigError: It watches the loss, or would be shown clients' rows.
        """
        if self.watch == "loss" or run.bound == "before":
            raise ConfigError(
                "skip: the server of a federation knows the one update of a round, but no loss; set "
                'watch = "gradient", and bound = "after" in [federated].'
            )

    def _take_in(self, reading: Tensor, memory: Memory) -> None:
        """Remember a reading, if it is finite."""
        if bool(reading[:2].isfinite().all()):
            window = memory.get(WINDOW, reading.new_zeros(0, 2))
            memory[WINDOW] = torch.cat([window, reading[None, :2]])[-self.window :].clone()

    def _score(self, memory: Memory, column: int, value: float) -> float:
        """Spreads between a reading and the centre; infinite if it is not finite, -infinite while warming up."""
        if not math.isfinite(value):
            return math.inf
        if WINDOW not in memory or len(memory[WINDOW]) < self.warmup:
            return -math.inf
        held = memory[WINDOW][:, column]
        if self.robust:
            centre = held.quantile(0.5)
            spread = MAD_TO_STD * float((held - centre).abs().quantile(0.5))
        else:
            centre = held.mean()
            spread = float(held.std()) if len(held) > 1 else 0.0
        spread = max(spread, LEAST_SPREAD * abs(float(centre)))
        distance = value - float(centre)
        return distance / spread if spread > 0 else math.copysign(math.inf, distance) if distance else 0.0
