"""What a defence costs where there is nothing to defend against."""

from collections.abc import Sequence
from typing import NamedTuple

from mithridate.attacks.clean import Clean
from mithridate.core.defence import Defence
from mithridate.simulation.online import OnlineRun, run_online
from mithridate.testing.toy import toy_learner, toy_stream

RUN = OnlineRun(steps=4, lr=0.05, images=0)
"""All that the toy stream holds."""


class CleanCost(NamedTuple):
    """Test accuracy that a defence loses on clean streams; below zero if it gains some.

    Args:
        mean: Over the streams, a fraction.
        each: Stream by stream.
    """

    mean: float
    each: tuple[float, ...]


def clean_cost(defence: Defence, *, seeds: Sequence[int] = range(5)) -> CleanCost:
    """How much accuracy a defence costs on clean toy streams, next to learning without it.

    Args:
        defence: With the settings that are asked about.
        seeds: Of the streams, the models and the order of samples.
    """
    each = tuple(_accuracy(None, seed) - _accuracy(defence, seed) for seed in seeds)
    return CleanCost(sum(each) / len(each), each)


def _accuracy(defence: Defence | None, seed: int) -> float:
    """After a clean stream, a fraction."""
    stream = toy_stream(seed)
    outcome = run_online(toy_learner(stream, seed=seed, defence=defence), stream, Clean(), RUN, seed=seed)
    assert outcome.accuracy_after_trigger is not None
    return outcome.accuracy_after_trigger
