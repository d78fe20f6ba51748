"""How a model computes: in eval or train mode without recording anything, in which precision, compiled or not."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mithridate.core.folding import folded

BatchNormMode = Literal["eval", "train"]
"""`eval`: running statistics; `train`: the statistics of the batch."""

Precision = Literal["float32", "tf32", "bfloat16"]
"""Of the passes through a model: `tf32` lets a GPU multiply with 10 bits of fraction, which elsewhere is `float32`;
`bfloat16` is autocast's, which leaves the sums that need it in float32."""

_OWN_FLAGS: ContextVar[Mapping[nn.Module, bool]] = ContextVar("own train flags", default=MappingProxyType({}))
"""What the train flags were before the outermost `in_mode`."""


@contextmanager
def in_mode(module: nn.Module, mode: BatchNormMode) -> Iterator[None]:
    """Put a model in eval or train mode; every module's own flag comes back as it was.

    A part that is in eval mode while the model as a whole is in train mode is frozen, and stays in eval mode.

    Args:
        module: The model.
        mode: `eval` or `train`.
    """
    now = [(m, m.training) for m in module.modules()]
    before = _OWN_FLAGS.get()
    own = {m: before.get(m, flag) for m, flag in now}
    token = _OWN_FLAGS.set({**before, **own})
    try:
        module.train(mode == "train")
        if mode == "train" and own[module]:
            for m, flag in own.items():
                if not flag:
                    m.training = False
        yield
    finally:
        for m, flag in now:
            m.training = flag
        _OWN_FLAGS.reset(token)


@contextmanager
def frozen_statistics(module: nn.Module, mode: BatchNormMode, *, once: bool = False) -> Iterator[None]:
    """Put a model in eval or train mode without letting it record; every flag and buffer comes back as it was.

    In eval mode BatchNorm is computed with the layer before it where it can be (`folding`), which rounds differently.

    Args:
        module: The model.
        mode: `eval` or `train`.
        once: Compute BatchNorm into those layers once for each set of weights, as `folding.folded` says.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracking = [m.track_running_stats for m in norms]
    with in_mode(module, mode), _kept_buffers(module):
        try:
            if mode == "eval":
                with folded(module, once=once):
                    yield
                return
            for m in norms:
                m.track_running_stats = False
            yield
        finally:
            for m, flag in zip(norms, tracking, strict=True):
                m.track_running_stats = flag


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Layers whose buffers are known to stay as they are in eval mode, and without `track_running_stats`."""


def other_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a forward pass may write to although BatchNorm does not record: those of all other layers."""
    return {
        f"{prefix}.{name}" if prefix else name: b
        for prefix, m in module.named_modules()
        if m._buffers and type(m) not in _NORMS
        for name, b in m._buffers.items()
        if b is not None
    }


@contextmanager
def _kept_buffers(module: nn.Module) -> Iterator[None]:
    """Bring back whatever a layer other than BatchNorm writes to its buffers inside the block."""
    held = [
        (m, {name: (b, None if b is None else b.detach().clone()) for name, b in m._buffers.items()})
        for m in module.modules()
        if m._buffers and type(m) not in _NORMS
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for m, buffers in held:
                for name in m._buffers.keys() - buffers.keys():
                    del m._buffers[name]
                for name, (b, kept) in buffers.items():
                    m._buffers[name] = b
                    if b is not None and kept is not None and not torch.equal(b, kept):
                        b.copy_(kept)


def passes_in(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Passes through a model in the given precision, inside the block.

    Args:
        precision: `tf32` changes nothing on a CPU.
        device: Where the model lies.
    """
    if precision != "bfloat16":
        return rounding(precision, device)
    # Without a cache: what a parameter was cast to in one pass carries that pass's graph, or its dual part.
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


@contextmanager
def rounding(precision: Precision, device: torch.device) -> Iterator[None]:
    """Let matrix products and convolutions of a GPU round to TF32 inside the block, or not; torch lets convolutions.

    Args:
        precision: Only `tf32` lets them.
        device: Where they are computed; on a CPU nothing changes.
    """
    if device.type != "cuda":
        yield
        return
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = precision == "tf32"
        yield
    finally:
        for backend, flag in zip(backends, before, strict=True):
            backend.allow_tf32 = flag


def eager() -> AbstractContextManager[None]:
    """Compiled models as they were before: what the compiler makes can be differentiated only once."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]  # torch gives it no types
