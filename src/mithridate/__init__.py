"""Attack, inspect and defend models that learn from live data streams.

Everything that a user needs is a name in this module; the parts are loaded when they are first used, so that reading a
report needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mithridate.attacks.accumulative import Accumulative as Accumulative
    from mithridate.attacks.vanilla import Vanilla as Vanilla
    from mithridate.bench.engine import run_recipe as run_recipe
    from mithridate.bench.recipe import read_recipe as read_recipe
    from mithridate.bench.store import read_runs as read_runs
    from mithridate.core.attack import Attack as Attack
    from mithridate.core.batch import Batch as Batch
    from mithridate.core.batch import Domain as Domain
    from mithridate.core.defence import Defence as Defence
    from mithridate.core.errors import UserError as UserError
    from mithridate.core.model import Snapshot as Snapshot
    from mithridate.core.registry import build as build
    from mithridate.core.registry import register as register
    from mithridate.core.registry import settings as settings
    from mithridate.core.update_attack import Honest as Honest
    from mithridate.core.update_attack import UpdateAttack as UpdateAttack
    from mithridate.core.view import Need as Need
    from mithridate.core.view import View as View
    from mithridate.core.watch import Detector as Detector
    from mithridate.core.watch import Monitor as Monitor
    from mithridate.data.shards import Shards as Shards
    from mithridate.data.stream import Stream as Stream
    from mithridate.data.stream import StreamSettings as StreamSettings
    from mithridate.data.stream import open_stream as open_stream
    from mithridate.defences.clip import Clip as Clip
    from mithridate.models import build_model as build_model
    from mithridate.report import build_report as build_report
    from mithridate.simulation.clients import FederatedRun as FederatedRun
    from mithridate.simulation.clients import federate as federate
    from mithridate.simulation.federated import run_federated as run_federated
    from mithridate.simulation.online import OnlineRun as OnlineRun
    from mithridate.simulation.online import run_online as run_online
    from mithridate.simulation.run import Outcome as Outcome
    from mithridate.simulation.run import victim_optimiser as victim_optimiser
    from mithridate.training.burn_in import BurnIn as BurnIn
    from mithridate.training.burn_in import burn_in as burn_in
    from mithridate.training.learner import Learner as Learner

_HOME = {
    "attacks.accumulative": ["Accumulative"],
    "attacks.vanilla": ["Vanilla"],
    "bench.engine": ["run_recipe"],
    "bench.recipe": ["read_recipe"],
    "bench.store": ["read_runs"],
    "core.attack": ["Attack"],
    "core.batch": ["Batch", "Domain"],
    "core.defence": ["Defence"],
    "core.model": ["Snapshot"],
    "core.update_attack": ["Honest", "UpdateAttack"],
    "core.view": ["Need", "View"],
    "core.watch": ["Detector", "Monitor"],
    "data.shards": ["Shards"],
    "data.stream": ["Stream", "StreamSettings", "open_stream"],
    "defences.clip": ["Clip"],
    "core.errors": ["UserError"],
    "training.burn_in": ["BurnIn", "burn_in"],
    "simulation.federated": ["run_federated"],
    "simulation.clients": ["FederatedRun", "federate"],
    "training.learner": ["Learner"],
    "simulation.online": ["OnlineRun", "run_online"],
    "simulation.run": ["Outcome", "victim_optimiser"],
    "models": ["build_model"],
    "core.registry": ["build", "register", "settings"],
    "report": ["build_report"],
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_WHERE)  # noqa: PLE0605  (a list of names, computed)


def __getattr__(name: str) -> object:
    """Load a public name when it is first used."""
    if name not in _WHERE:
        raise AttributeError(f"module 'mithridate' has no attribute '{name}'")
    value: object = getattr(import_module(f"mithridate.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
