"""A batch as the bytes of a safetensors file, without pickle, and back."""

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from mithridate.core.batch import AnyBatch, Batch, Inputs, check_batch
from mithridate.core.errors import DataError, said, shown
from mithridate.core.files import path_of
from mithridate.guard.entry import HEADER, INPUTS, TARGETS, header_of, read_entry, tensors_file, verified

FORMAT = "mithridate-batch-1"


def packed(batch: AnyBatch) -> tuple[bytes, dict[str, Tensor]]:
    """A batch as the bytes of a safetensors file; and its tensors on the CPU, by what the file calls them.

    Args:
        batch: Inputs and targets, on any device.

    Raises:
        DataError: It is no batch.
    """
    check_batch(batch)
    x = batch.x
    names = [str(name) for name in x] if isinstance(x, Mapping) else []
    if isinstance(x, Tensor):
        kind, inputs = "tensor", {INPUTS: x}
    elif isinstance(x, Mapping):
        kind, inputs = "mapping", {f"{INPUTS}.{name}": t for name, t in zip(names, x.values(), strict=True)}
    else:
        kind, inputs = "sequence", {f"{INPUTS}.{number}": t for number, t in enumerate(x)}
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in {**inputs, TARGETS: batch.y}.items()}
    header = json.dumps({"format": FORMAT, "inputs": kind, "names": names})
    return safetensors.torch.save(tensors, metadata={HEADER: header}), tensors


def read_batch(path: str | Path) -> AnyBatch:
    """A batch that a guard put into quarantine, as the loop gave it; the tensors are on the CPU.

    Args:
        path: Its `.safetensors` file, released or still in the quarantine; its `.json` file lies beside it.

    Raises:
        DataError: Missing, damaged, or not what was put into quarantine.
    """
    path = path_of(path)
    content = verified(path.parent, read_entry(path.parent, path.stem))
    where = tensors_file(path.parent, path.stem)
    try:
        header = json.loads(header_of(where)[HEADER])
        if header["format"] != FORMAT:
            raise DataError(
                f"{where} has the format {shown(header['format'])}, and this version reads '{FORMAT}'; read it with "
                "the version that wrote it."
            )
        tensors = safetensors.torch.load(content)
        targets = tensors.pop(TARGETS)
        x: Inputs
        if header["inputs"] == "tensor":
            x = tensors[INPUTS]
        elif header["inputs"] == "mapping":
            x = {str(name): tensors[f"{INPUTS}.{name}"] for name in header["names"]}
        else:
            x = [tensors[f"{INPUTS}.{number}"] for number in range(len(tensors))]
        batch: AnyBatch = Batch(x, targets)
        check_batch(batch, where=str(where))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{where} is damaged or no batch of this library ({type(error).__name__}: {said(error)}); it can only be "
            "dropped."
        ) from error
    return batch
