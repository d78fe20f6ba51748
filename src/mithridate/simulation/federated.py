"""The federated loop: rounds of clients, an attack on their updates, a defended server; one trace row a round."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.core.seeding import generator
from mithridate.core.update import Gradient
from mithridate.core.update_attack import UpdateAttack
from mithridate.core.view import Need, View
from mithridate.core.watch import Monitor
from mithridate.simulation.clients import FederatedRun, Federation, check_defence, check_model, has_rule
from mithridate.simulation.online import (
    EVALUATION_BATCH,
    Outcome,
    Progress,
    Row,
    accuracy_with_buffers_alone,
    alarms_of,
    attack_view,
    outcome_of,
    phase_end,
    start_row,
)
from mithridate.simulation.server_round import Sheet
from mithridate.training.learner import Learner, Update

GIB = 2**30


def hostile_clients(attack: UpdateAttack, clients: int) -> int:
    """How many of a round's clients an attack has: its share, rounded up."""
    return min(math.ceil(attack.ratio * clients - 1e-9), clients)


@dataclass(frozen=True)
class Collected:
    """What the server has of a round.

    Args:
        aggregate: One row.
        taken: Clients behind it.
        refused: Clients whose update was not finite; they are left out.
        lengths: Mean l2 length of the rows as sent.
        hostile: Share of hostile clients.
        loss: Mean loss of the honest data before the step.
        buffers: BatchNorm statistics after the round.
    """

    aggregate: Gradient
    taken: int
    refused: int
    lengths: float
    hostile: float
    loss: float
    buffers: Mapping[str, Tensor]


class _Rounds:
    """The pieces of one run, bound together; `run_federated` is its only user."""

    def __init__(
        self,
        learner: Learner,
        federation: Federation,
        attack: UpdateAttack,
        run: FederatedRun,
        monitors: Sequence[Monitor],
        progress: Progress,
    ) -> None:
        self.learner, self.federation, self.attack, self.run = learner, federation, attack, run
        self.monitors, self.progress = monitors, progress
        device, stream = learner.device, federation.stream
        federation.require(run)
        clients = run.per_round or len(federation.shards)
        check_defence(learner.defence, run, clients)
        check_model(learner.model, run)
        self.keep = self._keeps(clients)
        self.test = list(stream.test.batches(EVALUATION_BATCH, device=device))
        _, trigger = federation.round(run.rounds, run, device)
        self.things: dict[Need, Any] = {
            Need.MODEL: learner.white_box,
            Need.TRIGGER: Batch(trigger.x.flatten(0, 1), trigger.y.flatten()),
        }
        if len(stream.validation):
            self.things[Need.VALIDATION] = stream.validation.all(device)

    def view(self) -> View:
        """What the attack sees now."""
        return attack_view(self.attack, self.learner, self.progress, self.things)

    def start(self) -> None:
        """The row of the state before the first round."""
        self.progress.rows.append(start_row(self.learner, self.test))

    def step(self, phase: str) -> None:
        """One round: collect, aggregate, step, measure."""
        began = time.perf_counter()
        self.learner.begin_round()
        index = len(self.progress.rows) - 1
        number = self.run.rounds if phase == "trigger" else index
        rng = generator("update attack", self.federation.seed, index)
        collected = self._collect(number, phase, rng)
        made = time.perf_counter()
        update = self.learner.apply(
            collected.aggregate,
            batch_loss=collected.loss,
            learned=collected.taken,
            buffers=collected.buffers,
        )
        updated = time.perf_counter()
        if phase != "trigger":
            self.attack.fed(self.view())
        score = self.learner.evaluate(self.test)
        row = _row(index + 1, phase, collected, update)
        row |= {"accuracy": score.accuracy, "loss": score.loss}
        row |= {"craft_seconds": made - began, "update_seconds": updated - made, "alarms": ""}
        self.progress.rows.append(row)
        row["alarms"] = "; ".join(alarms_of(self.monitors, self.progress.rows))
        row["seconds"] = time.perf_counter() - began

    def _collect(self, number: int, phase: str, rng: torch.Generator) -> Collected:
        """Every client's update, the hostile ones' replaced, to one row."""
        who, data = self.federation.round(number, self.run, self.learner.device)
        n = len(data.y)
        hostile = hostile_clients(self.attack, n)
        clients = torch.from_numpy(who).to(self.learner.device)
        sheet = Sheet(self.learner, self.run, torch.roll(clients, -hostile), keep=self.keep, attacked=hostile > 0)
        sheet.add(data.x[hostile:], data.y[hostile:])
        mine = Batch(data.x[:hostile], data.y[:hostile])
        sheet.notes.take(mine.x, mine.y)
        if hostile:
            honest = sheet.honest(mine)
            craft = self.attack.craft_trigger if phase == "trigger" else self.attack.craft
            sheet.send(craft(honest, self.view(), rng))
        return Collected(
            aggregate=sheet.aggregated(),
            taken=sheet.filled,
            refused=sheet.refused,
            lengths=sheet.length / max(sheet.filled, 1),
            hostile=hostile / n,
            loss=sheet.notes.loss,
            buffers=sheet.notes.buffers(data.x),
        )

    def _keeps(self, n: int) -> bool:
        """Whether all rows of a round are held at once, because somebody looks at them.

        Raises:
            ConfigError: They are too many.
        """
        defence = self.learner.defence
        attacked = self.attack.every_row and hostile_clients(self.attack, n) > 0
        if not has_rule(defence) and not attacked:
            return False
        trained = [p for p in self.learner.model.parameters() if p.requires_grad]
        width = sum(p.numel() for p in trained)
        size = n * width * trained[0].element_size() / GIB
        if size > self.run.max_matrix:
            who = type(self.attack if attacked else defence).__name__
            raise ConfigError(
                f"{who} looks at all updates of a round at once: {n} clients of {width:,} parameters are {size:.1f} "
                f"GiB, more than max_matrix = {self.run.max_matrix:g}; use fewer clients a round, or raise it."
            )
        return True


def _row(number: int, phase: str, collected: Collected, update: Update) -> Row:
    return {
        "step": number,
        "phase": phase,
        "batch_loss": update.batch_loss,
        "gradient_norm": collected.lengths,
        "bounded_norm": update.bounded_norm,
        "update_norm": update.update_norm,
        "poison_linf": None,
        "poison_l2": None,
        "poisoned": collected.hostile,
        "quarantined": collected.refused,
        "flagged_clean": None,
        "flagged_poisoned": None,
        "admitted": update.verdict.admit,
        "verdict": update.verdict.reason,
    }


def federated_optimiser(learner_parameters: Any, run: FederatedRun) -> SGD:  # noqa: ANN401  (as torch's own)
    """The server's optimiser: a fresh SGD."""
    return SGD(learner_parameters, lr=run.lr, momentum=run.momentum, weight_decay=run.weight_decay)


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
        run: Length and options of the loop (its optimiser fields are for `federated_optimiser`).
        monitors: Watch the readings.
        progress: Where an interrupted run had come to; the learner must be at the same point.
        on_step: Called after every round before the trigger, for progress bars and resume points.

    Returns:
        As of the online loop; `steps` counts rounds, `quarantined` counts refused updates.

    Raises:
        DataError: More clients or samples are asked for than there are.
        ConfigError: The defence does not work in a federation, or not with so few clients (see `check_defence`); or
            somebody has to see more updates at once than `max_matrix` allows.
        ThreatModelError: The attack looks at what it does not declare.
    """
    run = run or FederatedRun()
    progress = progress or Progress()
    loop = _Rounds(learner, federation, attack, run, monitors, progress)
    if not progress.rows:
        loop.start()
    while (stopped_by := phase_end(progress.rows, run.rounds, run.on_alarm, lambda: attack.ready(loop.view()))) is None:
        loop.step("accumulative")
        if on_step:
            on_step(progress)
    halted = stopped_by == "monitor" and run.on_alarm == "halt"
    after_buffers = None
    if not halted:
        before = learner.snapshot()
        loop.step("trigger")
        after_buffers = accuracy_with_buffers_alone(learner, loop.test, before)
    return outcome_of(progress, stopped_by, halted, after_buffers)
