from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mithridate.core.domain import PIXELS, check_domain
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.registry import fields_of, make
from mithridate.core.seeding import generator
from mithridate.data import DATASETS, Part, Stream, StreamSettings, load_images, open_stream
from mithridate.data.stream import _victim_order
from mithridate.models import build_model

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
    assert all(isinstance(getattr(resolved, part), int) for part in PARTS)
    assert resolved.resolved() == resolved
    assert make(StreamSettings, fields_of(resolved), where="[data]") == resolved
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
    with pytest.raises(
        DataError,
        match="'all' has 1797 samples, too few for victim 1000, trusted 97 by default, validation 100 by default, "
        "burn_in 700 by default, 1897 in all",
    ):
        open_stream(StreamSettings(victim=1000))
    with pytest.raises(
        DataError, match="'train' has 50000 samples, too few for victim 60000, trusted 500 by default, 60500 in all"
    ):
        StreamSettings(name="cifar10", victim=60_000).resolved()
    with pytest.raises(DataError, match="'test' has 10000 samples, and none is left to test on"):
        StreamSettings(name="cifar10", validation=10_000).resolved()


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="unknown key 'batchsize': did you mean 'batch_size'"):
        make(StreamSettings, {"batchsize": 3}, where="[data]")
    with pytest.raises(ConfigError, match="batch_size = 0"):
        make(StreamSettings, {"batch_size": 0}, where="[data]")
    with pytest.raises(ConfigError, match="unknown data set 'digit': did you mean 'digits'"):
        StreamSettings(name="digit")


def test_svhn_without_its_training_split_says_how_to_go_on_and_then_goes_on(data_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ufldl-stanford" / "svhn" / "cropped_digits"
    folder.mkdir(parents=True)
    for path in (data_root / "ufldl-stanford/svhn/cropped_digits").glob("test*.parquet"):
        (folder / path.name).symlink_to(path.resolve())
    with pytest.raises(
        DataError, match=r"svhn: no split 'train'.*cut every part from what is there, set split = 'test'"
    ):
        open_stream(StreamSettings(name="svhn"), data_root=tmp_path)
    stream = open_stream(StreamSettings(name="svhn", split="test"), data_root=str(tmp_path))
    held = load_images("svhn", "test", data_root=tmp_path)
    found = [identity for part in parts(stream).values() for identity in identities(part)]
    assert sorted(found) == sorted(identities(Part("all", held.x, held.y)))
    assert (len(stream.victim), len(stream.test), stream.batch_size) == (3 * len(held) // 10, len(held) // 5, 100)
    assert stream.settings.resolved() == stream.settings
    assert stream.info == DATASETS["svhn"]


def test_a_split_that_a_known_set_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="svhn has no split 'tets': did you mean 'test'"):
        StreamSettings(name="svhn", split="tets")


# Sizes.


def test_a_share_is_one_of_the_split_that_the_part_is_cut_from() -> None:
    resolved = StreamSettings(name="mnist", victim=0.29, validation=0.07, trusted=0.001).resolved(
        {"train": 1000, "test": 100}
    )
    assert (resolved.victim, resolved.trusted, resolved.burn_in) == (290, 1, 709)
    assert (resolved.validation, resolved.test) == (7, 93)  # 0.07 * 100 is a little more than 7 in binary
    exact = StreamSettings(burn_in=0.25, victim=0.25, validation=0.125, trusted=0.125, test=0.25).resolved({"all": 16})
    assert [getattr(exact, part) for part in PARTS] == [4, 4, 2, 2, 4]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", [1.0, 0.0, 1.5, -0.1, -1, True, "half", float("nan")])
def test_one_and_one_point_nought_are_not_confused(part: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"\[data\]: {part} = .*a number of samples, .* or a share of the split"):
        make(StreamSettings, {part: value}, where="[data]")


def test_one_is_one_sample_and_numbers_of_numpy_are_numbers() -> None:
    settings = make(StreamSettings, {"victim": np.int64(1), "test": np.float64(0.5)}, where="[data]")
    assert [type(value) for value in (settings.victim, settings.test)] == [int, float]
    assert (settings.resolved().victim, settings.resolved().test) == (1, 898)


def test_shares_that_add_to_more_than_one_are_refused() -> None:
    with pytest.raises(DataError, match=r"the split 'all': the shares 0\.5 \+ 0\.4 \+ 0\.2 are more than 1"):
        StreamSettings(victim=0.5, test=0.4, burn_in=0.2).resolved()


@pytest.mark.parametrize("rows", [3, 10, 100, 1797, 70_000])
@pytest.mark.parametrize("asked", [{}, {"burn_in": 0.5}, {"test": 1}, {"victim": 1, "burn_in": 0}])
def test_own_data_of_any_size_are_divided_by_default(rows: int, asked: dict[str, float]) -> None:
    resolved = make(StreamSettings, {"name": "arrays", **asked}, where="").resolved({"all": rows})
    sizes = {part: getattr(resolved, part) for part in PARTS}
    assert sum(sizes.values()) == rows
    assert min(sizes.values()) >= 0
    assert min(sizes["victim"], sizes["test"]) >= 1
    assert resolved.batch_size == max(1, min(100, sizes["victim"] // 21))


def test_a_stream_shorter_than_its_parts_is_refused_in_counts() -> None:
    for asked, message in (
        (
            {"victim": 5, "trusted": 4, "test": 3},
            "10 samples, too few for victim 5, trusted 4, validation 0 by default",
        ),
        ({"burn_in": 0.95, "test": 1}, "too few for victim 3 by default, .* burn_in 9, 13 in all"),
        ({"test": 0.05}, "10 samples, and none is left to test on"),
        ({"victim": 0.05}, "10 samples, and none is left to learn online from"),
        ({"burn_in": 7}, "10 samples, and none is left to test on"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            make(StreamSettings, {"name": "arrays", **asked}, where="").resolved({"all": 10})
        assert "-" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"name": "folder"}, "name = 'folder' needs a `path`"),
        ({"name": "digits", "path": "x"}, "path says nothing of 'digits', but of folder, npz, parquet, saved"),
        ({"name": "folder", "path": "x", "columns": ("a", "b")}, "columns says nothing of 'folder'"),
        ({"name": "folder", "path": "x", "domain": [0, 1]}, "domain says nothing of 'folder'"),
        ({"name": "npz", "path": "x", "domain": [1, 0]}, "give two numbers, the lower first"),
        ({"name": "npz", "path": "x", "domain": "seen"}, "or 'observed'"),
        ({"name": "npz", "path": ""}, "give the path of a file or folder"),
        ({"name": "npz", "path": 3}, "give the path of a file or folder"),
        ({"name": "floder", "path": "x"}, "unknown data set 'floder': did you mean 'folder'"),
        ({"std": [0.0]}, "std"),
    ],
)
def test_settings_of_own_data_are_checked(asked: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(StreamSettings, asked, where="[data]")


def test_a_path_is_text_or_a_path_and_kept_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = str(tmp_path / "here")
    assert StreamSettings(name="folder", path="here").path == expected
    assert StreamSettings(name="folder", path=Path("here")).path == expected


# Batches.


def test_a_batch_is_what_a_model_may_see(digits: Stream) -> None:
    batch = digits.victim_batch(0, seed=0)
    check_domain(batch, PIXELS)
    assert set(batch.y.tolist()) <= set(range(10))
    assert batch.x.dtype == torch.float32
    assert batch.x.shape == (50, 1, 8, 8)
    part = digits.victim
    index = np.array([3, 1])
    chosen = part.batch(index)
    assert torch.equal((chosen.x * 255).round().to(torch.uint8), torch.tensor(part.x[index]))
    assert chosen.y.tolist() == part.y[index].tolist()
    chosen.x.zero_()
    assert part.x[index].any()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.uint16])
def test_class_numbers_of_any_whole_type_stay_what_they_are(digits: Stream, dtype: type) -> None:
    part = digits.victim
    y = Part("bytes", part.x, part.y.astype(dtype)).all().y
    assert y.dtype == torch.int64
    assert y.tolist() == part.y.tolist()


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


# A stream that the burn-in has seen, and one that comes again.

OVERLAPPING = StreamSettings(overlap=True, burn_in=900, victim=200)


def test_an_overlapping_stream_shows_what_the_burn_in_has_seen_and_nothing_of_the_others() -> None:
    stream = open_stream(OVERLAPPING)
    counts = {name: len(part) for name, part in parts(stream).items()}
    assert counts == {"burn_in": 900, "victim": 200, "validation": 100, "trusted": 97, "test": 700}
    assert set(identities(stream.victim)) <= set(identities(stream.burn_in))
    others = [
        identity
        for name in ("burn_in", "validation", "trusted", "test")
        for identity in identities(parts(stream)[name])
    ]
    assert len(set(others)) == len(others)
    assert stream.victim.name == "victim"


def test_overlap_leaves_the_other_parts_as_they_are_and_the_burn_in_gets_what_the_stream_does_not_take(
    cifar10: Stream, data_root: Path
) -> None:
    """Of the papers' protocol: the burn-in learns from the whole training set, and the stream goes over it again."""
    seen = open_stream(StreamSettings(name="cifar10", overlap=True), data_root=data_root)
    assert (len(seen.burn_in), len(seen.victim)) == (49_500, 10_000)
    for name in ("validation", "test"):
        assert identities(parts(seen)[name]) == identities(parts(cifar10)[name])
    fewer = open_stream(replace(OVERLAPPING, victim=50))
    assert identities(fewer.burn_in) == identities(open_stream(OVERLAPPING).burn_in)
    assert set(identities(fewer.victim)) < set(identities(open_stream(OVERLAPPING).victim))


def test_more_victim_samples_than_the_burn_in_has_are_refused() -> None:
    with pytest.raises(DataError, match=r"with overlap, victim \(901\) lies inside burn_in \(900\)"):
        open_stream(replace(OVERLAPPING, victim=901))
    assert len(open_stream(replace(OVERLAPPING, victim=900)).victim) == 900
    made = Stream.from_arrays(np.zeros((40, 3)), np.arange(40) % 2, overlap=True, victim=0.5)
    assert (len(made.burn_in), len(made.victim)) == (40 - 2 - 2 - 8, 20)


def test_settings_of_an_overlapping_stream_resolve_to_themselves() -> None:
    resolved = replace(OVERLAPPING, victim=0.25, passes=3, reshuffle=False).resolved()
    assert resolved.victim == 449
    assert resolved.resolved() == make(StreamSettings, fields_of(resolved), where="[data]") == resolved


def test_passes_each_show_every_sample_once_in_an_order_of_their_own(digits: Stream) -> None:
    stream = replace(digits, settings=replace(digits.settings, passes=3))
    batches = [stream.victim_batch(step, seed=4) for step in range(33)]
    for step in range(11):  # the first pass is the stream without passes
        assert torch.equal(batches[step].x, digits.victim_batch(step, seed=4).x)
    orders = [torch.cat([batch.x for batch in batches[11 * n : 11 * n + 11]]).flatten(1) for n in range(3)]
    whole = sorted(map(tuple, digits.victim.all().x.flatten(1).tolist()))
    assert [sorted(map(tuple, order.tolist())) == whole for order in orders] == [True] * 3
    assert not any(torch.equal(a, b) for a, b in [(orders[0], orders[1]), (orders[1], orders[2])])
    stream.require(32)
    with pytest.raises(DataError, match=r"33 accumulative batches .* has 550 in each of 3 passes; at most 32 fit"):
        stream.require(33)


def test_without_reshuffling_every_pass_is_the_first(digits: Stream) -> None:
    stream = replace(digits, settings=replace(digits.settings, passes=2, reshuffle=False))
    for step in range(11):
        assert torch.equal(stream.victim_batch(step, seed=4).x, stream.victim_batch(step + 11, seed=4).x)


def test_the_released_loop_feeds_one_batch_at_every_step_augmented_anew(data_root: Path) -> None:
    how = StreamSettings(
        name="cifar10", overlap=True, victim=100, passes=40, reshuffle=False, augment_stream=True, validation=500
    )
    stream = open_stream(how, data_root=data_root)
    batches = [*stream.victim_batches(5, seed=1), stream.trigger_batch(39, seed=1)]
    assert all(torch.equal(batch.y, batches[0].y) for batch in batches)
    assert len({batch.x.numpy().tobytes() for batch in batches}) == len(batches)
    plain = replace(stream, settings=replace(stream.settings, augment_stream=False))
    assert torch.equal(plain.victim_batch(0, seed=1).x, plain.victim_batch(38, seed=1).x)


def test_mean_and_std_of_a_named_set_may_be_set_and_reach_the_model_and_the_key(
    cifar10: Stream, data_root: Path
) -> None:
    released = StreamSettings(name="cifar10", std=(0.2023, 0.1994, 0.2010))
    stream = open_stream(released, data_root=data_root)
    assert (stream.info.mean, stream.info.std) == (cifar10.info.mean, (0.2023, 0.1994, 0.2010))
    assert fields_of(stream.settings)["std"] == [0.2023, 0.1994, 0.2010]
    assert stream.fingerprint != cifar10.fingerprint
    built = build_model({"name": "small_cnn"}, stream.info, seed=0)
    assert torch.equal(dict(built.named_buffers())["normalise.std"].flatten(), torch.tensor([0.2023, 0.1994, 0.2010]))
    with pytest.raises(ConfigError, match="std has 1 numbers"):
        open_stream(replace(released, std=(0.2,)), data_root=data_root)


def test_a_step_does_not_draw_the_order_of_the_whole_part_anew(digits: Stream) -> None:
    order, calls = _victim_order, _victim_order.cache_info
    order.cache_clear()
    batches = [digits.victim_batch(step, seed=11) for step in (0, 1, 0)]
    assert calls().misses == 1
    assert torch.equal(batches[0].x, batches[2].x)
    assert not torch.equal(batches[0].x, batches[1].x)
    assert not order(len(digits.victim), 11).flags.writeable
