"""What a component leaves changed that was not its to change, call by call."""

import dataclasses
import pickle
import random
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from mithridate.core.model import WhiteBox
from mithridate.core.view import Memory
from mithridate.testing.checks.evidence import Evidence, Rule
from mithridate.testing.checks.worlds import World
from mithridate.training.history import History

Seen = dict[tuple[Rule, str], object]
"""What can be compared before and after a call, by what it is of and which rule it falls under."""


class Witness:
    """Watches the calls of one component.

    Args:
        component: Whose calls.
        evidence: Where faults go; None looks at nothing, where the same calls were watched before.
        world: What the component can look at; None for what it is handed alone.
    """

    def __init__(self, component: object, evidence: Evidence | None, world: World | None = None) -> None:
        self.component, self.evidence, self.world = component, evidence, world

    @contextmanager
    def watching(
        self,
        call: str,
        handed: Mapping[str, object],
        *,
        module: nn.Module | None = None,
        notes: Memory | None = None,
        may: Collection[str] = (),
    ) -> Iterator[None]:
        """Compare before and after a call; what it drew from global generators is given back.

        Args:
            call: What is called, for messages.
            handed: What it is handed, by name; whatever tensors there are in it.
            module: The model that the component is handed; by default that of its world.
            notes: Its notes; they must be tensors that can be saved.
            may: Names of buffers that it may change.
        """
        if self.world is not None:
            module, handed = self.world.learner.model, {**self.world.beside(), **handed}
        generators = _global_generators()
        before = self._seen(module, may, handed)
        try:
            yield
            drawn = [name for name, state in _global_generators().items() if state != generators[name]]
        finally:
            _restore_generators(generators)
        if self.evidence is None:
            return
        after = self._seen(module, may, handed)
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

    def _seen(self, module: nn.Module | None, may: Collection[str], handed: Mapping[str, object]) -> Seen:
        if self.evidence is None:
            return {}
        seen: Seen = {("inputs", name): bits(t) for name, t in tensors_in(handed)}
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


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names and bits."""
    return one.keys() == other.keys() and all(bits(t) == bits(other[key]) for key, t in one.items())


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


def _pickled(value: object) -> object:
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
