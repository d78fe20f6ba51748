import io
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from mithridate.core.errors import ConfigError, DataError
from mithridate.data import images as module
from mithridate.data import load_images

Write = Callable[..., Path]


def encoded(pixels: NDArray[np.uint8]) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def colour(n: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def write_rows(path: Path, images: list[Any], labels: list[Any], columns: tuple[str, str] = ("img", "label")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({columns[0]: images, columns[1]: labels}), path)
    return path


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """A mirror of five colour images in two shards."""
    folder = tmp_path / "mirror" / "uoft-cs" / "cifar10" / "plain_text"
    x = colour(5)
    write_rows(folder / "test-00000-of-00002.parquet", [encoded(i) for i in x[:3]], [0, 1, 2])
    write_rows(folder / "test-00001-of-00002.parquet", [encoded(i) for i in x[3:]], [3, 9])
    return tmp_path / "mirror"


def load(mirror: Path, cache: Path) -> module.ImageSet:
    return load_images("cifar10", "test", data_root=mirror, cache=cache)


def cached(cache: Path) -> Path:
    (path,) = (cache / "images").glob("*.safetensors")
    return path


def refuse_to_decode(*_: object) -> None:
    raise AssertionError("decoded again")


def test_digits_need_neither_folder_nor_network(tmp_path: Path) -> None:
    digits = load_images("digits", "all", data_root=tmp_path / "absent")
    assert digits.x.shape == (1797, 1, 8, 8)
    assert (str(digits.x.dtype), str(digits.y.dtype)) == ("uint8", "int64")
    assert (digits.x.min(), digits.x.max()) == (0, 255)
    assert len(np.unique(digits.x)) == 17
    assert sorted(set(digits.y.tolist())) == list(range(10))


def test_pixels_labels_and_order_of_a_mirror_are_kept(mirror: Path, tmp_path: Path) -> None:
    found = load(mirror, tmp_path)
    assert np.array_equal(found.x, colour(5).transpose(0, 3, 1, 2))
    assert found.y.tolist() == [0, 1, 2, 3, 9]
    assert (found.name, found.split, len(found)) == ("cifar10", "test", 5)
    assert not found.x.flags.writeable
    assert not found.y.flags.writeable


def test_grey_images_get_one_channel(tmp_path: Path) -> None:
    x = np.random.default_rng(1).integers(0, 256, (2, 28, 28), dtype=np.uint8)
    write_rows(tmp_path / "ylecun/mnist/mnist/train.parquet", [encoded(i) for i in x], [4, 5], ("image", "label"))
    assert np.array_equal(load_images("mnist", "train", data_root=tmp_path, cache=tmp_path).x, x[:, None])


@pytest.mark.parametrize("place", ["test.parquet", "data/test-00000-of-00001.parquet", "plain_text/test/0000.parquet"])
def test_other_layouts_of_a_repository_are_found(place: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "uoft-cs/cifar10" / place, [encoded(colour(1)[0])], [7])
    assert load(tmp_path, tmp_path).y.tolist() == [7]


def test_a_split_is_not_taken_for_another_of_a_similar_name(tmp_path: Path) -> None:
    write_rows(tmp_path / "uoft-cs/cifar10/test2.parquet", [encoded(colour(1)[0])], [7])
    with pytest.raises(DataError, match="no split 'test'"):
        load(tmp_path, tmp_path)


def test_the_second_load_reads_the_cache(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(mirror, tmp_path)
    monkeypatch.setattr(module, "_decode", refuse_to_decode)
    second = load(mirror, tmp_path)
    assert np.array_equal(first.x, second.x)
    assert np.array_equal(first.y, second.y)
    assert (first.x.dtype, first.y.dtype) == (second.x.dtype, second.y.dtype)
    assert first.fingerprint == second.fingerprint
    assert not second.x.flags.writeable


def test_the_cache_follows_the_environment(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MITHRIDATE_DATA", str(mirror))
    monkeypatch.setenv("MITHRIDATE_CACHE", str(tmp_path / "kept"))
    assert len(load_images("cifar10", "test")) == 5
    assert cached(tmp_path / "kept").is_file()


def test_a_changed_mirror_is_decoded_again(mirror: Path, tmp_path: Path) -> None:
    before = load(mirror, tmp_path)
    shard = mirror / "uoft-cs/cifar10/plain_text/test-00001-of-00002.parquet"
    write_rows(shard, [encoded(i) for i in colour(2, seed=5)], [8, 8])
    after = load(mirror, tmp_path)
    assert after.y.tolist() == [0, 1, 2, 8, 8]
    assert before.fingerprint != after.fingerprint


def test_a_mirror_that_was_only_touched_has_the_same_fingerprint(mirror: Path, tmp_path: Path) -> None:
    before = load(mirror, tmp_path)
    shard = mirror / "uoft-cs/cifar10/plain_text/test-00001-of-00002.parquet"
    os.utime(shard, (1, 1))
    assert load(mirror, tmp_path).fingerprint == before.fingerprint
    assert len(list((tmp_path / "images").glob("*.safetensors"))) == 2


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_a_bit(content: bytes) -> bytes:
    return content[:-7] + bytes([content[-7] ^ 1]) + content[-6:]


def empty(_: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
def test_a_damaged_cache_file_is_replaced(
    mirror: Path, tmp_path: Path, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load(mirror, tmp_path)
    path = cached(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    after = load(mirror, tmp_path)
    assert np.array_equal(before.x, after.x)
    assert np.array_equal(before.y, after.y)
    monkeypatch.setattr(module, "_decode", refuse_to_decode)
    assert load(mirror, tmp_path).fingerprint == before.fingerprint


def test_two_processes_leave_one_good_file(mirror: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mithridate.data.images import load_images; "
        "print(load_images('cifar10', 'test', data_root=Path(sys.argv[1]), cache=Path(sys.argv[2])).fingerprint)"
    )
    command = [sys.executable, "-c", code, str(mirror), str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]  # noqa: S603  (a fixed command)
    printed = [process.communicate(timeout=60)[0].strip() for process in running]
    assert printed == [load(mirror, tmp_path).fingerprint] * 2
    assert cached(tmp_path).is_file()
    assert not list(tmp_path.rglob("*.part"))


def test_a_cache_that_cannot_be_written_is_named(mirror: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(DataError, match=r"cannot be kept in .*taken.*set MITHRIDATE_CACHE"):
        load(mirror, tmp_path / "taken")


def test_a_full_disk_is_one_message_and_leaves_nothing_half_written(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(part: Path, data: bytes) -> int:
        with part.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(DataError, match=r"cannot be kept in .*No space left on device.*set MITHRIDATE_CACHE"):
            load(mirror, tmp_path)
    assert not list(tmp_path.rglob("*.part"))
    load(mirror, tmp_path)
    (cached(tmp_path).parent / f".{cached(tmp_path).name}.x.part").write_bytes(b"what a killed process left")
    cached(tmp_path).unlink()
    load(mirror, tmp_path)
    assert not list(tmp_path.rglob("*.part"))


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="cifar10 has no split 'tran': did you mean 'train'"):
        load_images("cifar10", "tran")


def test_a_root_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the data root .*nowhere is not a folder"):
        load(tmp_path / "nowhere", tmp_path)


def test_a_split_that_the_root_lacks_is_not_fetched_from_the_hub(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "hub_rows", refuse_to_decode)
    with pytest.raises(DataError, match=r"cifar10: no split 'train' under .*Looked for train\*.*test-00000-of-00002"):
        load_images("cifar10", "train", data_root=mirror, cache=tmp_path)
    with pytest.raises(DataError, match=r"mnist: no split 'train'.*there is no Parquet file"):
        load_images("mnist", "train", data_root=mirror, cache=tmp_path)


def test_a_missing_shard_is_named(mirror: Path, tmp_path: Path) -> None:
    (mirror / "uoft-cs/cifar10/plain_text/test-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"incomplete: test-00000-of-00002\.parquet is missing"):
        load(mirror, tmp_path)


GREY = encoded(np.zeros((32, 32), dtype=np.uint8))
GOOD = encoded(np.zeros((32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (GREY, 0, "mode L, 32x32 pixels; cifar10 has mode RGB, 32x32"),
        (encoded(np.zeros((32, 31, 3), dtype=np.uint8)), 0, "mode RGB, 32x31 pixels"),
        (encoded(np.zeros((32, 32, 4), dtype=np.uint8)), 0, "mode RGBA"),
        ({"bytes": b"not an image", "path": None}, 0, "not a readable image"),
        ({"bytes": GOOD["bytes"][:60], "path": None}, 0, "not a readable image"),
        ({"bytes": None, "path": "elsewhere.png"}, 0, "holds no encoded image"),
        (None, 0, "holds no encoded image"),
        (GOOD, 10, "label 10 .*class numbers 0 to 9"),
        (GOOD, -1, "label -1"),
        (GOOD, None, "label None"),
    ],
)
def test_a_bad_row_is_named(image: object, label: object, message: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "uoft-cs/cifar10/plain_text/test.parquet", [GOOD, GOOD, image], [1, 2, label])
    with pytest.raises(DataError, match=f"row 2 of {path}.*{message}"):
        load(tmp_path, tmp_path)
    assert not list((tmp_path / "images").glob("*.safetensors"))


def test_a_label_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "uoft-cs/cifar10/plain_text/test.parquet", [GOOD, GOOD], [1.0, math.nan])
    with pytest.raises(DataError, match=r"row 0 of .*label 1\.0"):
        load(tmp_path, tmp_path)


def test_a_missing_column_an_empty_file_and_a_broken_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "uoft-cs/cifar10/plain_text/test.parquet"
    write_rows(path, [GOOD], [1], ("image", "label"))
    with pytest.raises(DataError, match=r"test\.parquet has no column 'img', but image, label"):
        load(tmp_path, tmp_path)
    write_rows(path, [GOOD], [1])
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(DataError, match="the split 'test' has no rows"):
        load(tmp_path, tmp_path)
    path.write_bytes(b"PAR1 nothing of the kind PAR1")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        load(tmp_path, tmp_path)


def test_without_a_network_the_message_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.delenv("MITHRIDATE_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError) as caught:
        load_images("cifar10", "train", cache=tmp_path)
    for hint in ("no route", "MITHRIDATE_DATA", "<folder>/uoft-cs/cifar10/plain_text/train*.parquet", "'digits'"):
        assert hint in str(caught.value)
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert capfd.readouterr() == ("", "")


def test_the_hub_gives_what_a_mirror_gives(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import datasets

    real = datasets.load_dataset
    asked = []

    def from_folder(hub_id: str, config: str, *, split: str) -> Any:
        asked.append((hub_id, config, split))
        files = sorted(str(path) for path in (mirror / hub_id / config).glob(f"{split}*"))
        read = real("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "hf"))
        return read.cast_column("img", datasets.Image())

    monkeypatch.delenv("MITHRIDATE_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    bars = datasets.utils.are_progress_bars_disabled()
    found = load_images("cifar10", "test", cache=tmp_path / "of hub")
    assert asked == [("uoft-cs/cifar10", "plain_text", "test")]
    assert found.fingerprint == load(mirror, tmp_path / "of mirror").fingerprint
    assert datasets.utils.are_progress_bars_disabled() == bars
    assert capfd.readouterr() == ("", "")
    assert len(load_images("cifar10", "test", cache=tmp_path / "of hub")) == 5
    assert len(asked) == 1


def test_importing_is_light() -> None:
    code = "import sys, mithridate.data; print([m for m in ('datasets', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603  (a fixed command)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_real_cifar10_second_load_takes_less_than_a_second(data_root: Path) -> None:
    first = load_images("cifar10", "train", data_root=data_root)
    started = time.process_time()  # of this process: other work on the machine does not count
    second = load_images("cifar10", "train", data_root=data_root)
    assert time.process_time() - started < 1
    assert first.x.shape == (50_000, 3, 32, 32)
    assert np.array_equal(first.x, second.x)
    assert np.bincount(second.y).tolist() == [5_000] * 10


def test_real_svhn_test_split_loads(data_root: Path) -> None:
    found = load_images("svhn", "test", data_root=data_root)
    assert found.x.shape[1:] == (3, 32, 32)
    assert set(found.y.tolist()) == set(range(10))
