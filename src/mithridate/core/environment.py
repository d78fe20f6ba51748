"""The machine and the software under a result: what else decides its bits beside settings and seed."""

import hashlib
import importlib.util
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mithridate.core.plugins import offered
from mithridate.core.settings import by_path

COUNTED = frozenset({"cpus"})
"""What is recorded for people alone: it moves no bit."""


def environment(device: torch.device, *, code: Iterable[str] = ()) -> dict[str, Any]:
    """Versions, processor, threads and precision: what must be equal for two runs to give the same bits.

    Args:
        device: Where tensors live.
        code: Modules by name, or .py files by path, that a recipe takes components from; each is recorded with the
            start of its SHA-256.
    """
    on_gpu = device.type == "cuda"
    return {
        "mithridate": version("mithridate"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "precision": {
            "default": str(torch.get_default_dtype()).removeprefix("torch."),
            "float32_matmul": torch.get_float32_matmul_precision(),
            "mkldnn": torch.backends.mkldnn.enabled,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        },
        **(_cuda() if on_gpu else {}),
        "packages": {point.dist.name: point.dist.version for point in offered() if point.dist},
        "code": {name: _digest(name) for name in sorted(set(code))},
    }


def _cuda() -> dict[str, Any]:
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]  # torch gives it no type
    return {"cuda": torch.version.cuda, "cudnn": cudnn, "cudnn_tf32": torch.backends.cudnn.allow_tf32}


def differing(here: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, str]:
    """What two environments disagree about, as `key -> here, there`; what only counts cores is left out."""
    a, b = by_path(here), by_path(there)
    keys = sorted((a.keys() | b.keys()) - COUNTED)
    return {key: f"{a.get(key)}, {b.get(key)}" for key in keys if a.get(key) != b.get(key)}


@cache
def _processor() -> str:
    """The processor's name as its maker gives it, as far as the system tells."""
    if sys.platform == "linux":
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Hardware")))
        return next(named, "") or platform.machine()
    return platform.processor() or platform.machine()


def _digest(name: str) -> str:
    """16 hex digits of a module's file, `unknown` if it has none."""
    path = Path(name)
    if not path.is_absolute():
        spec = importlib.util.find_spec(name)
        path = Path((spec.origin if spec else "") or "")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else "unknown"
