"""Median statistics against a numpy oracle, under one extreme sample, and in a learner."""

import copy
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import SGD

from mithridate.core.batch import Batch
from mithridate.core.view import View
from mithridate.defences.median_bn import MAD_TO_STD, MedianBn
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.learner import Learner

Over = Literal["samples", "values"]
MOMENTUM = 0.3


def forward(config: MedianBn, layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer gives inside the update of that defence."""
    return config.loss(layer, Batch(x, torch.zeros(len(x))), lambda out, _: out, View())


def channels(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, c, ...) to (c, n, places)."""
    return np.moveaxis(x.reshape(len(x), x.shape[1], -1), 1, 0)


def oracle(x: NDArray[np.float64], over: Over, strength: float, floor: float) -> tuple[Any, Any, Any]:
    """Mean and variance that standardise, and the variance that is recorded, one channel at a time."""
    means, variances, recorded = [], [], []
    for values in channels(x):
        if over == "samples" and values.shape[1] > 1:
            centre = np.median([sample.mean() for sample in values])
            robust = np.median([((sample - centre) ** 2).mean() for sample in values])
        else:
            centre = np.median(values)
            robust = (1.4826 * np.median(np.abs(values - centre))) ** 2
        robust = max(robust, floor**2 * values.var())
        means.append(strength * centre + (1 - strength) * values.mean())
        variances.append(strength * robust + (1 - strength) * values.var())
        recorded.append(strength * robust + (1 - strength) * values.var(ddof=1))
    return np.array(means), np.array(variances), np.array(recorded)


@pytest.mark.parametrize("over", ["samples", "values"])
@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("floor", [0.0, 0.95])
@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (7, 3, 3, 3), (9, 3), (8, 3), (5, 3, 4)])
def test_output_and_running_statistics_are_those_of_the_oracle(
    over: Over, strength: float, floor: float, shape: tuple[int, ...]
) -> None:
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    layer = kind(3, momentum=MOMENTUM).double()
    torch.manual_seed(0)
    for tensor in (layer.weight, layer.bias, layer.running_mean):
        nn.init.normal_(tensor)  # type: ignore[arg-type]  # there, as made above
    old_mean, old_var = layer.running_mean.clone(), layer.running_var.clone()  # type: ignore[union-attr]  # there, as made above
    x = torch.randn(shape, dtype=torch.float64).exp()
    config = MedianBn(strength=strength, over=over, floor=floor)
    out = forward(config, layer, x)
    mean, variance, recorded = (torch.from_numpy(v) for v in oracle(x.numpy(), over, strength, floor))
    view = (1, 3, *[1] * (len(shape) - 2))
    expected = (x - mean.view(view)) / (variance + layer.eps).sqrt().view(view)
    expected = expected * layer.weight.view(view) + layer.bias.view(view)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(layer.running_mean, (1 - MOMENTUM) * old_mean + MOMENTUM * mean)
    torch.testing.assert_close(layer.running_var, (1 - MOMENTUM) * old_var + MOMENTUM * recorded)
    assert int(layer.num_batches_tracked) == 1  # type: ignore[arg-type]  # there, as made above


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track", [True, False])
def test_a_strength_near_zero_is_nearly_torchs_batchnorm(affine: bool, momentum: float | None, track: bool) -> None:
    """Every option of the layer goes through: no weights, cumulative averages, no running statistics."""
    ours = nn.BatchNorm2d(4, affine=affine, momentum=momentum, track_running_stats=track).double()
    theirs = copy.deepcopy(ours)
    for seed in range(3):
        x = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        torch.testing.assert_close(forward(MedianBn(strength=1e-12), ours, x), theirs(x))
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)


def test_strength_zero_is_torchs_own_path_bit_for_bit() -> None:
    ours = nn.BatchNorm2d(4)
    theirs = copy.deepcopy(ours)
    x = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(forward(MedianBn(strength=0.0), ours, x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)  # type: ignore[arg-type]  # there, as made above
    assert not torch.equal(forward(MedianBn(), ours, x), theirs(x))


@pytest.mark.parametrize("over", ["samples", "values"])
def test_a_gaussian_has_its_usual_mean_and_variance(over: Over) -> None:
    layer = nn.BatchNorm2d(2, momentum=1.0)
    x = 3 + 2 * torch.randn(200, 2, 10, 10, generator=torch.Generator().manual_seed(0))
    forward(MedianBn(over=over, floor=0.0), layer, x)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.running_mean.tolist() == pytest.approx([3, 3], abs=0.05)
    assert layer.running_var.tolist() == pytest.approx([4, 4], rel=0.03)
    assert pytest.approx(1 / 0.6745, rel=1e-4) == MAD_TO_STD  # 0.6745: the upper quartile of a standard Gaussian


@pytest.mark.parametrize("over", ["samples", "values"])
def test_one_extreme_sample_in_twenty_drags_means_far_and_medians_little(over: Over) -> None:
    rng = torch.Generator().manual_seed(0)
    clean = torch.randn(20, 3, 6, 6, generator=rng)
    dirty = clean.clone()
    dirty[4] += 100
    shift = {}
    for name, config in (("median", MedianBn(over=over, floor=0.0)), ("mean", MedianBn(strength=0.0))):
        layers = []
        for x in (clean, dirty):
            layer = nn.BatchNorm2d(3, momentum=1.0)
            forward(config, layer, x)
            layers.append(layer)
        moved = (layers[1].running_mean - layers[0].running_mean).abs().max()  # type: ignore[operator]  # there, as made above
        grown = (layers[1].running_var / layers[0].running_var).max()  # type: ignore[operator, arg-type]  # there, as made above
        shift[name] = (float(moved), float(grown))
    assert shift["mean"][0] > 4.9
    assert shift["mean"][1] > 400
    assert shift["median"][0] < 0.2
    assert shift["median"][1] < 1.25


def test_the_floor_keeps_a_plain_background_from_blowing_up() -> None:
    x = torch.zeros(10, 1, 10, 10)
    x[:, :, :3, :3] = 1.0  # nine values in a hundred are not background
    free = forward(MedianBn(over="values", floor=0.0), nn.BatchNorm2d(1), x)
    held = forward(MedianBn(over="values", floor=0.5), nn.BatchNorm2d(1), x)
    assert float(free.detach().max()) > 100
    assert float(held.detach().max()) == pytest.approx(1 / (0.5 * (0.09 * 0.91) ** 0.5), rel=1e-3)


@pytest.mark.parametrize("over", ["samples", "values"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("n", [4, 5])
def test_gradients_are_right(over: Over, strength: float, n: int) -> None:
    x = torch.randn(n, 2, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    layer = nn.BatchNorm2d(2).double()
    config = MedianBn(over=over, strength=strength, floor=0.0)
    assert torch.autograd.gradcheck(lambda x: forward(config, layer, x).square(), (x,))


def test_only_the_update_sees_medians_and_names_stay() -> None:
    stream = toy_stream(0)
    learner = toy_learner(stream, defence=MedianBn())
    names = list(learner.model.state_dict())
    counts = {n: int(b) for n, b in learner.model.named_buffers() if "num_batches" in n}
    learner.update(stream.victim_batch(0, 0))
    assert list(learner.model.state_dict()) == names
    assert counts
    assert {n: int(b) for n, b in learner.model.named_buffers() if "num_batches" in n} == {
        n: c + 1 for n, c in counts.items()
    }
    plain = toy_learner(stream)
    plain.restore(learner.snapshot())
    x = stream.victim_batch(1, 0).x
    assert torch.equal(learner.model.train()(x), plain.model.train()(x))


def test_eval_mode_and_models_without_batchnorm_are_left_alone() -> None:
    stream = toy_stream(0)
    batch = stream.victim_batch(0, 0)
    ends = []
    for defence in (MedianBn(), None):
        learner = toy_learner(stream, defence=defence)
        learner.update_mode = "eval"
        learner.update(batch)
        model = nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 4))
        for p in model.parameters():
            nn.init.constant_(p, 0.1)
        without = Learner(model, SGD(model.parameters(), lr=0.1), defence=defence)
        without.update(batch)
        ends.append([*learner.model.state_dict().values(), *model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_one_value_a_channel_is_refused_as_torch_refuses_it() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        forward(MedianBn(), nn.BatchNorm2d(2), torch.ones(1, 2, 1, 1))


def test_the_ordinary_function_is_back_after_an_error() -> None:
    layer, x = nn.BatchNorm2d(2), torch.randn(4, 2, 3, 3)
    with pytest.raises(ValueError, match="more than 1 value"):
        forward(MedianBn(), layer, x[:1, :, :1, :1])
    expected = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
    assert torch.equal(layer(x), expected)


def test_the_price_on_a_clean_stream_is_small_over_samples_and_large_over_values() -> None:
    """What the docstring says of clean accuracy, on the toy stream (undefended: 0.93)."""
    accuracy = {}
    for over in ("samples", "values"):
        ends = []
        for seed in range(3):
            stream = toy_stream(seed)
            learner = toy_learner(stream, seed=seed, defence=MedianBn(over=over))
            for i in range(4):
                learner.update(stream.victim_batch(i, 0))
            ends.append(learner.evaluate([stream.test.all()]).accuracy)
        accuracy[over] = sum(ends) / len(ends)
    assert accuracy["samples"] > 0.85
    assert accuracy["values"] < accuracy["samples"] - 0.05
