"""The released online attack, stated anew in double backward and float64: rules, timing and the ball that drifts."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from mithridate.core.attack import Attack
from mithridate.core.batch import Batch
from mithridate.core.registry import build
from mithridate.core.view import Need, View
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.learner import Learner

EPS, STEPS, BATCHES = 0.2, 2, 3
STREAM = toy_stream(0)
TOLERANCE = 1e-9
FIELDS: dict[str, Any] = {"name": "accumulative", "preset": "released", "trigger_mode": "reoptimised"}


def double(batch: Any) -> Batch:
    return Batch(batch.x.double(), batch.y)


PHASE = [double(STREAM.victim_batch(i, 0)) for i in range(BATCHES)]
TRIGGER, VALIDATION = double(STREAM.trigger_batch(BATCHES, 0)), double(STREAM.validation.all())


def victim() -> Learner:
    """Hardly trained, so that no slope is a rounding error."""
    return toy_learner(STREAM, dtype=torch.float64, epochs=1, lr=0.1)


def gradients(model: nn.Module, batch: Batch) -> list[Tensor]:
    loss = F.cross_entropy(model(batch.x), batch.y)
    return list(torch.autograd.grad(loss, list(model.parameters()), create_graph=True))


def unit(tensors: list[Tensor]) -> list[Tensor]:
    return [t / t.norm() if bool(t.any()) else t for t in tensors]


def product(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Of gradients at unit length, tensor by tensor."""
    return torch.stack([(p * q).sum() for p, q in zip(unit(a), unit(b), strict=True)]).sum()


def detached(tensors: Any) -> list[Tensor]:
    return [t.detach() for t in tensors]


def pgd(x: Tensor, centre: Tensor, slope: Any) -> Tensor:
    """C = 2 steps of 2 eps / C up a slope, in the ball around a centre and in [0, 1]."""
    for _ in range(STEPS):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(slope(x), x)
        x = x.detach() + 2 * EPS / STEPS * g.sign()
        x = torch.max(torch.min(x, centre + EPS), centre - EPS).clamp(0, 1)
    return x.detach()


def restated(learner: Learner) -> tuple[list[Tensor], list[Tensor]]:
    """The poisoned batches, and the trigger as it stood at each of them; the last one is fed."""
    model = learner.model
    optimiser = SGD(model.parameters(), lr=0.1, momentum=0.9)
    sent, triggers, trigger = [], list[Tensor](), TRIGGER.x
    for batch in PHASE:
        model.eval()
        g_val = detached(gradients(model, VALIDATION))

        def harmless(x: Tensor, g_val: list[Tensor] = g_val) -> Tensor:
            return -product(gradients(model, Batch(x, TRIGGER.y)), g_val)

        trigger = pgd(trigger, trigger, harmless)  # around the last one, which is the clean one at first
        triggers.append(trigger)
        g_t = product(gradients(model, VALIDATION), gradients(model, Batch(trigger, TRIGGER.y)))
        second = unit(detached(torch.autograd.grad(g_t, list(model.parameters()))))
        clean = unit(detached(gradients(model, batch)))
        w = [a + b for a, b in zip(clean, second, strict=True)]

        def turned(x: Tensor, batch: Batch = batch, w: list[Tensor] = w) -> Tensor:
            ours = unit(gradients(model, Batch(x, batch.y)))
            return torch.stack([(p * q).sum() for p, q in zip(ours, w, strict=True)]).sum()

        sent.append(pgd(batch.x, batch.x, turned))
        model.train()
        optimiser.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(sent[-1]), batch.y))
        optimiser.step()
    return sent, triggers


def played(learner: Learner, attack: Attack) -> tuple[list[Tensor], Tensor]:
    """What the library's attack sends to a victim that learns from it, the trigger last."""
    memory: dict[str, Tensor] = {}

    def view(step: int) -> View:
        things = {
            Need.MODEL: learner.white_box,
            Need.VALIDATION: VALIDATION,
            Need.TRIGGER: TRIGGER,
            Need.ACCURACY: (1.0, 1.0),
        }
        return View(step, memory, things, attack.needs)

    sent = []
    for step, batch in enumerate(PHASE):
        poisoned = attack.poison(batch, view(step), rng=torch.Generator().manual_seed(step))
        sent.append(poisoned.x)
        learner.update(poisoned)
        attack.after_step(view(step + 1), torch.Generator().manual_seed(step))
    trigger = attack.trigger(TRIGGER, view(BATCHES), rng=torch.Generator()).x
    assert all(isinstance(x, Tensor) for x in (*sent, trigger))
    return sent, trigger


def test_the_released_attack_is_what_their_code_does() -> None:
    sent, triggers = restated(copy.deepcopy(victim()))
    found, fed = played(victim(), build("attack", FIELDS))
    for ours, theirs in zip(found, sent, strict=True):
        assert float((ours - theirs).abs().max()) < TOLERANCE
    assert float((fed - triggers[-1]).abs().max()) < TOLERANCE  # made before the last step, not after it
    drift = [float((t - TRIGGER.x).abs().max()) for t in triggers]
    assert drift == pytest.approx([0.2, 0.4, 0.6], abs=1e-9)


def test_after_step_keeps_its_ball() -> None:
    learner = victim()
    attack = build("attack", {**FIELDS, "trigger_update": "after_step"})
    _, fed = played(learner, attack)
    assert float((fed - TRIGGER.x).abs().max()) <= EPS + TOLERANCE
    _, drifted = played(victim(), build("attack", FIELDS))
    assert not attack.ball.holds(drifted - TRIGGER.x)


def test_a_gate_aware_attacker_may_send_a_drifting_trigger_too() -> None:
    inner = {k: v for k, v in FIELDS.items() if k != "eps"}
    attack = build(
        "attack", {"name": "gate_aware", "eps": EPS, "inner": inner, "max_loss_rise": 9.0, "max_accuracy_drop": 1.0}
    )
    _, fed = played(victim(), attack)
    assert float((fed - TRIGGER.x).abs().max()) == pytest.approx(BATCHES * EPS, abs=TOLERANCE)
