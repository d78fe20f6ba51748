from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mithridate.core.batch import PIXELS, check_domain
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.registry import make
from mithridate.core.seeding import generator
from mithridate.data import DATASETS, Part, Stream, StreamSettings, load_images, open_stream

PARTS = ("burn_in", "victim", "validation", "trusted", "test")


def parts(stream: Stream) -> dict[str, Part]:
    return {name: getattr(stream, name) for name in PARTS}


def identities(part: Part) -> list[bytes]:
    return [image.tobytes() + label.tobytes() for image, label in zip(part.x, part.y, strict=True)]


@pytest.fixture(scope="module")
def digits() -> Stream:
    return open_stream(StreamSettings())


@pytest.fixture(scope="module")
def cifar10(data_root: Path) -> Stream:
    return open_stream(StreamSettings(name="cifar10"), data_root=data_root)


def test_digits_by_default(digits: Stream) -> None:
    assert {name: len(part) for name, part in parts(digits).items()} == {
        "burn_in": 700,
        "victim": 550,
        "validation": 100,
        "trusted": 97,
        "test": 350,
    }
    assert digits.batch_size == 50
    assert [part.name for part in parts(digits).values()] == list(PARTS)


def test_the_parts_of_digits_are_the_whole_set_each_image_once(digits: Stream) -> None:
    whole = load_images("digits", "all")
    found = [identity for part in parts(digits).values() for identity in identities(part)]
    assert sorted(found) == sorted(identities(Part("all", whole.x, whole.y)))
    assert len(set(found)) == 1797


def test_cifar10_by_default(cifar10: Stream, data_root: Path) -> None:
    assert {name: len(part) for name, part in parts(cifar10).items()} == {
        "burn_in": 39_500,
        "victim": 10_000,
        "validation": 500,
        "trusted": 500,
        "test": 9_500,
    }
    assert cifar10.batch_size == 100
    seen = {name: identities(part) for name, part in parts(cifar10).items()}
    for split, names in {"train": ("burn_in", "victim", "trusted"), "test": ("validation", "test")}.items():
        whole = load_images("cifar10", split, data_root=data_root)
        assert sorted(identity for name in names for identity in seen[name]) == sorted(
            identities(Part(split, whole.x, whole.y))
        )


@pytest.mark.parametrize("name", DATASETS)
def test_settings_resolve_to_numbers_that_resolve_to_themselves(name: str) -> None:
    resolved = StreamSettings(name=name).resolved()
    assert None not in asdict(resolved).values()
    assert resolved.resolved() == resolved
    assert make(StreamSettings, asdict(resolved), where="[data]") == resolved
    assert resolved.batch_size == (50 if name == "digits" else 100)


def test_resolving_follows_what_the_mirror_holds() -> None:
    resolved = StreamSettings(name="mnist", victim=200).resolved({"train": 1000, "test": 600})
    assert (resolved.burn_in, resolved.victim, resolved.trusted) == (300, 200, 500)
    assert (resolved.validation, resolved.test) == (500, 100)


def test_seed_decides_which_image_goes_where(digits: Stream) -> None:
    same, other = open_stream(StreamSettings(seed=0)), open_stream(StreamSettings(seed=1))
    for name in PARTS:
        assert np.array_equal(getattr(digits, name).x, getattr(same, name).x)
        assert not np.array_equal(getattr(digits, name).x, getattr(other, name).x)
    assert digits.fingerprint == same.fingerprint != other.fingerprint


def test_burn_in_and_its_fingerprint_survive_a_change_of_the_other_parts(digits: Stream) -> None:
    other = open_stream(StreamSettings(victim=300, validation=50, trusted=10, test=20, batch_size=7))
    assert other.fingerprint == digits.fingerprint
    assert np.array_equal(other.burn_in.x, digits.burn_in.x)
    assert open_stream(StreamSettings(burn_in=600)).fingerprint != digits.fingerprint


def test_too_many_images_are_refused_with_the_numbers() -> None:
    with pytest.raises(DataError, match="'all' has 1797 images, too few for victim 1000, trusted 97, validation 100"):
        open_stream(StreamSettings(victim=1000))
    with pytest.raises(
        DataError, match="'train' has 50000 images, too few for victim 60000, trusted 500, burn_in -10500"
    ):
        StreamSettings(name="cifar10", victim=60_000).resolved()
    with pytest.raises(DataError, match="no image of the split 'test' is left to test on"):
        StreamSettings(name="cifar10", validation=10_000).resolved()


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="unknown key 'batchsize': did you mean 'batch_size'"):
        make(StreamSettings, {"batchsize": 3}, where="[data]")
    with pytest.raises(ConfigError, match="batch_size = 0"):
        make(StreamSettings, {"batch_size": 0}, where="[data]")
    with pytest.raises(ConfigError, match="unknown data set 'digit': did you mean 'digits'"):
        StreamSettings(name="digit")


def test_svhn_without_its_training_split(data_root: Path, tmp_path: Path) -> None:
    only_test = tmp_path / "ufldl-stanford"
    only_test.mkdir()
    (only_test / "svhn").mkdir()
    (only_test / "svhn" / "cropped_digits").mkdir()
    for path in (data_root / "ufldl-stanford/svhn/cropped_digits").glob("test*.parquet"):
        (only_test / "svhn" / "cropped_digits" / path.name).symlink_to(path.resolve())
    with pytest.raises(DataError, match="svhn: no split 'train'"):
        open_stream(StreamSettings(name="svhn"), data_root=tmp_path)


def test_a_batch_is_what_a_model_may_see(digits: Stream) -> None:
    batch = digits.victim_batch(0, seed=0)
    check_domain(batch, PIXELS, n_classes=10)
    assert batch.x.dtype == torch.float32
    assert batch.x.shape == (50, 1, 8, 8)
    part = digits.victim
    index = np.array([3, 1])
    chosen = part.batch(index)
    assert torch.equal((chosen.x * 255).round().to(torch.uint8), torch.tensor(part.x[index]))
    assert chosen.y.tolist() == part.y[index].tolist()
    chosen.x.zero_()
    assert part.x[index].any()


def test_batches_give_every_image_once(digits: Stream) -> None:
    part = digits.trusted
    plain = list(part.batches(40))
    assert [len(batch.x) for batch in plain] == [40, 40, 17]
    assert torch.equal(torch.cat([batch.x for batch in plain]), part.all().x)
    assert [len(batch.x) for batch in part.batches(40, drop_last=True)] == [40, 40]
    shuffled = list(part.batches(40, rng=generator("order")))
    again = list(part.batches(40, rng=generator("order")))
    assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(shuffled, again, strict=True))
    x = torch.cat([batch.x for batch in shuffled])
    assert not torch.equal(x, part.all().x)
    assert sorted(map(tuple, x.flatten(1).tolist())) == sorted(map(tuple, part.all().x.flatten(1).tolist()))


def test_the_stream_is_consecutive_batches_of_one_order(digits: Stream) -> None:
    steps = 10
    batches = [*digits.victim_batches(steps, seed=4), digits.trigger_batch(steps, seed=4)]
    seen = sorted(map(tuple, torch.cat([batch.x for batch in batches]).flatten(1).tolist()))
    assert seen == sorted(map(tuple, digits.victim.all().x.flatten(1).tolist()))
    assert not torch.equal(digits.victim_batch(0, seed=4).x, digits.victim_batch(0, seed=5).x)


@pytest.mark.parametrize("augment_stream", [False, True])
def test_a_batch_is_the_same_whichever_were_drawn_before(cifar10: Stream, augment_stream: bool) -> None:
    stream = replace(cifar10, settings=replace(cifar10.settings, augment_stream=augment_stream))
    in_order = list(stream.victim_batches(4, seed=2))
    assert torch.equal(stream.victim_batch(3, seed=2).x, in_order[3].x)
    assert torch.equal(stream.trigger_batch(3, seed=2).x, in_order[3].x)
    assert torch.equal(in_order[3].x, cifar10.victim_batch(3, seed=2).x) != augment_stream
    assert torch.equal(in_order[3].y, cifar10.victim_batch(3, seed=2).y)


def test_digits_are_never_shifted_or_mirrored(digits: Stream) -> None:
    batch = digits.burn_in.all()
    assert torch.equal(digits.augmented(batch, generator("augmentation")).x, batch.x)


def test_a_run_longer_than_the_stream_is_refused(digits: Stream) -> None:
    digits.require(10)
    with pytest.raises(
        DataError, match=r"11 accumulative batches .* need 600, and the victim part has 550; at most 10 fit"
    ):
        digits.require(11)
    with pytest.raises(DataError, match="at most 10 fit"):
        digits.victim_batches(11, seed=0)
    short = open_stream(StreamSettings(victim=20))
    with pytest.raises(DataError, match="not even the trigger batch fits"):
        short.trigger_batch(0, seed=0)


def test_empty_parts_are_allowed_where_nobody_needs_them() -> None:
    stream = open_stream(StreamSettings(burn_in=0, validation=0, trusted=0))
    assert len(stream.burn_in) == len(stream.validation) == len(stream.trusted) == 0
    assert len(stream.test) == 1797 - 550
