import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mithridate.core.seeding import generator
from mithridate.data import crop_and_flip


def windows(image: Tensor, padding: int) -> list[Tensor]:
    """Every crop of a padded image, one at a time."""
    _, height, width = image.shape
    padded = F.pad(image, [padding] * 4)
    return [padded[:, i : i + height, j : j + width] for i in range(2 * padding + 1) for j in range(2 * padding + 1)]


def test_every_image_is_one_of_its_own_windows_and_all_of_them_turn_up() -> None:
    image = torch.rand(3, 5, 4, generator=generator("image"))
    plain = windows(image, 1)
    allowed = torch.stack(plain + [w.flip(2) for w in plain])
    out = crop_and_flip(image.expand(600, -1, -1, -1), padding=1, rng=generator("crops"))
    matches = (out[:, None] == allowed).flatten(2).all(2)
    assert torch.equal(matches.sum(1), torch.ones(600, dtype=torch.int64))
    counts = matches.sum(0)
    assert counts.min() > 0.4 * 600 / len(allowed)
    assert counts.max() < 2 * 600 / len(allowed)


def test_without_flip_no_image_is_mirrored() -> None:
    image = torch.rand(1, 6, 6, generator=generator("image"))
    allowed = torch.stack(windows(image, 2))
    out = crop_and_flip(image.expand(200, -1, -1, -1), padding=2, flip=False, rng=generator("crops"))
    assert (out[:, None] == allowed).flatten(2).all(2).any(1).all()


def test_nothing_to_do_changes_nothing() -> None:
    x = torch.rand(7, 1, 8, 8, generator=generator("x"))
    assert torch.equal(crop_and_flip(x, padding=0, flip=False, rng=generator("crops")), x)


def test_the_generator_decides_and_the_input_stays() -> None:
    x = torch.rand(20, 3, 8, 8, generator=generator("x"))
    before = x.clone()
    first = crop_and_flip(x, rng=generator("crops", 0))
    assert torch.equal(first, crop_and_flip(x, rng=generator("crops", 0)))
    assert not torch.equal(first, crop_and_flip(x, rng=generator("crops", 1)))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_shape_and_dtype_are_kept_for_a_single_image_too(dtype: torch.dtype) -> None:
    x = torch.ones(1, 3, 9, 7, dtype=dtype)
    out = crop_and_flip(x, padding=2, rng=generator("crops"))
    assert (out.shape, out.dtype) == (x.shape, dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_result_is_the_same_on_cuda() -> None:
    x = torch.rand(50, 3, 32, 32, generator=generator("x"))
    on_cuda = crop_and_flip(x.cuda(), rng=generator("crops"))
    assert on_cuda.is_cuda
    assert torch.equal(on_cuda.cpu(), crop_and_flip(x, rng=generator("crops")))
