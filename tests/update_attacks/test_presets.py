"""What the presets of attacks on rounds say is what they do: each rule is stated anew, in plain autograd and float64.

The statements follow Algorithm 2 of Pang et al. (NeurIPS 2021) as printed, and what is known of their released code;
they share no line with the library.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import SGD

from mithridate.core.batch import Batch
from mithridate.core.registry import build
from mithridate.core.update_attack import Honest
from mithridate.core.view import Need, View
from mithridate.data.shards import Shards
from mithridate.simulation.clients import FederatedRun, Federation, federate
from mithridate.simulation.federated import run_federated
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.learner import Learner

CLIENTS, ROUNDS, BETA, LAM, ALPHA = 5, 3, 0.01, 0.3, 0.1
STREAM = toy_stream(0)
TOLERANCE = 1e-10
"""Of parameters in float64, after a few steps of length 1 or so."""

Bound = Callable[[Tensor], Tensor]


def l2(radius: float) -> Bound:
    return lambda row: row * min(1.0, radius / float(row.norm()))


def linf_scaled(radius: float) -> Bound:
    return lambda row: row * min(1.0, radius / float(row.abs().max()))


class Model:
    """A model's parameters as one vector, its loss in them as plain torch."""

    def __init__(self, module: nn.Module, mode: str) -> None:
        self.module = copy.deepcopy(module).train(mode == "train")
        for m in self.module.modules():
            if isinstance(m, nn.BatchNorm2d) and mode == "train":
                m.track_running_stats = False
        self.shapes = {name: p.shape for name, p in module.named_parameters()}
        self.theta = torch.cat([p.detach().reshape(-1) for p in module.parameters()])

    def gradient(self, batch: Batch, at: Tensor, *, graph: bool = False) -> Tensor:
        pieces = torch.split(at, [shape.numel() for shape in self.shapes.values()])
        named = {n: p.view(shape) for (n, shape), p in zip(self.shapes.items(), pieces, strict=True)}
        loss = F.cross_entropy(functional_call(self.module, named, (batch.x,)), batch.y)
        (g,) = torch.autograd.grad(loss, at, create_graph=graph)
        return g


@pytest.fixture(scope="module")
def burned_in() -> Learner:
    """Hardly trained, so that no gradient is a rounding error."""
    return toy_learner(STREAM, dtype=torch.float64, epochs=1)


def clients_of(federation: Federation, run: FederatedRun, number: int) -> list[Batch]:
    _, data = federation.round(number, run)
    return [Batch(x.double(), y) for x, y in zip(data.x, data.y, strict=True)]


class DoubleFederation(Federation):
    """The toy clients, with pixels in float64."""

    def round(self, *arguments: Any, **options: Any) -> Any:
        who, data = super().round(*arguments, **options)
        return who, Batch(data.x.double(), data.y)


def play(burned_in: Learner, lr: float, attack: dict[str, Any], momentum: float = 0.0) -> Tensor:
    """The parameters after the library's run."""
    model = copy.deepcopy(burned_in.model)
    learner = Learner(model, SGD(model.parameters(), lr=lr, momentum=momentum))
    plain = federate(STREAM, Shards(clients=CLIENTS), seed=0)
    federation = object.__new__(DoubleFederation)
    federation.__dict__.update(plain.__dict__)
    run = FederatedRun(rounds=ROUNDS, local_batch=2, lr=lr, momentum=momentum, batch_norm="frozen")
    run_federated(learner, federation, build("update_attack", attack), run)
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def rounds() -> list[list[Batch]]:
    run = FederatedRun(rounds=ROUNDS, local_batch=2, batch_norm="frozen")
    federation = federate(STREAM, Shards(clients=CLIENTS), seed=0)
    return [clients_of(federation, run, number) for number in range(ROUNDS + 1)]


def validation() -> Batch:
    x, y = STREAM.validation.all()
    return Batch(x.double(), y)


def printed(burned_in: Learner, eta: Bound) -> Tensor:
    """Algorithm 2, every client hostile, its random vectors M all zero (they are asked below)."""
    model, (*phase, trigger) = Model(burned_in.model, "eval"), rounds()
    theta = model.theta.requires_grad_()
    poisoned = [eta(-model.gradient(batch, theta)) for batch in trigger]
    for batches in phase:
        poisoned = [eta(p - ALPHA * model.gradient(batch, theta)) for p, batch in zip(poisoned, trigger, strict=True)]
        product = model.gradient(validation(), theta, graph=True) @ sum(poisoned)
        (second,) = torch.autograd.grad(product, theta)
        h = sum(model.gradient(batch, theta) for batch in batches) + LAM * second
        theta = (theta - BETA * sum(eta(h) for _ in batches)).detach().requires_grad_()
    return (theta - BETA * sum(poisoned)).detach()


@pytest.mark.parametrize("radius", [1e9, 0.5])
def test_paper_is_algorithm_2_as_printed(burned_in: Learner, radius: float) -> None:
    """Our server takes the mean, so its rate is N times their beta; eta is theirs."""
    attack = {"name": "accumulative", "preset": "paper", "lam": LAM, "alpha": ALPHA, "radius": radius, "spread": 0.0}
    found, expected = play(burned_in, CLIENTS * BETA, attack), printed(burned_in, l2(radius))
    start = torch.cat([p.detach().reshape(-1) for p in burned_in.model.parameters()])
    assert float((expected - start).norm()) > 0.02
    assert float((found - expected).abs().max()) < TOLERANCE


def test_the_random_vectors_of_paper_sum_to_zero_before_they_are_projected(burned_in: Learner) -> None:
    run = FederatedRun(rounds=ROUNDS, local_batch=2, batch_norm="frozen")
    sent: dict[tuple[float, float], Tensor] = {}
    fields = {"name": "accumulative", "preset": "paper"}
    for spread, radius in ((0.0, 1e9), (1.0, 1e9), (1.0, 0.5)):
        attack = build("update_attack", {**fields, "radius": radius, "trigger_radius": 1e9, "spread": spread})
        model = Model(burned_in.model, "eval")
        data = [
            torch.stack(t)
            for t in zip(*clients_of(federate(STREAM, Shards(clients=CLIENTS), seed=0), run, 0), strict=True)
        ]

        def gradients(x: Tensor, y: Tensor, model: Model = model) -> Tensor:
            at = model.theta.clone().requires_grad_()
            return torch.stack([model.gradient(Batch(a, b), at) for a, b in zip(x, y, strict=True)])

        nothing = torch.zeros_like(model.theta)
        honest = Honest(nothing, nothing, 0, data[0], data[1], None, gradients)
        trigger = Batch(data[0].flatten(0, 1), data[1].flatten())
        things = {Need.MODEL: burned_in.white_box, Need.VALIDATION: validation(), Need.TRIGGER: trigger}
        sent[spread, radius] = attack.craft(honest, View(0, {}, things, attack.needs), torch.Generator().manual_seed(3))
    m = sent[1.0, 1e9] - sent[0.0, 1e9]
    assert float(m.norm(dim=1).min()) > 0.1 * float(sent[0.0, 1e9].norm(dim=1).mean())
    assert float(m.sum(0).abs().max()) < TOLERANCE
    projected = torch.stack([l2(0.5)(row) for row in sent[1.0, 1e9]])
    assert float((sent[1.0, 0.5] - projected).abs().max()) < TOLERANCE
    assert build("update_attack", fields).spread > 0


def released(burned_in: Learner, lr: float, radius: float, scale: float) -> Tensor:
    """lam times the cosine alone, over whole gradients in train mode; l2 in the phase, the largest entry at the end."""
    model, (*phase, trigger_clients) = Model(burned_in.model, "train"), rounds()
    trigger = Batch(torch.cat([b.x for b in trigger_clients]), torch.cat([b.y for b in trigger_clients]))
    in_phase, at_end = l2(radius), linf_scaled(radius)
    theta = model.theta.requires_grad_()
    velocity = torch.zeros_like(theta)
    poisoned = at_end(-model.gradient(trigger, theta))
    for _ in phase:
        poisoned = at_end(poisoned - 0.01 * model.gradient(trigger, theta))
        cosine = F.cosine_similarity(model.gradient(validation(), theta, graph=True), poisoned, dim=0)
        (g,) = torch.autograd.grad(0.08 * cosine, theta)
        velocity = 0.9 * velocity + in_phase(g)
        theta = (theta - lr * velocity).detach().requires_grad_()
    velocity = 0.9 * velocity + at_end(scale * poisoned)
    return (theta - lr * velocity).detach()


@pytest.mark.parametrize("radius", [1e9, 0.02])
def test_released_is_reversed_reoptimised_and_bounded_by_two_norms(burned_in: Learner, radius: float) -> None:
    attack = {"name": "accumulative", "preset": "released", "radius": radius, "trigger_scale": 3.0}
    found = play(burned_in, 0.1, attack, momentum=0.9)
    expected = released(burned_in, 0.1, radius, 3.0)
    start = torch.cat([p.detach().reshape(-1) for p in burned_in.model.parameters()])
    assert float((expected - start).norm()) > 0.01
    assert float((found - expected).abs().max()) < TOLERANCE


def test_direct_released_is_a_step_up_the_validation_loss(burned_in: Learner) -> None:
    model = Model(burned_in.model, "train")
    theta = model.theta.requires_grad_()
    expected = (theta + 0.1 * 20 * model.gradient(validation(), theta)).detach()  # s = 20
    attack = {"name": "direct", "preset": "released", "trigger_scale": 20.0}
    for ratio in (1.0, 0.2):  # one client takes away again what the others add
        found = play(burned_in, 0.1, {**attack, "poison_ratio": ratio})
        assert float((found - expected).abs().max()) < TOLERANCE * 100
    assert float((expected - play(burned_in, 0.1, {**attack, "target": "update"})).abs().max()) > 1e-3
