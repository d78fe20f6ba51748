"""How much worse a model may become on trusted samples in a step: one rule, for the gate and for who knows of it."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from scipy.stats import binomtest
from scipy.stats import t as student
from torch import Tensor

from mithridate.core.batch import AnyBatch
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.model import WhiteBox
from mithridate.core.modes import Precision
from mithridate.core.past import Weights
from mithridate.core.registry import settings
from mithridate.core.targets import IGNORED, counted, loss_of, right_answers
from mithridate.core.view import Memory

CHUNK = 100
"""Samples that go through the model at once: a usual batch stays in the cache, and 500 took a sixth longer."""

START, BEST = "start", "best"
"""Notes: the first quality of all, and the best so far."""

PairedTest = Literal["flips", "chances"]
"""What two models are compared by on the same samples: which are right, or how sure each is of the right answer."""


class Quality(NamedTuple):
    """How good a model is on samples.

    Args:
        loss: Mean loss of the targets that count (not `IGNORED`), in the unit of the criterion; NaN if none does.
        worst: Accuracy of the class that fares worst, a fraction; of many labels, of the worst label; 1 where targets
            are neither.
        right: Which targets are hit, in order; empty where they are neither class numbers nor many labels.
        chances: What probability the model gives the right answer to each.
        groups: What each belongs to: its class, its label, or all to one. A note leaves it out.
    """

    loss: float
    worst: float
    right: tuple[bool, ...] = ()
    chances: tuple[float, ...] = ()
    groups: tuple[int, ...] = ()

    def note(self) -> Tensor:
        """The quality as a tensor, which a component can remember."""
        return torch.tensor((self.loss, self.worst, *self.right, *self.chances), dtype=torch.float64)

    @classmethod
    def read(cls, note: Tensor) -> "Quality":
        """The quality that `note` wrote down."""
        loss, worst, *samples = note.tolist()
        n = len(samples) // 2
        return cls(loss, worst, tuple(hit > 0 for hit in samples[:n]), tuple(samples[n:]))


@settings
class Tolerance:
    """The tolerance of a gate: by how much a model may become worse, compared with what.

    Two limits are fixed numbers; `level` asks instead whether the samples show that the model is worse, so that what
    passes shrinks with their number.

    Args:
        max_loss_rise: By how much the mean loss may rise, in the unit of the criterion (nats for cross-entropy), >= 0;
            `inf` is off.
        max_accuracy_drop: By how much the accuracy of the worst class may fall, a fraction, >= 0; `inf` is off. One
            sample of a class of n is 1/n, so a limit below that refuses any lost sample. Classes without samples are
            left out.
        level: Significance level of a paired test, in [0, 1): a step is refused if two equally good models would look
            so different at this rate or less, on all samples, or on those of one class at the level divided by the
            number of classes. 0 is off.
        test: `flips`: samples that were right are now wrong, more of them than the other way round (McNemar's exact
            test, one-sided): at 0.01, seven lost and none won, whatever the number of samples. `chances`: the
            probability of the right answer has fallen, on average (Student's t of the differences, one-sided), which
            shows a slow slide several times as early. Both take samples to be independent.
        reference: What is compared with: the `previous` committed state; the `best` of all committed states, which is
            the lowest loss, the highest accuracy of the worst class, and for the paired test the state that was most
            right or most sure of it; or the state at the `start` of the stream.
    """

    max_loss_rise: Annotated[float, Field(ge=0, allow_inf_nan=True)] = 0.1
    max_accuracy_drop: Annotated[float, Field(ge=0, allow_inf_nan=True)] = 0.1
    level: Annotated[float, Field(ge=0, lt=1)] = 0.0
    test: PairedTest = "flips"
    reference: Literal["previous", "best", "start"] = "previous"

    @property
    def off(self) -> bool:
        """Whether no limit is set."""
        return math.isinf(self.max_loss_rise) and math.isinf(self.max_accuracy_drop) and not self.level

    def check_targets(self, y: Tensor) -> None:
        """Refuse targets that the paired test says nothing about.

        Args:
            y: Targets (n, ...).

        Raises:
            ConfigError: They are neither class numbers nor many labels, and `level` is set.
        """
        if self.level and y.is_floating_point() and not bool(((y == 0) | (y == 1)).all()):
            raise ConfigError(
                f"level = {self.level:g} asks for a test of which samples are answered rightly, and these targets are "
                "numbers, which are never hit; set level = 0 and a max_loss_rise."
            )

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
        n = len(committed.right)
        part = slice(2, 2 + n) if self.test == "flips" else slice(2 + n, None)
        samples = max(best, now, key=lambda note: float(note[part].sum()))[2:]  # of two as good, the earlier one's
        memory[BEST] = torch.cat([torch.fmin(best[:1], now[:1]), torch.fmax(best[1:2], now[1:2]), samples])
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
        return faults + (self._shown(reference, now) if self.level else [])

    def _shown(self, reference: Quality, now: Quality) -> list[str]:
        """Where the samples show that a model is worse, in words: in all of them, and in a class."""
        before, after = (q.right if self.test == "flips" else q.chances for q in (reference, now))
        changes: dict[int, list[float]] = {group: [] for group in sorted(set(now.groups))}
        for group, was, is_now in zip(now.groups, before, after, strict=True):
            changes[group].append(is_now - was)
        everywhere = [change for several in changes.values() for change in several]
        places = [("", everywhere, self.level)]
        places += [(f" of class {group}", several, self.level / len(changes)) for group, several in changes.items()]
        faults = []
        for where, several, level in places:
            p, words = TESTS[self.test](several)
            if p <= level:
                faults.append(f"trusted samples{where}: {words}, p = {p:.2g}, level {level:g}")
        return faults


def flips(changes: Sequence[float]) -> tuple[float, str]:
    """How often two equally good models lose so many of the samples on which they differ, or more; and what was lost.

    Args:
        changes: -1 a sample that was right and is wrong, 1 the other way round, 0 for the others.

    Source:
        McNemar, Psychometrika 1947; the exact, one-sided form.
    """
    lost, won = changes.count(-1), changes.count(1)
    p = binomtest(lost, lost + won, alternative="greater").pvalue if lost > won else 1.0
    return float(p), f"{lost} lost, {won} won"


def chances(changes: Sequence[float]) -> tuple[float, str]:
    """How often the mean of such changes lies so far below zero, or farther, if their true mean is zero; and the mean.

    Args:
        changes: Of the probability of the right answer, a sample each.

    Source:
        Student, Biometrika 1908; of paired differences, one-sided.
    """
    values = torch.tensor(changes, dtype=torch.float64)
    mean, n = float(values.mean()), len(changes)
    if n < 2 or mean >= 0:
        return 1.0, ""
    error = float(values.std()) / math.sqrt(n)
    p = student.sf(-mean / error, n - 1) if error else 0.0
    return float(p), f"probability of the right answer {mean:+.3f}"


TESTS: Mapping[PairedTest, Callable[[Sequence[float]], tuple[float, str]]] = {"flips": flips, "chances": chances}
"""By name: what changes to p-value and words."""


def in_equal_parts(samples: AnyBatch, size: int | None) -> AnyBatch:
    """So many of the samples, always the same, in equal parts from every class; all if there are no more.

    Args:
        samples: Whose order is kept.
        size: How many; None: all.
    """
    if size is None or size >= samples.size:
        return samples
    seen: Counter[int] = Counter()
    turns = []  # how many of its class come before each sample
    for label in samples.y.tolist() if _labelled(samples) else [0] * samples.size:
        turns.append(seen[label])
        seen[label] += 1
    chosen = sorted(sorted(range(len(turns)), key=turns.__getitem__)[:size])
    return samples.take(torch.tensor(chosen))


def check_trusted(samples: AnyBatch, *, who: str) -> None:
    """Refuse trusted samples on which a model that forgets all classes but one would pass.

    Args:
        samples: Those that are used.
        who: Uses them, for the message.

    Raises:
        DataError: They are of one class.
    """
    if _labelled(samples) and bool((samples.y == samples.y[:1]).all()):
        raise DataError(
            f"{who}: the {samples.size} trusted samples are of one class, so a model that forgets all others would "
            "pass; give trusted samples of at least two classes, better of all."
        )


def _labelled(samples: AnyBatch) -> bool:
    return samples.y.ndim == 1 and samples.y.dtype == torch.int64


@torch.no_grad()
def quality(
    box: WhiteBox, samples: AnyBatch, weights: Weights | None = None, precision: Precision = "float32"
) -> Quality:
    """How good a model is on samples, in eval mode.

    Args:
        box: The model.
        samples: Any number of them; class numbers, many labels, or other targets, of which only the loss counts.
        weights: Parameters and buffers to use in place of the model's, in float32.
        precision: Of the model's passes.

    Raises:
        DataError: Class numbers do not fit the model.
    """
    loss, count = 0.0, 0
    hits, chances, groups = [], [], []
    for piece in samples.split(CHUNK):
        logits = box.logits(piece.x, precision=precision) if weights is None else weights.logits(box.module, piece.x)
        size = counted(logits, piece.y)
        mean = loss_of(box.criterion, logits, piece.y, where="trusted samples")
        loss += float(mean) * size if size else 0.0  # of nothing the mean is NaN
        count += size
        right = right_answers(logits, piece.y)
        if right is not None and len(right):
            hits.append(right)
            chances.append(_chances(logits, piece.y))
            groups.append(_group_of(piece.y))
    loss = loss / count if count else math.nan
    if not hits:
        return Quality(loss, 1.0)
    right, group = torch.cat(hits), torch.cat(groups)
    worst = min(float(right[group == g].double().mean()) for g in torch.unique(group))
    each = (right, torch.cat(chances), group)
    return Quality(loss, worst, *(tuple(values.tolist()) for values in each))


def _chances(logits: Tensor, y: Tensor) -> Tensor:
    """What probability a model gives the right answer to each target that `right_answers` counts."""
    if y.is_floating_point():
        return torch.where(y > 0.5, logits, -logits).sigmoid().flatten()
    named = logits.gather(-1, y.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return (named - logits.logsumexp(-1)).exp()[y != IGNORED]


def _group_of(y: Tensor) -> Tensor:
    """What each target that `right_answers` counts belongs to: its class, its label, or all to one."""
    if y.is_floating_point():
        return torch.arange(y[0].numel(), device=y.device).repeat(len(y))
    known = y[y != IGNORED]
    return known if y.ndim == 1 else torch.zeros_like(known)
