"""Per-client gradients: both ways against separate backward passes, and what cannot be done layer by layer."""

import itertools
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mithridate.core.errors import ConfigError, DataError
from mithridate.core.modes import BatchNormMode
from mithridate.models import build_model
from mithridate.simulation.per_client import gradients as per_client
from mithridate.simulation.per_client import sums as per_client_sums
from mithridate.simulation.per_client.gradients import Way, client_gradients
from mithridate.simulation.per_client.sums import summed_gradients
from mithridate.testing.toy import CLASSES, TOY

MODELS: dict[str, Mapping[str, Any]] = {
    "small_cnn": {"name": "small_cnn", "width": 4},
    "small_cnn, group": {"name": "small_cnn", "width": 4, "norm": "group", "groups": 2},
    "small_cnn, none": {"name": "small_cnn", "width": 4, "norm": "none"},
    "resnet18": {"name": "resnet18", "width": 4, "stem_pool": True},
    "resnet18, no pool": {"name": "resnet18", "width": 4, "stem_pool": False},
    "resnet18, group": {"name": "resnet18", "width": 4, "norm": "group", "groups": 2},
    "vgg11": {"name": "vgg11", "width": 4},
    "vgg11, group": {"name": "vgg11", "width": 4, "norm": "group", "groups": 4},
}


def made(name: str) -> nn.Module:
    """A model in float64 whose running statistics and affine weights are not those of a fresh one."""
    model = build_model(MODELS[name], TOY, seed=0).double()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                for tensor in (module.weight, module.bias):
                    tensor.add_(0.3 * torch.rand(tensor.shape, generator=rng))
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean += 0.3 * torch.rand(module.running_mean.shape, generator=rng)
                module.running_var += 0.3 * torch.rand(module.running_var.shape, generator=rng)
    return model


def samples_of(clients: int, samples: int, shape: tuple[int, ...] = TOY.shape) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(2)
    x = torch.rand(clients, samples, *shape, generator=rng, dtype=torch.float64)
    return x, torch.randint(CLASSES, (clients, samples), generator=rng)


def one_by_one(model: nn.Module, x: Tensor, y: Tensor, mode: BatchNormMode = "eval") -> Tensor:
    """The oracle: a forward and a backward pass a client."""
    trained = [p for p in model.parameters() if p.requires_grad]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    flag = model.training
    model.train(mode == "train")
    rows = []
    for pixels, labels in zip(x, y, strict=True):
        found = torch.autograd.grad(F.cross_entropy(model(pixels), labels), trained, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in found]))
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
    model.train(flag)
    return torch.stack(rows)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_both_ways_are_separate_backward_passes(name: str, samples: int) -> None:
    model = made(name)
    x, y = samples_of(5, samples)
    oracle = one_by_one(model, x, y)
    assert float((oracle[0] - oracle[1]).abs().max()) > 1e-3  # clients differ: a mean would not pass
    for way in ("layered", "mapped"):
        assert close(client_gradients(model, F.cross_entropy, x, y, way=way), oracle)


@pytest.mark.parametrize("name", ["small_cnn", "vgg11, group", "small_cnn, none"])
def test_clients_with_statistics_of_their_own(name: str) -> None:
    model = made(name)
    x, y = samples_of(4, 3)
    oracle = one_by_one(model, x, y, "train")
    assert close(client_gradients(model, F.cross_entropy, x, y, mode="train", way="mapped"), oracle)
    assert close(client_gradients(model, F.cross_entropy, x, y, mode="train"), oracle)
    differs = not close(oracle, one_by_one(model, x, y))
    assert differs == (name == "small_cnn")  # it has BatchNorm


@pytest.mark.parametrize("way", ["layered", "mapped"])
def test_a_round_larger_than_one_pass(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("small_cnn")
    x, y = samples_of(7, 3)
    monkeypatch.setattr(per_client, "PASS", 7)  # two clients at a time, the last alone
    assert close(client_gradients(model, F.cross_entropy, x, y, way=way), one_by_one(model, x, y))
    monkeypatch.setattr(per_client, "PASS", 2)  # less than one client has
    assert close(client_gradients(model, F.cross_entropy, x, y, way=way), one_by_one(model, x, y))


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "stride, dilation and padding": lambda: nn.Conv2d(1, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    "more channels than places": lambda: nn.Conv2d(1, 70, 3, bias=False),
    "one channel": lambda: nn.Conv2d(1, 1, 1),
}


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_of_all_sorts(name: str, samples: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        CONVOLUTIONS[name](), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(CLASSES)
    )
    model = model.double()
    x, y = samples_of(3, samples)
    model(x[0])  # gives the linear layer its width
    assert close(client_gradients(model, F.cross_entropy, x, y, way="layered"), one_by_one(model, x, y))


class Tokens(nn.Module):
    """Linear layers on three dimensions and BatchNorm on two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.norm(torch.tanh(self.first(x[:, 0])).mean(1)))
        return logits


class InPlace(nn.Module):
    """What follows a layer writes to the layer's output, as in most public models."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.fc = nn.Linear(4 * 64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x))
        x = self.norm(x)
        x += 0.5
        logits: Tensor = self.fc(self.relu(x).flatten(1))
        return logits


@pytest.mark.parametrize("cls", [Tokens, InPlace])
def test_a_users_module_of_known_layers_goes_the_layered_way(cls: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = cls().double()
    x, y = samples_of(4, 3)
    oracle = one_by_one(model, x, y)
    assert close(client_gradients(model, F.cross_entropy, x, y, way="layered"), oracle)
    assert close(client_gradients(model, F.cross_entropy, x, y, way="mapped"), oracle)


# Lengths and sums, no row being formed.

SUMMABLE: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(made, name) for name in MODELS},
    "tokens": lambda: Tokens().double(),
    "in place": lambda: InPlace().double(),
    "few places": lambda: nn.Sequential(
        nn.Conv2d(1, 40, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(40, 50, (3, 2), padding=(2, 1), dilation=(2, 1), bias=False),
        nn.Tanh(),
        nn.Conv2d(50, 60, 3, stride=(1, 2)),
        nn.Flatten(),
        nn.Linear(240, CLASSES),
    ).double(),
}


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", SUMMABLE)
def test_lengths_and_sums_are_those_of_the_rows(name: str, samples: int) -> None:
    torch.manual_seed(0)
    model = SUMMABLE[name]()
    x, y = samples_of(5, samples)
    rows = one_by_one(model, x, y)
    lengths = rows.norm(dim=1)
    found = summed_gradients(model, F.cross_entropy, x, y)
    assert not isinstance(found, str)
    assert close(found.total, rows.sum(0))
    assert close(found.lengths, lengths)
    assert found.unweighted is None
    losses = torch.stack([F.cross_entropy(model.eval()(a), b) for a, b in zip(x, y, strict=True)])
    assert close(found.losses, losses.detach())
    weights = torch.linspace(0.1, 2, 5, dtype=torch.float64)
    given: list[Tensor] = []

    def factors(seen: Tensor) -> Tensor:
        given.append(seen)
        return weights

    apart = {next(n for n, _ in model.named_parameters())}
    kept = torch.cat([torch.full((p.numel(),), n not in apart) for n, p in model.named_parameters()])
    weighted = summed_gradients(model, F.cross_entropy, x, y, factors=factors, unmeasured=apart, unweighted=True)
    assert not isinstance(weighted, str)
    assert weighted.unweighted is not None
    assert close(weighted.unweighted, rows.sum(0))
    assert close(weighted.total, torch.where(kept, weights @ rows, rows.sum(0)))
    assert close(given[0], rows[:, kept].norm(dim=1))
    assert close(weighted.lengths, lengths)


def test_the_deep_layers_of_a_resnet_form_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    made_rows: list[int] = []
    rows = per_client_sums._Rows

    def noting(entries: Tensor) -> object:
        made_rows.append(entries.shape[1])
        return rows(entries)

    monkeypatch.setattr(per_client_sums, "_Rows", noting)
    model = build_model({"name": "resnet18", "width": 8}, TOY, seed=0)
    x, y = samples_of(4, 1)
    assert not isinstance(summed_gradients(model, F.cross_entropy, x.float(), y), str)
    assert sum(made_rows) < 0.2 * sum(p.numel() for p in model.parameters())


def test_another_criterion_is_asked_client_by_client() -> None:
    model = made("small_cnn, none")
    x, y = samples_of(4, 3)

    def squared(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits - F.one_hot(labels, CLASSES)).square().mean()

    found = summed_gradients(model, squared, x, y)
    assert not isinstance(found, str)
    assert close(found.lengths, client_gradients(model, squared, x, y, way="layered").norm(dim=1))


@pytest.mark.parametrize("ignored", [False, True])
def test_one_call_for_all_clients_of_a_sample_gives_the_bits_of_a_call_each(ignored: bool) -> None:
    model = made("small_cnn, none").float()
    x, y = samples_of(9, 1)
    if ignored:
        y[4] = -100  # a label without a loss: its mean is NaN, and must not pass for a loss of zero
    calls: list[int] = []

    def each(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(len(labels))
        return F.cross_entropy(logits, labels)

    together = summed_gradients(model, F.cross_entropy, x.float(), y)
    apart = summed_gradients(model, each, x.float(), y)
    assert not isinstance(together, str)
    assert not isinstance(apart, str)
    assert calls == [1] * 9
    for found, expected in zip(together, apart, strict=True):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert bool(together.losses[4].isnan()) == ignored


def test_parameters_that_are_not_trained_or_not_used_are_not_counted() -> None:
    model = made("small_cnn, none")
    model.get_parameter("fc1.weight").requires_grad_(False)
    x, y = samples_of(3, 2)
    found = summed_gradients(model, F.cross_entropy, x, y, unweighted=True)
    assert not isinstance(found, str)
    rows = one_by_one(model, x, y)
    assert close(found.total, rows.sum(0))
    assert close(found.lengths, rows.norm(dim=1))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same, self.last = nn.Linear(64, 64), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.tanh(self.same(torch.tanh(self.same(x.flatten(1))))))
        return logits


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, CLASSES)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.tanh(self.two(torch.tanh(self.one(x.flatten(1))))))
        return logits


class Borrowed(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.last = nn.Linear(64, 64), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.tanh(F.linear(x.flatten(1), self.held.weight)))
        return logits


class Named(nn.Module):
    """Gives a layer its input by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(input=x.flatten(1))
        return logits


def head(*layers: nn.Module, width: int = 64) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, CLASSES))


OBSTACLES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "unknown": (lambda: head(Scale()), "the layer 0 is a Scale"),
    "subclass": (lambda: nn.Sequential(nn.Flatten(), Doubling(64, CLASSES)), "the layer 1 is a Doubling"),
    "parametrised": (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), "whose formula is not known"),
    "twice": (Twice, "the layer same is not used just once"),
    "tied": (Tied, "two layers share a parameter"),
    "borrowed": (Borrowed, "the layer held is not used just once"),
    "by keyword": (Named, "the layer last is not used just once"),
    "groups": (lambda: head(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1, groups=2), width=128), "the convolution 1 has gro"),
    "reflecting": (lambda: head(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")), "padding other than zeros"),
    "a word": (lambda: head(nn.Conv2d(1, 1, 3, padding="same")), "its padding given as a word"),
    "no statistics": (lambda: head(nn.BatchNorm2d(1, affine=False, track_running_stats=False)), "mix samples"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_cannot_be_done_layer_by_layer_is_mapped_and_said(name: str) -> None:
    torch.manual_seed(0)
    make, message = OBSTACLES[name]
    model = make().double()
    if name == "parametrised":
        model = nn.Sequential(model, nn.Flatten(), nn.Linear(64, CLASSES)).double()
    x, y = samples_of(3, 2)
    oracle = one_by_one(model, x, y)
    for way in ("auto", "mapped"):
        assert close(client_gradients(model, F.cross_entropy, x, y, way=way), oracle)
    with pytest.raises(ConfigError, match=message):
        client_gradients(model, F.cross_entropy, x, y, way="layered")
    assert re.search(message, str(summed_gradients(model, F.cross_entropy, x, y)))


@pytest.mark.parametrize("affine", [True, False])
def test_batch_statistics_are_an_obstacle_whoever_owns_parameters(affine: bool) -> None:
    torch.manual_seed(0)
    model = head(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, affine=affine)).double()
    for p in model[1].parameters():  # type: ignore[index]  # a Sequential
        p.requires_grad_(False)
    x, y = samples_of(3, 4)
    assert close(client_gradients(model, F.cross_entropy, x, y, mode="train"), one_by_one(model, x, y, "train"))
    with pytest.raises(ConfigError, match="batch statistics, which mix samples"):
        client_gradients(model, F.cross_entropy, x, y, mode="train", way="layered")


@pytest.mark.parametrize("way", ["layered", "mapped"])
def test_parameters_that_are_not_trained_have_no_column(way: Way) -> None:
    model = made("small_cnn")
    whole = one_by_one(model, *samples_of(3, 2))
    sizes = [p.numel() for p in model.parameters()]
    pieces = torch.split(whole, sizes, 1)
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 != 0)  # weights here, biases there
    left = torch.cat([piece for i, piece in enumerate(pieces) if i % 3 != 0], 1)
    assert close(client_gradients(model, F.cross_entropy, *samples_of(3, 2), way=way), left)


@pytest.mark.parametrize("name", ["small_cnn", "borrowed"])
def test_a_layer_that_is_not_used_has_zeros(name: str) -> None:
    torch.manual_seed(0)
    model = (made(name) if name in MODELS else Borrowed()).double()
    model.register_module("spare", nn.Linear(3, 3).double())
    x, y = samples_of(3, 2)
    out = torch.full((3, sum(p.numel() for p in model.parameters())), torch.nan, dtype=torch.float64)
    rows = client_gradients(model, F.cross_entropy, x, y, out=out)
    assert close(rows, one_by_one(model, x, y))
    assert not rows[:, -12:].any()


@pytest.mark.parametrize(("way", "mode"), [("layered", "eval"), ("mapped", "eval"), ("mapped", "train")])
def test_the_model_is_left_as_it_was(way: Way, mode: BatchNormMode) -> None:
    model = made("small_cnn")
    modules = list(model.modules())
    for i, module in enumerate(modules):
        module.training = i % 2 == 0
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    x, y = samples_of(3, 2)
    kept = x.clone()
    rows = client_gradients(model, F.cross_entropy, x, y, way=way, mode=mode)
    assert not rows.requires_grad
    assert torch.equal(x, kept)
    assert not x.requires_grad
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [m.training for m in modules] == [i % 2 == 0 for i in range(len(modules))]
    assert [p.grad is not None for p in model.parameters()] == [True, *[False] * (len(list(model.parameters())) - 1)]
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in modules)
    assert torch.equal(state, torch.get_rng_state())


def test_hooks_are_taken_away_if_the_model_raises() -> None:
    model = made("small_cnn")
    x, y = samples_of(2, 2, shape=(1, 12, 12))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        client_gradients(model, F.cross_entropy, x, y)
    assert not any(m._forward_hooks for m in model.modules())
    assert close(client_gradients(model, F.cross_entropy, *samples_of(2, 2)), one_by_one(model, *samples_of(2, 2)))


@pytest.mark.parametrize("way", ["layered", "mapped"])
def test_the_same_place_is_written_again(way: Way) -> None:
    model = made("resnet18")
    x, y = samples_of(4, 2)
    room = torch.full((6, sum(p.numel() for p in model.parameters())), 7.0, dtype=torch.float64)
    rows = client_gradients(model, F.cross_entropy, x, y, way=way, out=room[:4])
    assert rows.data_ptr() == room.data_ptr()
    assert close(room[:4], one_by_one(model, x, y))
    assert (room[4:] == 7).all()
    client_gradients(model, F.cross_entropy, x.flip(0), y.flip(0), way=way, out=room[:4])
    assert close(room[:4], one_by_one(model, x, y).flip(0))


def test_one_sample_has_no_batch_statistics_of_its_own() -> None:
    model = made("resnet18")  # its last maps are single pixels
    with pytest.raises(DataError, match=r"1 samples a client.*give clients more samples"):
        client_gradients(model, F.cross_entropy, *samples_of(3, 1), mode="train")


def test_layers_and_clients_do_not_mix() -> None:
    """Another client's samples do not change a row, in whatever order they come."""
    model = made("vgg11")
    x, y = samples_of(4, 2)
    whole = client_gradients(model, F.cross_entropy, x, y)
    for order in itertools.islice(itertools.permutations(range(4)), 1, 24, 7):
        where = list(order)
        assert close(client_gradients(model, F.cross_entropy, x[where], y[where]), whole[where])
    assert close(client_gradients(model, F.cross_entropy, x[:1], y[:1]), whole[:1])


def test_a_criterion_of_ones_own() -> None:
    model = made("small_cnn")
    x, y = samples_of(3, 4)

    def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=0.2)

    rows = [client_gradients(model, smoothed, x, y, way=way) for way in ("layered", "mapped")]
    assert close(*rows)
    assert not close(rows[0], one_by_one(model, x, y))
