"""Flower, the strategy behind the guard: whether it can stand there, and its state, to be put back after a veto.

Needs the extra `flower` (flwr >= 1.41, < 2).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedXgbBagging, FedXgbCyclic, Strategy

from mithridate.core.errors import ConfigError


def weighted_by(inner: Strategy) -> str:
    """The metric that the inner strategy, or the one that it wraps in turn, weights by."""
    own = getattr(inner, "weighted_by_key", None)
    if own is not None:
        return str(own)
    wrapped = getattr(inner, "strategy", None)
    return weighted_by(wrapped) if isinstance(wrapped, Strategy) else "num-examples"


def loss_of(inner: Strategy) -> str | None:
    """The metric by which the inner strategy, or the one that it wraps in turn, weights besides; None if by none."""
    own = getattr(inner, "train_loss_key", None)
    if own is not None:
        return str(own)
    wrapped = getattr(inner, "strategy", None)
    return loss_of(wrapped) if isinstance(wrapped, Strategy) else None


def check_inner(inner: Strategy) -> None:
    """Refuse a strategy that a guard cannot stand before.

    Raises:
        ConfigError: It exchanges no weights, or brings its own `start`.
    """
    name = type(inner).__name__
    if isinstance(inner, FedXgbBagging | FedXgbCyclic):
        raise ConfigError(f"GuardedStrategy: {name} exchanges trees, not weights, and no update can be measured.")
    if type(inner).start is not Strategy.start:
        raise ConfigError(
            f"GuardedStrategy: {name} has its own `start`, which would go past the guard; move what it adds into "
            "`evaluate_fn`, or into a subclass of GuardedStrategy."
        )


def remembered(value: Any) -> Any:  # noqa: ANN401  (a strategy holds anything)
    """A strategy's state, to be put back: numbers, arrays, records and containers of them; other objects are shared."""
    if isinstance(value, Strategy):
        return {name: remembered(v) for name, v in vars(value).items()}
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, ArrayRecord):
        return ArrayRecord(dict(value))
    if type(value) in (list, tuple):
        return type(value)(remembered(v) for v in value)
    if type(value) is dict:
        return {key: remembered(v) for key, v in value.items()}
    return value


def put_back(strategy: Strategy, state: Mapping[str, Any]) -> None:
    """Undo what a vetoed round did to a strategy, and to one that it wraps."""
    for name in vars(strategy).keys() - state.keys():
        delattr(strategy, name)
    for name, value in state.items():
        now = vars(strategy).get(name)
        if isinstance(now, Strategy):
            put_back(now, value)
        else:
            setattr(strategy, name, value)
