"""Clients with their samples, and how a server learns from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from mithridate.core.aggregator import Aggregator
from mithridate.core.batch import Batch, each_tensor
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.registry import build, config_of, settings
from mithridate.core.seeding import derived_seed, generator
from mithridate.core.sgd import LearningRate, Momentum
from mithridate.data.shards import Shards, divide, sampled
from mithridate.data.stream import Stream
from mithridate.simulation.run import OnAlarm
from mithridate.training.learner import EvaluationPrecision


@settings
class FederatedRun:
    """How the server learns from its clients, and how long.

    A client's update is the gradient of its loss; the server takes the mean over the round's clients, or what a robust
    rule makes of their rows, and steps with SGD.

    What breaks a robust rule: more hostile clients than it is made for; attacks whose updates do not stand out in a
    round, such as the accumulative one, since a rule looks at one round at a time; and clients whose data really
    differ, which look like outliers. Each rule names its source and its bounds: `mithridate list aggregators NAME`.

    Args:
        rounds: Rounds before the trigger round at most; the trigger round comes on top.
        per_round: Clients sampled in a round, >= 1; unset: all of them.
        local_batch: Samples a client draws from its shard in a round, >= 1; unset: the whole shard, or as many as the
            smallest shard of the round holds.
        lr: Learning rate of the server's SGD, in (0, 1e6).
        momentum: Momentum factor of the server's SGD, in [0, 1).
        weight_decay: L2 penalty of the server's SGD.
        restore_momentum: Go on with the burn-in's momentum instead of a fresh optimiser.
        rule: The server's robust rule, a table as in a recipe: `{name = "krum", hostile = 2}`; completed with the
            rule's defaults. Unset: the mean, for which no client's update need be formed.
        bound: Where the defence's `bound` (clipping) acts: on the aggregate (`after`, threat model C.2), or on each
            client's row (`before`, C.3).
        batch_norm: Statistics of BatchNorm. `synchronised`: clients use the global running statistics, which then take
            in each layer's inputs from all of the round's samples, as one batch; `averaged`: each client uses those of
            its own batch, and the clients' running statistics are averaged; `frozen`: nothing is recorded.
        distances: Which parameters a robust rule and a bound look at: `all`, or all but those of normalisation layers
            (`without_norm`), which then follow the mean, unbounded.
        max_matrix: Largest (client, parameter) matrix that may be in memory, in GiB, > 0. Only a robust rule, or an
            attack that looks at every update, needs one.
        on_alarm: What a monitor's alarm does: `record` it only; `trigger`: the attacker ends the phase and fires;
            `halt`: the service stops learning before the trigger.
        evaluate_every: Rounds between two measurements of the test part; it is measured at the start, before and after
            the trigger in any case. Attacks and monitors know of no other than that of the start and those between.
        evaluate_size: Samples of the test part that are measured at the rounds between, the same in the whole run, of
            each class its share; the seed draws them. At the start, before and after the trigger it is always the
            whole part. Unset: all.
        evaluate_precision: `bfloat16` measures with convolutions and products of matrices rounded to it, which is
            faster on processors that have it (AVX-512 BF16, AMX, GPUs), and many times slower on others.
        save_every: Rounds between resume points.

    Source:
        Pang et al., NeurIPS 2021, section 4.2: SGD, lr 0.1, momentum 0.9, statistics of BatchNorm synchronised.
    """

    rounds: Annotated[int, Field(ge=0)] = 20
    per_round: Annotated[int, Field(ge=1)] | None = None
    local_batch: Annotated[int, Field(ge=1)] | None = None
    lr: LearningRate = 0.1
    momentum: Momentum = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    restore_momentum: bool = False
    rule: dict[str, Any] | None = None
    bound: Literal["after", "before"] = "after"
    batch_norm: Literal["synchronised", "averaged", "frozen"] = "synchronised"
    distances: Literal["all", "without_norm"] = "all"
    max_matrix: Annotated[float, Field(gt=0)] = 4.0
    on_alarm: OnAlarm = "record"
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    evaluate_size: Annotated[int, Field(ge=1)] | None = None
    evaluate_precision: EvaluationPrecision = "float32"
    save_every: Annotated[int, Field(ge=1)] = 1

    def __post_init__(self) -> None:
        rule: Aggregator | None = (
            None if self.rule is None else build("aggregator", self.rule, where="[federated] rule")
        )
        # The class is frozen: these are set once, here, and follow from `rule`.
        object.__setattr__(self, "_aggregator", rule)
        object.__setattr__(self, "rule", None if rule is None else config_of(rule))

    def __hash__(self) -> int:
        """Equal settings have equal hashes; the rule's table itself has none."""
        return hash((self.rounds, self.per_round, self.local_batch, self.lr, self.rule_name))

    @property
    def aggregator(self) -> Aggregator | None:
        """The robust rule as a settings object; None for the mean."""
        rule: Aggregator | None = self.__dict__["_aggregator"]
        return rule

    @property
    def rule_name(self) -> str:
        """What the rule is called."""
        return "mean" if self.rule is None else str(self.rule["name"])

    def check(self, clients: int, trusted: bool) -> None:
        """Refuse a rule that does not hold for so many clients, or misses what it needs.

        Args:
            clients: In a round.
            trusted: Whether the server has trusted samples.

        Raises:
            ConfigError: Says what to change.
        """
        if self.aggregator is None:
            return
        self.aggregator.check(clients)
        if self.aggregator.needs_trusted and not trusted:
            raise ConfigError(
                f"[federated] rule: {self.rule_name} compares with the server's own update, and there are no trusted "
                "samples; give some ([data] trusted), or take another rule."
            )

    @property
    def steps(self) -> int:
        """Rounds before the trigger at most, by the name that an online run has for them."""
        return self.rounds


@dataclass(frozen=True)
class Federation:
    """Clients and their samples.

    Args:
        stream: Gives test, validation and trusted parts.
        shards: The positions of each client's samples in the stream's victim part.
        seed: Decides which clients take part in a round, and what each draws from its shard.
    """

    stream: Stream
    shards: Sequence[NDArray[np.int64]]
    seed: int

    def require(self, run: FederatedRun) -> None:
        """Refuse a run that asks for more clients or samples, in any round, than there are.

        Raises:
            DataError: The run asks for more than there is.
        """
        for number in range(run.rounds + 1):
            self._drawn(number, run)

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        """How many samples each client holds."""
        return np.array([len(shard) for shard in self.shards])

    def _drawn(self, number: int, run: FederatedRun) -> tuple[NDArray[np.int64], int]:
        """The clients of a round, and how many samples each brings."""
        who = sampled(len(self.shards), run.per_round or len(self.shards), round_=number, seed=self.seed)
        smallest = int(self._sizes[who].min())
        size = smallest if run.local_batch is None else run.local_batch
        if size > smallest:
            raise DataError(
                f"local_batch = {size}, and a client of round {number} holds {smallest} samples; lower it, use fewer "
                "clients, or another partition."
            )
        return who, size

    def _local_batch(self, number: int, client: int, size: int) -> NDArray[np.int64]:
        """The positions of a client's samples in a round."""
        shard = self.shards[client]
        if (
            len(shard) == 1
        ):  # nothing to draw, and a generator for each of ten thousand clients takes a third of a second
            return shard
        rng = np.random.default_rng(derived_seed("local batch", self.seed, number, client))
        return rng.permutation(shard)[:size]

    def round(self, number: int, run: FederatedRun, device: torch.device | str = "cpu") -> tuple[NDArray[Any], Batch]:
        """The clients of a round, and their samples: x (clients, samples, ...), y (clients, samples).

        Args:
            number: Which round, from 0; with the seed it decides everything.
            run: How many clients and samples.
            device: Where the samples go.

        Raises:
            DataError: More clients or samples are asked for than there are.
        """
        who, size = self._drawn(number, run)
        chosen = [self._local_batch(number, int(client), size) for client in who]
        batch = self.stream.victim.batch(np.concatenate(chosen), device)
        if self.stream.settings.augment_stream:
            batch = self.stream.augmented(batch, generator("federated augmentation", self.seed, number))
        by_client = (len(who), size)
        x = each_tensor(batch.x, lambda t: t.reshape(*by_client, *t.shape[1:]))
        return who, Batch(x, batch.y.reshape(*by_client, *batch.y.shape[1:]))


def federate(stream: Stream, how: Shards, *, seed: int) -> Federation:
    """Divide the stream's victim part among clients.

    Args:
        stream: Whose victim part is divided.
        how: Number of clients and partition.
        seed: Decides the division, which clients take part in a round, and what each draws from its shard.

    Raises:
        DataError: There are too few samples.
    """
    return Federation(stream, divide(stream.victim, how, seed=seed), seed)


def check_model(model: torch.nn.Module, run: FederatedRun) -> None:
    """Refuse a model whose clients would draw random numbers in train mode.

    Args:
        model: What they train.
        run: Says how BatchNorm is shared.

    Raises:
        ConfigError: It has dropout, and gradients are computed in train mode.
    """
    dropout = (m for m in model.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd))
    if run.batch_norm == "averaged" and any(m.p > 0 for m in dropout):
        raise ConfigError(
            'batch_norm = "averaged" computes gradients in train mode, in which the model\'s dropout would draw anew '
            'for every client and no run could be repeated; use "synchronised" or "frozen".'
        )
