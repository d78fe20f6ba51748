from statistics import median
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad
from torch.nn import functional as F

from mithridate.core.errors import ConfigError
from mithridate.core.model import WhiteBox
from mithridate.core.registry import config_of, entries
from mithridate.core.seeding import generator
from mithridate.data import DATASETS, StreamSettings, open_stream
from mithridate.maths.calculus import mixed_partial, mixed_partial_of_curvature
from mithridate.models import build_model, check_model
from mithridate.models.resnet import ResNet18
from mithridate.testing.toy import TOY
from mithridate.training.burn_in import BurnIn, burn_in

CONFIGS: list[dict[str, Any]] = [
    {"name": "resnet18", "width": 4},
    {"name": "resnet18", "width": 4, "norm": "group", "groups": 2, "stem_pool": False},
    {"name": "vgg11", "width": 4},
    {"name": "vgg11", "width": 4, "norm": "group", "groups": 2},
    {"name": "small_cnn", "width": 4},
    {"name": "small_cnn", "width": 4, "norm": "group", "groups": 2},
    {"name": "small_cnn", "width": 4, "norm": "none"},
]
IDS = ["-".join(str(value) for value in config.values()) for config in CONFIGS]
each_model = pytest.mark.parametrize("config", CONFIGS, ids=IDS)


def images(name: str, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    info = DATASETS[name]
    rng = generator("images", name, seed)
    return torch.rand(n, *info.shape, generator=rng), torch.randint(len(info.classes), (n,), generator=rng)


def test_the_known_models() -> None:
    assert list(entries("model")) == ["resnet18", "small_cnn", "vgg11"]


def test_every_kind_of_model_is_tested_here() -> None:
    assert {config["name"] for config in CONFIGS} == set(entries("model"))


@pytest.mark.parametrize("width", [2**62, 2**63 - 1, 2**63, 10**400], ids=["2^62", "2^63-1", "2^63", "10^400"])
def test_a_model_that_is_larger_than_numbers_is_refused_in_a_sentence(width: int) -> None:
    with pytest.raises(
        ConfigError, match=r"cannot be made with these settings|too large for a whole number"
    ) as refusal:
        build_model({"name": "small_cnn", "width": width}, DATASETS["digits"], seed=0)
    assert len(str(refusal.value)) < 600


def test_more_groups_than_can_be_counted_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="set groups to 4"):
        build_model({"name": "small_cnn", "width": 4, "norm": "group", "groups": 10**18}, DATASETS["digits"], seed=0)


@each_model
@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10", "cifar100"])
def test_logits_and_features_for_every_size_of_image(config: dict[str, Any], name: str) -> None:
    info = DATASETS[name]
    model = cast("Any", build_model(config, info, seed=0))
    x, _ = images(name, 2)
    for training in (True, False):
        model.train(training)
        features = model.features(x)
        assert features.shape == (2, 16 if config["name"] == "small_cnn" else 32)
        assert model(x).shape == (2, len(info.classes))
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    assert torch.equal(head(features), model(x))


@each_model
def test_the_seed_decides_and_the_global_generator_is_left_alone(config: dict[str, Any]) -> None:
    info = DATASETS["digits"]
    before = torch.get_rng_state()
    first, same, other = (build_model(config, info, seed=seed).state_dict() for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@each_model
def test_settings_round_trip(config: dict[str, Any]) -> None:
    made = entries("model")[config["name"]].cls(**{k: v for k, v in config.items() if k != "name"})
    assert config_of(made).items() >= config.items()
    first, second = (
        build_model(made, DATASETS["digits"], seed=1),
        build_model(config_of(made), DATASETS["digits"], seed=1),
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@each_model
def test_normalisation_is_inside_and_in_no_checkpoint(config: dict[str, Any]) -> None:
    info = DATASETS["cifar10"]
    model = build_model(config, info, seed=0)
    assert not [key for key in model.state_dict() if "normalise" in key]
    seen: list[Tensor] = []
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    x, _ = images("cifar10", 2)
    model(x)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (info.mean, info.std))
    assert torch.allclose(seen[0], (x - mean) / std)


@each_model
def test_forward_over_reverse_equals_backward_over_backward(config: dict[str, Any]) -> None:
    model = build_model(config, DATASETS["digits"], seed=0).double()
    x, y = images("digits", 3)
    x = x.double()
    rng = generator("directions")
    box = WhiteBox(model, F.cross_entropy)
    names = list(box.parameters)
    u, v = (
        {name: torch.randn(p.shape, generator=rng, dtype=p.dtype) for name, p in box.parameters.items()} for _ in "uv"
    )
    with box.objective("eval") as objective:
        first = mixed_partial(objective, box.parameters, x, y, v)
        second = mixed_partial_of_curvature(objective, box.parameters, x, y, u, v)
        pixels = x.clone().requires_grad_()
        leaves = {name: p.clone().requires_grad_() for name, p in box.parameters.items()}

        def along(value: Tensor, direction: dict[str, Tensor]) -> Tensor:
            slopes = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
            return torch.stack([(s * direction[n]).sum() for n, s in zip(names, slopes, strict=True)]).sum()

        slope = along(objective(leaves, pixels, y), v)
        (expected_first,) = torch.autograd.grad(slope, pixels, retain_graph=True)
        (expected_second,) = torch.autograd.grad(along(slope, u), pixels)
    assert first.abs().max() > 0
    assert second.abs().max() > 0
    assert torch.allclose(first, expected_first, rtol=1e-8, atol=1e-10)
    assert torch.allclose(second, expected_second, rtol=1e-8, atol=1e-10)


@each_model
def test_derivatives_with_the_statistics_of_the_batch_leave_the_buffers_alone(config: dict[str, Any]) -> None:
    model = build_model(config, DATASETS["mnist"], seed=0)
    x, y = images("mnist", 4)
    before = {name: b.clone() for name, b in model.named_buffers()}
    box = WhiteBox(model, F.cross_entropy)
    with box.objective("train") as objective:
        slope = grad(lambda theta: objective(theta, x, y))(box.parameters)
    assert all(torch.isfinite(s).all() for s in slope.values())
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_resnet18_has_the_size_and_the_names_of_the_usual_one() -> None:
    model = build_model({"name": "resnet18"}, DATASETS["cifar10"], seed=0)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    expected = {"conv1.weight": (64, 3, 3, 3), "fc.weight": (10, 512), "fc.bias": (10,)}
    batch_norms = {"bn1": 64}
    inputs = 64
    for stage, outputs in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            prefix = f"layer{stage}.{block}"
            expected[f"{prefix}.conv1.weight"] = (outputs, inputs, 3, 3)
            expected[f"{prefix}.conv2.weight"] = (outputs, outputs, 3, 3)
            batch_norms |= {f"{prefix}.bn1": outputs, f"{prefix}.bn2": outputs}
            if outputs != inputs:
                expected[f"{prefix}.downsample.0.weight"] = (outputs, inputs, 1, 1)
                batch_norms[f"{prefix}.downsample.1"] = outputs
            inputs = outputs
    for name, channels in batch_norms.items():
        expected |= {f"{name}.{end}": (channels,) for end in ("weight", "bias", "running_mean", "running_var")}
        expected[f"{name}.num_batches_tracked"] = ()
    assert shapes == expected


def test_vgg11_has_the_documented_size() -> None:
    model = build_model({"name": "vgg11"}, DATASETS["cifar10"], seed=0)
    assert sum(p.numel() for p in model.parameters()) == 9_231_114


def test_the_stem_pool_quarters_the_maps() -> None:
    sizes = []
    for pool in (True, False):
        model = build_model({"name": "resnet18", "width": 2, "stem_pool": pool}, DATASETS["cifar10"], seed=0)
        cast("nn.Module", model.layer1).register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape[2:])))
        model(images("cifar10", 2)[0])
    assert sizes == [(16, 16), (32, 32)]


def test_group_norm_keeps_no_statistics_and_does_not_depend_on_the_batch() -> None:
    model = build_model({"name": "resnet18", "width": 4, "norm": "group", "groups": 2}, DATASETS["cifar10"], seed=0)
    assert not [key for key in model.state_dict() if "running" in key]
    x, _ = images("cifar10", 4)
    model.train()
    assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-5)


def test_groups_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"resnet18: groups = 32 does not divide width = 16.*set groups to 16"):
        build_model({"name": "resnet18", "width": 16, "norm": "group"}, DATASETS["cifar10"], seed=0)
    assert ResNet18(width=16).groups == 32


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "resnet19"}, "unknown model 'resnet19': did you mean 'resnet18'"),
        ({"name": "resnet18", "widht": 3}, "unknown key 'widht': did you mean 'width'"),
        ({"name": "resnet18", "norm": "none"}, "norm = 'none'"),
        ({"name": "vgg11", "width": 0}, "width = 0"),
    ],
)
def test_wrong_tables_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(config, DATASETS["cifar10"], seed=0)


def test_check_model_names_what_it_got_and_leaves_the_model_alone() -> None:
    info = DATASETS["cifar10"]
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3072), nn.Linear(3072, 7))
    model[1].eval()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"Sequential gives \(1, 7\) for one image of cifar10; expected .* \(1, 10\)"):
        check_model(model, info)
    assert [m.training for m in model] == [True, False, True]
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    with pytest.raises(ConfigError, match="Sequential cannot take one image of mnist"):
        check_model(model, DATASETS["mnist"])
    check_model(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10).double()), info)


@pytest.mark.slow
def test_small_cnn_learns_the_digits_in_fifteen_epochs() -> None:
    stream = open_stream(StreamSettings())
    test, accuracies = stream.test.all(), []
    for seed in range(5):
        model = build_model({"name": "small_cnn"}, stream.info, seed=seed)
        burn_in(model, stream, BurnIn(epochs=15, batch_size=50), seed=seed)
        accuracies.append(float((model.eval()(test.x).argmax(1) == test.y).double().mean()))
    assert median(accuracies) >= 0.95


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_pooling_with_channels_last_gives_the_same_numbers(norm: str) -> None:
    model = build_model({"name": "resnet18", "width": 8, "norm": norm, "groups": 4}, TOY, seed=0).eval()
    x = torch.rand(5, *TOY.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for flag in (False, True):  # the model's own flag alone chooses the layout; its layers stay in eval mode
        model.training = flag
        logits = model(x)
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        found.append((logits, torch.cat([g.flatten() for g in gradients])))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert norm == "group" or torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-5 * float(found[0][1].abs().max()))
