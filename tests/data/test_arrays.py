"""A user's own arrays as a stream: every kind that is taken, and what is refused with which words."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import mithridate as mi
from mithridate.core.batch import check_batch
from mithridate.core.domain import PIXELS, check_domain
from mithridate.core.errors import ConfigError, DataError
from mithridate.data import StreamSettings, open_stream
from mithridate.models import build_model, check_model

N = 120
PARTS = ("burn_in", "victim", "validation", "trusted", "test")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pictures(*shape: int) -> NDArray[np.uint8]:
    return rng().integers(0, 256, (N, *shape), dtype=np.uint8)


LABELS = np.arange(N) % 3
ROWS = rng(1).normal(size=(N, 5)).astype(np.float32)


def rows_of(stream: mi.Stream) -> list[Any]:
    return [row for part in PARTS for row in getattr(stream, part).all().x]


# Images.


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize(
    ("shape", "expected"), [((6, 7), (1, 6, 7)), ((3, 6, 7), (3, 6, 7)), ((6, 7, 3), (3, 6, 7)), ((6, 7, 1), (1, 6, 7))]
)
def test_images_come_as_floats_in_the_unit_range_channels_first(
    shape: tuple[int, ...], expected: tuple[int, ...], as_float: bool, as_tensor: bool
) -> None:
    x = pictures(*shape)
    given: Any = x / 255 if as_float else x
    stream = mi.Stream.from_arrays(torch.as_tensor(given) if as_tensor else given, LABELS)
    first = np.moveaxis(x, -1, 1) if shape[-1] in (1, 3) else x.reshape(N, *expected)
    whole = torch.tensor(first, dtype=torch.float32) / 255
    assert stream.info.shape == expected
    assert stream.domain == PIXELS
    assert len(rows_of(stream)) == N
    for part in PARTS:
        batch = getattr(stream, part).all()
        check_domain(batch, PIXELS)
        assert set(batch.y.tolist()) <= {0, 1, 2}
        assert all((whole - image).abs().amax((1, 2, 3)).min() < 1e-6 for image in batch.x)
    mean, std = (whole.numpy().astype(np.float64).mean((0, 2, 3)), whole.numpy().astype(np.float64).std((0, 2, 3)))
    burned = stream.burn_in.all().x.double()
    assert stream.info.mean == pytest.approx(burned.mean((0, 2, 3)).tolist(), rel=1e-3)
    assert stream.info.std == pytest.approx(burned.std((0, 2, 3), correction=0).tolist(), rel=1e-3)
    assert np.allclose(stream.info.mean, mean, atol=0.1)
    assert np.allclose(stream.info.std, std, atol=0.1)


def test_the_parts_are_the_whole_each_sample_once_with_its_target() -> None:
    x = np.arange(N, dtype=np.float32)[:, None].repeat(2, 1)
    stream = mi.Stream.from_arrays(x, np.arange(N) // 40, burn_in=0.5)
    pairs = [(int(row[0]), int(y)) for part in PARTS for row, y in zip(*getattr(stream, part).all(), strict=True)]
    assert sorted(pairs) == [(i, i // 40) for i in range(N)]


def test_images_are_neither_flipped_nor_shifted_unless_asked_for() -> None:
    batch = (stream := mi.Stream.from_arrays(pictures(8, 8), LABELS)).burn_in.all()
    assert stream.settings.augment
    assert torch.equal(stream.augmented(batch, torch.Generator().manual_seed(0)).x, batch.x)
    flipping = mi.Stream.from_arrays(pictures(8, 8), LABELS, flip=True, crop_padding=1)
    changed = flipping.augmented(batch, torch.Generator().manual_seed(0)).x
    assert not torch.equal(changed, batch.x)
    assert flipping.fingerprint != stream.fingerprint


def test_mean_and_std_may_be_given_and_are_part_of_the_fingerprint() -> None:
    measured = mi.Stream.from_arrays(pictures(8, 8), LABELS)
    stream = mi.Stream.from_arrays(pictures(8, 8), LABELS, mean=[0.5], std=[0.25])
    assert (stream.info.mean, stream.info.std) == ((0.5,), (0.25,))
    assert stream.fingerprint != measured.fingerprint
    same = mi.Stream.from_arrays(pictures(8, 8), LABELS, mean=measured.info.mean, std=measured.info.std)
    assert same.fingerprint == measured.fingerprint
    with pytest.raises(ConfigError, match="mean has 3 numbers, and images of arrays have 1 channels"):
        mi.Stream.from_arrays(pictures(8, 8), LABELS, mean=[0.5] * 3, std=[0.25] * 3)


def test_a_model_by_name_fits_own_images_and_image_targets() -> None:
    stream = mi.Stream.from_arrays(pictures(8, 8), LABELS, classes=["a", "b", "c", "d"])
    assert stream.info.classes == ("a", "b", "c", "d")
    model = build_model({"name": "small_cnn", "width": 2, "norm": "none"}, stream.info, seed=0)
    assert model(stream.test.all().x).shape == (len(stream.test), 4)
    angles = mi.Stream.from_arrays(pictures(8, 8), rng().normal(size=(N, 2)))
    model = build_model({"name": "small_cnn", "width": 2, "norm": "none"}, angles.info, seed=0)
    assert model(angles.test.all().x).shape == angles.test.all().y.shape


# Rows, token ids, mappings; targets.


def test_rows_of_numbers_are_unbounded_and_nothing_is_done_to_them() -> None:
    stream = mi.Stream.from_arrays(ROWS.astype(np.float64), LABELS)
    assert stream.info.shape == (5,)
    assert stream.domain == mi.Domain()
    assert stream.settings.augment is False
    assert (stream.info.mean, stream.info.std) == ((), ())
    batch = stream.victim_batch(0, seed=0)
    check_batch(batch)
    assert batch.x.dtype == torch.float32
    assert all((torch.tensor(ROWS) == row).all(1).any() for row in rows_of(stream))


def test_a_domain_is_given_or_observed() -> None:
    observed = mi.Stream.from_arrays(ROWS, LABELS, domain="observed")
    assert torch.equal(torch.as_tensor(observed.domain.low), torch.tensor(ROWS.min(0)))
    assert torch.equal(torch.as_tensor(observed.domain.high), torch.tensor(ROWS.max(0)))
    assert all(observed.domain.holds(getattr(observed, part).all().x) for part in PARTS)
    pair = mi.Stream.from_arrays(ROWS, LABELS, domain=(-9, math.inf))
    assert pair.domain == mi.Domain(-9.0, math.inf)
    bounds = mi.Domain(torch.full((5,), -9.0), torch.full((5,), 9.0))
    given = mi.Stream.from_arrays(ROWS, LABELS, domain=bounds).domain
    assert (given.low, given.high) == tuple(bounds)  # the very tensors
    with pytest.raises(ConfigError, match=r"the lower first .*or 'observed'"):
        mi.Stream.from_arrays(ROWS, LABELS, domain=(2, 1))
    with pytest.raises(DataError, match=r"120 rows of x lie outside the domain .*; widen it or scale x"):
        mi.Stream.from_arrays(ROWS, LABELS, domain=(100, 200))
    with pytest.raises(DataError, match=r"a bound of the domain has the shape \(4,\), and a sample \(5,\)"):
        mi.Stream.from_arrays(ROWS, LABELS, domain=mi.Domain(torch.zeros(4), 1.0))


def test_with_a_domain_floats_of_any_shape_are_no_images() -> None:
    sound = rng().normal(size=(N, 2, 4, 9))
    stream = mi.Stream.from_arrays(sound, LABELS, domain=mi.Domain())
    assert stream.info.shape == (2, 4, 9)
    assert not stream.info.images
    with pytest.raises(ConfigError, match="arrays holds no images, and this model takes nothing else"):
        build_model({"name": "small_cnn"}, stream.info, seed=0)


def test_token_ids_and_mappings_keep_their_types() -> None:
    ids = rng().integers(0, 50, (N, 7))
    alone = mi.Stream.from_arrays(ids.astype(np.int32), LABELS)
    assert alone.victim_batch(0, seed=0).x.dtype == torch.int64
    x = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(ids > 9), "scale": ROWS.astype(np.float64)}
    stream = mi.Stream.from_arrays(x, LABELS, batch_size=6)
    batch = stream.victim_batch(0, seed=3)
    check_batch(batch)
    assert {key: (t.dtype, tuple(t.shape)) for key, t in batch.x.items()} == {
        "input_ids": (torch.int64, (6, 7)),
        "attention_mask": (torch.bool, (6, 7)),
        "scale": (torch.float32, (6, 5)),
    }
    assert torch.equal(batch.x["input_ids"] > 9, batch.x["attention_mask"])  # rows stay together
    assert stream.info.shape == ()


@pytest.mark.parametrize(
    ("y", "dtype", "targets"),
    [
        (rng().normal(size=N), torch.float32, ()),
        (rng().normal(size=(N, 1)), torch.float32, (1,)),
        (rng().integers(0, 2, (N, 4)).astype(bool), torch.float32, (4,)),
        (rng().integers(-100, 9, (N, 7)), torch.int64, (7,)),
    ],
    ids=["regression", "column", "many labels", "labels of tokens"],
)
def test_targets_that_are_no_class_numbers(y: NDArray[Any], dtype: torch.dtype, targets: tuple[int, ...]) -> None:
    stream = mi.Stream.from_arrays(ROWS, y)
    assert (stream.info.classes, stream.info.targets) == ((), targets)
    assert stream.info.outputs == math.prod(targets)
    batch = stream.test.all()
    assert (batch.y.dtype, batch.y.shape) == (dtype, (len(stream.test), *targets))


class Words(nn.Module):
    """Takes keywords, and answers with an object that has logits, as language models do."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, outputs)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        kept = self.embedding(input_ids) * attention_mask[..., None]
        return type("Answer", (), {"logits": self.head(kept.mean(1))})()


def test_check_model_takes_rows_mappings_and_objects_with_logits() -> None:
    table = mi.Stream.from_arrays(ROWS, LABELS)
    check_model(nn.Linear(5, 3), table.info)
    with pytest.raises(ConfigError, match=r"Linear gives \(1, 4\) for one sample of arrays; expected .* \(1, 3\)"):
        check_model(nn.Linear(5, 4), table.info)
    with pytest.raises(ConfigError, match="Linear cannot take one sample of arrays, of shape"):
        check_model(nn.Linear(4, 3), table.info)
    ids = rng().integers(0, 50, (N, 7))
    words = mi.Stream.from_arrays({"input_ids": ids, "attention_mask": ids > 9}, LABELS)
    check_model(Words(3), words.info)
    with pytest.raises(ConfigError, match=r"Words gives \(1, 2\)"):
        check_model(Words(2), words.info)
    with pytest.raises(ConfigError, match=r"Linear cannot take one sample of arrays, of shape \{'input_ids'"):
        check_model(nn.Linear(7, 3), words.info)
    check_model(nn.Linear(5, 2), mi.Stream.from_arrays(ROWS, rng().normal(size=N)).info)  # a mean and a variance
    with pytest.raises(ConfigError, match="a model must give floats, a row a sample"):
        check_model(Scalar(), mi.Stream.from_arrays(ROWS, LABELS / 3).info)


class Scalar(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum()


# Test arrays, memory, fingerprints.


def test_test_arrays_give_validation_and_test_parts() -> None:
    stream = mi.Stream.from_arrays(ROWS, LABELS, x_test=ROWS[:40] + 100, y_test=LABELS[:40], validation=0.25)
    assert (len(stream.validation), len(stream.test)) == (10, 30)
    assert all(getattr(stream, part).all().x.min() > 50 for part in ("validation", "test"))
    assert all(getattr(stream, part).all().x.max() < 50 for part in ("burn_in", "victim", "trusted"))
    with pytest.raises(DataError, match="x_test and y_test come together"):
        mi.Stream.from_arrays(ROWS, LABELS, x_test=ROWS)
    with pytest.raises(DataError, match="the splits differ in dtype or shape"):
        mi.Stream.from_arrays(ROWS, LABELS, x_test=ROWS[:, :4], y_test=LABELS)


def test_a_stream_holds_copies() -> None:
    x, y = ROWS.copy(), LABELS.copy()
    stream = mi.Stream.from_arrays(x, y)
    before = stream.victim.all().clone()
    x[:], y[:] = 0, 0
    assert torch.equal(stream.victim.all().x, before.x)
    assert torch.equal(stream.victim.all().y, before.y)
    with pytest.raises(ValueError, match="read-only"):
        stream.victim.x[:] = 0


def test_the_fingerprint_follows_content_targets_and_classes_of_the_burn_in_and_nothing_else() -> None:
    def of(x: Any = ROWS, y: Any = LABELS, **more: Any) -> str:
        return mi.Stream.from_arrays(x, y, burn_in=40, victim=40, **more).fingerprint

    assert of() == of(test=20, name="another") == of(torch.tensor(ROWS))
    others = [of(ROWS + 1), of(y=(LABELS + 1) % 3), of(classes="abcd"), of(seed=1), of({"x": ROWS}), of(y=LABELS / 3)]
    assert len({of(), *others}) == 7


def test_a_stream_of_arrays_cannot_be_opened_from_its_settings() -> None:
    settings = mi.Stream.from_arrays(ROWS, LABELS).settings
    with pytest.raises(ConfigError, match=r"given to Stream\.from_arrays.*use name = 'npz'"):
        open_stream(settings)


# Bad input.


def spoilt(value: float, rows: int = 2) -> NDArray[np.float32]:
    x = ROWS.copy()
    x[:rows, 1] = value
    return x


OBJECTS = np.array([[1, 2], [3]], dtype=object)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (ROWS, LABELS[:-1], "x has 120, y has 119 rows"),
        ({"ids": ROWS, "mask": ROWS[:7]}, LABELS, r"x\['ids'\] has 120, x\['mask'\] has 7, y has 120 rows"),
        ({}, LABELS, "a mapping of nothing"),
        (OBJECTS, LABELS, r"x holds Python objects \(dtype object\)"),
        (ROWS, np.array(["a"] * N, dtype=object), r"y holds Python objects"),
        ([[1, 2], [3]], LABELS, "x is no array"),
        (ROWS.astype(complex), LABELS, "x is of dtype complex128; give numbers"),
        (ROWS, np.array(["cat", "dog", "eel"] * 40), r"y is of dtype <U3.*`names, y = np\.unique"),
        (ROWS[:0], LABELS[:0], "x has no samples"),
        (ROWS[:, 0], LABELS, r"x is float32 of shape \(120,\)\. Taken are"),
        (pictures(5).reshape(N, 5), LABELS, r"x is uint8 of shape \(120, 5\)\. Taken are"),
        (pictures(5, 5).astype(np.int64), LABELS, r"x is int64 of shape \(120, 5, 5\)\. Taken are"),
        (spoilt(np.nan), LABELS, "2 of 120 rows hold NaN, infinity"),
        (spoilt(np.inf, 3), LABELS, "3 of 120 rows hold NaN, infinity"),
        (ROWS.astype(np.float64) * 1e300, LABELS, "120 of 120 rows hold NaN, infinity or numbers too large"),
        (ROWS, np.where(LABELS == 1, np.nan, 0.5), "y: 40 of 120 rows hold NaN"),
        (pictures(5, 5) / 100, LABELS, r"of 120 have pixels outside \[0, 1\].*or give their `domain`"),
        (pictures(64, 64, 4), LABELS, r"64 channels and 64x4 pixels.*transpose\(0, 3, 1, 2\)"),
        (ROWS, LABELS + 1, r"labels span \[1, 3\]; of 0 to 3 there is no 0\. .*np\.unique"),
        (ROWS, LABELS * 2, r"labels span \[0, 4\]; of 0 to 4 there is no 1, 3\."),
        (ROWS, LABELS * 10**9, r"there is no 1, 2, 3, 4, 5\."),
        (ROWS, LABELS - 1, r"labels span \[-1, 1\]\. Class numbers must be"),
        (ROWS, LABELS * 0, "labels have one class alone"),
        (ROWS, LABELS[:, None], r"y is of shape \(120, 1\).*`y\[:, 0\]`"),
    ],
)
def test_bad_arrays_are_refused_with_what_is_wrong_and_what_to_do(x: Any, y: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        mi.Stream.from_arrays(x, y)


def test_class_names_must_fit() -> None:
    with pytest.raises(DataError, match=r"labels span \[0, 2\], and 2 class names make the numbers 0 to 1"):
        mi.Stream.from_arrays(ROWS, LABELS, classes=["a", "b"])
    with pytest.raises(DataError, match="two classes have one name"):
        mi.Stream.from_arrays(ROWS, LABELS, classes=["a", "b", "a"])
    with pytest.raises(DataError, match="classes are named, and targets are float32"):
        mi.Stream.from_arrays(ROWS, LABELS / 2, classes=["a", "b", "c"])


@pytest.mark.parametrize("key", ["augment", "augment_stream", "flip", "crop_padding", "mean"])
def test_what_is_done_to_images_is_refused_for_other_inputs(key: str) -> None:
    value: Any = {"crop_padding": 2, "mean": [0.5]}.get(key, True)
    with pytest.raises(ConfigError, match=f"arrays holds no images.*leave {key} out"):
        mi.Stream.from_arrays(ROWS, LABELS, **{key: value})
    stream = mi.Stream.from_arrays(ROWS, LABELS)
    with pytest.raises(ConfigError, match="holds no images, which alone are augmented"):
        stream.augmented(stream.victim_batch(0, seed=0), torch.Generator())


def test_images_without_anything_to_measure_are_refused() -> None:
    with pytest.raises(DataError, match="no image is left for burn-in, so mean and std cannot be measured"):
        mi.Stream.from_arrays(pictures(8, 8), LABELS, burn_in=0)
    assert mi.Stream.from_arrays(pictures(8, 8), LABELS, burn_in=0, mean=[0.4], std=[0.2]).info.mean == (0.4,)
    with pytest.raises(DataError, match="channel 0 is the same in every pixel"):
        mi.Stream.from_arrays(np.zeros((N, 8, 8), np.uint8), LABELS)


@pytest.mark.parametrize(("key", "value"), [("path", "x"), ("split", "train"), ("columns", ("a", "b"))])
def test_settings_of_data_on_disk_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key} says nothing of 'arrays'"):
        mi.Stream.from_arrays(ROWS, LABELS, **{key: value})


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Stream\.from_arrays: unknown key 'victims': did you mean 'victim'"):
        mi.Stream.from_arrays(ROWS, LABELS, victims=3)


# The .npz file.


def opened(path: Path, **more: Any) -> mi.Stream:
    return open_stream(StreamSettings(name="npz", path=path, **more))


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path / "own.npz", **arrays)
    return path / "own.npz"


def test_a_file_holds_rows_test_arrays_names_and_mappings(tmp_path: Path) -> None:
    plain = opened(write(tmp_path, x=ROWS, y=LABELS), domain="observed")
    same = mi.Stream.from_arrays(ROWS, LABELS, domain="observed")
    assert plain.fingerprint == same.fingerprint
    assert torch.equal(torch.as_tensor(plain.domain.low), torch.as_tensor(same.domain.low))
    assert plain.info.name == "own"
    both = {"x_train": ROWS, "y_train": LABELS, "x_test": ROWS[:40], "y_test": LABELS[:40]}
    split = opened(write(tmp_path, **both, classes=np.array(["a", "b", "c"])))
    assert split.info.classes == ("a", "b", "c")
    assert len(split.validation) + len(split.test) == 40
    assert len(opened(write(tmp_path, **both), split="test").burn_in) == 40 - 12 - 2 - 2 - 8
    ids = rng().integers(0, 9, (N, 4))
    words = opened(write(tmp_path, **{"x.input_ids": ids, "x.attention_mask": ids > 2, "y": LABELS}))
    assert set(words.victim_batch(0, seed=0).x) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: write(p, images=ROWS, labels=LABELS), "holds the arrays images, labels; it needs x and y"),
        (lambda p: write(p, x=ROWS, y=LABELS, x_train=ROWS, y_train=LABELS), "and not both"),
        (lambda p: write(p, x=OBJECTS, y=LABELS), "unpickling them runs code"),
        (lambda p: (p / "own.npz").write_bytes(b"no zip") and p / "own.npz", r"or no \.npz file; write one by"),
        (lambda p: p / "absent.npz", "is not there"),
        (lambda p: write(p, x=ROWS, y=LABELS[:3]), "own: x has 120, y has 3 rows"),
    ],
)
def test_a_bad_file_is_refused(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        opened(make(tmp_path))


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, x=ROWS, y=LABELS)
    content = bytearray(path.read_bytes())
    content[300:400] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        opened(path)
