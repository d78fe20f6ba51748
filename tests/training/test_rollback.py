"""A step that is taken back leaves no bit behind: parameters, buffers, optimiser state, its settings, train flags."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer, RMSprop

from mithridate.core.batch import Batch
from mithridate.core.defence import Defence, Verdict
from mithridate.core.errors import CheckpointError
from mithridate.core.past import Weights
from mithridate.core.view import View
from mithridate.training.learner import Learner
from mithridate.training.rollback import Rollback, put_weights

Maker = Callable[[Iterator[nn.Parameter]], Optimizer]
OPTIMISERS: dict[str, Maker] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, dampening=0.1),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "adamw": lambda p: AdamW(p, lr=0.01, foreach=False),
    "adamw foreach": lambda p: AdamW(p, lr=0.01, foreach=True),
    "adamw amsgrad": lambda p: AdamW(p, lr=0.01, amsgrad=True),
    "adamw fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "adamw, its rate a tensor": lambda p: AdamW(p, lr=torch.tensor(0.01)),
    "adagrad": lambda p: Adagrad(p, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.5),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5, centered=True),
}


class Net(nn.Module):
    """BatchNorm, a module that stays in eval mode, a frozen parameter, one that is not used, and a counter."""

    def __init__(self, lazy: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.frozen, self.unused = nn.BatchNorm1d(8).eval(), nn.Linear(2, 2)
        self.first.bias.requires_grad_(False)
        self.lazy = lazy
        self.calls: Tensor | None
        self.register_buffer("calls", None if lazy else torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = (torch.zeros((), dtype=torch.int64) if self.calls is None else self.calls) + 1  # another tensor
        logits: Tensor = self.last(self.frozen(self.norm(self.first(x))).relu())
        return logits


def model(**options: Any) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(**options)


def batch_of(seed: int, n: int = 9) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(n, 6, generator=rng), torch.randint(3, (n,), generator=rng))


def learner_of(name: str, defence: Defence | None = None, **options: Any) -> Learner:
    net = model(**options)
    return Learner(net, OPTIMISERS[name](net.parameters()), defence=defence)


def everything(learner: Learner) -> dict[str, Any]:
    """Copies of all that a step can change, by name."""
    net, optimiser = learner.model, learner.optimiser
    names: dict[Tensor, str] = {p: name for name, p in net.named_parameters()}
    out: dict[str, Any] = {f"parameter {name}": p for name, p in net.named_parameters()}
    out |= {f"buffer {name}": b for name, b in net.named_buffers()}
    out |= {f"flag {name}": m.training for name, m in net.named_modules()}
    out |= {f"requires grad {name}": p.requires_grad for name, p in net.named_parameters()}
    for p, state in optimiser.state.items():
        out |= {f"state {names[p]} {key}": value for key, value in state.items()} | {f"state {names[p]}": len(state)}
    for i, group in enumerate(optimiser.param_groups):
        out |= {f"group {i} {key}": value for key, value in group.items() if key != "params"}
    out["step"] = learner.step
    return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in out.items()}


def differing(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """Names of what differs in a bit."""
    return sorted(one.keys() ^ two.keys()) + [
        key
        for key in one.keys() & two.keys()
        if not (torch.equal(one[key], two[key]) if isinstance(one[key], Tensor) else one[key] == two[key])
    ]


class Refusing(Defence):
    """Refuses the steps that it is told to, and says which it was asked about."""

    def __init__(self, *steps: int, error: Exception | None = None) -> None:
        self.steps, self.error = steps, error

    def admit(self, before: Weights, view: View) -> Verdict:
        asked = int(view.memory.get("asked", torch.zeros(()))) + 1
        view.memory["asked"] = torch.tensor(asked)
        if asked in self.steps and self.error is not None:
            raise self.error
        return Verdict(admit=asked not in self.steps)


@pytest.mark.parametrize("fails", [False, True], ids=["refused", "failed"])
@pytest.mark.parametrize("made", [0, 1, 3])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_step_that_is_taken_back_was_never_made(name: str, made: int, fails: bool) -> None:
    """Whatever was there before it comes back, and learning goes on as if it had not been: the first step included."""
    error = ArithmeticError("odd") if fails else None
    learner, undisturbed = learner_of(name, Refusing(made + 1, error=error)), learner_of(name)
    for i in range(made):
        for one in (learner, undisturbed):
            one.update(batch_of(i))
    before = everything(learner)
    assert differing(before, everything(undisturbed)) == []
    if fails:
        with pytest.raises(ArithmeticError, match="odd"):
            learner.update(batch_of(10))
    else:
        assert learner.update(batch_of(10)).update_norm == 0.0
    assert differing(everything(learner), before) == []
    assert all(p.grad is None for p in learner.model.parameters())
    learner.defence = Defence()
    for i in range(20, 23):
        learner.update(batch_of(i))
        undisturbed.update(batch_of(i))
    assert differing(everything(learner), everything(undisturbed)) == []
    moved = {key.split()[0] for key in differing(everything(learner), before)}
    assert {"parameter", "buffer", "step"} <= moved <= {"parameter", "buffer", "step", "state"}


class Halfway(SGD):
    """Fails in the middle of a step."""

    def step(self, closure: Any = None) -> Any:
        group = self.param_groups[0]
        group["params"], rest = group["params"][:2], group["params"]
        super().step(closure)
        group["params"] = rest
        group["lr"] = 99.0
        raise FloatingPointError("in the middle")


@pytest.mark.parametrize("made", [0, 2])
def test_an_optimiser_that_fails_halfway_leaves_nothing(made: int) -> None:
    learner = learner_of("momentum")
    learner.optimiser = SGD(learner.model.parameters(), lr=0.1, momentum=0.9)
    for i in range(made):
        learner.update(batch_of(i))
    before = everything(learner)
    learner.optimiser.__class__ = Halfway
    with pytest.raises(FloatingPointError, match="in the middle"):
        learner.update(batch_of(5))
    assert differing(everything(learner), before) == []


def test_a_model_that_fails_halfway_leaves_nothing() -> None:
    """BatchNorm has recorded and a flag was changed when the last layer fails."""
    learner = learner_of("momentum")
    learner.update(batch_of(0))
    before = everything(learner)

    def fail(*_: object) -> None:
        learner.model.get_submodule("frozen").train()
        raise RuntimeError("in the middle")

    handle = learner.model.get_submodule("last").register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        learner.update(batch_of(1))
    assert differing(everything(learner), before) == []
    handle.remove()
    learner.update(batch_of(1))
    assert "buffer norm.running_mean" in differing(everything(learner), before)


def test_a_buffer_that_the_step_made_is_gone_again() -> None:
    learner = learner_of("sgd", Refusing(1), lazy=True)
    assert not learner.update(batch_of(0)).verdict.admit
    assert learner.model.calls is None
    assert learner.update(batch_of(0)).verdict.admit
    assert int(learner.model.calls) == 1


def test_train_flags_survive_whatever_becomes_of_the_step() -> None:
    for steps in ((), (1,)):
        learner = learner_of("momentum", Refusing(*steps))
        flags = [m.training for m in learner.model.modules()]
        assert len(set(flags)) == 2
        learner.update(batch_of(0))
        assert [m.training for m in learner.model.modules()] == flags


# The place itself.


def one_step(net: nn.Module, optimiser: Optimizer, seed: int) -> None:
    batch = batch_of(seed)
    torch.autograd.backward(F.cross_entropy(net(batch.x), batch.y))
    optimiser.step()
    optimiser.zero_grad()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_copies_go_into_the_same_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the optimiser has its state, a place to come back to costs copies and no allocation."""
    net = model()
    optimiser = OPTIMISERS[name](net.parameters())
    rollback = Rollback()
    for seed in range(2):
        rollback.save(net, optimiser)
        one_step(net, optimiser, seed)
    rollback.save(net, optimiser)

    def places() -> dict[str, int]:
        weights = rollback.weights
        return {name: t.data_ptr() for name, t in [*weights.parameters.items(), *weights.buffers.items()]}

    before = places()
    cloned: list[Tensor] = []
    clone = Tensor.clone

    def counting(t: Tensor, **options: Any) -> Tensor:
        cloned.append(t)
        return clone(t, **options)

    monkeypatch.setattr(Tensor, "clone", counting)
    for seed in range(2, 5):
        one_step(net, optimiser, seed)
        rollback.save(net, optimiser)
    assert places() == before
    assert [t for t in cloned if t.ndim] == []  # a rate may be a number in a tensor
    assert all(torch.equal(t, net.state_dict()[n]) for n, t in rollback.weights.parameters.items())


def test_what_is_remembered_does_not_follow_the_model_and_can_be_brought_back_often() -> None:
    net = model()
    optimiser = OPTIMISERS["adamw amsgrad"](net.parameters())
    rollback = Rollback()
    one_step(net, optimiser, 0)
    rollback.save(net, optimiser)
    kept = {n: t.clone() for n, t in net.state_dict().items()}
    for seed in (1, 2):
        one_step(net, optimiser, seed)
        one_step(net, optimiser, seed + 1)
        assert any(not torch.equal(t, kept[n]) for n, t in net.state_dict().items())
        rollback.restore()
        assert all(torch.equal(t, kept[n]) for n, t in net.state_dict().items())


def test_how_far_the_model_has_moved_is_measured_from_there() -> None:
    net = model()
    optimiser = OPTIMISERS["sgd"](net.parameters())
    rollback = Rollback()
    rollback.save(net, optimiser)
    assert not any(bool(d.any()) for d in rollback.moved())
    before = [p.detach().clone() for p in net.parameters()]
    one_step(net, optimiser, 0)
    moved = list(rollback.moved())
    assert all(torch.equal(d, p - b) for d, p, b in zip(moved, net.parameters(), before, strict=True))
    assert not any(d.requires_grad for d in moved)


def test_without_an_optimiser_the_model_alone_comes_back() -> None:
    net = model()
    rollback = Rollback()
    rollback.save(net, None)
    kept = {n: t.clone() for n, t in net.state_dict().items()}
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.add_(1)
    net.eval()
    rollback.restore()
    assert all(torch.equal(t, kept[n]) for n, t in net.state_dict().items())
    assert net.training
    assert not net.frozen.training


def test_a_model_of_another_dtype_is_remembered_anew() -> None:
    net = model()
    optimiser = SGD(net.parameters(), lr=0.1, momentum=0.9)
    rollback = Rollback()
    rollback.save(net, optimiser)
    net.double()
    rollback.save(net, optimiser)
    assert {t.dtype for t in rollback.weights.parameters.values()} == {torch.float64}
    with torch.no_grad():
        net.last.weight.fill_(math.pi)
    rollback.save(net, optimiser)
    net.last.weight.data.zero_()
    rollback.restore()
    assert bool((net.last.weight == math.pi).all())


def test_foreign_weights_are_refused_before_anything_is_written() -> None:
    net, other = model(), model()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.add_(1)
    weights = Weights.of(other).copied()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    without = {n: b for n, b in weights.buffers.items() if n != "norm.running_var"}
    with pytest.raises(CheckpointError, match=r"buffers are of another model: missing \['norm.running_var'\]"):
        put_weights(net, Weights(weights.parameters, without))
    with pytest.raises(CheckpointError, match=r"parameter 'last.bias' has shape \(4,\), the model wants \(3,\)"):
        put_weights(net, Weights({**weights.parameters, "last.bias": torch.zeros(4)}, weights.buffers))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    put_weights(net, weights)
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in net.state_dict().items())
