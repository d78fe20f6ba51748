"""A folder of images: what is read, and what is refused by name before any of it is decoded."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

import mithridate as mi
from mithridate.core.errors import ConfigError, DataError
from mithridate.data import StreamSettings, open_stream
from mithridate.data.decode import MAX_PIXELS

if TYPE_CHECKING:
    from tests.data.conftest import Digits


def opened(path: Path, **more: Any) -> mi.Stream:
    return open_stream(StreamSettings(name="folder", path=path, **more))


def write(path: Path, pixels: Any = None, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8), np.uint8) if pixels is None else pixels).save(path, **how)
    return path


def small(root: Path) -> Path:
    """Two classes of five random images each."""
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        for number in range(5):
            write(root / label / f"{number}.png", rng.integers(0, 256, (8, 8), dtype=np.uint8))
    return root


def test_pixels_classes_and_order_are_those_of_the_files(digits: "Digits", written: dict[str, Path]) -> None:
    stream = opened(written["folder"])
    assert stream.info.classes == digits.names
    assert stream.info.shape == (1, 8, 8)
    same = mi.Stream.from_arrays(digits.x, digits.y, classes=digits.names)
    assert stream.fingerprint == same.fingerprint
    for part in ("burn_in", "victim", "validation", "trusted", "test"):
        mine, theirs = getattr(stream, part), getattr(same, part)
        assert np.array_equal(mine.x, theirs.x)
        assert np.array_equal(mine.y, theirs.y)


def test_train_and_test_folders_give_their_parts(digits: "Digits", tmp_path: Path) -> None:
    digits.folder(tmp_path, "train")
    digits._replace(x=digits.x[:100], y=digits.y[:100]).folder(tmp_path, "test")  # lacks the last class
    stream = opened(tmp_path)
    assert len(stream.burn_in) + len(stream.victim) + len(stream.trusted) == 240
    assert len(stream.validation) + len(stream.test) == 100
    assert stream.info.classes == digits.names
    alone = opened(tmp_path, split="train")
    assert sum(len(getattr(alone, p)) for p in ("burn_in", "victim", "trusted", "validation", "test")) == 240
    with pytest.raises(ConfigError, match="has no split 'trian': did you mean 'train'"):
        opened(tmp_path, split="trian")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    small(tmp_path)
    (tmp_path / "cat").rename(tmp_path / "train")
    assert opened(tmp_path).info.classes == ("dog", "train")


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "webp", "ppm", "JPG"])
def test_colour_and_every_format_of_the_list(ending: str, tmp_path: Path) -> None:
    for label, value in (("dark", 20), ("light", 200)):
        for number in range(5):
            pixels = np.full((9, 7, 3), value + number, np.uint8)
            pixels[:4] += 30
            write(tmp_path / label / f"{number}.{ending}", pixels)
    stream = opened(tmp_path)
    assert stream.info.shape == (3, 9, 7)
    batch = stream.burn_in.all()
    assert torch.equal(batch.x.mean((1, 2, 3)) > 0.5, batch.y == 1)


def test_hidden_files_and_links_that_stay_inside_are_no_trouble(tmp_path: Path) -> None:
    root = small(tmp_path / "own")
    (root / "cat" / ".DS_Store").write_bytes(b"x")
    (root / ".cache").mkdir()
    (root / "README.md").write_text("about")
    (root / "dog" / "again.png").symlink_to(root / "dog" / "1.png")
    (tmp_path / "link").symlink_to(root)
    stream = opened(tmp_path / "link")
    assert sum(len(getattr(stream, p)) for p in ("burn_in", "victim", "trusted", "validation", "test")) == 11


# What is refused.


def other_size(root: Path) -> None:
    write(root / "dog" / "3.png", np.zeros((8, 9), np.uint8))


def other_mode(root: Path) -> None:
    write(root / "dog" / "3.png", np.zeros((8, 8, 3), np.uint8))


def with_alpha(root: Path) -> None:
    write(root / "cat" / "0.png", np.zeros((8, 8, 4), np.uint8))


def sixteen_bits(root: Path) -> None:
    write(root / "cat" / "0.png", np.zeros((8, 8), np.uint16))


def no_image(root: Path) -> None:
    (root / "dog" / "3.png").write_bytes(b"nothing of the kind")


def cut_off(root: Path) -> None:
    path = root / "dog" / "3.png"
    path.write_bytes(path.read_bytes()[:-40])


def another_format(root: Path) -> None:
    (root / "dog" / "3.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")


def moving(root: Path) -> None:
    frames = [Image.new("L", (8, 8), value) for value in (0, 200)]
    frames[0].save(root / "dog" / "3.png", save_all=True, append_images=frames[1:])


def text(root: Path) -> None:
    (root / "dog" / "notes.txt").write_text("x")


def nested(root: Path) -> None:
    write(root / "dog" / "old.png" / "1.png")


def pipe(root: Path) -> None:
    os.mkfifo(root / "dog" / "9.png")


def link_out(root: Path) -> None:
    (root / "dog" / "9.png").symlink_to(write(root.parent / "outside.png"))


def folder_link_out(root: Path) -> None:
    write(root.parent / "outside" / "1.png")
    (root / "eel").symlink_to(root.parent / "outside")


def dangling(root: Path) -> None:
    (root / "dog" / "9.png").symlink_to(root / "dog" / "gone.png")


def empty_class(root: Path) -> None:
    (root / "eel").mkdir()


def beside(root: Path) -> None:
    write(root / "train" / "cat" / "1.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_size, r"dog/3\.png is an image of mode L, 8x9 pixels; .*cat/0\.png has mode L, 8x8 pixels.*convert it"),
        (other_mode, r"dog/3\.png is an image of mode RGB, 8x8 pixels; .*cat/0\.png has mode L"),
        (with_alpha, r"cat/0\.png is an image of mode RGBA.*convert it to grey \(L\) or colour \(RGB\)"),
        (sixteen_bits, r"cat/0\.png is an image of mode I;16"),
        (no_image, r"dog/3\.png is not a readable image .*take it out"),
        (cut_off, r"dog/3\.png is not a readable image"),
        (another_format, r"dog/3\.png is not a readable image"),
        (moving, r"dog/3\.png holds 2 pictures"),
        (text, r"dog/notes\.txt is no image file"),
        (nested, r"dog/old\.png is no image file"),
        (pipe, r"dog/9\.png is no image file"),
        (link_out, r"dog/9\.png is a link that leads out of .*own"),
        (folder_link_out, r"eel/1\.png is a link that leads out of .*own"),
        (dangling, r"dog/9\.png is no image file"),
        (empty_class, r"eel holds no image"),
        (beside, r"own holds cat, dog beside train"),
    ],
)
def test_a_bad_file_is_named(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    root = small(tmp_path / "own")
    opened(root)
    spoil(root)
    with pytest.raises(DataError, match=message):
        opened(root)


def test_a_bomb_is_refused_before_it_unfolds(tmp_path: Path) -> None:
    side = int(MAX_PIXELS**0.5) + 1

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    root = small(tmp_path)
    # no pixels at all: whoever tried to decode it would say that it is cut off
    (root / "cat" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(DataError, match=rf"cat/0\.png has {side}x{side} pixels, and 16,777,216 are the most"):
        opened(root)


def test_a_class_that_training_lacks_is_named(tmp_path: Path) -> None:
    small(tmp_path / "train")
    small(tmp_path / "test")
    write(tmp_path / "test" / "eel" / "1.png")
    with pytest.raises(DataError, match="eel is a class that the training images lack"):
        opened(tmp_path)


def test_too_little_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent is not a folder; set"):
        opened(tmp_path / "absent")
    write(tmp_path / "1.png")
    with pytest.raises(DataError, match="has no class folders; put its images into one folder a class"):
        opened(tmp_path)
    write(tmp_path / "cat" / "1.png")
    with pytest.raises(DataError, match="has one image"):
        opened(tmp_path)
    write(tmp_path / "cat" / "2.png")
    with pytest.raises(DataError, match=r"labels have one class alone \(cat\)"):
        opened(tmp_path)
    write(tmp_path / "dog" / "1.png")
    with pytest.raises(DataError, match=r"has 3 samples, too few for victim 1 by default, .*test 4, 5 in all"):
        opened(tmp_path, test=4)
