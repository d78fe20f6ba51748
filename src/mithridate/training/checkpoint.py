"""Checkpoints without pickle: tensors in safetensors, everything else as JSON inside its header.

Foreign checkpoints come in as bare tensors only: a `.pt` file is read with `weights_only=True`.
"""

import argparse
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mithridate.core.errors import CheckpointError
from mithridate.core.files import path_of, write_atomically
from mithridate.core.past import Snapshot

FORMAT = "mithridate-snapshot-1"


def save_snapshot(
    path: str | Path, snapshot: Snapshot, *, extra: Mapping[str, Tensor] | None = None, note: object = None
) -> None:
    """Write a snapshot as one safetensors file, atomically.

    Args:
        path: The file.
        snapshot: What to write.
        extra: More tensors to write beside the snapshot, by name.
        note: Any JSON value to write beside the snapshot.
    """
    tensors = {f"parameter.{n}": t for n, t in snapshot.parameters.items()}
    tensors |= {f"buffer.{n}": t for n, t in snapshot.buffers.items()}
    tensors |= {f"extra.{n}": t for n, t in (extra or {}).items()}
    json_state: dict[str, dict[str, Any]] = {}
    for index, state in snapshot.optimiser["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimiser.{index}.{key}"] = value
            else:
                json_state.setdefault(str(index), {})[key] = value
    header = {
        "format": FORMAT,
        "step": snapshot.step,
        "param_groups": snapshot.optimiser["param_groups"],
        "optimiser_plain": json_state,
        "note": note,
    }
    ready = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    text = json.dumps(header)
    write_atomically(
        path_of(path), lambda part: safetensors.torch.save_file(ready, part, metadata={"mithridate": text})
    )


def load_snapshot(path: str | Path) -> tuple[Snapshot, dict[str, Tensor], Any]:
    """Read what `save_snapshot` wrote: the snapshot, the extra tensors and the note.

    Raises:
        CheckpointError: Missing, truncated, or not one of our files.
    """
    try:
        with safe_open(path_of(path), framework="pt") as handle:
            header = json.loads((handle.metadata() or {})["mithridate"])
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (not a dict)
        if header["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has the format {header['format']!r}, this version reads {FORMAT!r}; make it anew."
            )
        state: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in header["optimiser_plain"].items()}
        parts: dict[str, dict[str, Tensor]] = {"parameter": {}, "buffer": {}, "extra": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimiser":
                index, _, key = rest.partition(".")
                state.setdefault(int(index), {})[key] = tensor
            else:
                parts[kind][rest] = tensor
        optimiser = {"state": state, "param_groups": header["param_groups"]}
        snapshot = Snapshot(parts["parameter"], parts["buffer"], optimiser, int(header["step"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is missing, cut off or not a checkpoint of this library ({type(error).__name__}: {error}); delete "
            "it and train again, or give another file."
        ) from error
    return snapshot, parts["extra"], header["note"]


def load_weights(path: str | Path, model: nn.Module) -> None:
    """Fill a model from a checkpoint that somebody else may have made: `.safetensors`, or `.pt`/`.pth` as bare tensors.

    The wrapper prefix `module.` is taken off, and a state dict may lie under `net`, `model` or `state_dict`. A file
    that would run code when read is refused.

    Args:
        path: The checkpoint.
        model: Filled in place; untouched if anything does not fit.

    Raises:
        CheckpointError: Missing, unreadable, unsafe, or its tensors do not fit the model.
    """
    weights = {name.removeprefix("module."): t for name, t in _read_weights(path_of(path)).items()}
    wanted = model.state_dict()
    if not any(name in wanted for name in weights):
        inside = {name: t for name, t in ((_after_dot(n), t) for n, t in weights.items()) if name in wanted}
        weights = inside or weights
    missing = sorted(wanted.keys() - weights.keys())
    derived = {name for name, _ in model.named_buffers()} - wanted.keys()  # our snapshots hold them; no state dict does
    weights = {name: t for name, t in weights.items() if name not in derived}
    extra = sorted(weights.keys() - wanted.keys())
    wrong = sorted(n for n in wanted.keys() & weights.keys() if wanted[n].shape != weights[n].shape)
    if missing or extra or wrong:
        raise CheckpointError(
            f"{path} does not fit the model: {len(missing)} tensors missing {missing[:3]}, {len(extra)} unexpected "
            f"{extra[:3]}, {len(wrong)} of another shape {wrong[:3]}; set [model] to the architecture, width and "
            "classes of the checkpoint."
        )
    model.load_state_dict(weights)


def _after_dot(name: str) -> str:
    return name.partition(".")[2]


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
    for key in ("net", "model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise CheckpointError(f"{path} holds no state dict (names to tensors); save `model.state_dict()` instead.")
    return {str(name): t for name, t in loaded.items()}
