"""What every attack on a stream must pass."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import median
from typing import Any

import torch

from mithridate.attacks.noise import Noise
from mithridate.core.attack import Attack
from mithridate.core.batch import AnyBatch, tensors_of
from mithridate.core.domain import Domain
from mithridate.core.errors import ConfigError
from mithridate.core.view import Memory, Need, View
from mithridate.maths.norms import Ball, sample_norms
from mithridate.simulation.online import OnlineRun, run_online
from mithridate.testing.checks.evidence import Evidence
from mithridate.testing.checks.subject import Check, entry_of, fields_in, fresh, made, named_choices, variants
from mithridate.testing.checks.witness import Witness, bits, through_file, unsaveable
from mithridate.testing.checks.worlds import World, image_world, other_worlds, stream_of, tabular_world
from mithridate.testing.toy import toy_learner

BUDGET = 0.15
"""Radius on the toy stream, in pixel units."""
INNER_STEPS = 2
ROUNDING = 1e-5
"""What a sum of pixels may be off by in float32."""

SEEDS = range(7)
WORSE = 1.5
"""How many times as large as under noise the victim's loss must be, at the median over `SEEDS`. Other draws of the
noise give 0.8 to 1.1 times the loss, this library's attacks 2.7 and more."""


@lru_cache(maxsize=64)
def exercised(cls: type) -> Evidence:
    """What is found when an attack is tried in all its settings; tried once."""
    evidence = Evidence()
    with evidence.trying(cls.__name__):
        attacks = _settings(cls)
        for attack in attacks:
            with evidence.trying(attack, breach="budget"):
                _run_and_resume(attack, evidence, image_world)
        if evidence.crashed:
            return evidence
        for attack in [*attacks, *_choices(cls)]:
            with evidence.trying(attack, "domain"):
                _run_and_resume(attack, evidence, tabular_world if _takes_features(attack) else image_world)
        for attack in attacks:
            with evidence.trying(attack, "batch of one"):
                _try_batch_of_one(attack, evidence)
        with evidence.trying(attacks[0], "dtype"):
            _try_float64(attacks[0], evidence)
        if not evidence.crashed:
            with evidence.trying(attacks[0], "other inputs"):
                _try_other_inputs(attacks[0])
        if "poison_ratio" in entry_of(cls).fields:
            half = made(cls, {**_small(cls), "poison_ratio": 0.5})
            with evidence.trying(half, "partial ratio"):
                _try_half(half, evidence)
    return evidence


def _small(cls: type) -> dict[str, Any]:
    """Settings for the toy stream: its budget, and few inner steps where there are any."""
    inner = {"name": "accumulative", "trigger_update": "after_step", "steps": INNER_STEPS}
    return fields_in(cls, {"eps": BUDGET, "steps": INNER_STEPS, "inner": inner})


def _settings(cls: type) -> list[Attack]:
    """The class at the toy budget, in both balls."""
    return variants(cls, [_small(cls), {**_small(cls), **fields_in(cls, {"norm": "l2", "eps": 4 * BUDGET})}])


def _choices(cls: type) -> list[Attack]:
    """The class with every value of its named choices, and around other attacks."""
    small = {**_small(cls), **fields_in(cls, {"inner": {"name": "pgd", "steps": INNER_STEPS}})}
    around = [{**small, "inner": {"name": "vanilla", "steps": INNER_STEPS}}] if "inner" in small else []
    return variants(cls, [small, *around, *({**small, **choice} for choice in named_choices(cls))])[1:]


def _takes_features(attack: Attack) -> bool:
    """Whether it works on rows of features; an attack on images alone says so, and is tried on images."""
    try:
        attack.check_inputs(tabular_world().batches[0])
    except ConfigError:
        return False
    return True


class _Play:
    """An attack and its victim on three batches, the last of which is the trigger."""

    def __init__(self, attack: Attack, evidence: Evidence | None, world: World) -> None:
        self.attack, self.world, self.witness = attack, world, Witness(attack, evidence, world)
        self.memory: Memory = {}

    def sends(self, number: int) -> AnyBatch:
        """What it makes of a batch."""
        batch, view = self.world.batches[number].clone(), self.world.view(self.attack, self.memory)
        call, act = ("trigger", self.attack.trigger) if number == 2 else ("poison", self.attack.poison)
        with self.witness.watching(call, {"batch": batch}, notes=self.memory):
            return act(batch, view, rng=torch.Generator().manual_seed(number))

    def learned(self, sent: AnyBatch, number: int) -> None:
        """The victim learns from it, and the attack is told."""
        self.world.learner.update(sent)
        with self.witness.watching("after_step", {}, notes=self.memory):
            self.attack.after_step(self.world.view(self.attack, self.memory), torch.Generator().manual_seed(number))
        with self.witness.watching("ready", {}, notes=self.memory):
            self.attack.ready(self.world.view(self.attack, self.memory))


def _run_and_resume(attack: Attack, evidence: Evidence, begin: Callable[[], World]) -> None:
    """Two batches and the trigger; then its beginning again, and its end from what was saved in the middle.

    Args:
        attack: In one setting.
        evidence: Where faults go.
        begin: Makes the world, the same each time.
    """
    play = _Play(fresh(attack), evidence, begin())
    first = play.sends(0)
    play.learned(first, 0)
    if unsaveable(play.memory):
        return  # that is on record
    notes, snapshot = through_file(play.memory), play.world.learner.snapshot()
    past = play.world.past.tensors()
    second = play.sends(1)
    play.learned(second, 1)
    trigger = play.sends(2)
    balls = (attack.ball, attack.ball, attack.trigger_ball)
    for clean, sent, ball in zip(play.world.batches, (first, second, trigger), balls, strict=True):
        _judge(attack, clean, sent, ball, play.world.domain, evidence)
    used = _used(attack, play.world.batches[0], first)
    if not _may_hold_back(attack) and used <= 0.5:
        evidence.add("use of the budget", attack, f"hardly uses its budget: {used:.3g} of it")

    again = _Play(fresh(attack), None, begin())
    if bits(again.sends(0).x) != bits(first.x):
        evidence.add("repeats", attack, "makes another batch from the same state of the generator")
    resumed = _Play(fresh(attack), None, begin())
    resumed.memory.update(notes)
    resumed.world.learner.restore(snapshot)
    resumed.world.past.load(past)
    middle = resumed.sends(1)
    resumed.learned(middle, 1)
    if (bits(middle.x), bits(resumed.sends(2).x)) != (bits(second.x), bits(trigger.x)):
        evidence.add("resumes", attack, "goes on otherwise once its notes were saved")


def _used(attack: Attack, clean: AnyBatch, sent: AnyBatch) -> float:
    """Which part of its budget an attack uses: of the radius, or of the samples where it has none."""
    if attack.power == "inputs":
        longest = float(sample_norms(sent.x - clean.x, attack.ball.norm).max())
        return longest / attack.ball.eps if attack.ball.eps else 0.0
    return float(_changed(attack, clean, sent).float().mean()) / attack.ratio


def _changed(attack: Attack, clean: AnyBatch, sent: AnyBatch) -> torch.Tensor:
    """(n,) bool, samples of which anything is another that is in the attack's power."""
    pairs = zip(_in_power(attack, clean), _in_power(attack, sent), strict=True)
    return torch.stack([(a != b).reshape(clean.size, -1).any(1) for a, b in pairs]).any(0)


def _in_power(attack: Attack, batch: AnyBatch) -> list[torch.Tensor]:
    """What of a batch an attack says that it changes."""
    inputs = [] if attack.power == "labels" else tensors_of(batch.x)
    return inputs if attack.power == "inputs" else [*inputs, batch.y]


def _may_hold_back(attack: Attack) -> bool:
    """Controls, and attacks that send less than their budget on purpose (`restrained`)."""
    return attack.control or attack.restrained


def _judge(attack: Attack, clean: AnyBatch, sent: AnyBatch, ball: Ball, domain: Domain, evidence: Evidence) -> None:
    """Hold a poisoned batch against the clean one."""
    if (sent.x.shape, sent.x.dtype, sent.x.device) != (clean.x.shape, clean.x.dtype, clean.x.device):
        evidence.add("dtype", attack, f"made {sent.x.dtype} {tuple(sent.x.shape)} on {sent.x.device}")
        return
    if attack.power == "inputs" and bits(sent.y) != bits(clean.y):
        evidence.add("labels", attack, "changed labels")
    if attack.power == "labels" and bits(sent.x) != bits(clean.x):
        evidence.add("labels", attack, "changed inputs, and says that labels alone are in its power")
    longest = float(sample_norms(sent.x.double() - clean.x.double(), ball.norm).max())
    if attack.power != "samples" and longest > ball.eps + ROUNDING * max(1, ball.eps):
        evidence.add("budget", attack, f"left its {ball.norm} ball: {longest:.6g}")
    if not domain.holds(sent.x):
        evidence.add("domain", attack, f"left the domain: {float(sent.x.min()):.4g} to {float(sent.x.max()):.4g}")


def _try_batch_of_one(attack: Attack, evidence: Evidence) -> None:
    world = image_world()
    one = dataclasses.replace(world, batches=tuple(batch.take(slice(1)) for batch in world.batches))
    play = _Play(attack, None, one)
    for number in (0, 2):
        if not bool(play.sends(number).x.isfinite().all()):
            evidence.add("batch of one", attack, "makes NaN or infinity of a single sample")


def _try_float64(attack: Attack, evidence: Evidence) -> None:
    play = _Play(attack, None, image_world(torch.float64))
    for number in (0, 2):
        sent = play.sends(number)
        if sent.x.dtype != torch.float64:
            evidence.add("dtype", attack, f"makes {sent.x.dtype} of float64")


def _try_other_inputs(attack: Attack) -> None:
    for world in other_worlds():
        try:
            attack.check_inputs(world.batches[0])
        except ConfigError:
            continue
        play = _Play(attack, None, world)
        play.learned(play.sends(0), 0)
        play.sends(2)


def _try_half(attack: Attack, evidence: Evidence) -> None:
    """The same half of the positions is left clean, batch after batch and in the trigger."""
    play = _Play(attack, None, image_world())
    changed = [_changed(attack, clean, play.sends(number)) for number, clean in enumerate(play.world.batches)]
    limit = int(0.5 * len(changed[0]) + 0.5)
    if int(torch.stack(changed).any(0).sum()) > limit:
        evidence.add("partial ratio", attack, "poisons more than half, or moves about")


def check_keeps_labels(cls: type) -> None:
    """What an attack does not say is in its power (`power`) is as it was: labels, of most."""
    exercised(cls).require("labels")


def check_stays_in_the_ball(cls: type) -> None:
    """No sample is further from the clean one than the budget allows, in any setting."""
    exercised(cls).require("budget")


def check_uses_its_budget(cls: type) -> None:
    """Somewhere it goes more than half the way, unless it is a control or says that it holds back (`restrained`)."""
    exercised(cls).require("use of the budget")


def check_stays_in_the_domain(cls: type) -> None:
    """What it makes is valid: pixels in [0, 1], and z-scored features each within bounds of their own."""
    exercised(cls).require("domain")


def check_half_a_batch(cls: type) -> None:
    """With poison_ratio = 0.5 the same other half stays clean, batch after batch and in the trigger."""
    exercised(cls).require("partial ratio")


def check_zero_budget(cls: type) -> None:
    """With eps = 0 the batch comes back bit for bit."""
    _check_identity(cls, "eps")


def check_zero_ratio(cls: type) -> None:
    """With poison_ratio = 0 the batch comes back bit for bit."""
    _check_identity(cls, "poison_ratio")


def _check_identity(cls: type, field: str) -> None:
    if field not in entry_of(cls).fields or exercised(cls).crashed:
        return
    attack: Attack = made(cls, {**_small(cls), field: 0.0})
    play = _Play(attack, None, image_world())
    for number in (0, 2):
        clean, sent = play.world.batches[number], play.sends(number)
        pairs = zip(_in_power(attack, clean), _in_power(attack, sent), strict=True)
        same = all(bits(a) == bits(b) for a, b in pairs)
        assert same, f"{attack} is not the identity at {field} = 0"


@lru_cache(maxsize=8)
def _losses(attack: Attack, lr: float) -> Sequence[float]:
    """Test loss after the trigger, one a seed; a model that came to NaN has lost without limit."""
    losses = []
    for seed in SEEDS:
        learner = toy_learner(stream_of(seed), seed=seed, lr=lr)
        run = OnlineRun(steps=3, lr=lr, images=0)
        surrogate = toy_learner(stream_of(seed), seed=seed + 1).white_box if Need.SURROGATE in attack.needs else None
        outcome = run_online(learner, stream_of(seed), attack, run, seed=seed, surrogate=surrogate)
        loss = outcome.trace[-1]["loss"]
        losses.append(loss if loss is not None and math.isfinite(loss) else math.inf)
    return losses


def check_beats_noise(cls: type) -> None:
    """The victim's loss ends well above that under noise of the same budget and schedule; controls are exempt.

    What has no ball, since it changes labels or sends other samples, is compared with noise of the toy budget.
    At the median over seeds of the toy stream. An attack that has but one step is given a longer one.
    """
    attack: Attack = made(cls, _small(cls))
    if attack.control or exercised(cls).crashed:
        return
    at_once = attack.ready(View(available={Need.ACCURACY: (1.0, 1.0)}))
    lr = 0.1 if at_once else 0.05
    noise = Noise(eps=attack.ball.eps if attack.power == "inputs" else BUDGET, norm=attack.ball.norm, phase=not at_once)
    pairs = zip(_losses(attack, lr), _losses(noise, lr), strict=True)
    worse = median(ours / chance for ours, chance in pairs)
    assert worse > WORSE, (
        f"{attack}: the victim's loss is {worse:.3g} times that under noise of the same budget (median over "
        f"{len(SEEDS)} seeds), and should be more than {WORSE:g} times"
    )


CHECKS: Sequence[Check] = (
    check_keeps_labels,
    check_stays_in_the_ball,
    check_uses_its_budget,
    check_stays_in_the_domain,
    check_half_a_batch,
    check_zero_budget,
    check_zero_ratio,
    check_beats_noise,
)
