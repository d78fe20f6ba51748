"""A client's own turn as a round, the same attack as in a simulation, and garbage."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError, ThreatModelError
from mithridate.core.model import WhiteBox
from mithridate.core.registry import build, entries, make
from mithridate.core.update_attack import UpdateAttack
from mithridate.core.view import Memory
from mithridate.guard.garbage_clients import GarbageClients
from mithridate.guard.hostile_clients import Accomplice, HostileClients, NamedClients, Turn
from mithridate.maths.calculus import gradient
from mithridate.maths.directions import inner

CLIENTS = 12


class Net(nn.Module):
    """Two layers, so that there is curvature, statistics and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.tanh(self.first(x)))
        return logits


@pytest.fixture
def accomplice() -> Accomplice:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().double()
        validation, trigger = (Batch(torch.rand(n, 4, dtype=torch.float64), torch.randint(3, (n,))) for n in (30, 10))
    return Accomplice(net, validation, trigger)


def states(accomplice: Accomplice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The global model, and what a client makes of it that moves each weight by 0.001 and counts one batch."""
    model = {name: t.clone() for name, t in accomplice.module.state_dict().items()}
    return model, {name: t + (1 if name in ("batches", "running_mean") else 0.001) for name, t in model.items()}


WEIGHTS = [name for name, _ in Net().named_parameters()]


def playing(attack: str = "accumulative", *, partitions: Any = (0,), clients: int = CLIENTS, **fields: Any) -> Any:
    """Hostile clients as a table makes them; `lr`, `trigger_round` and `seed` are theirs, other fields the attack's."""
    theirs: dict[str, Any] = {key: fields.pop(key) for key in ("lr", "trigger_round", "seed") if key in fields}
    table = {"name": attack, **fields}
    return make(HostileClients, {"attack": table, "partitions": partitions, "clients": clients, **theirs}, where="test")


def send(
    accomplice: Accomplice,
    clients: NamedClients,
    server_round: int = 1,
    notes: Memory | None = None,
    *,
    partition: int = 0,
) -> dict[str, Tensor]:
    model, honest = states(accomplice)
    notes = {} if notes is None else notes
    return clients.sent(Turn(model, honest, server_round, partition, lambda: accomplice, notes))


def update(accomplice: Accomplice, sent: dict[str, Tensor]) -> dict[str, Tensor]:
    model, _ = states(accomplice)
    return {name: sent[name] - model[name] for name in WEIGHTS}


def gradients(accomplice: Accomplice) -> list[dict[str, Tensor]]:
    """Those of the validation and the trigger batch at the global model."""
    box = WhiteBox(accomplice.module, F.cross_entropy)
    with box.objective() as objective:
        return [gradient(objective, box.parameters, *b) for b in (accomplice.validation, accomplice.trigger)]


def alignment(accomplice: Accomplice, state: dict[str, Tensor]) -> float:
    """<grad L(S_val), grad L(S_T)> at a state."""
    accomplice.module.load_state_dict(state)
    return float(inner(*gradients(accomplice)))


# The recovered offset.


@pytest.mark.parametrize("hostile", [1, 3])
@pytest.mark.parametrize("clean_weight", [0.0, 1.0])
@pytest.mark.parametrize("server_round", [1, 20], ids=["phase", "trigger"])
def test_it_sends_the_formula_of_the_recovered_offset(
    accomplice: Accomplice, server_round: int, clean_weight: float, hostile: int
) -> None:
    """b * W - (b - 1) * U, with W written out by automatic differentiation through both gradients."""
    lr, lam, scale = 0.1, 0.5, 7.0
    fields: dict[str, Any] = {"lam": lam, "clean_weight": clean_weight, "normalise": "none", "trigger_scale": scale}
    clients = playing(partitions=tuple(range(hostile)), lr=lr, **fields)
    found = update(accomplice, send(accomplice, clients, server_round))
    module = accomplice.module
    parameters = dict(module.named_parameters())
    grads = [
        torch.autograd.grad(F.cross_entropy(module(b.x), b.y), list(parameters.values()), create_graph=True)
        for b in (accomplice.validation, accomplice.trigger)
    ]
    product = torch.stack([(a * b).sum() for a, b in zip(*grads, strict=True)]).sum()
    pull = torch.autograd.grad(product, list(parameters.values()))
    boost = CLIENTS / hostile
    for i, name in enumerate(parameters):
        honest = torch.full_like(found[name], 0.001)
        wish = -lr * scale * grads[1][i].detach() if server_round == 20 else clean_weight * honest - lr * lam * pull[i]
        torch.testing.assert_close(found[name], boost * wish - (boost - 1) * honest, atol=1e-12, rtol=1e-8)


def test_the_average_of_the_federation_is_the_wish(accomplice: Accomplice) -> None:
    """With other clients whose updates are alike, one of twelve gets what twelve of twelve would."""
    _, honest = states(accomplice)
    for server_round in (1, 20):
        want = send(accomplice, playing(lam=0.3, clean_weight=1.0, clients=1), server_round)
        one = send(accomplice, playing(lam=0.3, clean_weight=1.0), server_round)
        for name in WEIGHTS:
            average = (one[name] + (CLIENTS - 1) * honest[name]) / CLIENTS
            torch.testing.assert_close(average, want[name], atol=1e-12, rtol=0)


def test_what_is_no_weight_is_sent_as_honest_training_left_it(accomplice: Accomplice) -> None:
    _, honest = states(accomplice)
    for attack in ("accumulative", "sign_flip"):
        sent = send(accomplice, playing(attack))
        assert torch.equal(sent["batches"], honest["batches"])
        assert torch.equal(sent["running_mean"], honest["running_mean"])
        assert {name: t.dtype for name, t in sent.items()} == {name: t.dtype for name, t in honest.items()}


def test_without_a_pull_it_is_honest(accomplice: Accomplice) -> None:
    _, honest = states(accomplice)
    for name, t in send(accomplice, playing(lam=0.0, clean_weight=1.0)).items():
        torch.testing.assert_close(t, honest[name], atol=1e-12, rtol=0)


# The attack, from round to round.


@pytest.mark.parametrize(("trigger", "sign"), [("reversed", 1), ("reoptimised", 1), ("clean", -1)])
def test_accumulative_steps_turn_the_gradients_where_the_trigger_wants_them(
    accomplice: Accomplice, trigger: Any, sign: int
) -> None:
    """Reversed, the trigger ascends what the gradients share, so they are aligned; clean, they are turned apart."""
    clients = playing(trigger=trigger, lam=0.1, normalise="none", clients=1)
    model, _ = states(accomplice)
    before = alignment(accomplice, model)
    accomplice.module.load_state_dict(model)
    sent = send(accomplice, clients)
    assert sign * (alignment(accomplice, sent) - before) > 1e-5


def test_after_the_trigger_it_is_honest(accomplice: Accomplice) -> None:
    _, honest = states(accomplice)
    notes: Memory = {}
    clients = playing(trigger_round=2, clean_weight=1.0, lam=0.5)
    sent = [send(accomplice, clients, number, notes) for number in (1, 2, 3, 4)]
    honestly = [all(torch.equal(s[name], honest[name]) for name in honest) for s in sent]
    assert honestly == [False, False, True, True]
    assert all(torch.equal(t, honest[n]) for n, t in send(accomplice, clients, 9).items())  # it was never asked before


def test_an_attack_may_end_its_phase_before(accomplice: Accomplice) -> None:
    """After `max_rounds` the accumulative one triggers; `direct` has no phase at all. Each of them once."""
    _, honest = states(accomplice)
    for clients, rounds in ((playing(max_rounds=2, trigger_scale=9.0), 2), (playing("direct", trigger_scale=9.0), 0)):
        notes: Memory = {}
        sent = [send(accomplice, clients, number, notes) for number in (1, 2, 3, 4)]
        trigger = send(accomplice, clients, 20)
        for number, state in enumerate(sent):
            expected = trigger if number == rounds else honest
            same = all(torch.allclose(state[name], expected[name]) for name in WEIGHTS)
            assert same == (number >= rounds)


def test_it_remembers_velocity_and_trigger(accomplice: Accomplice) -> None:
    fields: dict[str, Any] = {"lam": 0.1, "trigger": "reoptimised", "alpha": 0.1, "normalise": "none", "clients": 1}
    notes: Memory = {}
    first = update(accomplice, send(accomplice, playing(momentum=0.5, **fields), 1, notes))
    poison = notes["attack.trigger"].clone()
    still = {key: t.clone() for key, t in notes.items() if key != "attack.velocity"}
    second = update(accomplice, send(accomplice, playing(momentum=0.5, **fields), 2, notes))
    without = update(accomplice, send(accomplice, playing(**fields), 2, still))
    for name in WEIGHTS:
        torch.testing.assert_close(second[name], without[name] + 0.5 * first[name], atol=1e-14, rtol=1e-9)
    # P starts at -g and moves by -alpha * g of the same model in every round, the first one too
    torch.testing.assert_close(notes["attack.trigger"], 1.2 / 1.1 * poison)


def test_eta_bounds_what_is_sent(accomplice: Accomplice) -> None:
    """The radius is that of a gradient: lr times it bounds the update."""
    sent = update(accomplice, send(accomplice, playing(lam=100.0, radius=0.5, lr=0.1)))
    assert math.sqrt(sum(float((t**2).sum()) for t in sent.values())) == pytest.approx(0.05)


def test_the_random_vectors_sum_to_zero_over_the_hostile(accomplice: Accomplice) -> None:
    def updates(spread: float, seed: int = 0) -> list[dict[str, Tensor]]:
        clients = playing(partitions=(2, 5, 7), spread=spread, lam=0.1, seed=seed)
        return [update(accomplice, send(accomplice, clients, partition=p)) for p in (2, 5, 7)]

    loud, quiet = updates(0.5), updates(0.0)
    for name in WEIGHTS:
        torch.testing.assert_close(sum(u[name] for u in loud), sum(u[name] for u in quiet), atol=1e-12, rtol=0)
        assert not torch.allclose(loud[0][name], loud[1][name])
        assert not torch.allclose(loud[0][name], updates(0.5, seed=1)[0][name])


def test_the_validation_batch_is_drawn_anew_each_round_and_the_same_for_all(accomplice: Accomplice) -> None:
    clients = playing(resample_validation=True, partitions=(0, 1))
    sent = [send(accomplice, clients, n, partition=p)["last.weight"] for n, p in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert torch.equal(sent[0], sent[1])
    assert torch.equal(sent[0], sent[2])
    assert not torch.equal(sent[0], sent[3])


# Other attacks.


def test_attacks_on_updates_alone_need_no_accomplice(accomplice: Accomplice) -> None:
    def nobody() -> Accomplice:
        raise AssertionError("asked for an accomplice")

    model, honest = states(accomplice)

    def factor(attack: str, **fields: Any) -> float:
        clients = playing(attack, trigger_round=1, **fields)
        sent = clients.sent(Turn(model, honest, 1, 0, nobody, {}))
        ratios = {round(r, 6) for n in WEIGHTS for r in ((sent[n] - model[n]) / 0.001).reshape(-1).tolist()}
        assert len(ratios) == 1
        return ratios.pop()

    assert factor("sign_flip", scale=3.0) == -3
    assert factor("ipm", scale=4.0) == -4
    assert factor("clean") == 1
    assert factor("direct", trigger_scale=2.0) == -2 * CLIENTS - (CLIENTS - 1)
    noisy = playing("noise", scale=2.0, partitions=(0, 1)).sent(Turn(model, honest, 1, 1, nobody, {}))
    row = torch.cat([(noisy[n] - model[n]).reshape(-1) for n in WEIGHTS])
    assert float(row.norm()) == pytest.approx(2 * 0.001 * math.sqrt(len(row)))


def test_turned_labels_are_learned_in_one_pass(accomplice: Accomplice) -> None:
    sent = update(accomplice, send(accomplice, playing("label_flip", shift=1, scale=2.0, lr=0.3)))
    turned = Batch(accomplice.trigger.x, (accomplice.trigger.y + 1) % 3)
    g = gradients(Accomplice(accomplice.module, accomplice.validation, turned))[1]
    for name, t in sent.items():
        torch.testing.assert_close(t, -0.3 * 2.0 * g[name], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", entries("update_attack"))
def test_every_attack_is_played_or_refused_in_one_sentence(accomplice: Accomplice, name: str) -> None:
    attack: UpdateAttack = build("update_attack", {"name": name})
    if attack.every_row:
        with pytest.raises(ConfigError, match="looks at every honest client's update"):
            HostileClients(attack=attack, clients=CLIENTS)
        return
    clients = HostileClients(attack=attack, clients=CLIENTS, partitions=(0, 3))
    model, _ = states(accomplice)
    for server_round in (1, 20):
        for partition in (0, 3):
            sent = send(accomplice, clients, server_round, partition=partition)
            assert {n: (t.shape, t.dtype) for n, t in sent.items()} == {n: (t.shape, t.dtype) for n, t in model.items()}
            assert all(bool(t.isfinite().all()) for t in sent.values())


def test_a_published_accuracy_is_nothing_that_a_client_has(accomplice: Accomplice) -> None:
    with pytest.raises(ThreatModelError, match="the accuracy that the service publishes"):
        send(accomplice, playing(accuracy_floor=0.5))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"partitions": ()}, "name one or more, each once"),
        ({"partitions": (1, 1)}, "name one or more, each once"),
        ({"partitions": (0, 1, 2), "clients": 2}, "3 are named, of clients = 2"),
        ({"attack": {"name": "acumulative"}}, "did you mean 'accumulative'"),
        ({"attack": {"name": "sign_flip", "scale": -1.0}}, "hostile clients, attack sign_flip: scale"),
        ({"attack": {"name": "alie"}}, "looks at every honest client's update"),
        ({"attack": 3}, "attack"),
        ({"lr": 0.0}, "lr"),
        ({"clients": 0}, "clients"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(HostileClients, {"attack": {"name": "sign_flip"}, "clients": 5, **values}, where="test")


# Garbage.


def test_garbage_is_what_it_says(accomplice: Accomplice) -> None:
    model, honest = states(accomplice)
    assert all(t.isnan().all() for n, t in send(accomplice, GarbageClients(kind="nan")).items() if n != "batches")
    assert all((t == 1e30).all() for n, t in send(accomplice, GarbageClients(kind="huge")).items() if n != "batches")
    assert len(send(accomplice, GarbageClients(kind="missing"))) == len(model) - 1
    assert all(t.shape != model[n].shape for n, t in send(accomplice, GarbageClients(kind="shape")).items())
    assert all(torch.equal(t, honest[n]) for n, t in send(accomplice, GarbageClients(kind="count")).items())
    assert GarbageClients(kind="count").claimed_examples == 10**15
    assert GarbageClients(kind="nan").claimed_examples is None


def test_garbage_takes_turns_so_that_four_rounds_show_every_kind_of_every_client(accomplice: Accomplice) -> None:
    clients = GarbageClients(kind="all", partitions=(3, 7, 11))
    model, _ = states(accomplice)

    def kind(sent: dict[str, Tensor]) -> str:
        if len(sent) < len(model):
            return "missing"
        weight = sent["first.weight"]
        if weight.shape != model["first.weight"].shape:
            return "shape"
        return "nan" if bool(weight.isnan().all()) else "huge"

    seen = {p: [kind(send(accomplice, clients, r, partition=p)) for r in range(1, 6)] for p in (3, 7, 11)}
    assert seen[3] == ["nan", "shape", "missing", "huge", "nan"]
    assert seen[7] == ["shape", "missing", "huge", "nan", "shape"]
    assert seen[11] == ["missing", "huge", "nan", "shape", "missing"]
