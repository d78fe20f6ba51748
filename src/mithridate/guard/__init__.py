"""Defences in real training loops. Each name is loaded when it is first used: some need torch, some an extra."""

from importlib import import_module
from typing import TYPE_CHECKING

from mithridate.core.errors import UserError

if TYPE_CHECKING:
    from mithridate.guard.accelerated import attach_accelerated as attach_accelerated
    from mithridate.guard.batch_file import read_batch as read_batch
    from mithridate.guard.entry import Quarantined as Quarantined
    from mithridate.guard.flower import GuardedStrategy as GuardedStrategy
    from mithridate.guard.flower_attack import attack_mod as attack_mod
    from mithridate.guard.garbage_clients import GarbageClients as GarbageClients
    from mithridate.guard.hostile_clients import Accomplice as Accomplice
    from mithridate.guard.hostile_clients import HostileClients as HostileClients
    from mithridate.guard.limits import RECOMMENDED as RECOMMENDED
    from mithridate.guard.limits import ReplyLimits as ReplyLimits
    from mithridate.guard.loop import Guard as Guard
    from mithridate.guard.loop import GuardStopped as GuardStopped
    from mithridate.guard.loop import attach as attach
    from mithridate.guard.mlflow_tracker import MLflow as MLflow
    from mithridate.guard.prometheus_tracker import Prometheus as Prometheus
    from mithridate.guard.quarantine import Quarantine as Quarantine
    from mithridate.guard.record import StepRecord as StepRecord
    from mithridate.guard.record import Tracker as Tracker
    from mithridate.guard.state_file import last_checkpoint as last_checkpoint
    from mithridate.guard.step_log import StepLog as StepLog
    from mithridate.guard.tensorboard_tracker import TensorBoard as TensorBoard
    from mithridate.guard.trackers import Trackers as Trackers

_HOMES = {
    "Accomplice": "hostile_clients",
    "GarbageClients": "garbage_clients",
    "Guard": "loop",
    "GuardStopped": "loop",
    "GuardedStrategy": "flower",
    "HostileClients": "hostile_clients",
    "MLflow": "mlflow_tracker",
    "Prometheus": "prometheus_tracker",
    "Quarantine": "quarantine",
    "Quarantined": "entry",
    "RECOMMENDED": "limits",
    "ReplyLimits": "limits",
    "StepLog": "step_log",
    "StepRecord": "record",
    "TensorBoard": "tensorboard_tracker",
    "Tracker": "record",
    "Trackers": "trackers",
    "attach": "loop",
    "attack_mod": "flower_attack",
    "attach_accelerated": "accelerated",
    "last_checkpoint": "state_file",
    "read_batch": "batch_file",
}
"""The module of every public name."""

_EXTRAS = {
    "accelerate": ("accelerate", "loops"),
    "flwr": ("Flower", "flower"),
    "mlflow": ("mlflow", "tracking"),
    "prometheus_client": ("prometheus-client", "tracking"),
    "tensorboard": ("tensorboard", "tracking"),
}
"""What names may need: by the module that is imported, what people call it, and the extra that brings it."""


def __dir__() -> list[str]:
    return list(_HOMES)


if not TYPE_CHECKING:  # with it, a type checker would take any name for a public one

    def __getattr__(name: str) -> object:
        """Load a name when it is first used.

        Raises:
            UserError: It needs an extra that is not installed.
        """
        if name not in _HOMES:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        try:
            return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        except ModuleNotFoundError as error:
            needed = _EXTRAS.get((error.name or "").partition(".")[0])
            if needed is None:
                raise
            called, extra = needed
            raise UserError(
                f"{name} needs {called}, which is not installed: pip install 'mithridate[{extra}]'."
            ) from error
