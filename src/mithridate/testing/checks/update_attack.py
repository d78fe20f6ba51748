"""What every attack on federated rounds must pass."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import median
from typing import Any

import torch
from torch import Generator, Tensor

from mithridate.core.update_attack import Honest, UpdateAttack
from mithridate.core.updates import Updates
from mithridate.core.view import Memory, Need, View
from mithridate.data.shards import Shards
from mithridate.maths.norms import Norm, sample_norms
from mithridate.simulation.clients import FederatedRun, Federation, federate
from mithridate.simulation.federated import run_federated
from mithridate.simulation.per_client.gradients import client_gradients
from mithridate.testing.checks.evidence import Evidence
from mithridate.testing.checks.subject import Check, entry_of, fields_in, fresh, made, named_choices, variants
from mithridate.testing.checks.witness import Witness, bits, through_file, unsaveable
from mithridate.testing.checks.worlds import image_world, stream_of, untimed
from mithridate.testing.toy import toy_learner
from mithridate.update_attacks.clean import CleanUpdates

CLIENTS, HOSTILE = 10, 4
"""Clients of the toy federation, ten images each, and how many of them are hostile where it matters."""

RUN = FederatedRun(rounds=3, lr=0.05)
LONG_RUN = FederatedRun(rounds=5, lr=0.1, batch_norm="frozen")
"""Where harm is measured: statistics of so few samples would move the test loss more than most attacks."""
RADIUS = 0.05
"""Shorter than what any attack would send to the toy federation."""

SEEDS = range(7)
WORSE = 1.5
"""How many times as large as under noise the victim's loss must be, at the median over `SEEDS`. Between other draws of
the noise the ratio is 0.8 to 1.3."""
LOUD = {"lam": 1.0, "trigger_scale": 4.0}
"""Of an attack that turns the model little by little, or steps once: it has few rounds to show in. The noise beside it
is as long."""


@lru_cache(maxsize=64)
def exercised(cls: type) -> Evidence:
    """What is found when an attack is tried in all its settings; tried once."""
    evidence = Evidence()
    with evidence.trying(cls.__name__):
        attacks = _settings(cls)
        for attack in attacks:
            with evidence.trying(attack):
                _run_and_resume(attack, evidence)
        if evidence.crashed:
            return evidence
        for attack in attacks:
            with evidence.trying(attack, "batch of one"):
                _try_few_clients(attack, evidence)
        with evidence.trying(attacks[0], "dtype"):
            _try_float64(attacks[0], evidence)
        if "radius" in entry_of(cls).fields:
            for attack in variants(cls, [{}, *(choice for choice in named_choices(cls) if "norm" in choice)]):
                with evidence.trying(attack):
                    _try_radius(attack, evidence)
    return evidence


def _settings(cls: type) -> list[UpdateAttack]:
    """The class as it is, in every preset, and with every value of its named choices."""
    return variants(cls, [{}, *entry_of(cls).presets.values(), *named_choices(cls)])


@lru_cache(maxsize=8)
def _federation(seed: int) -> Federation:
    return federate(stream_of(seed), Shards(clients=CLIENTS), seed=seed)


class _Play:
    """Two rounds and the trigger round of the toy federation, in which some clients are hostile."""

    def __init__(
        self,
        attack: UpdateAttack,
        evidence: Evidence | None,
        *,
        hostile: int = HOSTILE,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.attack, self.hostile, self.dtype = attack, hostile, dtype
        self.world = image_world(dtype)
        self.witness = Witness(attack, evidence, self.world)
        self.memory: Memory = {}

    def honest(self, number: int) -> Honest:
        """A round as the attacker sees it before it sends."""
        _, (x, y) = _federation(0).round(number, RUN)
        x, model, criterion = x.to(self.dtype), self.world.learner.model, self.world.learner.criterion
        rows = client_gradients(model, criterion, x, y)[self.hostile :]
        total = rows.sum(0)
        return Honest(
            total=total,
            bounded_total=total.clone(),
            n_honest=len(rows),
            x=x[: self.hostile],
            y=y[: self.hostile],
            rows=rows if self.attack.every_row else None,
            gradients=lambda x, y: client_gradients(model, criterion, x, y),
        )

    def sends(self, number: int) -> Tensor:
        """What hostile clients send in a round; in the last one, the trigger's."""
        honest = self.honest(number)
        self.own = honest.own  # made when first looked at: now
        call, craft = ("craft_trigger", self.attack.craft_trigger) if number == 2 else ("craft", self.attack.craft)
        view = self.world.view(self.attack, self.memory)
        with self.witness.watching(call, {"honest": honest}, notes=self.memory):
            return craft(honest, view, torch.Generator().manual_seed(number))

    def learned(self, sent: Tensor, number: int) -> None:
        """The model takes a step on the round, and the attack is told."""
        honest, learner = self.honest(number), self.world.learner
        shapes = {name: p.shape for name, p in learner.model.named_parameters()}
        mean = Updates(((honest.total + sent.sum(0)) / CLIENTS).unsqueeze(0), shapes).named()
        learner.put_parameters({name: p - RUN.lr * mean[name] for name, p in learner.white_box.parameters.items()})
        learner.step += 1
        with self.witness.watching("after_step", {}, notes=self.memory):
            self.attack.after_step(self.world.view(self.attack, self.memory), torch.Generator().manual_seed(number))
        with self.witness.watching("ready", {}, notes=self.memory):
            self.attack.ready(self.world.view(self.attack, self.memory))


def _run_and_resume(attack: UpdateAttack, evidence: Evidence) -> None:
    """Two rounds and the trigger; then the first again, and the end from what was saved in the middle."""
    play = _Play(attack, evidence)
    first = play.sends(0)
    _judge(play, first, evidence)
    play.learned(first, 0)
    if unsaveable(play.memory):
        return  # that is on record
    notes, snapshot = through_file(play.memory), play.world.learner.snapshot()
    second = play.sends(1)
    play.learned(second, 1)
    trigger = play.sends(2)
    _judge(play, trigger, evidence)

    if bits(_Play(fresh(attack), None).sends(0)) != bits(first):
        evidence.add("repeats", attack, "sends other rows from the same state of the generator")
    resumed = _Play(fresh(attack), None)
    resumed.memory.update(notes)
    resumed.world.learner.restore(snapshot)
    middle = resumed.sends(1)
    resumed.learned(middle, 1)
    if (bits(middle), bits(resumed.sends(2))) != (bits(second), bits(trigger)):
        evidence.add("resumes", attack, "goes on otherwise once its notes were saved")


def _judge(play: _Play, sent: Tensor, evidence: Evidence) -> None:
    """Hold what was sent against the rows that hostile clients would have sent honestly."""
    own = play.own
    if sent.shape != own.shape:
        evidence.add("shape", play.attack, f"sends {tuple(sent.shape)} for rows of {tuple(own.shape)}")
    if (sent.dtype, sent.device) != (own.dtype, own.device):
        evidence.add("dtype", play.attack, f"sends {sent.dtype} on {sent.device} in a round of {own.dtype}")
    if sent.requires_grad:
        evidence.add("shape", play.attack, "sends rows that carry a gradient")
    if not bool(sent.isfinite().all()):
        evidence.add("shape", play.attack, "sends NaN or infinity")


def _try_few_clients(attack: UpdateAttack, evidence: Evidence) -> None:
    """A single hostile client works; so do rounds without honest ones, unless it looks at their rows."""
    for hostile in (1,) if attack.every_row else (1, CLIENTS):
        play = _Play(attack, None, hostile=hostile)
        for number in (0, 2):
            if len(play.sends(number)) != hostile:
                evidence.add("batch of one", attack, f"sends other rows than one for each of {hostile} hostile clients")


def _try_float64(attack: UpdateAttack, evidence: Evidence) -> None:
    play = _Play(attack, None, dtype=torch.float64)
    for number in (0, 2):
        _judge(play, play.sends(number), evidence)


def _try_radius(attack: UpdateAttack, evidence: Evidence) -> None:
    """With a radius nothing longer is sent, in either norm."""
    norm: Norm = getattr(attack, "norm", "l2")
    bounded = fresh(attack, radius=RADIUS)
    for number in (0, 2):
        free, short = (float(sample_norms(_Play(a, None).sends(number), norm).max()) for a in (attack, bounded))
        if free <= RADIUS:
            evidence.add("budget", attack, f"sends nothing that a radius of {RADIUS} would shorten: nothing is tested")
        if short > RADIUS * (1 + 1e-5):
            evidence.add("budget", bounded, f"sends a row of {norm} length {short:.6g}")


def check_sends_rows(cls: type) -> None:
    """One finite row a hostile client, without a gradient."""
    exercised(cls).require("shape")


def check_keeps_to_its_radius(cls: type) -> None:
    """An attack with a `radius` sends nothing longer."""
    exercised(cls).require("budget")


def _trace(attack: UpdateAttack) -> Sequence[Mapping[str, Any]]:
    federation = _federation(0)
    outcome = run_federated(toy_learner(federation.stream), federation, attack, RUN)
    return untimed(outcome.trace)


def _at_once(attack: UpdateAttack) -> bool:
    """Whether it has no phase before the trigger."""
    return attack.ready(View(available={Need.ACCURACY: (1.0, 1.0)}))


def check_nobody_hostile(cls: type) -> None:
    """With poison_ratio = 0 the run is the honest run, bit for bit."""
    attack: UpdateAttack = made(cls, fields_in(cls, {"poison_ratio": 0.0}))
    if attack.ratio == 0 and not exercised(cls).crashed:
        honest = CleanUpdates(phase=not _at_once(attack))
        assert _trace(attack) == _trace(honest), f"{attack} changes a run of honest clients"


class _AsNoise(UpdateAttack):
    """Random rows, each as long as what another attack would have sent."""

    def __init__(self, attack: UpdateAttack) -> None:
        self.attack = attack
        self.needs, self.every_row = attack.needs, attack.every_row  # type: ignore[misc]  # as of the one it stands for

    @property
    def ratio(self) -> float:
        return self.attack.ratio

    def ready(self, view: View) -> bool:
        return self.attack.ready(view)

    def after_step(self, view: View, rng: Generator) -> None:
        self.attack.after_step(view, rng)

    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        return _random(self.attack.craft(honest, view, rng), rng)

    def craft_trigger(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        return _random(self.attack.craft_trigger(honest, view, rng), rng)


def _random(rows: Tensor, rng: Generator) -> Tensor:
    drawn = torch.randn(rows.shape, generator=rng, dtype=rows.dtype).to(rows.device)
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    noise: Tensor = drawn * (lengths / torch.linalg.vector_norm(drawn, dim=1, keepdim=True))
    return noise


def _loss_after(attack: UpdateAttack, seed: int) -> float:
    """Test loss after the trigger round; a model that came to NaN has lost without limit."""
    federation = _federation(seed)
    learner = toy_learner(federation.stream, seed=seed, lr=LONG_RUN.lr)
    loss = run_federated(learner, federation, attack, LONG_RUN).trace[-1]["loss"]
    return loss if loss is not None and math.isfinite(loss) else math.inf


def check_beats_noise(cls: type) -> None:
    """The victim's loss ends well above that under random rows of the same lengths; controls are exempt.

    At the median over seeds of the toy federation, by default or with one of its named choices, as loud as `LOUD` says.
    """
    fixed = fields_in(cls, {"poison_ratio": HOSTILE / CLIENTS, **LOUD})
    found = []
    for attack in variants(cls, [fixed, *({**fixed, **choice} for choice in named_choices(cls))]):
        if attack.control or exercised(cls).crashed:
            return
        found.append(median(_loss_after(attack, seed) / _loss_after(_AsNoise(attack), seed) for seed in SEEDS))
        if found[-1] > WORSE:
            return
    raise AssertionError(
        f"{cls.__name__}: the victim's loss is {max(found):.3g} times that under noise of the same lengths (median "
        f"over {len(SEEDS)} seeds), and should be more than {WORSE:g} times"
    )


CHECKS: Sequence[Check] = (
    check_sends_rows,
    check_keeps_to_its_radius,
    check_nobody_hostile,
    check_beats_noise,
)
