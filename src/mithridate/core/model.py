"""The page to read first: what flows through the library, and what an attack, a defence, a detector and a monitor are.

A stream yields a `Batch`; an `Attack` may change it; a learner updates on it, and on the way asks a `Defence` three
times; a `Detector` scores single samples; a `Monitor` reads what a service publishes. All but the monitor see the world
through a `View` that holds only what they declare in `needs`, so the threat model is part of the type.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from mithridate.core.errors import CheckpointError, DataError, ThreatModelError
from mithridate.maths.calculus import Objective, Parameters
from mithridate.maths.norms import Ball

PIXEL_TOLERANCE = 1e-4
"""How far outside [0, 1] a pixel may lie before a batch is refused: float arithmetic is not exact."""

BatchNormMode = Literal["eval", "train"]
"""`eval`: running statistics; `train`: the statistics of the batch."""

Criterion = Callable[[Tensor, Tensor], Tensor]
"""(logits, labels) -> mean loss."""

Memory = dict[str, Tensor]
"""A component's private notes between steps. The loop saves them, so a resumed run remembers."""

FLAGGED = "flagged"
"""Where a defence that treats samples unlike each other notes, in `screen`, which of them it corrected, dropped or gave
less weight: (n,) bool over the batch that it was given. The learner clears it before every batch. For measurement."""


class Batch(NamedTuple):
    """What a stream yields.

    Shape:
        x (n, channels, height, width) float, pixels in [0, 1]; y (n,) int64.
    """

    x: Tensor
    y: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(self.x.to(device), self.y.to(device))


def check_batch(batch: Batch, *, n_classes: int | None = None, where: str = "batch") -> None:
    """Refuse a batch that must not reach a model.

    Args:
        batch: What to check.
        n_classes: Labels must lie in [0, n_classes); None skips that check.
        where: Named in the message.

    Raises:
        DataError: Wrong shape, empty, lengths differ, pixels are not float, not finite or outside [0, 1], labels are
            not int64 or out of range.
    """
    x, y = batch
    if x.ndim < 2 or y.ndim != 1:
        raise DataError(
            f"{where}: images of shape {tuple(x.shape)} and labels of shape {tuple(y.shape)}; a batch is "
            "(n, channels, height, width) and (n,)."
        )
    if len(x) == 0 or len(x) != len(y):
        raise DataError(f"{where}: {len(x)} images and {len(y)} labels; a batch needs as many of each, at least one.")
    if not x.is_floating_point():
        raise DataError(
            f"{where}: pixels are {x.dtype}; convert to float and divide by 255 so that they lie in [0, 1]."
        )
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
        raise DataError(
            f"{where}: {bad} of {len(x)} images hold NaN or infinite pixels; drop them before they come here."
        )
    low, high = float(x.min()), float(x.max())
    if low < -PIXEL_TOLERANCE or high > 1 + PIXEL_TOLERANCE:
        raise DataError(
            f"{where}: pixels span [{low:.4g}, {high:.4g}], outside [0, 1]; scale them. Normalisation (mean, std) "
            "belongs inside the model, not in the stream."
        )
    if y.dtype != torch.int64:
        raise DataError(f"{where}: labels are {y.dtype}; class numbers must be int64.")
    if n_classes is not None and (int(y.min()) < 0 or int(y.max()) >= n_classes):
        raise DataError(
            f"{where}: labels span [{int(y.min())}, {int(y.max())}], but the model has {n_classes} classes "
            f"(0 to {n_classes - 1})."
        )


@dataclass(frozen=True)
class Snapshot:
    """All that a learner is at one moment: a value, detached copies, restored bit for bit.

    Args:
        parameters: Parameters by name.
        buffers: Buffers by name (BatchNorm statistics among them).
        optimiser: The optimiser's state dict (momentum and the like).
        step: Number of updates made.
    """

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    optimiser: Mapping[str, Any]
    step: int


@dataclass(frozen=True)
class Gradient:
    """Updates as a matrix (client, parameter). Online learning is the case of one client.

    Args:
        rows: (clients, parameters), each row the parameter tensors laid end to end.
        shapes: Name and shape of each tensor, in that order.
        clients: (clients,) int64, whose rows they are; None where that is not known.
    """

    rows: Tensor
    shapes: Mapping[str, torch.Size]
    clients: Tensor | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Gradient":
        """One client's tensors as a one-row matrix (a copy)."""
        flat = torch.cat([t.detach().reshape(-1) for t in tensors.values()])
        return cls(flat.unsqueeze(0), {name: t.shape for name, t in tensors.items()})

    def named(self, row: int = 0) -> Parameters:
        """One row back as tensors by name (views of it)."""
        pieces = torch.split(self.rows[row], [shape.numel() for shape in self.shapes.values()])
        return {name: p.view(shape) for (name, shape), p in zip(self.shapes.items(), pieces, strict=True)}

    def with_rows(self, rows: Tensor) -> "Gradient":
        """The same layout with other values."""
        return replace(self, rows=rows)


class Need(StrEnum):
    """What a component may ask to see. An honest comparison names these beside each result."""

    MODEL = "white-box model"
    VALIDATION = "validation batch"
    TRIGGER = "the clean trigger batch in advance"
    ACCURACY = "the accuracy that the service publishes"
    TRUSTED = "trusted set"
    HISTORY = "history of the model's own past"
    TRAINING = "clean samples that the model was trained on before the stream"
    SURROGATE = "surrogate model of the attacker's own"


@dataclass(frozen=True)
class WhiteBox:
    """Read access to a model: its parameters, and its loss as a pure function of parameters and pixels.

    Args:
        module: The model; never changed through this object.
        criterion: (logits, labels) -> mean loss.
    """

    module: nn.Module
    criterion: Criterion

    @property
    def parameters(self) -> Parameters:
        """The trainable parameters, detached (they share memory with the model: do not write)."""
        return {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}

    @contextmanager
    def objective(self, mode: BatchNormMode = "eval") -> Iterator[Objective]:
        """The loss as a pure function, with BatchNorm in the given mode; flags and statistics come back untouched.

        Args:
            mode: `eval` uses the running statistics. `train` uses those of the batch and records nothing.
        """
        with frozen_statistics(self.module, mode):

            def objective(parameters: Parameters, x: Tensor, y: Tensor) -> Tensor:
                return self.criterion(functional_call(self.module, parameters, (x,)), y)

            yield objective


@contextmanager
def frozen_statistics(module: nn.Module, mode: BatchNormMode) -> Iterator[None]:
    """Put a model in eval or train mode without letting BatchNorm record; every flag comes back as it was.

    Args:
        module: The model.
        mode: `eval` or `train`.
    """
    training = {name: m.training for name, m in module.named_modules()}
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracking = [m.track_running_stats for m in norms]
    module.train(mode == "train")
    if mode == "train":
        for m in norms:
            m.track_running_stats = False
    try:
        yield
    finally:
        for name, m in module.named_modules():
            m.training = training[name]
        for m, flag in zip(norms, tracking, strict=True):
            m.track_running_stats = flag


@dataclass(frozen=True)
class View:
    """What one component sees at one step: its own notes, and the things that it declared in `needs`.

    Args:
        step: Updates that the learner has made since the stream began.
        memory: The component's private notes; writing to it is how a component remembers.
        things: Everything that can be granted, by need.
        granted: Which of them this component may look at.
        owner: The component's name, for messages.

    Raises:
        ThreatModelError: On looking at something that was not declared.
    """

    step: int = 0
    memory: Memory = field(default_factory=dict)
    things: Mapping[Need, Any] = field(default_factory=dict)
    granted: frozenset[Need] = frozenset(Need)
    owner: str = "this component"

    def _get(self, need: Need) -> Any:  # noqa: ANN401  (typed by the properties below)
        if need not in self.granted:
            raise ThreatModelError(f"{self.owner} looked at the {need}, but does not declare it: add it to `needs`.")
        if need not in self.things:
            raise ThreatModelError(f"{self.owner} needs the {need}, and this learner or stream has none: supply one.")
        return self.things[need]

    @property
    def model(self) -> WhiteBox:
        """The victim's model (`Need.MODEL`)."""
        box: WhiteBox = self._get(Need.MODEL)
        return box

    @property
    def validation(self) -> Batch:
        """The attacker's own validation images, S_val (`Need.VALIDATION`)."""
        batch: Batch = self._get(Need.VALIDATION)
        return batch

    @property
    def clean_trigger(self) -> Batch:
        """The batch S_T that will be the trigger, before poisoning (`Need.TRIGGER`)."""
        batch: Batch = self._get(Need.TRIGGER)
        return batch

    @property
    def accuracy(self) -> tuple[float, float]:
        """Published accuracy at the start and now, fractions (`Need.ACCURACY`)."""
        pair: tuple[float, float] = self._get(Need.ACCURACY)
        return pair

    @property
    def history(self) -> "Past":
        """The model's own past (`Need.HISTORY`)."""
        past: Past = self._get(Need.HISTORY)
        return past

    @property
    def trusted(self) -> Batch:
        """Samples that the defender knows to be clean (`Need.TRUSTED`)."""
        batch: Batch = self._get(Need.TRUSTED)
        return batch

    @property
    def training(self) -> Iterable[Batch]:
        """Batches that the model was trained on before the stream; may be iterated again (`Need.TRAINING`)."""
        batches: Iterable[Batch] = self._get(Need.TRAINING)
        return batches

    @property
    def surrogate(self) -> WhiteBox:
        """Another model than the victim's, which an attacker without access to the victim holds (`Need.SURROGATE`)."""
        box: WhiteBox = self._get(Need.SURROGATE)
        return box


class Past(Protocol):
    """A model's own past, as a defence or an attack may look at it."""

    def back(self, k: int) -> "Weights | None":
        """The model as it was `k` updates ago, or the nearest kept state older than that; None if there is none."""

    def checkpoint(self, epoch: int | None = None) -> "Weights | None":
        """The model at the end of a burn-in epoch; unset: the earliest kept one. None if there is none."""


@dataclass(frozen=True)
class Weights:
    """Parameters and buffers of one past model.

    Args:
        parameters: By name.
        buffers: By name.
        label: When it was, for messages.
    """

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    label: str = ""

    def logits(self, module: nn.Module, x: Tensor) -> Tensor:
        """What that model says of `x`, in eval mode, through a module of the same architecture.

        Raises:
            CheckpointError: It is of another architecture or class count.
        """
        now = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        held = {**self.parameters, **self.buffers}
        if now.keys() != held.keys() or any(now[name].shape != held[name].shape for name in now):
            raise CheckpointError(
                f"the old model ({self.label or 'unnamed'}) is of another architecture or class count than the current "
                "one; look back at a state of the same model."
            )
        with frozen_statistics(module, "eval"):
            logits: Tensor = functional_call(module, held, (x,))
        return logits


class Attack(ABC):
    """Poisons the batches of a stream, then one trigger batch.

    An author writes `craft` (and `craft_trigger` or `ready` where they differ from the defaults); the loop calls
    `poison` and `trigger`, which check what goes in and hold what comes out to the budget.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    """What the attack sees besides the batch."""

    control: ClassVar[bool] = False
    """Whether it is a control, which is not meant to beat noise."""

    weight_momentum: float | None = None
    """Momentum factor that the attack imposes on the victim's optimiser in the accumulative phase; None leaves it."""

    @property
    @abstractmethod
    def ball(self) -> Ball:
        """The perturbation budget of one image."""

    @property
    @abstractmethod
    def ratio(self) -> float:
        """Share of each batch that may be poisoned, in [0, 1]."""

    @abstractmethod
    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        """Perturbed pixels for one batch of the accumulative phase.

        Args:
            batch: The clean batch (n, c, h, w), (n,).
            view: What the attack declared.
            mask: (n,) bool, the samples that may change.
            rng: The only source of randomness.
        """

    def craft_trigger(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        """Perturbed pixels for the trigger batch; by default the same as for any other batch."""
        return self.craft(batch, view, mask, rng)

    def ready(self, view: View) -> bool:
        """Whether the accumulative phase should end now; asked before every batch. By default it never should."""
        return False

    def fed(self, view: View, rng: Generator) -> None:  # noqa: B027  (a hook: doing nothing is a complete answer)
        """Called after the victim has learned from a poisoned batch; `view` shows the updated model."""

    def poison(self, batch: Batch, view: View, *, rng: Generator) -> Batch:
        """One batch of the accumulative phase, poisoned within the budget.

        Args:
            batch: The clean batch; not changed.
            view: What the attack declared.
            rng: The only source of randomness.

        Returns:
            A batch of the same shape, dtype, device and labels.

        Raises:
            DataError: The batch must not reach a model (see `check_batch`).
            AssertionError: The attack broke its own budget; a defect in it.
        """
        return self._guarded(self.craft, batch, view, rng)

    def trigger(self, batch: Batch, view: View, *, rng: Generator) -> Batch:
        """The trigger batch, poisoned within the budget; arguments and errors as in `poison`."""
        return self._guarded(self.craft_trigger, batch, view, rng)

    def _guarded(
        self,
        craft: Callable[[Batch, View, Tensor, Generator], Tensor],
        batch: Batch,
        view: View,
        rng: Generator,
    ) -> Batch:
        name = type(self).__name__
        check_batch(batch, where=f"batch given to {name}")
        mask = self.positions(len(batch.x), view, rng).to(batch.x.device)
        if self.ball.eps == 0 or not bool(mask.any()):
            return batch
        x = craft(
            Batch(batch.x.clone(), batch.y.clone()), view, mask.clone(), rng
        ).detach()  # copies: what counts is ours
        if (x.shape, x.dtype, x.device) != (batch.x.shape, batch.x.dtype, batch.x.device):
            raise AssertionError(f"{name} made {x.dtype} {tuple(x.shape)} of {batch.x.dtype} {tuple(batch.x.shape)}")
        x = torch.where(mask.view(-1, *[1] * (x.ndim - 1)), x, batch.x)
        poisoned = Batch(x, batch.y)
        check_batch(poisoned, where=f"batch made by {name}")
        if not self.ball.holds(x - batch.x):
            raise AssertionError(f"{name} left its {self.ball.norm} ball of radius {self.ball.eps}")
        return poisoned

    def positions(self, n: int, view: View, rng: Generator) -> Tensor:
        """The positions that may change: drawn once, kept for the whole run and the trigger (Pang et al., Table 2)."""
        count = int(self.ratio * n + 0.5)
        key = f"positions.{n}"
        if key not in view.memory:
            view.memory[key] = torch.randperm(n, generator=rng)
        mask = torch.zeros(n, dtype=torch.bool)
        mask[view.memory[key][:count]] = True
        return mask


@dataclass(frozen=True)
class Honest:
    """What the honest part of a federated round looks like to an attacker who sees every update.

    Args:
        total: (parameters,), sum of the honest clients' rows.
        bounded_total: The same after the server's bound on single rows; equal to `total` where it bounds none.
        n_honest: How many honest clients there are.
        x: The hostile clients' own pixels (hostile clients, samples, channels, height, width).
        y: Their own labels (hostile clients, samples).
        rows: (honest clients, parameters), after the server's bound on single rows; not to be written to. Held only
            for an attack that declares `every_row`, else None.
        gradients: (pixels, labels) of all hostile clients -> the updates that they would send, a row each, as the round
            computes them.
    """

    total: Tensor
    bounded_total: Tensor
    n_honest: int
    x: Tensor
    y: Tensor
    rows: Tensor | None
    gradients: Callable[[Tensor, Tensor], Tensor]

    @cached_property
    def own(self) -> Tensor:
        """(hostile clients, parameters), what the hostile clients' own data would give; made when first looked at."""
        return self.gradients(self.x, self.y)

    @property
    def hostile(self) -> int:
        """How many hostile clients there are."""
        return len(self.x)

    @property
    def clients(self) -> int:
        """All clients of the round."""
        return self.n_honest + self.hostile

    @property
    def mean(self) -> Tensor:
        """(parameters,), what the round would come to if everyone were honest and no row bounded."""
        return (self.total + self.own.sum(0)) / self.clients


class UpdateAttack(ABC):
    """Sends model updates in place of honest ones: the attack of a federated round.

    An author writes `craft` (and `craft_trigger` or `ready` where they differ from the defaults).
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    """What the attack sees besides the honest updates."""

    control: ClassVar[bool] = False
    """Whether it is a control, which is not meant to do harm."""

    every_row: ClassVar[bool] = False
    """Whether it looks at each honest row (`Honest.rows`), not only at their sum."""

    @property
    @abstractmethod
    def ratio(self) -> float:
        """Share of a round's clients that are hostile, in [0, 1]; rounded up to a whole client."""

    @abstractmethod
    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        """(hostile clients, parameters), sent in one round before the trigger; they may be views of a single row."""

    def craft_trigger(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        """(hostile clients, parameters), sent in the trigger round; by default as in any other."""
        return self.craft(honest, view, rng)

    def ready(self, view: View) -> bool:
        """Whether the trigger should come now; asked before every round. By default never."""
        return False

    def fed(self, view: View) -> None:  # noqa: B027  (a hook: doing nothing is a complete answer)
        """Called after a round before the trigger; `view` shows the updated model."""


class Verdict(NamedTuple):
    """A defence's last word on a step.

    Args:
        admit: Keep it; False rolls back parameters, buffers and optimiser state.
        reason: Why, for the trace.
        parameters: Put these in place of the stepped ones (a shorter step, say); None keeps what the step gave.
    """

    admit: bool
    reason: str = ""
    parameters: Mapping[str, Tensor] | None = None


ADMITTED = Verdict(admit=True)


class Defence:
    """Stands between a batch and the model. Override what you use; each moment is the identity otherwise.

    A defence sees what a deployed system sees: the batch as received, its own model and notes, a trusted set if it
    declares one. It never sees which samples are poisoned.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    """What the defence sees besides the batch."""

    neutral: ClassVar[Mapping[str, Any]] = {}
    """Settings under which it changes nothing, bit for bit."""

    active: ClassVar[Mapping[str, Any]] = {}
    """Settings under which it surely acts on a toy stream; equal to `neutral` only for a defence that never acts."""

    notes_only: ClassVar[bool] = False
    """Whether its `screen` and `loss` only take notes and hand on what they are given, so that it may stand before a
    federation, whose server sees no samples."""

    @property
    def observes_loss(self) -> bool:
        """Whether its `loss` is the plain one, noted, so that it may stand beside a defence that changes the loss."""
        return self.notes_only

    @property
    def lookback(self) -> int:
        """How many updates back it looks in the model's history; 0 if only at burn-in checkpoints or not at all."""
        return 0

    def screen(self, batch: Batch, view: View) -> Batch:
        """Before the gradient: drop, weight or correct samples."""
        return batch

    def loss(self, model: nn.Module, batch: Batch, criterion: Criterion, view: View) -> Tensor:
        """The loss that is differentiated, the model being in update mode: weight samples, add a term."""
        return criterion(model(batch.x), batch.y)

    def bound(self, gradient: Gradient, view: View) -> Gradient:
        """Between gradient and step: bound or refuse it, each client's row by itself."""
        return gradient

    def factors(self, lengths: Tensor) -> Tensor | None:
        """What `bound` multiplies rows by, if their l2 lengths are all that it looks at; None if it looks at more.

        With it a server bounds many clients' updates without forming them. Whoever overrides `bound` may leave it.

        Args:
            lengths: (clients,), l2.
        """
        return torch.ones_like(lengths)

    def aggregate(self, gradient: Gradient, view: View) -> Gradient:
        """Of a federated round: all clients' rows to one; the mean by default."""
        return gradient.with_rows(gradient.rows.mean(0, keepdim=True))

    def admit(self, before: Snapshot, view: View) -> Verdict:
        """After the step: commit it, shorten it, or roll it back to `before`."""
        return ADMITTED

    def serve(self, view: View) -> Weights | None:
        """The model that answers queries, where it is another than the one that learns; None if it is that one."""
        return None


def row_factors(defence: Defence, lengths: Tensor) -> Tensor | None:
    """What a defence's `bound` multiplies rows of these l2 lengths by; None if that does not follow from the lengths.

    A class that overrides `bound` and not `factors` is taken at its `bound`, whatever it inherits.
    """
    owner = next(cls for cls in type(defence).__mro__ if "bound" in vars(cls))
    return defence.factors(lengths) if "factors" in vars(owner) else None


class Observed(NamedTuple):
    """What a model makes of samples, for detectors.

    Args:
        features: Pooled features (n, features): what goes into the last linear layer.
        logits: (n, classes).
        y: Labels as received (n,).
    """

    features: Tensor
    logits: Tensor
    y: Tensor

    @property
    def predicted(self) -> Tensor:
        """The most likely class of each sample (n,)."""
        return self.logits.argmax(1)

    def right(self) -> "Observed":
        """Only the samples that the model classifies as labelled."""
        keep = self.predicted == self.y
        return Observed(self.features[keep], self.logits[keep], self.y[keep])


class Detector(ABC):
    """Scores samples: the lower, the more suspicious.

    A detector that compares with clean samples remembers them in tensors, so that they can be saved; it is fitted once,
    before the stream, and does not follow the model.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL})
    """What `score` sees besides the batch."""

    fits: ClassVar[bool] = True
    """Whether it must be fitted on clean samples."""

    def fit(self, clean: Observed, *, rng: Generator) -> Memory:
        """What it remembers of clean samples.

        Args:
            clean: What the model makes of them; the detector itself keeps to those that are classified as labelled.
            rng: Draws which ones are kept, where not all are.

        Raises:
            DataError: Too few samples, or features that cannot be fitted; says what is needed.
        """
        return {}

    @abstractmethod
    def score(self, batch: Batch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        """One number a sample, whatever other samples are in the batch.

        Args:
            batch: As received.
            view: What the detector declared.
            fitted: From `fit`.

        Returns:
            (n,); lower is more suspicious.
        """


class Reading(NamedTuple):
    """What a service can watch after a step: fractions and mean losses; `batch_loss` is None if nothing was learned."""

    step: int
    accuracy: float
    loss: float
    batch_loss: float | None


class Monitor(ABC):
    """Watches a service's readings and raises an alarm."""

    @abstractmethod
    def alarm(self, readings: Sequence[Reading]) -> str | None:
        """The alarm's text, or None.

        Args:
            readings: All readings so far, the state before the stream first, the newest last.
        """
