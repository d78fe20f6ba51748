"""How much memory a call needs at its highest, for benchmarks."""

import sys
from collections.abc import Callable
from pathlib import Path


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes by which a call raises resident memory at its highest, from the kernel's high-water mark.

    Memory that an earlier call has freed, but the allocator kept, hides what this one needs: measure each call in a
    fresh process, after a warm-up on little data. (`ru_maxrss` would not do: a child inherits its parent's.)

    Args:
        run: What to measure.

    Raises:
        OSError: The system is not Linux.
    """
    if sys.platform != "linux":
        raise OSError("peak_memory reads /proc/self, which only Linux has")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """A size from the kernel's account of this process, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
