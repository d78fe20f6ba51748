"""Clients of a federation that play an attack: a client's own turn, made into a round as the attack sees one.

Nothing here knows of a transport: states are full models (parameters and buffers) as tensors by name, and
`guard.flower_attack` carries them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, InstanceOf
from torch import Tensor, nn
from torch.nn import functional as F

from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.core.model import WhiteBox
from mithridate.core.registry import build, settings
from mithridate.core.seeding import generator
from mithridate.core.sgd import LearningRate
from mithridate.core.targets import Criterion
from mithridate.core.update_attack import Honest, UpdateAttack
from mithridate.core.updates import Updates
from mithridate.core.view import Memory, Need, View
from mithridate.guard.limits import is_statistic
from mithridate.maths.calculus import gradient

Tensors = Mapping[str, Tensor]

TRIGGERED = "triggered"
"""Note of a client that has sent before: whether the last thing that it sent was the trigger."""


@dataclass(frozen=True, eq=False)
class Accomplice:
    """What a hostile client holds besides the global model that the server sends it.

    Args:
        module: Of the federation's architecture; its weights are overwritten.
        validation: Its own images S_val.
        trigger: Its local batch S_T that becomes the trigger.
        criterion: (logits, targets) -> mean loss.
    """

    module: nn.Module
    validation: Batch
    trigger: Batch
    criterion: Criterion = F.cross_entropy


@dataclass(frozen=True)
class Turn:
    """One client's part of a round.

    Args:
        model: The global state that it was sent.
        honest: Its state after honest local training.
        round: Server round, from 1.
        partition: Which of the hostile clients it is.
        notes: What it remembers between rounds; written to.
        accomplice: Gives what else it holds; called only if the attack looks at it.
    """

    model: Tensors
    honest: Tensors
    round: int
    partition: int
    accomplice: Callable[[], Accomplice]
    notes: Memory = field(default_factory=dict)


@settings
class NamedClients(ABC):
    """Some clients of a federation, by their numbers, and what they send in place of an honest reply.

    Args:
        partitions: Numbers of the hostile clients (`partition-id` of the node), each >= 0 and once.

    Raises:
        ConfigError: None is named, or one twice.
    """

    partitions: tuple[Annotated[int, Field(ge=0)], ...] = (0,)

    def __post_init__(self) -> None:
        if not self.partitions or len(set(self.partitions)) < len(self.partitions):
            raise ConfigError(f"hostile clients: partitions = {list(self.partitions)}; name one or more, each once.")

    @property
    def claimed_examples(self) -> int | None:
        """The number of examples that they report; None: the true one."""
        return None

    @abstractmethod
    def sent(self, turn: Turn) -> dict[str, Tensor]:
        """The state that one of these clients sends."""


def _built(attack: object) -> object:
    return build("update_attack", attack, where="hostile clients, attack") if isinstance(attack, Mapping) else attack


@settings
class HostileClients(NamedClients):
    """Clients that play an attack on updates, the same as in a simulation.

    A client of a real federation knows no other client's update. To the attack it shows a round in which its own honest
    update stands for those of all others: with a wish W for what the federation should do and its own honest update U
    it then sends b * W - (b - 1) * U, b = `clients` / hostile ones, the recovered offset as far as one client can know
    it. Attacks that look at every honest update (alie, min_max) cannot be played.

    To the attack an update is a gradient, -U / lr. What needs gradients on other than its honest data (label_flip) has
    them from one pass on the trigger batch, not from local training. Buffers and counters are sent as honest training
    left them. Hostile clients draw from one generator a round and take a row each, so that `spread` hides them from
    each other as in a simulation; the rows sum to zero as far as their own updates are equally long.

    Args:
        partitions: Numbers of the hostile clients (`partition-id` of the node), each >= 0 and once.
        attack: What they play: a table as in a recipe (`{name = "accumulative", lam = 0.02}`), or the attack itself.
            Its own share of hostile clients does not count here. On servers without momentum (FedAvg), give the
            accumulative attack a `momentum` of its own.
        clients: In a round, hostile ones included, >= 1.
        lr: Step size beta of the federation that the attack's gradients are expressed in, in (0, 1e6).
        trigger_round: Server round of the trigger, from 1, at the latest: an attack may end its phase before
            (`max_rounds`; `direct` has none). After its trigger a client is honest.
        seed: Of all that is drawn.

    Raises:
        ConfigError: The attack is unknown, or cannot be played by single clients; or more clients are hostile than
            there are.

    Source:
        Pang et al., NeurIPS 2021, section 3.3, Eq. (14), Algorithm 2 and Appendix C.1.
    """

    attack: Annotated[InstanceOf[UpdateAttack], BeforeValidator(_built)]
    clients: Annotated[int, Field(ge=1)]
    lr: LearningRate = 0.1
    trigger_round: Annotated[int, Field(ge=1)] = 20
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attack.every_row:
            raise ConfigError(
                f"hostile clients: {type(self.attack).__name__} looks at every honest client's update, and a client "
                "sees its own alone; take accumulative, direct, ipm, label_flip, noise or sign_flip."
            )
        if len(self.partitions) > self.clients:
            raise ConfigError(
                f"hostile clients: {len(self.partitions)} are named, of clients = {self.clients} in a round; raise it."
            )

    def sent(self, turn: Turn) -> dict[str, Tensor]:
        """The state that the attack wants sent; after the trigger, the honest one."""
        attack = self.attack
        if turn.round > self.trigger_round or bool(turn.notes.get(TRIGGERED, False)):
            return dict(turn.honest)
        accomplice = turn.accomplice() if attack.needs else None
        row, honest = self._as_a_round(turn, accomplice)
        available: dict[Need, Any] = {}
        if accomplice is not None:
            available = {
                Need.MODEL: WhiteBox(accomplice.module, accomplice.criterion),
                Need.VALIDATION: accomplice.validation,
                Need.TRIGGER: accomplice.trigger,
            }
        everything = View(turn.round - 1, turn.notes, available)
        with everything.inside("attack.", attack.needs, type(attack).__name__) as view:
            if TRIGGERED in turn.notes:  # what it last sent has been learned from by now
                attack.after_step(view, generator("hostile clients, after a step", self.seed, turn.round))
            now = turn.round == self.trigger_round or attack.ready(view)
            craft = attack.craft_trigger if now else attack.craft
            rows = craft(honest, view, generator("hostile clients", self.seed, turn.round))
        turn.notes[TRIGGERED] = torch.tensor(now)
        mine = row.with_rows(rows[self.partitions.index(turn.partition)].unsqueeze(0)).named()
        return {
            name: (turn.model[name].to(t) - self.lr * mine[name]).to(t) if name in mine else t.clone()
            for name, t in turn.honest.items()
        }

    def _as_a_round(self, turn: Turn, accomplice: Accomplice | None) -> tuple[Updates, Honest]:
        """The client's honest update as a gradient, and a round in which all others' are like it."""
        hostile, others = len(self.partitions), self.clients - len(self.partitions)
        if accomplice is None:
            names = [name for name, t in turn.honest.items() if t.is_floating_point() and not is_statistic(name)]
            x = y = torch.empty(hostile, 0)  # no data are looked at
        else:
            accomplice.module.load_state_dict(dict(turn.model))
            names = [name for name, p in accomplice.module.named_parameters() if p.requires_grad]
            x, y = (t.expand(hostile, *t.shape) for t in accomplice.trigger)
        row = Updates.of({n: (turn.model[n].to(turn.honest[n]) - turn.honest[n]) / self.lr for n in names})
        total = others * row.rows[0]

        def gradients(other_x: Tensor, other_y: Tensor) -> Tensor:
            if torch.equal(other_x, x) and torch.equal(other_y, y):  # its own: what it trained on
                return row.rows.expand(hostile, -1)
            if accomplice is None:
                raise AssertionError(
                    f"{type(self.attack).__name__} asks for gradients, and declares no need of a model"
                )
            box = WhiteBox(accomplice.module, accomplice.criterion)
            with box.objective("eval") as objective:
                each = [gradient(objective, box.parameters, *data) for data in zip(other_x, other_y, strict=True)]
            return torch.cat([Updates.of(tensors).rows for tensors in each])

        return row, Honest(total, total.clone(), others, x, y, None, gradients)
