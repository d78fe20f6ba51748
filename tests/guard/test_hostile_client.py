import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.core.model import WhiteBox
from mithridate.core.registry import make
from mithridate.guard.hostile_client import Accomplice, Hostile, Memory, hostile_state
from mithridate.maths.calculus import gradient, inner


class Net(nn.Module):
    """Two layers, so that there is curvature, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(torch.tanh(self.first(x)))
        return logits


@pytest.fixture
def accomplice() -> Accomplice:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().double()
        data = [Batch(torch.rand(n, 4, dtype=torch.float64), torch.randint(3, (n,))) for n in (30, 10)]
    return Accomplice(net, *data)


def states(accomplice: Accomplice) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The global model, and what a client makes of it that counts one batch and moves each weight by 0.001."""
    model = {name: t.clone() for name, t in accomplice.module.state_dict().items()}
    return model, {name: t + (1 if name == "batches" else 0.001) for name, t in model.items()}


def send(
    accomplice: Accomplice,
    hostile: Hostile,
    server_round: int = 1,
    memory: Memory | None = None,
    *,
    partition: int = 0,
) -> dict[str, torch.Tensor]:
    model, honest = states(accomplice)
    notes = {} if memory is None else memory
    return hostile_state(
        model,
        honest,
        hostile,
        server_round=server_round,
        partition=partition,
        memory=notes,
        accomplice=lambda: accomplice,
    )


def update(accomplice: Accomplice, sent: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model, _ = states(accomplice)
    return {name: sent[name] - model[name] for name in model if name != "batches"}


def alignment(accomplice: Accomplice, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """<grad L(S_val), grad L(S_T)> at a state."""
    accomplice.module.load_state_dict(state)
    box = WhiteBox(accomplice.module, F.cross_entropy)
    with box.objective() as objective:
        return inner(
            gradient(objective, box.parameters, *accomplice.validation),
            gradient(objective, box.parameters, *accomplice.trigger),
        )


def test_garbage_is_what_it_says(accomplice: Accomplice) -> None:
    model, honest = states(accomplice)
    assert all(t.isnan().all() for n, t in send(accomplice, Hostile(kind="nan")).items() if n != "batches")
    assert all((t == 1e30).all() for n, t in send(accomplice, Hostile(kind="huge")).items() if n != "batches")
    assert len(send(accomplice, Hostile(kind="missing"))) == len(model) - 1
    assert all(t.shape != model[n].shape for n, t in send(accomplice, Hostile(kind="shape")).items())
    assert all(torch.equal(t, honest[n]) for n, t in send(accomplice, Hostile(kind="count")).items())


def test_garbage_takes_turns_so_that_four_rounds_show_every_kind_of_every_client(accomplice: Accomplice) -> None:
    hostile = Hostile(kind="garbage", partitions=(3, 7, 11))
    model, _ = states(accomplice)

    def kind(sent: dict[str, torch.Tensor]) -> str:
        if len(sent) < len(model):
            return "missing"
        weight = sent["first.weight"]
        if weight.shape != model["first.weight"].shape:
            return "shape"
        return "nan" if bool(weight.isnan().all()) else "huge"

    seen = {p: [kind(send(accomplice, hostile, r, partition=p)) for r in range(1, 6)] for p in (3, 7, 11)}
    assert seen[3] == ["nan", "shape", "missing", "huge", "nan"]
    assert seen[7] == ["shape", "missing", "huge", "nan", "shape"]
    assert seen[11] == ["missing", "huge", "nan", "shape", "missing"]


def test_sign_flip_sends_the_honest_update_reversed(accomplice: Accomplice) -> None:
    sent = send(accomplice, Hostile(kind="sign_flip", boost=3.0))
    for t in update(accomplice, sent).values():
        torch.testing.assert_close(t, torch.full_like(t, -0.003))
    assert sent["batches"] == 1


def test_without_lam_and_after_the_trigger_it_is_honest(accomplice: Accomplice) -> None:
    _, honest = states(accomplice)
    for sent in (send(accomplice, Hostile(lam=0.0, boost=20.0)), send(accomplice, Hostile(trigger_round=3), 4)):
        for name, t in sent.items():
            torch.testing.assert_close(t, honest[name], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("trigger", "sign"), [("reverse", 1), ("optimised", 1), ("clean", -1)])
def test_accumulative_steps_turn_the_gradients_where_the_trigger_wants_them(
    accomplice: Accomplice, trigger: Any, sign: int
) -> None:
    """Reversed, the trigger ascends what the gradients share, so they are aligned; clean, they are turned apart."""
    hostile = Hostile(trigger=trigger, lam=0.1, honest_weight=0.0, momentum=0.0)
    model, _ = states(accomplice)
    before = alignment(accomplice, model)
    sent = send(accomplice, hostile)
    assert sign * (alignment(accomplice, sent) - before) > 1e-5


def test_the_accumulative_step_is_the_derivative_of_the_product(accomplice: Accomplice) -> None:
    """Against automatic differentiation through both gradients."""
    sent = update(
        accomplice, send(accomplice, Hostile(lam=0.5, lr=0.1, trigger="clean", honest_weight=0.0, momentum=0.0))
    )
    states_ = accomplice.module
    parameters = dict(states_.named_parameters())
    grads = [
        torch.autograd.grad(F.cross_entropy(states_(b.x), b.y), list(parameters.values()), create_graph=True)
        for b in (accomplice.validation, accomplice.trigger)
    ]
    product = sum((a * b).sum() for a, b in zip(*grads, strict=True))
    assert isinstance(product, torch.Tensor)
    expected = torch.autograd.grad(product, list(parameters.values()))
    for name, g in zip(parameters, expected, strict=True):
        torch.testing.assert_close(sent[name], -0.1 * 0.5 * g, atol=1e-12, rtol=1e-8)


def test_the_recovered_offset_makes_the_average_the_wish(accomplice: Accomplice) -> None:
    """Eq. (14): with n clients whose updates are alike, boost = n gives the federation what the attacker wants."""
    n = 5
    wish = Hostile(lam=0.3, momentum=0.0)
    _, honest = states(accomplice)
    for server_round in (1, 20):
        want = send(accomplice, wish, server_round)
        boosted = send(accomplice, make(Hostile, {"lam": 0.3, "momentum": 0.0, "boost": n}, where="test"), server_round)
        for name in want:
            if name != "batches":
                average = (boosted[name] + (n - 1) * honest[name]) / n
                torch.testing.assert_close(average, want[name], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("trigger", "sign"), [("reverse", 1), ("clean", -1)])
def test_the_trigger_round_steps_along_the_trigger_gradient(accomplice: Accomplice, trigger: Any, sign: int) -> None:
    model, _ = states(accomplice)
    sent = update(accomplice, send(accomplice, Hostile(trigger=trigger, trigger_round=2, trigger_scale=7.0), 2))
    accomplice.module.load_state_dict(model)
    box = WhiteBox(accomplice.module, F.cross_entropy)
    with box.objective() as objective:
        g = gradient(objective, box.parameters, *accomplice.trigger)
    for name, t in sent.items():
        torch.testing.assert_close(t, sign * 0.1 * 7.0 * g[name], atol=1e-12, rtol=1e-9)


def test_it_remembers_velocity_and_trigger(accomplice: Accomplice) -> None:
    memory: Memory = {}
    hostile = Hostile(lam=0.1, momentum=0.5, honest_weight=0.0, trigger="optimised", alpha=0.1)
    first = update(accomplice, send(accomplice, hostile, 1, memory))
    poison = {n: t.clone() for n, t in memory.items() if n.startswith("p.")}
    second = update(accomplice, send(accomplice, hostile, 2, memory))
    still = Hostile(lam=0.1, momentum=0.0, honest_weight=0.0, trigger="optimised", alpha=0.1)
    plain = update(accomplice, send(accomplice, still, 2, {n: t.clone() for n, t in poison.items()}))
    for name in first:
        torch.testing.assert_close(second[name], plain[name] + 0.5 * first[name], atol=1e-14, rtol=1e-9)
        assert not torch.equal(memory[f"p.{name}"], poison[f"p.{name}"])
        # P starts at -g and moves by -alpha * g of the same model: 1.1 times as long
        torch.testing.assert_close(memory[f"p.{name}"], 1.1 * poison[f"p.{name}"])


def test_eta_bounds_what_is_sent(accomplice: Accomplice) -> None:
    sent = update(accomplice, send(accomplice, Hostile(lam=100.0, boost=20.0, max_norm=0.05)))
    length = math.sqrt(sum(float((t**2).sum()) for t in sent.values()))
    assert length == pytest.approx(0.05)


def test_the_random_vectors_sum_to_zero_over_the_hostile(accomplice: Accomplice) -> None:
    def updates(noise: float) -> list[dict[str, torch.Tensor]]:
        hostile = Hostile(partitions=(2, 5, 7), noise=noise, lam=0.1)
        return [update(accomplice, send(accomplice, hostile, partition=p)) for p in (2, 5, 7)]

    loud, quiet = updates(0.1), updates(0.0)
    for name in quiet[0]:
        torch.testing.assert_close(sum(u[name] for u in loud), sum(u[name] for u in quiet), atol=1e-12, rtol=0)
        assert not torch.allclose(loud[0][name], loud[1][name])


def test_bootstrapping_draws_the_validation_batch_anew(accomplice: Accomplice) -> None:
    hostile = Hostile(bootstrap=True, momentum=0.0)
    one, again, other = (send(accomplice, hostile, n)["last.weight"] for n in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="no partition"):
        Hostile(partitions=())
    with pytest.raises(ConfigError, match="boost"):
        make(Hostile, {"boost": 0.5}, where="test")
