"""Where randomness comes from: generators derived from named keys, so that no draw depends on an earlier one."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(*keys: int | str) -> int:
    """A seed that differs whenever a key differs; the same on every machine and in every process.

    Args:
        keys: What the randomness is for, such as `("attack", run_seed, step)`. The integer 1 and the text "1" differ.

    Returns:
        An integer in [0, 2^63).

    >>> derived_seed("attack", 1) == derived_seed("attack", 1)
    True
    >>> derived_seed("attack", 1) == derived_seed("attack", "1")
    False
    """
    text = json.dumps([key if isinstance(key, str) else int(key) for key in keys])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*keys: int | str) -> torch.Generator:
    """A fresh generator on the CPU, seeded by `derived_seed`; draw there and move the result to a device.

    Args:
        keys: What the randomness is for.
    """
    return torch.Generator().manual_seed(derived_seed(*keys))


@contextmanager
def seeded_default(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's default generators inside the block and give them back their states afterwards.

    For code that can draw from nowhere else, such as the constructors of layers, or dropout.

    Args:
        seed: Any integer in [-2^63, 2^64).
        device: Whose generator is seeded beside that of the CPU; unset: none.
    """
    with torch.random.fork_rng(devices=_with_generator(device)):
        torch.default_generator.manual_seed(seed)
        for gpu in _with_generator(device):
            torch.cuda.default_generators[gpu].manual_seed(seed)
        yield


@contextmanager
def no_draws(module: torch.nn.Module) -> Iterator[None]:
    """Give torch's default generators back their states after the block, whatever a model draws inside.

    Args:
        module: Lies on the device whose generator counts beside that of the CPU.
    """
    first = next(module.parameters(), None)
    with torch.random.fork_rng(devices=_with_generator(None if first is None else first.device)):
        yield


def _with_generator(device: torch.device | None) -> list[int]:
    """The number of a GPU, as torch.random wants it; none for other devices."""
    if device is None or device.type != "cuda":
        return []
    return [torch.cuda.current_device() if device.index is None else device.index]
