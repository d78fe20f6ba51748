"""How much worse a model may become on trusted samples in a step: one rule, for the gate and for who knows of it."""

import math
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from mithridate.core.batch import AnyBatch
from mithridate.core.model import IGNORED, WhiteBox, loss_of, right_answers
from mithridate.core.past import Weights
from mithridate.core.registry import settings
from mithridate.core.view import Memory

CHUNK = 500
"""Samples that go through the model at once."""

START, BEST = "start", "best"
"""Notes: the first quality of all, and the best so far."""


class Quality(NamedTuple):
    """How good a model is on samples.

    Args:
        loss: Mean loss, in the unit of the criterion.
        worst: Accuracy of the class that fares worst, a fraction; of many labels, of the worst label; 1 where targets
            are neither.
    """

    loss: float
    worst: float

    def note(self) -> Tensor:
        """The quality as a tensor, which a component can remember."""
        return torch.tensor(self, dtype=torch.float64)

    @classmethod
    def read(cls, note: Tensor) -> "Quality":
        """The quality that `note` wrote down."""
        return cls(float(note[0]), float(note[1]))


@settings
class Tolerance:
    """The tolerance of a gate: by how much the loss may rise and accuracy fall, compared with what.

    Args:
        max_loss_rise: By how much the mean loss may rise, in the unit of the criterion (nats for cross-entropy), >= 0;
            `inf` is off.
        max_accuracy_drop: By how much the accuracy of the worst class may fall, a fraction, >= 0; `inf` is off. One
            sample of a class of n is 1/n, so a limit below that refuses any lost sample. Classes without samples are
            left out.
        reference: What a step is compared with: the `previous` committed state, the `best` loss and the best
            worst-class accuracy of all committed states, or the state at the `start` of the stream.
    """

    max_loss_rise: Annotated[float, Field(ge=0, allow_inf_nan=True)] = 0.1
    max_accuracy_drop: Annotated[float, Field(ge=0, allow_inf_nan=True)] = 0.1
    reference: Literal["previous", "best", "start"] = "previous"

    @property
    def off(self) -> bool:
        """Whether no limit is set."""
        return math.isinf(self.max_loss_rise) and math.isinf(self.max_accuracy_drop)

    def compared_with(self, memory: Memory, committed: Quality) -> Quality:
        """The quality that a step is compared with.

        Args:
            memory: Notes; written to.
            committed: Quality of the state that the step starts from, the last one that stayed.
        """
        if self.reference == "previous":
            return committed
        if self.reference == "start":
            return Quality.read(memory.setdefault(START, committed.note()))
        now = committed.note()
        best = memory.get(BEST, now)
        memory[BEST] = torch.stack([torch.fmin(best[0], now[0]), torch.fmax(best[1], now[1])])
        return Quality.read(memory[BEST])

    def faults(self, reference: Quality, now: Quality) -> list[str]:
        """Which limits are broken, in words; none if the step may stay."""
        if not math.isfinite(now.loss):
            return [f"the trusted loss is {now.loss}"]
        faults = []
        if now.loss - reference.loss > self.max_loss_rise:
            faults.append(f"trusted loss {reference.loss:.4g} to {now.loss:.4g}, limit +{self.max_loss_rise:g}")
        if reference.worst - now.worst > self.max_accuracy_drop + 1e-9:  # fractions of counts are not exact
            faults.append(
                f"worst class's accuracy {reference.worst:.3f} to {now.worst:.3f}, limit -{self.max_accuracy_drop:g}"
            )
        return faults


@torch.no_grad()
def quality(box: WhiteBox, samples: AnyBatch, weights: Weights | None = None) -> Quality:
    """How good a model is on samples, in eval mode.

    Args:
        box: The model.
        samples: Any number of them; class numbers, many labels, or other targets, of which only the loss counts.
        weights: Parameters and buffers to use in place of the model's.

    Raises:
        DataError: Class numbers do not fit the model.
    """
    loss, hits, groups = 0.0, [], []
    for piece in samples.split(CHUNK):
        logits = box.logits(piece.x) if weights is None else weights.logits(box.module, piece.x)
        loss += float(loss_of(box.criterion, logits, piece.y, where="trusted samples")) * piece.size
        right = right_answers(logits, piece.y)
        if right is not None:
            hits.append(right)
            groups.append(_group_of(piece.y))
    if not hits:
        return Quality(loss / samples.size, 1.0)
    right, group = torch.cat(hits), torch.cat(groups)
    worst = min(float(right[group == g].double().mean()) for g in torch.unique(group))
    return Quality(loss / samples.size, worst)


def _group_of(y: Tensor) -> Tensor:
    """What each target that `right_answers` counts belongs to: its class, its label, or all to one."""
    if y.is_floating_point():
        return torch.arange(y[0].numel(), device=y.device).repeat(len(y))
    return y if y.ndim == 1 and not bool((y == IGNORED).any()) else torch.zeros_like(y[y != IGNORED])
