"""The federated loop: rounds of clients, an attack on their updates, a defended server; one trace row a round."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.update_attack import UpdateAttack
from mithridate.core.updates import Updates
from mithridate.core.view import Need
from mithridate.core.watch import Monitor
from mithridate.simulation.clients import FederatedRun, Federation, check_model
from mithridate.simulation.run import Exchange, Outcome, Progress, Simulation
from mithridate.simulation.server_round import ServerRound
from mithridate.simulation.trace import Phase, Sent
from mithridate.simulation.unfit_clients import fit_clients, left_out, taken_clients
from mithridate.training.door import TOO_FEW, too_few
from mithridate.training.learner import Learner, Update

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
        trigger = _flat(data)
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
        if bool((fit := fit_clients(learner, data)).any()):
            self.available[Need.TRIGGER] = _flat(data.take(fit))
        self.keep = self._keeps(clients)

    def exchange(self, index: int, phase: Phase, rng: torch.Generator) -> Exchange:
        """One round: every client's update, the hostile ones' replaced, and the server's step."""
        began = time.perf_counter()
        learner = self.learner
        number = self.run.rounds if phase == "trigger" else index
        who, data = self.federation.round(number, self.run, learner.device)
        n = len(data.y)
        hostile = hostile_clients(self.attack, n)
        with learner.taking():
            fit = fit_clients(learner, data)
            collected = self._collected(who, data, hostile, fit, phase, rng)
            collected_at = time.perf_counter()
            if isinstance(collected, str):
                update = Update(math.nan, 0.0, 0.0, 0.0, 0, learner.refuse(collected), 0.0)
                loss, length, refused = None, 0.0, int((~fit).sum())
            else:
                server_round, aggregate, buffers = collected
                loss, length = server_round.notes.loss, server_round.length / max(server_round.filled, 1)
                refused = server_round.refused
                update = learner.apply(aggregate, batch_loss=loss, learned=server_round.filled, buffers=buffers)
        sent = Sent(
            batch_loss=loss,
            gradient_norm=length,
            bounded_norm=update.bounded_norm,
            update_norm=update.update_norm,
            objective_start=None,
            objective_end=None,
            poison_linf=None,
            poison_l2=None,
            poisoned=hostile / n,
            quarantined=refused,
            flagged_clean=None,
            flagged_poisoned=None,
            admitted=update.verdict.admit,
            verdict="; ".join(filter(None, [update.verdict.reason, left_out(who[~fit.numpy()].tolist())])),
        )
        return Exchange(sent, collected_at - began, time.perf_counter() - collected_at)

    def _collected(
        self, who: NDArray[Any], data: Batch, hostile: int, fit: Tensor, phase: Phase, rng: torch.Generator
    ) -> "tuple[ServerRound, Updates, dict[str, Tensor]] | str":
        """The round, its update and the buffers after it; or why the model cannot learn from the round.

        Args:
            who: The clients' ids, the hostile ones first.
            data: Their samples.
            hostile: How many of them are hostile.
            fit: (clients,) bool, those that take part; written to where others show themselves unfit.
            phase: Of the run.
            rng: The attack's randomness.
        """
        try:
            try:
                taking_part = self._heard(who, data, hostile, fit)
            except Exception:
                taken = taken_clients(self.learner, data)
                if bool(taken[fit].all()):  # no client's samples are at fault by themselves
                    raise
                fit &= taken
                taking_part = self._heard(who, data, hostile, fit)
            if taking_part is None:
                return "no client's samples can be learned from"
            server_round, data, of_hostile = taking_part
            if len(of_hostile.y):
                self._send_hostile(server_round, of_hostile, phase, rng)
            return server_round, server_round.aggregated(), server_round.notes.buffers(data.x)
        except (DataError, ValueError) as error:
            if TOO_FEW not in str(error):
                raise
            return too_few(f"{len(data.y)} clients of {data.y.shape[1]} samples each")

    def _heard(
        self, who: NDArray[Any], data: Batch, hostile: int, fit: Tensor
    ) -> tuple[ServerRound, Batch, Batch] | None:
        """The round once every honest client that takes part has sent its update; None if nobody takes part.

        Returns:
            The round, the samples of all that take part, and those of the hostile ones among them.
        """
        learner = self.learner
        if not bool(fit.any()):
            return None
        if not bool(fit.all()):
            who, data, hostile = who[fit.numpy()], data.take(fit), int(fit[:hostile].sum())
        server_round = ServerRound(
            learner,
            self.run,
            torch.roll(torch.from_numpy(who).to(learner.device), -hostile),
            self.progress.rule,
            left_out=int((~fit).sum()),
            keep=self.keep,
            attacked=hostile > 0,
        )
        server_round.add(data.x[hostile:], data.y[hostile:])
        of_hostile = data.take(slice(hostile))
        server_round.notes.take(of_hostile.x, of_hostile.y)
        return server_round, data, of_hostile

    def _send_hostile(self, server_round: ServerRound, own: Batch, phase: Phase, rng: torch.Generator) -> None:
        """Let the hostile clients send what the attack makes of what they see; `own` are their samples."""
        attack = self.attack
        craft = attack.craft_trigger if phase == "trigger" else attack.craft
        honest = server_round.honest(own)
        # A ruined model gives no honest update that is finite: who hides among them has nothing to do.
        idle = attack.every_row and honest.n_honest == 0 and server_round.refused > 0
        server_round.send(honest.own if idle else craft(honest, self.view(), rng))

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


def _flat(data: Batch) -> Batch:
    """All clients' samples as one batch."""
    return Batch(data.x.flatten(0, 1), data.y.flatten(0, 1))


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
        What the run came to; `steps` counts rounds, `quarantined` counts refused updates and clients left out, since
        the model cannot take their samples. A round on which BatchNorm cannot train is refused.

    Raises:
        DataError: More clients or samples are asked for than there are.
        ConfigError: Defence or rule do not work in this federation (see `Defence.check_federation`), or rule or attack
            look at more updates at once than `max_matrix` allows.
        ThreatModelError: The attack looks at what it does not declare.
    """
    return _Federated(
        learner, federation, attack, run or FederatedRun(), monitors=monitors, progress=progress or Progress()
    ).go(on_step)
