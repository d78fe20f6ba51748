"""Batches that no stream should yield, for every defence: refused in words, or learned from; the model stays finite."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mithridate.core.batch import AnyBatch, Batch, each_tensor, tensors_of
from mithridate.core.errors import UserError
from mithridate.core.registry import build, entries
from mithridate.testing.checks.worlds import World, image_world, other_worlds, tabular_world
from mithridate.training.learner import Learner
from tools.faults.case import LONGEST, Result, drawn, exception_of

WORLDS: Sequence[tuple[str, Callable[[], World]]] = (
    ("images", image_world),
    ("rows", tabular_world),
    ("tokens", lambda: other_worlds()[0]),
    ("regression", lambda: other_worlds()[1]),
)
SHARES = (6, 2, 1, 1)
"""How often each is drawn."""

MOST = 3
"""Batches of one learner."""

LARGE = (1e3, 1e10, 1e20, 1e30, 3e38)
DTYPES = (
    *(torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.uint8, torch.int8, torch.int32, torch.int64),
)


@dataclass
class Batches:
    """Batches by number; a case is a learner behind a defence that is handed up to `MOST` of them."""

    seed: int
    shared: Path
    full: int = 2000
    tables: list[dict[str, Any]] = field(default_factory=list)

    def prepare(self) -> None:
        """List every defence in its settings."""
        known = {name: cast("Any", entry.cls) for name, entry in entries("defence").items()}
        for name, cls in known.items():
            choices = [{}, cls.active, cls.active, cls.neutral]
            choices += [{"preset": preset} for preset in entries("defence")[name].presets]
            self.tables += [{"name": name, **choice} for choice in choices]
        parts = [{"name": name, **cls.active} for name, cls in known.items() if name != "chain"]
        self.tables += [{"name": "chain", "parts": [{"name": "clip", "clip_norm": 0.1}, part]} for part in parts]

    def case(self, number: int, folder: Path) -> Result:
        """Hand batches to a learner, and look at it after each."""
        rng = drawn("batches", self.seed, number)
        name, make_world = rng.choices(WORLDS, SHARES)[0]
        table = self.tables[number % len(self.tables)]
        world = make_world()
        learner = world.learner
        learner.defence = build("defence", table)
        what = [f"{name}, {table}"]
        try:
            learner.defence.check_inputs(world.batches[0])
        except UserError as error:
            return Result("refused", what[0], str(error), 1)
        result = Result("same", "", "", 0)
        for size in range(1, rng.randint(1, MOST) + 1):
            batch, how = spoilt(rng.choice(world.batches), rng)
            what.append(how)
            result = _handed(learner, batch)._replace(what="; ".join(what), size=size)
            if result.outcome in {"exception", "silent"}:
                break
        return result


def _handed(learner: Learner, batch: Any) -> Result:  # noqa: ANN401  (what is handed in may be anything)
    """Let a learner learn from a batch, and compare what it and its caller have with what they had."""
    before, given, drawn_before = _state(learner), _bits(batch), torch.get_rng_state()
    try:
        result = Result("same", "", learner.update(batch).verdict.reason)
    except UserError as error:
        result = Result("refused", "", str(error))
        if not 0 < len(str(error)) < LONGEST:
            result = Result("exception", "", f"a message of {len(str(error))} characters: {str(error)[:200]}")
    except Exception as error:  # that is what is looked for
        return Result("exception", "", exception_of(error))
    after = _state(learner)
    changed = [key for key in before.keys() | after.keys() if not _same(before.get(key), after.get(key))]
    bad = [name for name, t in _weights(learner).items() if not bool(torch.isfinite(t).all())]
    fault = ""
    if result.outcome != "same" and changed:
        fault = f"refused, and yet changed: {', '.join(sorted(changed)[:3])}"
    elif bad:
        fault = f"the model is not finite: {', '.join(bad[:3])}"
    elif _bits(batch) != given:
        fault = "the caller's tensors changed"
    elif not torch.equal(drawn_before, torch.get_rng_state()):
        fault = "it drew from the global generator"
    return Result("silent", "", fault) if fault else result


def _weights(learner: Learner) -> dict[str, Tensor]:
    model = learner.model
    return {n: t for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_floating_point()}


def _state(learner: Learner) -> dict[str, Any]:
    """All that must be as before after a refusal."""
    snapshot = learner.snapshot()
    state: dict[str, Any] = {f"parameter {n}": t for n, t in snapshot.parameters.items()}
    state |= {f"buffer {n}": t for n, t in snapshot.buffers.items()}
    state |= {f"note {n}": t.clone() for n, t in learner.memory.items()}
    for index, values in snapshot.optimiser["state"].items():
        state |= {f"optimiser {index} {key}": value for key, value in values.items()}
    state["groups"] = repr(snapshot.optimiser["param_groups"])
    state["step"] = learner.step
    state["train flags"] = [m.training for m in learner.model.modules()]
    if learner.history is not None:
        state |= {f"past {n}": t.clone() for n, t in learner.history.tensors().items()}
    return state


def _same(a: Any, b: Any) -> bool:  # noqa: ANN401  (a tensor or a plain value)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
    return type(a) is type(b) and bool(a == b)


def _bits(batch: Any) -> list[bytes]:  # noqa: ANN401  (what is handed in may be anything)
    """The bits of a batch's tensors, as far as it has any."""
    if not isinstance(batch, Batch):
        return []
    inputs = tensors_of(batch.x) if isinstance(batch.x, Tensor | Mapping | list) else []
    tensors = [t.detach() for t in [*inputs, batch.y] if isinstance(t, Tensor)]
    real = [t.contiguous() for t in tensors if t.layout is torch.strided and t.device.type == "cpu"]
    return [t.view(-1).view(torch.uint8).numpy().tobytes() if t.ndim else repr(t).encode() for t in real]


def spoilt(batch: AnyBatch, rng: Random) -> tuple[Any, str]:
    """A batch that is not as it should be, and how; now and then one that is.

    Args:
        batch: One that is as it should be; left alone.
        rng: Decides how.
    """
    spoilt: Any = batch.clone()
    hows = []
    for _ in range(rng.choice([0, 1, 1, 1, 1, 2])):
        if not isinstance(spoilt, Batch):
            break
        name = rng.choice(list(SPOILERS))
        try:
            spoilt = SPOILERS[name](spoilt, rng)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
            continue  # what has been spoilt already cannot be spoilt so
        hows.append(name)
    return spoilt, " and ".join(hows) or "as it should be"


def _inputs(batch: AnyBatch, change: Callable[[Tensor], Tensor]) -> AnyBatch:
    """Other inputs, where they are numbers."""
    return Batch(each_tensor(batch.x, change), batch.y)


def _somewhere(t: Tensor, value: float, rng: Random, *, samples: int) -> Tensor:
    """A value in some places of some samples."""
    if not t.is_floating_point() or t.ndim == 0:
        return t
    t = t.clone()
    for sample in rng.sample(range(len(t)), min(samples, len(t))):
        flat = t[sample].view(-1) if t.ndim > 1 else t[sample : sample + 1]
        flat[rng.sample(range(len(flat)), rng.randint(1, len(flat)))] = value
    return t


def _values(value: float, share: float) -> Callable[[AnyBatch, Random], AnyBatch]:
    def change(batch: AnyBatch, rng: Random) -> AnyBatch:
        samples = max(1, round(share * batch.size))
        return _inputs(batch, lambda t: _somewhere(t, value, rng, samples=samples))

    return change


def _targets(change: Callable[[Tensor, Random], Any]) -> Callable[[AnyBatch, Random], AnyBatch]:
    return lambda batch, rng: Batch(batch.x, change(batch.y, rng))


def _label(value: int, *, of_all: bool = False) -> Callable[[Tensor, Random], Tensor]:
    def change(y: Tensor, rng: Random) -> Tensor:
        y = y.clone()
        y[slice(None) if of_all else rng.randrange(len(y))] = value
        return y

    return change


def _x(change: Callable[[Tensor], Any]) -> Callable[[AnyBatch, Random], AnyBatch]:
    return lambda batch, _: _inputs(batch, change)


def _many(batch: AnyBatch, _: Random) -> AnyBatch:
    return batch.take(torch.arange(3000) % batch.size)


def _written_to(batch: AnyBatch, rng: Random) -> AnyBatch:
    """Samples that share memory: one image, expanded."""
    return batch._replace(x=each_tensor(batch.x, lambda t: t[:1].expand(batch.size, *t.shape[1:])))


SPOILERS: dict[str, Callable[[AnyBatch, Random], Any]] = {
    "NaN in one sample": _values(float("nan"), 0),
    "NaN in half": _values(float("nan"), 0.5),
    "NaN in all": _values(float("nan"), 1),
    "infinity in one sample": _values(float("inf"), 0),
    "minus infinity in all": _values(float("-inf"), 1),
    **{f"{value:g} in one sample": _values(value, 0) for value in LARGE},
    **{f"{-value:g} in all": _values(-value, 1) for value in LARGE},
    "a little out of the domain": _x(lambda t: t * 1.2 - 0.1 if t.is_floating_point() else t),
    "bytes for pixels": _x(lambda t: t * 255),
    "all zero": _x(torch.zeros_like),
    "subnormal": _x(lambda t: t * 1e-42 if t.is_floating_point() else t),
    "token numbers out of range": _x(lambda t: t if t.is_floating_point() else t + 10**6),
    "negative token numbers": _x(lambda t: t if t.is_floating_point() else -t - 1),
    **{f"inputs as {dtype}": _x(partial(lambda d, t: t.to(d), dtype)) for dtype in DTYPES},
    "one more dimension": _x(lambda t: t.unsqueeze(-1)),
    "flat": _x(lambda t: t.flatten(1)),
    "one dimension less": _x(lambda t: t[:, 0]),
    "samples last": _x(lambda t: t.movedim(0, -1)),
    "no features": _x(lambda t: t[:, :0]),
    "three channels": _x(lambda t: torch.cat([t, t, t], 1)),
    "no width": _x(lambda t: t[..., :0]),
    "cropped": _x(lambda t: t[..., :-1]),
    "no samples": lambda batch, _: batch.take(slice(0, 0)),
    "one sample": lambda batch, _: batch.take(slice(0, 1)),
    "two samples": lambda batch, _: batch.take(slice(0, 2)),
    "three thousand samples": _many,
    "one sample many times": _written_to,
    "more inputs than targets": lambda batch, _: Batch(batch.x, batch.y[:-1]),
    "more targets than inputs": lambda batch, _: Batch(each_tensor(batch.x, lambda t: t[:-1]), batch.y),
    "a label of -1": _targets(_label(-1)),
    "a label of -100": _targets(_label(-100)),
    "all labels -100": _targets(_label(-100, of_all=True)),
    "a label of a million": _targets(_label(10**6)),
    "all labels out of range": _targets(_label(99, of_all=True)),
    "the largest label there is": _targets(_label(2**62)),
    "one label for all": _targets(_label(0, of_all=True)),
    **{f"targets as {dtype}": _targets(partial(lambda d, y, _: y.to(d), dtype)) for dtype in (torch.float32, *DTYPES)},
    "targets with NaN": _targets(lambda y, rng: _somewhere(y.float(), float("nan"), rng, samples=1)),
    "targets with infinity": _targets(lambda y, rng: _somewhere(y.float(), float("inf"), rng, samples=len(y))),
    "huge targets": _targets(lambda y, _: y.float() * 1e30),
    "targets of one column": _targets(lambda y, _: y.unsqueeze(1)),
    "one-hot targets": _targets(lambda y, _: torch.nn.functional.one_hot(y.flatten() % 3, 3)),
    "a target that is a single number": _targets(lambda y, _: y.flatten()[0]),
    "targets as a list": _targets(lambda y, _: y.tolist()),
    "no targets": _targets(lambda y, _: None),
    "targets as numpy": _targets(lambda y, _: y.numpy()),
    "inputs as numpy": _x(lambda t: t.numpy()),
    "inputs as a list of numbers": lambda batch, _: Batch(np.asarray(batch.x).tolist(), batch.y),
    "inputs as text": lambda batch, _: Batch("images", batch.y),
    "no inputs": lambda batch, _: Batch(None, batch.y),
    "a mapping": lambda batch, _: Batch({"x": tensors_of(batch.x)[0]}, batch.y),
    "an empty mapping": lambda batch, _: Batch({}, batch.y),
    "a sequence": lambda batch, _: Batch([tensors_of(batch.x)[0]] * 2, batch.y),
    "a plain pair": lambda batch, _: (batch.x, batch.y),
    "a mapping of both": lambda batch, _: {"x": batch.x, "y": batch.y},
    "nothing": lambda batch, _: None,
    "inputs that want gradients": _x(lambda t: t.requires_grad_() if t.is_floating_point() else t),
    "inputs behind a graph": _x(lambda t: t.clone().requires_grad_() * 1 if t.is_floating_point() else t),
    "sparse inputs": _x(lambda t: t.to_sparse()),
    "inputs on no device": _x(lambda t: t.to("meta")),
    "targets on no device": _targets(lambda y, _: y.to("meta")),
    "not contiguous": _x(lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 2 else t),
    "channels last": _x(lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t),
    "in inference mode": lambda batch, _: _inference(batch),
}


def _inference(batch: AnyBatch) -> AnyBatch:
    with torch.inference_mode():
        return batch.clone()


def make(seed: int, shared: Path) -> Batches:
    """The kind, for a seed, with what its cases share in a folder."""
    return Batches(seed, shared)
