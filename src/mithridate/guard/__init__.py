"""Defences in real training loops. What needs an extra is loaded when it is first used."""

from importlib import import_module
from typing import TYPE_CHECKING

from mithridate.core.errors import UserError
from mithridate.guard.garbage_clients import GarbageClients as GarbageClients
from mithridate.guard.hostile_clients import Accomplice as Accomplice
from mithridate.guard.hostile_clients import HostileClients as HostileClients
from mithridate.guard.limits import RECOMMENDED as RECOMMENDED
from mithridate.guard.limits import ReplyLimits as ReplyLimits

if TYPE_CHECKING:
    from mithridate.guard.flower import GuardedStrategy as GuardedStrategy
    from mithridate.guard.flower_attack import attack_mod as attack_mod

_NEEDS_FLOWER = {"GuardedStrategy": "flower", "attack_mod": "flower_attack"}


def __dir__() -> list[str]:
    return ["Accomplice", "GarbageClients", "HostileClients", "RECOMMENDED", "ReplyLimits", *_NEEDS_FLOWER]


if not TYPE_CHECKING:  # with it, a type checker would take any name for a public one

    def __getattr__(name: str) -> object:
        """Load a name that needs Flower.

        Raises:
            UserError: Flower is not installed.
        """
        if name not in _NEEDS_FLOWER:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        try:
            return getattr(import_module(f"{__name__}.{_NEEDS_FLOWER[name]}"), name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "flwr":
                raise
            raise UserError(
                f"{name} needs Flower, which is not installed: pip install 'mithridate[flower]'."
            ) from error
