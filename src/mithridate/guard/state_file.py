"""A guard's state as one file without pickle, for checkpoints of other libraries."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mithridate.core.errors import CheckpointError, said
from mithridate.core.files import write_whole

FORMAT = "mithridate-guard-1"
STATE = "mithridate-guard.safetensors"
"""What it is called in a checkpoint's folder."""

_TABLES = ("memory", "history")


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write what `Guard.state_dict` gave.

    Args:
        path: The file; the folder is there.
        state: Numbers, and two tables of tensors.

    Raises:
        WriteError: It cannot be written; nothing is half-written then.
    """
    tensors = {f"{table}/{name}": t.cpu().contiguous() for table in _TABLES for name, t in state[table].items()}
    numbers = {name: value for name, value in state.items() if name not in _TABLES}
    header = {"format": FORMAT, "numbers": json.dumps(numbers)}
    write_whole(path, safetensors.torch.save(tensors, metadata=header))


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote, for `Guard.load_state_dict`.

    Args:
        path: The file.

    Raises:
        CheckpointError: It is missing, damaged, or of another version.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        if header.get("format") != FORMAT:
            raise CheckpointError(f"{path} is no state of this version's guard; go on from another checkpoint.")
        state: dict[str, Any] = {**json.loads(header["numbers"]), **{table: {} for table in _TABLES}}
        for key, tensor in tensors.items():
            table, _, name = key.partition("/")
            state[table][name] = tensor
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({said(error)}); go on from another checkpoint.") from error
    return state


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint that is whole, for `trainer.train(resume_from_checkpoint=...)`; None if there is none.

    A process that is killed while it writes a checkpoint leaves a part of one, which the Trainer itself would take.

    Args:
        output_dir: Of the `TrainingArguments`.
    """
    whole = {int(p.parent.name.rpartition("-")[2]): p.parent for p in Path(output_dir).glob(f"*-*/{STATE}")}
    return str(whole[max(whole)]) if whole else None
