"""A gate after the step: measure on trusted samples, then commit or roll back."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from mithridate.core.batch import Batch
from mithridate.core.defence import ADMITTED, Defence, Verdict
from mithridate.core.errors import DataError
from mithridate.core.model import Snapshot, Weights
from mithridate.core.registry import register, settings
from mithridate.core.view import Memory, Need, View

CHUNK = 500
"""Trusted samples that go through the model at once."""

SEEN, MEASURED, BEST, START = "seen", "measured", "best", "start"
"""Notes: fingerprints of the two states measured last, what was measured, and what is compared with."""


class Measure(NamedTuple):
    """What the gate looks at: mean loss, and accuracy of the class that fares worst."""

    loss: float
    worst: float


@register("defence", "gate")
@settings
class Gate(Defence):
    """Keep a step only if the model is still good on a trusted set; else roll all of it back, momentum and buffers too.

    The model is measured in eval mode, as it learns (an average that `ema` serves is not what is measured). A state is
    measured once: what was found out about the one that was kept is reused for the next step. A step after which the
    loss is NaN or infinite is refused, unless both limits are off. In a chain, put the gate last, so that it measures
    the step that will be kept.

    What breaks it: poison that stays inside the tolerance step by step (choose `reference`: with `previous` the losses
    add up without end, with `best` and `start` they cannot); damage that the trusted set does not show, such as a
    backdoor, one class that it lacks, or a class of few samples; and with `best` or `start`, a stream whose clean task
    really changes, which is then refused for ever.

    Args:
        max_loss_rise: By how much the mean trusted loss may rise, in the unit of the criterion (nats for
            cross-entropy), >= 0; `inf` is off.
        max_accuracy_drop: By how much the accuracy of the worst class may fall, a fraction, >= 0; `inf` is off. One
            sample of a class of n is 1/n, so a limit below that refuses any lost sample. Classes without trusted
            samples are left out.
        reference: Compared with what: the `previous` committed state, the `best` loss and the best worst-class
            accuracy of all committed states, or the state at the `start` of the stream.
        trusted_size: Use only so many trusted samples, >= 2, always the same, in equal parts from every class;
            unset: all of them.

    Raises:
        DataError: The trusted samples are of one class, or their labels do not fit the model; before any step is made.

    Source:
        Engineering practice (validation before deployment). Close published relatives: RONI ("reject on negative
        impact"), Nelson et al., LEET 2008, and the validation set of Xie et al., Zeno, ICML 2019, arXiv:1805.10032.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL, Need.TRUSTED})
    neutral: ClassVar[Mapping[str, Any]] = {"max_loss_rise": math.inf, "max_accuracy_drop": math.inf}
    active: ClassVar[Mapping[str, Any]] = {"max_loss_rise": 0.0, "max_accuracy_drop": 0.0, "reference": "best"}
    notes_only: ClassVar[bool] = True

    max_loss_rise: Annotated[float, Field(ge=0)] = 0.1
    max_accuracy_drop: Annotated[float, Field(ge=0)] = 0.1
    reference: Literal["previous", "best", "start"] = "previous"
    trusted_size: Annotated[int, Field(ge=2)] | None = None

    @property
    def off(self) -> bool:
        """Whether no limit is set."""
        return math.isinf(self.max_loss_rise) and math.isinf(self.max_accuracy_drop)

    def screen(self, batch: Batch, view: View) -> Batch:
        """The batch as it is; before the first step, trusted set and model are tried together."""
        if not self.off and SEEN not in view.memory:
            module = view.model.module
            _remember(view.memory, self._measured(view, dict(module.named_parameters()), dict(module.named_buffers())))
        return batch

    def admit(self, before: Snapshot, view: View) -> Verdict:
        """Admit the step if neither limit is broken."""
        if self.off:
            return ADMITTED
        module = view.model.module
        first = self._measured(view, before.parameters, before.buffers)
        second = self._measured(view, dict(module.named_parameters()), dict(module.named_buffers()))
        _remember(view.memory, first, second)  # whichever of the two stays, the next step starts from it
        (_, kept), (_, now) = first, second
        reference = self._reference(view.memory, kept)
        if not math.isfinite(now.loss):
            return Verdict(admit=False, reason=f"gate: the trusted loss is {now.loss}")
        faults = []
        if now.loss - reference.loss > self.max_loss_rise:
            faults.append(f"trusted loss {reference.loss:.4g} to {now.loss:.4g}, limit +{self.max_loss_rise:g}")
        if reference.worst - now.worst > self.max_accuracy_drop + 1e-9:  # fractions of counts are not exact
            faults.append(
                f"worst class's accuracy {reference.worst:.3f} to {now.worst:.3f}, limit -{self.max_accuracy_drop:g}"
            )
        return Verdict(admit=False, reason=f"gate: {'; '.join(faults)}") if faults else ADMITTED

    def _reference(self, memory: Memory, kept: Measure) -> Measure:
        """What is compared with; the notes are only ever fed with states that were committed."""
        if self.reference == "previous":
            return kept
        if self.reference == "start":
            return _read(memory.setdefault(START, _note(kept)))
        best = _read(memory[BEST]) if BEST in memory else kept
        best = Measure(
            best.loss if best.loss <= kept.loss or math.isnan(kept.loss) else kept.loss, max(best.worst, kept.worst)
        )
        memory[BEST] = _note(best)
        return best

    def _measured(
        self, view: View, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> tuple[int, Measure]:
        """Fingerprint and measure of a state; from the notes, if it is one of the two that were measured last."""
        trusted = self._trusted(view)
        mark = _fingerprint([*parameters.values(), *buffers.values(), *trusted])
        if SEEN in view.memory:
            for seen, note in zip(view.memory[SEEN].tolist(), view.memory[MEASURED], strict=True):
                if seen == mark:
                    return mark, _read(note)
        return mark, _measure(view, Weights(parameters, buffers), trusted)

    def _trusted(self, view: View) -> Batch:
        x, y = view.trusted
        if self.trusted_size is not None and self.trusted_size < len(y):
            seen: Counter[int] = Counter()
            turns = []  # how many of its class come before each sample
            for label in y.tolist():
                turns.append(seen[label])
                seen[label] += 1
            chosen = sorted(sorted(range(len(turns)), key=turns.__getitem__)[: self.trusted_size])
            x, y = x[chosen], y[chosen]
        if len(y) == 0 or bool((y == y[0]).all()):
            raise DataError(
                f"gate: the {len(y)} trusted samples are of one class, so a model that forgets all others would pass; "
                "give trusted samples of at least two classes, better of all."
            )
        return Batch(x, y)


@torch.no_grad()
def _measure(view: View, weights: Weights, trusted: Batch) -> Measure:
    module, criterion = view.model.module, view.model.criterion
    loss, right = 0.0, []
    for x, y in zip(torch.split(trusted.x, CHUNK), torch.split(trusted.y, CHUNK), strict=True):
        logits = weights.logits(module, x)
        if int(y.min()) < 0 or int(y.max()) >= logits.shape[1]:
            raise DataError(
                f"gate: trusted labels span [{int(y.min())}, {int(y.max())}], but the model has {logits.shape[1]} "
                "classes; trust samples of the model's own classes."
            )
        loss += float(criterion(logits, y)) * len(y)
        right.append(logits.argmax(1) == y)
    hits = torch.cat(right)
    worst = min(float(hits[trusted.y == label].double().mean()) for label in torch.unique(trusted.y))
    return Measure(loss / len(trusted.y), worst)


def _remember(memory: Memory, *states: tuple[int, Measure]) -> None:
    memory[SEEN] = torch.tensor([mark for mark, _ in states])
    memory[MEASURED] = torch.stack([_note(measure) for _, measure in states])


def _note(measure: Measure) -> Tensor:
    return torch.tensor(measure, dtype=torch.float64)


def _read(note: Tensor) -> Measure:
    return Measure(float(note[0]), float(note[1]))


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def _fingerprint(tensors: Iterable[Tensor]) -> int:
    """A number that another model, or other trusted samples, would not have: made from the bits, on their device."""
    sums = []
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).flatten().long()
        places = torch.arange(1, 2 * len(bits), 2, device=bits.device)
        sums.append(torch.stack([bits.sum(), (bits * places).sum()]))
    plain = torch.stack(sums).cpu().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "little", signed=True)
