"""What the user's function gives: a model that learns, its data, perhaps its defence; checked before anything runs."""

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mithridate.core.batch import AnyBatch, Batch, check_batch, each_tensor, tensors_of
from mithridate.core.defence import Defence
from mithridate.core.domain import PIXELS, Domain
from mithridate.core.errors import ComponentError, ConfigError, DataError, UserError, nearest, said, shown
from mithridate.core.plugins import absolute, module_of
from mithridate.core.seeding import derived_seed, seeded_default
from mithridate.core.targets import Criterion
from mithridate.data.stream import Stream
from mithridate.guard import forms
from mithridate.guard.loop import Guard
from mithridate.guard.loop_door import GUARDED, defence_of

IMAGE_DIMENSIONS = 4

LABELS = (*forms.LABELS, "y")
"""Under which key a mapping that is a whole batch may hold its targets: those that a guard takes, and one more."""


@dataclass(frozen=True, eq=False)
class Target:
    """What is audited, as it stands before the stream; the target function gives one a seed.

    Args:
        model: Any module that gives logits, a tensor or an object with `.logits`.
        optimizer: A torch optimiser over its parameters, with the state that it has.
        criterion: (logits, targets) -> mean loss.
        stream: The batches that the model is going to learn from, in order: a list, a data loader, or a `Stream`, which
            brings trusted, test and attacker's samples and the domain with it. A batch is a `Batch`, a pair of inputs
            and targets, or a mapping with its targets under `labels`.
        trusted: Samples that the owner knows to be clean, for defences that want some: a batch, or several.
        test: What accuracy is measured on: a batch, or several.
        defence: The guard in the user's loop: what `mi.guard.attach` gave, or a defence as that takes it (an object, a
            name, `recommended`, a table). Of a guard, its defence is tried, not its `warm_up`, `every` and the like.
        domain: What a valid input is. Unset: [0, 1] of images, any number of other inputs.
        validation: Samples that the attacker has. Unset: half of the test samples, 500 at most, on which accuracy is
            then not measured.
        older: States of the model from before (`model.state_dict()`), by epoch, for defences that look back at one.
        training: Samples that the model was trained on before the stream, for defences that compare with some
            (`filter`): a batch, or several. Not the trusted ones, which the model should not know.
    """

    model: nn.Module
    optimizer: Optimizer
    criterion: Criterion
    stream: Any
    trusted: Any = None
    test: Any = None
    defence: Guard | Defence | str | Mapping[str, Any] | None = None
    domain: Domain | None = None
    validation: Any = None
    older: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    training: Any = None

    @classmethod
    def from_arrays(
        cls,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: Criterion,
        x: object,
        y: object,
        *,
        defence: Guard | Defence | str | Mapping[str, Any] | None = None,
        older: Mapping[int, Mapping[str, Tensor]] | None = None,
        training: object = None,
        **settings: object,
    ) -> "Target":
        """A target whose data are arrays.

        Args:
            model: Any module that gives logits, a tensor or an object with `.logits`.
            optimizer: A torch optimiser over its parameters, with the state that it has.
            criterion: (logits, targets) -> mean loss.
            x: Inputs that the model has not learned from.
            y: Their targets.
            defence: The guard in the user's loop, as in `Target`.
            older: States of the model from before, by epoch, as in `Target`.
            training: Samples that the model was trained on, as in `Target`.
            settings: Of `Stream.from_arrays`: how many samples are the victim's, trusted, the attacker's (`validation`)
                and for tests, `batch_size`, `seed`, `domain`.

        Raises:
            ConfigError: A setting is unknown or out of its range.
            DataError: The arrays do not fit each other, or are too short.
        """
        checked_there: dict[str, Any] = settings
        stream = Stream.from_arrays(x, y, **checked_there)
        return cls(model, optimizer, criterion, stream, defence=defence, older=older or {}, training=training)


@dataclass(frozen=True, eq=False)
class TargetSamples:
    """The data of a target, checked.

    Args:
        batches: Of the stream, as many as a run takes, one more than the phase.
        trusted: None if there are none.
        test: What accuracy is measured on.
        validation: The attacker's own.
        domain: What a valid input is.
        training: What the model was trained on before; None if there is nothing.
    """

    batches: Sequence[AnyBatch]
    trusted: AnyBatch | None
    test: AnyBatch
    validation: AnyBatch
    domain: Domain
    training: AnyBatch | None = None


def target_function(spelled: str, folder: Path) -> Callable[..., Any]:
    """The function that an audit.toml names.

    Args:
        spelled: `package.module:function` or `file.py:function`.
        folder: Where the path of a file begins.

    Raises:
        ConfigError: There is none.
    """
    place, _, name = spelled.rpartition(":")
    if not place or not name.isidentifier():
        raise ConfigError(f"target = {shown(spelled)}: write package.module:function or file.py:function.")
    module = module_of(absolute(place, folder))
    function = getattr(module, name, None)
    if not callable(function):
        defined = {key: v for key, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
        inside = [key for key, value in defined.items() if callable(value)]
        raise ConfigError(f"target = {shown(spelled)}: {place} has no function {shown(name)}: {nearest(name, inside)}")
    return cast("Callable[..., Any]", function)


def called(function: Callable[..., Any], seed: int) -> Target:
    """What a target function gives for a seed; torch's own generators are seeded while it works.

    Args:
        function: Called as `function(seed=seed)`.
        seed: Of the runs.

    Raises:
        ComponentError: It raised.
        DataError: It gave something else.
    """
    name = getattr(function, "__name__", "the target")
    try:
        with seeded_default(derived_seed("audit target", seed)):
            target = function(seed=seed)
    except UserError:
        raise
    except Exception as error:  # whatever the user's code can raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ComponentError(
            f"the target function {name} raised {type(error).__name__}: {said(error)} ({last.filename}, line "
            f"{last.lineno}); mend it: it is called as {name}(seed={seed}) and returns mi.audit.Target(...)."
        ) from error
    if not isinstance(target, Target):
        raise DataError(
            f"the target function {name} gave a {type(target).__name__}; it must return mi.audit.Target(model, "
            "optimizer, criterion, stream, trusted=..., test=...)."
        )
    return target


def guard_of(target: Target) -> Defence | None:
    """A target's defence as an object; a guard is taken off its loop, for the audit takes the steps itself.

    Raises:
        ConfigError: Its name or settings are wrong, or the optimiser is guarded and the target does not say by what.
    """
    given = target.defence
    if isinstance(given, Guard):
        given.detach()
        return given.defence
    if target.optimizer in GUARDED:
        raise ConfigError(
            "the target's optimiser is guarded already; give the guard itself, Target(..., defence=guard)."
        )
    return None if given is None else defence_of(given)


def samples_of(target: Target, batches: int, seed: int) -> TargetSamples:
    """A target's data, checked.

    Args:
        target: What the function gave.
        batches: Of a run: those of the phase and the last one.
        seed: Draws the order of a `Stream`, and which test samples the attacker has.

    Raises:
        DataError: Something is missing, too short, or no batch.
    """
    test, validation, trusted, domain = target.test, target.validation, target.trusted, target.domain
    if isinstance(target.stream, Stream):
        of = target.stream
        of.require(batches - 1)
        stream: list[AnyBatch] = [of.victim_batch(step, seed) for step in range(batches)]
        test = of.test.all() if test is None and len(of.test) else test
        trusted = of.trusted.all() if trusted is None and len(of.trusted) else trusted
        validation = of.validation.all() if validation is None and len(of.validation) else validation
        domain = of.domain if domain is None else domain
    elif target.stream is None:
        raise DataError("the target has no stream; give the batches that the model is going to learn from.")
    else:
        stream = [_batch(b, f"stream, batch {i}") for i, b in enumerate(islice(_several(target.stream), batches))]
        if len(stream) < batches:
            raise DataError(
                f"the target's stream has {len(stream)} batches, and a run takes {batches}: those of [budget] batches, "
                "and a last one. Give more, or lower [budget] batches."
            )
    if test is None:
        raise DataError("the target has no test samples, on which accuracy is measured; give Target(..., test=...).")
    measured = _joined(test, "test samples")
    if validation is None:
        measured, attackers = _halved(measured, seed)
    else:
        attackers = _joined(validation, "validation samples")
    known = None if trusted is None else _joined(trusted, "trusted samples")
    learned = None if target.training is None else _joined(target.training, "training samples")
    others = {"test": measured, "validation": attackers, "trusted": known, "training": learned}
    _check_alike(stream[0], {f"{name} samples": batch for name, batch in others.items()})
    return TargetSamples(stream, known, measured, attackers, _domain(domain, stream), learned)


def _several(value: object) -> Iterable[object]:
    if not isinstance(value, Iterable) or isinstance(value, Tensor | str | Mapping | Batch):
        raise DataError(f"the target's stream is a {type(value).__name__}; give a list or a loader of batches.")
    return value


def _batch(value: object, where: str) -> AnyBatch:
    """One batch, however it is written."""
    if isinstance(value, Mapping):
        key = next((key for key in LABELS if key in value), None)
        if key is None:
            raise DataError(f"{where} is a mapping without {', '.join(LABELS)}; give its targets under 'labels'.")
        value = Batch({str(k): t for k, t in value.items() if k != key}, value[key])
    elif isinstance(value, tuple | list) and len(value) == 2 and not isinstance(value, Batch):
        value = Batch(*value)
    batch = cast("AnyBatch", value)  # whatever a user calls one: what is none is refused in the next line
    check_batch(batch, where=where)
    if not isinstance(batch.x, Tensor | Mapping):
        raise DataError(f"{where}: inputs are a {type(batch.x).__name__}; give a tensor, or a mapping by argument.")
    if any(t.dtype == torch.uint8 for t in tensors_of(batch.x)):
        raise DataError(f"{where}: inputs are bytes; give floats, of images in [0, 1]: divide by 255.")
    if not bool(batch.finite().all()):
        raise DataError(f"{where} holds NaN or infinity; an audit begins with clean samples.")
    return batch.each(Tensor.detach).with_class_numbers()


def _joined(value: object, where: str) -> AnyBatch:
    """A batch, or several as one."""
    single = isinstance(value, Batch | Mapping) or (
        isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[1], Tensor)
    )
    if single:
        return _batch(value, where)
    if not isinstance(value, Iterable):
        raise DataError(f"{where} are a {type(value).__name__}; give a batch, or a list of batches.")
    pieces = [_batch(piece, where) for piece in value]
    if not pieces:
        raise DataError(f"{where}: there are none; give some.")
    first = pieces[0].x
    if isinstance(first, Tensor):
        x: Any = torch.cat([piece.x for piece in pieces])
    else:
        x = {key: torch.cat([piece.x[key] for piece in pieces]) for key in first}
    return Batch(x, torch.cat([piece.y for piece in pieces]))


def _halved(test: AnyBatch, seed: int) -> tuple[AnyBatch, AnyBatch]:
    """Test samples without those that the attacker has, and those."""
    if test.size < 4:
        raise DataError(f"{test.size} test samples are too few to give the attacker some; give more, or `validation`.")
    order = torch.randperm(test.size, generator=torch.Generator().manual_seed(derived_seed("audit validation", seed)))
    size = min(test.size // 2, 500)
    return test.take(order[size:].sort().values), test.take(order[:size].sort().values)


def _check_alike(first: AnyBatch, others: Mapping[str, AnyBatch | None]) -> None:
    def kind(batch: AnyBatch) -> object:
        inputs = each_tensor(batch.x, lambda t: (t.dtype, t.shape[1:]))
        return inputs, batch.y.dtype, batch.y.shape[1:]

    for name, batch in others.items():
        if batch is not None and kind(batch) != kind(first):
            raise DataError(
                f"the target's {name} are of another kind than the stream's first batch (types or shapes: "
                f"{kind(batch)}, not {kind(first)}); make them alike."
            )


def _domain(domain: Domain | None, stream: Sequence[AnyBatch]) -> Domain:
    x = stream[0].x
    if domain is not None:
        return Domain(*domain)
    if isinstance(x, Tensor) and x.is_floating_point() and x.ndim == IMAGE_DIMENSIONS:
        if all(PIXELS.holds(batch.x) for batch in stream):
            return PIXELS
        raise DataError(
            "the stream's images leave [0, 1], so it is not known what a valid one is; give Target(..., domain=...), "
            "the least and the largest value, and eps in the same unit, or normalise inside the model."
        )
    return Domain()
