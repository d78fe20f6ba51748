"""What a component leaves changed that was not its to change, call by call."""

import dataclasses
import pickle
import random
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from mithridate.core.errors import DataError, ThreatModelError, UserError
from mithridate.core.model import WhiteBox
from mithridate.core.registry import defaults, fields_of
from mithridate.core.view import Memory
from mithridate.training.history import History

Rule = Literal[
    "runs",
    "needs",
    "inputs",
    "model",
    "gradients",
    "train flags",
    "generators",
    "state",
    "notes",
    "repeats",
    "resumes",
    "batch of one",
    "dtype",
    "labels",
    "budget",
    "use of the budget",
    "domain",
    "partial ratio",
    "shape",
    "screened",
    "company",
]
"""What a fault is against."""

LONGEST = 200
"""Characters of a component in a message: those of nested tables are long."""

Seen = dict[tuple[Rule, str], object]


def described(component: object) -> str:
    """A component by its class and what is not as by default, short enough for a message."""
    if isinstance(component, type) or not dataclasses.is_dataclass(component):
        return getattr(component, "__name__", type(component).__name__)
    usual = defaults(type(component))
    told = [f"{key}={value!r}" for key, value in fields_of(component).items() if value != usual[key]]
    text = f"{type(component).__name__}({', '.join(told)})"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}...)"


class Evidence:
    """Faults of one class, by the rule that they are against."""

    def __init__(self) -> None:
        self._faults: dict[Rule, list[str]] = {}
        self.crashed = False
        """Whether it is no use to try it any further: it raised an error, and would again."""

    def add(self, rule: Rule, component: object, what: str) -> None:
        """Put a fault on record, once.

        Args:
            rule: What it is against.
            component: Whose it is.
            what: The end of a sentence that begins with the component.
        """
        faults = self._faults.setdefault(rule, [])
        fault = f"{described(component)} {what}"
        if fault not in faults:
            faults.append(fault)

    def require(self, rule: Rule) -> None:
        """Raise if there is a fault against a rule.

        Raises:
            AssertionError: Says which.
        """
        faults = self._faults.get(rule, [])
        more = f"; and {len(faults) - 3} more like it" if len(faults) > 3 else ""
        assert not faults, "; ".join(faults[:3]) + more

    @contextmanager
    def trying(self, component: object, crash: Rule = "runs", *, breach: Rule | None = None) -> Iterator[None]:
        """Put on record what the block raises, and go on after it.

        Args:
            component: Whose fault it is.
            crash: The rule that errors are against.
            breach: The one that AssertionErrors are against, which entry points raise at defects of a component; unset:
                the same.
        """
        try:
            yield
        except Exception as error:  # whatever an author's code can raise
            self.crashed = True
            rule, what = crash, f"fails: {error}"
            if isinstance(error, ThreatModelError):
                rule = "needs"
            elif isinstance(error, AssertionError):
                rule = breach or crash
            elif isinstance(error, DataError) and "outside the domain" in str(error):
                rule = "domain"
            elif not isinstance(error, UserError):
                what = f"raises {type(error).__name__}: {error}"
            self.add(rule, component, what)


class Witness:
    """Watches the calls of one component.

    Args:
        component: Whose calls.
        evidence: Where faults go; None looks at nothing, where the same calls were watched before.
    """

    def __init__(self, component: object, evidence: Evidence | None) -> None:
        self.component, self.evidence = component, evidence

    @contextmanager
    def watching(
        self,
        call: str,
        *,
        module: nn.Module | None = None,
        notes: Memory | None = None,
        may: Collection[str] = (),
        **shown: object,
    ) -> Iterator[None]:
        """Compare before and after a call; what it drew from global generators is given back.

        Args:
            call: What is called, for messages.
            module: The model that the component can reach.
            notes: Its notes; they must be tensors that can be saved.
            may: Names of buffers that it may change.
            shown: Whatever else it is handed or can look at.
        """
        generators = _global_generators()
        before = self._seen(module, may, shown)
        try:
            yield
            drawn = [name for name, state in _global_generators().items() if state != generators[name]]
        finally:
            _restore_generators(generators)
        if self.evidence is None:
            return
        after = self._seen(module, may, shown)
        changed: dict[Rule, list[str]] = {}
        for rule, name in sorted(before.keys() | after.keys()):
            if before.get((rule, name)) != after.get((rule, name)):
                changed.setdefault(rule, []).append(name)
        for rule, names in changed.items():
            more = " and more" if names[3:] else ""
            self.evidence.add(rule, self.component, f"changed {', '.join(names[:3])}{more} in `{call}`")
        if drawn:
            which = f"the global generator of {' and '.join(drawn)}"
            self.evidence.add("generators", self.component, f"drew from {which} in `{call}`")
        if notes is not None and (problem := unsaveable(notes)):
            self.evidence.add("notes", self.component, f"{problem}, in `{call}`")

    def _seen(self, module: nn.Module | None, may: Collection[str], shown: Mapping[str, object]) -> Seen:
        if self.evidence is None:
            return {}
        seen: Seen = {("inputs", name): bits(t) for name, t in tensors_in(dict(shown))}
        for name, value in state_outside_notes(self.component):
            seen["state", name] = value
        if module is None:
            return seen
        for name, p in module.named_parameters():
            seen["model", f"parameter {name}"] = (bits(p), p.requires_grad)
            seen["gradients", f".grad of {name}"] = None if p.grad is None else bits(p.grad)
        for name, b in module.named_buffers():
            if name not in may:
                seen["model", f"buffer {name}"] = bits(b)
        for name, m in module.named_modules():
            seen["train flags", f"the train flag of {name or 'the model'}"] = m.training
        return seen


def tensors_in(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors that a value holds, each with the path that leads to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, nn.Module):
        yield from tensors_in(value.state_dict(), name)
    elif isinstance(value, WhiteBox):
        yield from tensors_in(value.module, name)
    elif isinstance(value, History):
        yield from tensors_in({**value.tensors(), "checkpoints": value.checkpoints}, name)
    elif dataclasses.is_dataclass(value):
        yield from tensors_in(vars(value), name)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        names = getattr(value, "_fields", range(len(value)))  # those of a named tuple
        yield from tensors_in(dict(zip(names, value, strict=True)), name)


def bits(t: Tensor) -> object:
    """What is equal if, and only if, type, shape and every bit are."""
    raw = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return t.dtype, tuple(t.shape), raw.numpy().tobytes()


def unsaveable(notes: object) -> str:
    """Why notes cannot be saved; empty if they can."""
    if not isinstance(notes, dict):
        return f"made of its notes a {type(notes).__name__}"
    for key, note in notes.items():
        if not isinstance(key, str):
            return f"keeps a note under {key!r}, which is no text"
        if not isinstance(note, Tensor):
            return f"keeps as note '{key}' a {type(note).__name__}, which cannot be saved: make it a tensor"
        if note.requires_grad:
            return f"keeps a note '{key}' that carries a gradient: detach it"
    try:
        read = through_file(notes)
    except Exception as error:  # whatever the format does not take
        return f"keeps notes that cannot be saved ({error})"
    changed = [key for key, note in notes.items() if bits(note) != bits(read[key])]
    return f"keeps notes that come back otherwise once saved: {changed}" if changed else ""


def through_file(notes: Memory) -> Memory:
    """Notes as a resumed run reads them."""
    return safetensors.torch.load(safetensors.torch.save({key: t.contiguous().clone() for key, t in notes.items()}))


def state_outside_notes(component: object) -> Iterator[tuple[str, object]]:
    """What an object, its classes and their modules hold, besides functions and classes."""
    for name, value in vars(component).items():
        yield f"its own attribute {name}", _pickled(value)
    holders: dict[str, object] = {}
    for cls in type(component).__mro__[:-1]:
        holders[f"the class attribute {cls.__name__}"] = cls
        holders[f"the global {cls.__module__}"] = sys.modules.get(cls.__module__, cls)
    for where, holder in holders.items():
        for name, value in list(vars(holder).items()):
            if not (name.startswith("__") or callable(value) or isinstance(value, _NO_STATE)):
                yield f"{where}.{name}", _pickled(value)


_NO_STATE = (ModuleType, property, classmethod, staticmethod)


def _pickled(value: Any) -> object:  # noqa: ANN401  (whatever somebody keeps)
    try:
        return pickle.dumps(value)
    except Exception:  # not everything can be pickled; then who it is must do
        return repr(value)


def _global_generators() -> dict[str, object]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002  (the generator that nobody should draw from)
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (kind, np.asarray(keys).tobytes(), *rest),
        "random": random.getstate(),
    }


def _restore_generators(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray(states["torch"]), dtype=torch.uint8))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    random.setstate(states["random"])
