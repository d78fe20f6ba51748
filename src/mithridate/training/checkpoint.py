"""Checkpoints without pickle: tensors in safetensors, everything else as JSON inside its header.

Foreign checkpoints come in as bare tensors only: a `.pt` file is read with `weights_only=True`.
"""

import argparse
import hashlib
import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mithridate.core.errors import CheckpointError
from mithridate.core.files import path_of, write_atomically
from mithridate.core.past import Snapshot, Weights

FORMAT = "mithridate-snapshot-2"
"""Raised when a file's layout changes; 2 came with the checksum."""


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """64 hex digits of a SHA-256 over names, types, shapes and bits, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


KEYS = ("net", "model", "state_dict", "model_state_dict", "model_state", "network", "module", "weights", "params")
"""Under which a state dict may lie in a file of torch."""

WRAPPERS = ("module", "_module", "_orig_mod")
"""What DataParallel and AveragedModel, opacus, and `torch.compile` put before the names of what they wrap."""

TENSOR, TUPLE = "<tensor>", "<tuple>"
"""In an optimiser's state as JSON: the name of a tensor that stands there, and a tuple's items."""


def save_snapshot(
    path: str | Path, snapshot: Snapshot, *, extra: Mapping[str, Tensor] | None = None, note: object = None
) -> None:
    """Write a snapshot as one safetensors file, atomically, with a checksum over everything in it.

    Args:
        path: The file.
        snapshot: What to write.
        extra: More tensors to write beside the snapshot, by name.
        note: Any JSON value to write beside the snapshot.

    Raises:
        WriteError: The file system refuses.
    """
    tensors = Weights(snapshot.parameters, snapshot.buffers).named()
    tensors |= {f"extra.{n}": t for n, t in (extra or {}).items()}
    json_state: dict[str, dict[str, Any]] = {}
    for index, state in snapshot.optimiser["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimiser.{index}.{key}"] = value
            else:
                json_state.setdefault(str(index), {})[key] = _plain(value, f"optimiser.{index}.{key}", tensors)
    header = {
        "format": FORMAT,
        "step": snapshot.step,
        "in_eval": snapshot.in_eval,
        "param_groups": _plain(snapshot.optimiser["param_groups"], "group", tensors),
        "optimiser_plain": json_state,
        "note": note,
    }
    ready = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    text = json.dumps(header)
    metadata = {"mithridate": text, "sha256": _checksum(text, ready)}
    # `save_file` would write beside the part, to a file of another name, which a killed process leaves behind.
    write_atomically(path_of(path), lambda part: part.write_bytes(safetensors.torch.save(ready, metadata=metadata)))


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(f"{header}\n{tensors_digest(tensors)}".encode()).hexdigest()


def _verify(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    if metadata["sha256"] != _checksum(metadata["mithridate"], tensors):
        raise ValueError("its checksum differs from what was written")


def _plain(value: object, at: str, tensors: dict[str, Tensor]) -> object:
    """What JSON can hold of a value of an optimiser's; its tensors go to `tensors`, and are named in their places."""
    if isinstance(value, Tensor):
        tensors[f"within.{at}"] = value
        return {TENSOR: f"within.{at}"}
    if isinstance(value, tuple):
        return {TUPLE: [_plain(item, f"{at}.{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [_plain(item, f"{at}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{at}.{key}", tensors) for key, item in value.items()}
    return value


def _whole(value: object, tensors: Mapping[str, Tensor]) -> object:
    """What `_plain` was given."""
    if isinstance(value, list):
        return [_whole(item, tensors) for item in value]
    if not isinstance(value, Mapping):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if TUPLE in value:
        return tuple(_whole(item, tensors) for item in value[TUPLE])
    return {key: _whole(item, tensors) for key, item in value.items()}


def load_snapshot(path: str | Path) -> tuple[Snapshot, dict[str, Tensor], Any]:
    """Read what `save_snapshot` wrote: the snapshot, the extra tensors and the note.

    Raises:
        CheckpointError: Missing, damaged in any bit, or not one of our files.
    """
    try:
        with safe_open(path_of(path), framework="pt") as handle:
            metadata = handle.metadata() or {}
            header = json.loads(metadata["mithridate"])
            names = handle.keys()
            tensors = {name: handle.get_tensor(name) for name in names}
        if header["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has the format {header['format']!r}, this version reads {FORMAT!r}; make it anew."
            )
        _verify(metadata, tensors)
        state = {
            int(i): {key: _whole(value, tensors) for key, value in values.items()}
            for i, values in header["optimiser_plain"].items()
        }
        groups = _whole(header["param_groups"], tensors)
        parts: dict[str, dict[str, Tensor]] = {"parameter": {}, "buffer": {}, "extra": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimiser":
                index, _, key = rest.partition(".")
                state.setdefault(int(index), {})[key] = tensor
            elif kind != "within":
                parts[kind][rest] = tensor
        optimiser = {"state": state, "param_groups": groups}
        in_eval = header["in_eval"]
        snapshot = Snapshot(
            parts["parameter"],
            parts["buffer"],
            optimiser,
            int(header["step"]),
            None if in_eval is None else tuple(in_eval),
        )
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is missing, damaged or not a checkpoint of this library ({type(error).__name__}: {error}); delete "
            "it and train again, or give another file."
        ) from error
    return snapshot, parts["extra"], header["note"]


def load_weights(path: str | Path, model: nn.Module) -> None:
    """Fill a model from a checkpoint that somebody else may have made: `.safetensors`, or `.pt`/`.pth` as bare tensors.

    What wraps a model (DataParallel, `torch.compile`, AveragedModel, a Sequential behind a normalisation) is taken off
    its names, in any order; the model may be wrapped itself. A parameter that is used twice may come under either name.
    A state dict may lie under one of the usual keys (`KEYS`). A file that would run code when read is refused.

    Args:
        path: The checkpoint.
        model: Filled in place; untouched if anything does not fit.

    Raises:
        CheckpointError: Missing, unreadable, unsafe; its tensors do not fit the model, are of another kind of number,
            or hold NaN or infinity; or it holds several state dicts.
    """
    read = _read_weights(path_of(path))
    wanted = model.state_dict()
    derived = {name for name, _ in model.named_buffers()} - wanted.keys()  # our snapshots hold them; no state dict does
    tied = _tied(model)
    misfits = []
    for named in _by_names_of(wanted, read):
        weights = {name: t for name, t in named.items() if name not in derived}
        for names in tied:
            held = [weights[name] for name in names if name in weights]
            if held:
                weights |= {name: held[0] for name in names if name not in weights}
        missing, extra = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
        wrong = sorted(n for n in wanted.keys() & weights.keys() if wanted[n].shape != weights[n].shape)
        if not (missing or extra or wrong):
            _check_values(weights, wanted, tied, path)
            model.load_state_dict(weights)
            return
        misfits.append((missing, extra, wrong))
    missing, extra, wrong = min(misfits, key=lambda misfit: len(misfit[0]))
    raise CheckpointError(
        f"{path} does not fit the model: {len(missing)} tensors missing {missing[:3]}, {len(extra)} unexpected "
        f"{extra[:3]}, {len(wrong)} of another shape {wrong[:3]}; set [model] to the architecture, width and "
        "classes of the checkpoint."
    )


def _by_names_of(wanted: Mapping[str, Tensor], weights: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The weights by names that may be the model's: as they are first, then with more and more wrappers taken off."""
    weights = {name: t for name, t in weights.items() if name != "n_averaged" or name in wanted}
    for own_names in _unwrapped(list(wanted)):
        own = dict(zip(own_names, wanted, strict=True))
        for names in _unwrapped(list(weights)):
            yield {own.get(name, name): t for name, t in zip(names, weights.values(), strict=True)}
    own, given = ({_bare(name): name for name in names} for names in (wanted, weights))
    if len(own) == len(wanted) and len(given) == len(weights):
        yield {own.get(bare, bare): weights[name] for bare, name in given.items()}
        # Behind one more name, as a part of a Sequential is: the other parts are none of the model's.
        inside = {own[_after_dot(bare)]: weights[n] for bare, n in given.items() if _after_dot(bare) in own}
        if inside and not given.keys() & own.keys():
            yield inside


def _unwrapped(names: list[str]) -> Iterator[list[str]]:
    """The names as they are, then without the wrapper that all of them begin with, and so on."""
    yield names
    while names and {name.partition(".")[0] for name in names} <= set(WRAPPERS):
        shorter = [_after_dot(name) for name in names]
        if len(set(shorter)) < len(names) or "" in shorter:
            return
        names = shorter
        yield names


def _bare(name: str) -> str:
    """A name without what wraps a model or a part of it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _after_dot(name: str) -> str:
    return name.partition(".")[2]


def _tied(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _check_values(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tied: Iterable[list[str]], path: str | Path
) -> None:
    """Refuse values that no trained model has, or that would be changed as they are read."""
    for name, t in weights.items():
        own = wanted[name]
        if (t.is_floating_point(), t.is_complex()) != (own.is_floating_point(), own.is_complex()):
            raise CheckpointError(
                f"{path}: '{name}' is {t.dtype}, and the model's is {own.dtype}; save it as it was trained, not "
                "quantised."
            )
        # What is meant to be infinite, such as an attention mask, is so in a fresh model too.
        bad = ~torch.isfinite(t) & (t != own.to(t.device))
        if bool(bad.any()):
            raise CheckpointError(
                f"{path}: '{name}' holds {int(bad.sum())} of {t.numel()} values that are NaN or infinite; the training "
                "had diverged: take an earlier checkpoint."
            )
    for names in tied:
        differing = [name for name in names if not torch.equal(weights[name], weights[names[0]])]
        if differing:
            raise CheckpointError(
                f"{path}: '{names[0]}' and '{differing[0]}' are one parameter in the model, and differ here; build the "
                "model without the tie, or save it with."
            )


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
            ours = {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(("parameter.", "buffer."))}
            return ours or tensors
        # The papers' released checkpoints carry an argparse.Namespace, which is inert data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own words recommend reading it unsafely
        raise CheckpointError(
            f"{path} cannot be read safely: it is no file of torch, or holds more than tensors and would run code when "
            "read; give one of bare tensors (`torch.save(model.state_dict(), ...)`) or a .safetensors file."
        ) from error
    except Exception as error:  # a damaged file raises whatever the reader stumbles over: struct.error, IndexError, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read safely ({reason}); it must exist, be whole, and hold tensors "
            "only."
        ) from error
    while isinstance(loaded, Mapping):
        inside = [key for key in KEYS if _may_hold_weights(loaded.get(key))]
        if len(inside) > 1:
            raise CheckpointError(
                f"{path} holds several state dicts ({', '.join(inside)}); save the one that is meant by itself."
            )
        if not inside:
            break
        loaded = loaded[inside[0]]
    if not isinstance(loaded, Mapping) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise CheckpointError(f"{path} holds no state dict (names to tensors); save `model.state_dict()` instead.")
    return {str(name): t for name, t in loaded.items()}


def _may_hold_weights(value: object) -> bool:
    """Whether something in a checkpoint is a state dict, or has one under a usual key; settings are neither."""
    return isinstance(value, Mapping) and (
        any(isinstance(t, Tensor) for t in value.values()) or any(_may_hold_weights(value.get(key)) for key in KEYS)
    )
