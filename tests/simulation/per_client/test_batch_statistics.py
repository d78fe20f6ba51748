"""Statistics gathered a few samples at a time against those that torch records of one batch."""

import pytest
import torch
from torch import Tensor, nn

from mithridate.core.errors import DataError
from mithridate.simulation.per_client.batch_statistics import LayerMoments, Moments, recorded, watched


def first_norm(**options: object) -> nn.Module:
    """BatchNorm on the input, so that what it is fed does not depend on other layers' mode."""
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(3, **options), nn.Conv2d(3, 2, 1))  # type: ignore[arg-type]  # options of torch


def images(n: int) -> Tensor:
    return 5 + 3 * torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def seen_in_pieces(model: nn.Module, x: Tensor, sizes: list[int]) -> LayerMoments:
    total: LayerMoments = {}
    for piece in torch.split(x, sizes):
        with watched(model) as seen:
            model(piece)
        for name, moments in seen.items():
            if name in total:
                total[name].take(moments)
            else:
                total[name] = moments
    return total


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("sizes", [[12], [1, 10, 1], [5, 7]])
def test_pieces_are_recorded_as_one_batch(sizes: list[int], momentum: float | None) -> None:
    x, model = images(12), first_norm(momentum=momentum).train()
    model(images(4) - 2)  # once before, so that a cumulative average has something to average with
    seen = seen_in_pieces(model.eval(), x, sizes)
    before = {name: b.clone() for name, b in model.named_buffers()}
    found = recorded(model, seen)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())  # the model is left alone
    model.train()(x)
    for name, b in model.named_buffers():
        assert torch.allclose(found[name].double(), b.double(), rtol=1e-5)
        assert not torch.equal(b, before[name])


def test_moments_far_from_zero_keep_their_variance() -> None:
    values = 1e6 + torch.arange(8.0, dtype=torch.float64)
    total = Moments(1, values[:1].clone(), torch.zeros(1, dtype=torch.float64))
    for v in values[1:]:
        total.take(Moments(1, v.view(1), torch.zeros(1, dtype=torch.float64)))
    assert total.count == 8
    assert total.squares / 7 == pytest.approx(float(values.var()), rel=1e-12)


def test_layers_that_record_nothing_and_other_buffers_stay() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Conv2d(3, 2, 1))
    model.register_buffer("mine", torch.ones(2))
    with watched(model) as seen:
        model(images(3))
    assert seen == {}
    assert torch.equal(recorded(model, seen)["mine"], torch.ones(2))


def test_nothing_is_noted_after_the_block() -> None:
    model = first_norm().eval()
    with watched(model) as seen:
        model(images(2))
    model(images(4))
    assert seen["0"].count == 2 * 16


def test_a_single_value_has_no_variance() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2)).eval()
    with watched(model) as seen:
        model(torch.ones(1, 2))
    with pytest.raises(DataError, match="more than 1 value per channel"):
        recorded(model, seen)
