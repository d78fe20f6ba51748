"""The accumulative attack on rounds: its direction against double backward, its trigger, and what it comes to."""

import copy
import dataclasses
import math
from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.optim import SGD

from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError, ThreatModelError
from mithridate.core.model import WhiteBox
from mithridate.core.modes import frozen_statistics
from mithridate.core.registry import build
from mithridate.core.update_attack import Honest
from mithridate.core.view import Need, View
from mithridate.data.shards import Shards
from mithridate.data.stream import Stream, StreamSettings, open_stream
from mithridate.models import build_model
from mithridate.simulation.clients import FederatedRun, federate
from mithridate.simulation.federated import run_federated
from mithridate.simulation.run import Outcome, Progress
from mithridate.testing import toy_learner
from mithridate.training.burn_in import BurnIn, burn_in
from mithridate.training.learner import Learner
from mithridate.update_attacks.accumulative import TRIGGER, VELOCITY, AccumulativeUpdates

GRANTED = AccumulativeUpdates.needs


@pytest.fixture(scope="module")
def learner(stream: Stream) -> Learner:
    """In float64."""
    return toy_learner(stream, dtype=torch.float64)


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def double(batch: Batch) -> Batch:
    return Batch(batch.x.double(), batch.y)


@pytest.fixture
def view(stream: Stream, learner: Learner) -> View:
    things = {
        Need.MODEL: learner.white_box,
        Need.VALIDATION: double(stream.validation.all()),
        Need.TRIGGER: double(stream.trigger_batch(3, 0)),
        Need.ACCURACY: (0.9, 0.9),
    }
    return View(0, {}, things, GRANTED)


def honest_of(learner: Learner, clients: int = 10, hostile: int = 3) -> Honest:
    width = sum(p.numel() for p in learner.model.parameters())
    rows = torch.randn(clients, width, generator=rng(), dtype=torch.float64)
    nothing = torch.zeros(hostile, 1, 1, 1, 1), torch.zeros(hostile, 1, dtype=torch.int64)
    total = rows[hostile:].sum(0)
    return Honest(total, total.clone(), clients - hostile, *nothing, rows[hostile:], lambda x, y: rows[:hostile])


def pieces(box: WhiteBox) -> list[int]:
    return [p.numel() for p in box.parameters.values()]


def flat_gradient(box: WhiteBox, batch: Batch, mode: Any, point: Tensor, *, keep: bool = True) -> Tensor:
    """The oracle's gradient at a flat point, with a graph."""
    shapes = {name: p.shape for name, p in box.parameters.items()}
    tensors = {
        name: piece.view(shape)
        for (name, shape), piece in zip(shapes.items(), torch.split(point, pieces(box)), strict=True)
    }
    with frozen_statistics(box.module, mode):
        loss = F.cross_entropy(functional_call(box.module, tensors, (batch.x,)), batch.y)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(tensors.values()), create_graph=keep)])


def point_of(box: WhiteBox) -> Tensor:
    return torch.cat([p.reshape(-1) for p in box.parameters.values()]).clone().requires_grad_()


def product_of(box: WhiteBox, a: Tensor, b: Tensor, normalise: str) -> Tensor:
    sizes = {"none": None, "global": [len(a)], "tensor": pieces(box)}[normalise]
    total = a.new_zeros(())
    if sizes is None:
        return total + a @ b
    for p, q in zip(torch.split(a, sizes), torch.split(b, sizes), strict=True):
        if bool(p.any()) and bool(q.any()):
            total = total + p @ q / (p.norm() * q.norm())
    return total


@pytest.mark.parametrize("normalise", ["none", "global", "tensor"])
@pytest.mark.parametrize("trigger", ["clean", "reversed", "reoptimised"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_pull_is_the_gradient_of_the_product(view: View, mode: Any, trigger: Any, normalise: Any) -> None:
    box = view.model
    point = point_of(box)
    g_validation = flat_gradient(box, view.validation, mode, point)
    if trigger == "reoptimised":
        update = -0.5 * flat_gradient(box, view.clean_trigger, mode, point).detach() + 0.01  # as it may have become
        view.memory[TRIGGER] = update.clone().unsqueeze(0)
    else:
        update = flat_gradient(box, view.clean_trigger, mode, point) * (1 if trigger == "clean" else -1)
    (oracle,) = torch.autograd.grad(product_of(box, g_validation, update, normalise), point)
    attack = AccumulativeUpdates(trigger=trigger, normalise=normalise, craft_mode=mode, chunk=7)
    found = attack.pull(view, rng())
    assert oracle.norm() > 1e-3
    live = oracle.abs() > 0
    assert torch.allclose(found[live], oracle[live], rtol=1e-6, atol=1e-9 * float(oracle.norm()))
    cosine = torch.cosine_similarity(g_validation.detach(), update.detach(), dim=0)
    assert attack.alignment(view) == pytest.approx(float(cosine), abs=1e-9)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("trigger", ["clean", "reversed", "reoptimised"])
def test_a_step_against_the_pull_makes_the_trigger_worse(view: View, learner: Learner, trigger: Any, mode: Any) -> None:
    """By the step's length times the pull's, to first order: the pull is the cosine's gradient."""
    attack = AccumulativeUpdates(trigger=trigger, craft_mode=mode)
    if trigger == "reoptimised":
        attack.craft(honest_of(learner), view, rng())  # it is kept from here on, wherever the model goes
    before = attack.alignment(view)
    pull = attack.pull(view, rng())
    length, start = 1e-5, 0
    moved = copy.deepcopy(learner.model)
    with torch.no_grad():
        for p in moved.parameters():
            p.sub_(length * pull[start : start + p.numel()].view_as(p) / pull.norm())
            start += p.numel()
    other = View(0, view.memory, {**view.available, Need.MODEL: WhiteBox(moved, F.cross_entropy)}, GRANTED)
    assert before - attack.alignment(other) == pytest.approx(length * float(pull.norm()), rel=0.05)


def test_a_round_is_made_what_the_algorithm_says(view: View, learner: Learner) -> None:
    honest = honest_of(learner)
    for weight, lam, ratio in ((1.0, 0.3, 3), (0.0, 2.0, 3), (1.0, 0.0, 1)):
        seen = honest_of(learner, hostile=ratio)
        attack = AccumulativeUpdates(clean_weight=weight, lam=lam)
        rows = attack.craft(seen, view, rng())
        expected = weight * seen.mean + lam * attack.pull(view, rng())
        assert torch.allclose((seen.total + rows.sum(0)) / seen.clients, expected, atol=1e-10)
    assert torch.equal(honest.total, honest_of(learner).total)


@pytest.mark.parametrize(("accuracy", "rests"), [((0.9, 0.9), False), ((0.9, 0.8901), False), ((0.9, 0.88), True)])
def test_a_round_of_rest_is_honest(view: View, learner: Learner, accuracy: tuple[float, float], rests: bool) -> None:
    known = dataclasses.replace(view, available={**view.available, Need.ACCURACY: accuracy})
    honest = honest_of(learner)
    rows = AccumulativeUpdates(rest=0.01).craft(honest, known, rng())
    assert torch.equal(rows, honest.own) is rests


def test_hostile_clients_can_be_made_to_differ(view: View, learner: Learner) -> None:
    honest = honest_of(learner)
    same = AccumulativeUpdates().craft(honest, view, rng())
    spread = AccumulativeUpdates(spread=0.5).craft(honest, view, rng())
    assert torch.equal(same[0], same[2])
    assert not torch.allclose(spread[0], spread[2])
    assert torch.allclose(same.sum(0), spread.sum(0), atol=1e-9)
    lengths = (spread - same).norm(dim=1) / same.norm(dim=1)
    assert lengths.tolist() == pytest.approx([0.5 * math.sqrt(2 / 3)] * 3, rel=0.1)


def trigger_gradient(view: View, mode: Any = "train") -> Tensor:
    return flat_gradient(view.model, view.clean_trigger, mode, point_of(view.model), keep=False).detach()


@pytest.mark.parametrize(("trigger", "sign"), [("clean", 1), ("reversed", -1), ("reoptimised", -1)])
def test_the_trigger_round_is_the_triggers_update(view: View, learner: Learner, trigger: Any, sign: int) -> None:
    honest = honest_of(learner)

    def mean(**fields: Any) -> Tensor:
        rows = AccumulativeUpdates(trigger=trigger, **fields).craft_trigger(honest, view, rng())
        return (honest.total + rows.sum(0)) / honest.clients

    g = trigger_gradient(view)
    assert torch.allclose(mean(), sign * g, atol=1e-10)
    assert torch.allclose(mean(trigger_scale=20.0), 20 * sign * g, atol=1e-9)
    assert torch.allclose(mean(trigger_norm=3.0, trigger_scale=20.0), 3 * sign * g / g.norm(), atol=1e-10)
    if trigger != "reoptimised":
        eval_mode = sign * trigger_gradient(view, "eval")
        assert torch.allclose(mean(craft_mode="eval"), eval_mode, atol=1e-10)
        assert not torch.allclose(eval_mode, sign * g, atol=1e-4)


def test_a_reoptimised_trigger_is_carried_from_round_to_round(view: View, learner: Learner) -> None:
    """The first model is used twice: for the reversed trigger, and for its first update."""
    attack = AccumulativeUpdates(trigger="reoptimised", alpha=0.3)
    start = trigger_gradient(view)
    attack.craft(honest_of(learner), view, rng())
    assert torch.allclose(view.memory[TRIGGER], -1.3 * start, atol=1e-10)
    moved = copy.deepcopy(learner.model)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(0.1)
    later = View(1, view.memory, {**view.available, Need.MODEL: WhiteBox(moved, F.cross_entropy)}, GRANTED)
    attack.craft(honest_of(learner), later, rng())
    now = trigger_gradient(later)
    assert not torch.allclose(now, start, atol=1e-3)
    assert torch.allclose(view.memory[TRIGGER], -1.3 * start - 0.3 * now, atol=1e-10)
    bounded = AccumulativeUpdates(trigger="reoptimised", alpha=0.3, radius=0.2)
    bounded.craft(honest_of(learner), later, rng())
    assert float(view.memory[TRIGGER].norm()) == pytest.approx(0.2)
    for trigger in ("clean", "reversed"):  # these have nothing to remember
        fresh = View(0, {}, view.available, GRANTED)
        AccumulativeUpdates(trigger=trigger).craft(honest_of(learner), fresh, rng())
        assert not fresh.memory


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_an_attacker_may_keep_within_a_radius(view: View, learner: Learner, norm: Any) -> None:
    honest = honest_of(learner)
    free, held = AccumulativeUpdates(), AccumulativeUpdates(radius=0.1, norm=norm)
    for act in ("craft", "craft_trigger"):
        rows, kept = (getattr(a, act)(honest, view, rng()) for a in (free, held))
        expected = rows * (0.1 / rows.norm(dim=1, keepdim=True)) if norm == "l2" else rows.clamp(-0.1, 0.1)
        assert torch.allclose(kept, expected, atol=1e-10)


def test_validation_images_can_be_few_or_drawn_anew(view: View) -> None:
    x, y = view.validation
    few = View(0, {}, {**view.available, Need.VALIDATION: Batch(x[:20], y[:20])}, GRANTED)
    assert torch.equal(
        AccumulativeUpdates(validation_size=20).pull(view, rng()), AccumulativeUpdates().pull(few, rng())
    )
    assert torch.equal(
        AccumulativeUpdates(validation_size=999).pull(view, rng()), AccumulativeUpdates().pull(view, rng())
    )
    drawing = AccumulativeUpdates(validation_size=20, resample_validation=True)
    draws = rng()
    first, second = drawing.pull(view, draws), drawing.pull(view, draws)
    assert not torch.allclose(first, second)
    assert torch.equal(first, drawing.pull(view, rng()))


def test_with_momentum_a_pull_goes_on_into_the_next_rounds(view: View, learner: Learner) -> None:
    """For servers without momentum of their own; the honest part has none of it."""
    honest, draws = honest_of(learner), rng()
    attack = AccumulativeUpdates(momentum=0.5, lam=0.3, clean_weight=1.0)
    pull = 0.3 * attack.pull(view, rng())
    for share in (1.0, 1.5, 1.75):  # the model stays, and so does what is added
        rows = attack.craft(honest, view, draws)
        mean = (honest.total + rows.sum(0)) / honest.clients
        assert torch.allclose(mean, honest.mean + share * pull, atol=1e-10)
        assert torch.allclose(view.memory[VELOCITY], share * pull, atol=1e-10)
    assert torch.equal(
        attack.craft_trigger(honest, view, rng()), AccumulativeUpdates().craft_trigger(honest, view, rng())
    )  # the trigger is what it is
    fresh = dataclasses.replace(view, memory={})
    AccumulativeUpdates(lam=0.3).craft(honest, fresh, rng())
    assert not fresh.memory


def test_published_accuracy_is_looked_at_only_where_it_matters(view: View) -> None:
    unpublished = View(3, {}, {need: view.available[need] for need in GRANTED - {Need.ACCURACY}}, GRANTED)
    assert not AccumulativeUpdates().ready(unpublished)
    assert AccumulativeUpdates(max_rounds=3, accuracy_floor=0.5).ready(unpublished)
    for fields in ({"accuracy_floor": 0.5}, {"max_drop": 0.1}):
        with pytest.raises(ThreatModelError, match="accuracy that the service publishes"):
            AccumulativeUpdates(**fields).ready(unpublished)  # type: ignore[arg-type]  # all of them are fractions


@pytest.mark.parametrize(
    ("fields", "accuracy", "ready"),
    [
        ({}, (0.9, 0.0), False),
        ({"accuracy_floor": 0.5}, (0.9, 0.5), False),
        ({"accuracy_floor": 0.5}, (0.9, 0.49), True),
        ({"max_drop": 0.25}, (0.75, 0.5), False),
        ({"max_drop": 0.25}, (0.75, 0.49), True),
        ({"max_drop": 0.0}, (0.75, 0.8), False),
    ],
)
def test_the_phase_ends_when_it_is_about_to_be_noticed(
    fields: dict[str, Any], accuracy: tuple[float, float], ready: bool
) -> None:
    view = View(1, {}, {Need.ACCURACY: accuracy}, GRANTED)
    assert AccumulativeUpdates(**fields).ready(view) is ready
    assert not AccumulativeUpdates(**fields).ready(dataclasses.replace(view, step=0))  # not before the first round


def test_the_phase_ends_after_its_rounds(view: View) -> None:
    for step, ready in ((0, False), (6, False), (7, True)):
        assert AccumulativeUpdates(max_rounds=7).ready(dataclasses.replace(view, step=step)) is ready
    assert AccumulativeUpdates(max_rounds=0).ready(view)


@pytest.mark.parametrize(
    "fields",
    [
        {"lam": -1.0},
        {"momentum": -0.5},
        {"radius": 0.0},
        {"trigger_norm": 0.0},
        {"alpha": -0.1},
        {"chunk": 0},
        {"trigger": "poisoned"},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    (key,) = fields
    with pytest.raises(ConfigError, match=key):
        build("update_attack", {"name": "accumulative", **fields})


# What it comes to, on digits.

Digits = list[tuple[Stream, Learner]]


@pytest.fixture(scope="module")
def digits() -> Digits:
    """Small nets after eight epochs of digits."""
    stream, learners = open_stream(StreamSettings(name="digits")), []
    for seed in range(5):
        model = build_model({"name": "small_cnn", "width": 8}, stream.info, seed=seed)
        burn_in(model, stream, BurnIn(epochs=8, batch_size=50), seed=seed)
        learners.append((stream, Learner(model, SGD(model.parameters(), lr=0.1, momentum=0.9))))
    return learners


def attacked(digits: tuple[Stream, Learner], run: FederatedRun, **fields: Any) -> tuple[Outcome, float, float]:
    """The run, and the cosine of validation gradient and trigger before it and just before the trigger."""
    stream, burned_in = digits
    model = copy.deepcopy(burned_in.model)
    learner = Learner(model, SGD(model.parameters(), lr=run.lr, momentum=run.momentum))
    federation = federate(stream, Shards(clients=50), seed=0)
    attack: AccumulativeUpdates = build("update_attack", {"name": "accumulative", **fields})
    _, trigger = federation.round(run.rounds, run)
    cosines: list[float] = []

    def note(progress: Progress) -> None:
        if len(progress.rows) == run.rounds + 1:
            cosines.append(cosine())

    def cosine() -> float:
        things = {
            Need.MODEL: learner.white_box,
            Need.VALIDATION: stream.validation.all(),
            Need.TRIGGER: Batch(trigger.x.flatten(0, 1), trigger.y.flatten()),
        }
        return attack.alignment(View(0, {}, things, GRANTED))

    start = cosine()
    outcome = run_federated(learner, federation, attack, run, on_step=note)
    return outcome, start, cosines[0]


@pytest.mark.slow
@pytest.mark.parametrize("trigger", ["clean", "reversed"])
def test_a_trigger_of_one_length_does_more_after_the_phase(digits: Digits, trigger: str) -> None:
    """Over five burn-ins, against the same trigger after an honest phase."""
    run = FederatedRun(rounds=15, local_batch=1, lr=0.02, batch_norm="frozen")
    same: dict[str, Any] = {"trigger": trigger, "poison_ratio": 0.02, "trigger_norm": 25.0, "craft_mode": "eval"}
    turned, further, worse, hidden = [], [], [], []
    for burned_in in digits:
        outcome, start, end = attacked(burned_in, run, lam=0.1, **same)
        honest, _, straight = attacked(burned_in, run, lam=0.0, clean_weight=1.0, **same)
        assert outcome.accuracy_after_trigger is not None
        assert honest.accuracy_after_trigger is not None
        turned.append(end)
        further.append(min(start, straight) - end)
        worse.append(honest.accuracy_after_trigger - outcome.accuracy_after_trigger)
        hidden.append(outcome.accuracy_start - outcome.accuracy_before_trigger)
    assert median(turned) < -0.2
    assert median(further) > 0.2
    assert median(worse) > 0.05
    if trigger == "clean":  # an honest update: nothing but the phase made it harmful, and the phase was quiet
        assert median(hidden) < 0.06
