"""Attack, inspect and defend models that learn from live data streams.

Everything that a user needs is a name in this module; components are reached through their folders, such as
`attacks.Accumulative`. The parts are loaded when they are first used, so that reading a report needs no torch.
"""

import ast
import inspect
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from mithridate.core import errors as errors
from mithridate.core.errors import UserError as UserError

if TYPE_CHECKING:
    from mithridate import aggregators as aggregators
    from mithridate import attacks as attacks
    from mithridate import audit as audit
    from mithridate import defences as defences
    from mithridate import detectors as detectors
    from mithridate import guard as guard
    from mithridate import models as models
    from mithridate import monitors as monitors
    from mithridate import reproduce as reproduce
    from mithridate import testing as testing
    from mithridate import update_attacks as update_attacks
    from mithridate.bench.engine import run_recipe as run_recipe
    from mithridate.bench.recipe import read_recipe as read_recipe
    from mithridate.bench.store import read_runs as read_runs
    from mithridate.core.aggregator import Aggregator as Aggregator
    from mithridate.core.attack import Attack as Attack
    from mithridate.core.batch import Batch as Batch
    from mithridate.core.defence import Defence as Defence
    from mithridate.core.defence import Screened as Screened
    from mithridate.core.defence import Verdict as Verdict
    from mithridate.core.domain import PIXELS as PIXELS
    from mithridate.core.domain import Domain as Domain
    from mithridate.core.past import Snapshot as Snapshot
    from mithridate.core.registry import build as build
    from mithridate.core.registry import load_plugin as load_plugin
    from mithridate.core.registry import register as register
    from mithridate.core.settings import settings as settings
    from mithridate.core.update_attack import Honest as Honest
    from mithridate.core.update_attack import UpdateAttack as UpdateAttack
    from mithridate.core.updates import Updates as Updates
    from mithridate.core.view import Need as Need
    from mithridate.core.view import View as View
    from mithridate.core.watch import Detector as Detector
    from mithridate.core.watch import Monitor as Monitor
    from mithridate.data.shards import Shards as Shards
    from mithridate.data.stream import Stream as Stream
    from mithridate.data.stream import StreamSettings as StreamSettings
    from mithridate.data.stream import open_stream as open_stream
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


def _homes() -> dict[str, str]:
    """The module of every name that is imported above for type checkers, which is the only list of them."""
    tree = ast.parse(inspect.getsource(sys.modules[__name__]))
    block = next(node.body for node in tree.body if isinstance(node, ast.If))
    return {alias.name: str(line.module) for line in block if isinstance(line, ast.ImportFrom) for alias in line.names}


_HOMES = _homes()

_PUBLIC = sorted([*_HOMES, "UserError", "errors"])

__all__ = list(_PUBLIC)


def __dir__() -> list[str]:
    return list(_PUBLIC)


if not TYPE_CHECKING:  # with it, a type checker would take any name for a public one

    def __getattr__(name: str) -> object:
        """Load a public name when it is first used."""
        if name not in _HOMES:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        home = _HOMES[name]
        value = import_module(f"{home}.{name}") if home == __name__ else getattr(import_module(home), name)
        globals()[name] = value
        return value
