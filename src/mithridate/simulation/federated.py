"""The federated loop: rounds of clients, an attack on their updates, a defended server; one trace row a round."""

import math
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.core.update_attack import UpdateAttack
from mithridate.core.watch import Monitor
from mithridate.simulation.clients import FederatedRun, Federation, check_model
from mithridate.simulation.run import Exchange, Outcome, Progress, Simulation
from mithridate.simulation.server_round import ServerRound
from mithridate.simulation.trace import Phase, Sent
from mithridate.training.learner import Learner

GIB = 2**30


def hostile_clients(attack: UpdateAttack, clients: int) -> int:
    """How many of a round's clients an attack has: its share, rounded up."""
    return min(math.ceil(attack.ratio * clients - 1e-9), clients)


class _Federated(Simulation):
    """Rounds of clients, some of them hostile, and a server that learns from their updates."""

    key: ClassVar[str] = "update attack"
    attack: UpdateAttack

    def __init__(
        self,
        learner: Learner,
        federation: Federation,
        attack: UpdateAttack,
        run: FederatedRun,
        *,
        monitors: Sequence[Monitor],
        progress: Progress,
    ) -> None:
        federation.require(run)
        clients = run.per_round or len(federation.shards)
        run.check(clients, learner.trusted is not None)
        learner.defence.check_federation(run, clients)
        check_model(learner.model, run)
        _, data = federation.round(run.rounds, run, learner.device)
        if not isinstance(data.x, Tensor):
            raise ConfigError(
                "a federation is simulated for inputs that are one tensor, and these are several; run an online recipe "
                "([run] in place of [federated])."
            )
        trigger = Batch(data.x.flatten(0, 1), data.y.flatten())
        super().__init__(
            learner,
            federation.stream,
            attack,
            run,
            trigger,
            seed=federation.seed,
            monitors=monitors,
            progress=progress,
        )
        self.federation, self.run = federation, run
        self.keep = self._keeps(clients)

    def exchange(self, index: int, phase: Phase, rng: torch.Generator) -> Exchange:
        """One round: every client's update, the hostile ones' replaced, and the server's step."""
        began = time.perf_counter()
        learner, attack = self.learner, self.attack
        number = self.run.rounds if phase == "trigger" else index
        who, data = self.federation.round(number, self.run, learner.device)
        n = len(data.y)
        hostile = hostile_clients(attack, n)
        clients = torch.roll(torch.from_numpy(who).to(learner.device), -hostile)
        with learner.taking():
            server_round = ServerRound(
                learner, self.run, clients, self.progress.rule, keep=self.keep, attacked=hostile > 0
            )
            server_round.add(data.x[hostile:], data.y[hostile:])
            of_hostile = Batch(data.x[:hostile], data.y[:hostile])
            server_round.notes.take(of_hostile.x, of_hostile.y)
            if hostile:
                craft = attack.craft_trigger if phase == "trigger" else attack.craft
                honest = server_round.honest(of_hostile)
                # A ruined model gives no honest update that is finite: who hides among them has nothing to do.
                idle = attack.every_row and honest.n_honest == 0 and server_round.refused > 0
                server_round.send(honest.own if idle else craft(honest, self.view(), rng))
            aggregate, buffers = server_round.aggregated(), server_round.notes.buffers(data.x)
            collected_at = time.perf_counter()
            update = learner.apply(
                aggregate, batch_loss=server_round.notes.loss, learned=server_round.filled, buffers=buffers
            )
        sent = Sent(
            batch_loss=update.batch_loss,
            gradient_norm=server_round.length / max(server_round.filled, 1),
            bounded_norm=update.bounded_norm,
            update_norm=update.update_norm,
            poison_linf=None,
            poison_l2=None,
            poisoned=hostile / n,
            quarantined=server_round.refused,
            flagged_clean=None,
            flagged_poisoned=None,
            admitted=update.verdict.admit,
            verdict=update.verdict.reason,
        )
        return Exchange(sent, collected_at - began, time.perf_counter() - collected_at)

    def _keeps(self, n: int) -> bool:
        """Whether a round keeps all rows in memory, because rule or attack looks at them.

        Raises:
            ConfigError: They take more memory than `max_matrix` allows.
        """
        attacked = self.attack.every_row and hostile_clients(self.attack, n) > 0
        if self.run.aggregator is None and not attacked:
            return False
        trained = [p for p in self.learner.model.parameters() if p.requires_grad]
        width = sum(p.numel() for p in trained)
        size = n * width * trained[0].element_size() / GIB
        if size > self.run.max_matrix:
            who = type(self.attack).__name__ if attacked else f"the rule {self.run.rule_name}"
            raise ConfigError(
                f"{who} looks at all updates of a round at once: {n} clients of {width:,} parameters are {size:.1f} "
                f"GiB, more than max_matrix = {self.run.max_matrix:g}; use fewer clients a round, or raise it."
            )
        return True


def run_federated(
    learner: Learner,
    federation: Federation,
    attack: UpdateAttack,
    run: FederatedRun | None = None,
    *,
    monitors: Sequence[Monitor] = (),
    progress: Progress | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> Outcome:
    """Let a server learn from clients, some of them hostile: rounds before the trigger, then one trigger round.

    Args:
        learner: The server's model after its burn-in, with its defence; changed in place.
        federation: The clients.
        attack: What hostile clients send.
        run: Length and options of the loop (its optimiser fields are for `victim_optimiser`).
        monitors: Watch the readings.
        progress: Where an interrupted run had come to; the learner must be at the same point.
        on_step: Called after every round before the trigger, for progress bars and resume points.

    Returns:
        What the run came to; `steps` counts rounds, `quarantined` counts refused updates.

    Raises:
        DataError: More clients or samples are asked for than there are.
        ConfigError: Defence or rule do not work in this federation (see `Defence.check_federation`), or rule or attack
            look at more updates at once than `max_matrix` allows.
        ThreatModelError: The attack looks at what it does not declare.
    """
    return _Federated(
        learner, federation, attack, run or FederatedRun(), monitors=monitors, progress=progress or Progress()
    ).go(on_step)
