"""Data from strangers: whatever lies in a file or beside it, each row comes once, or one message names the file."""

import io
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import EpsImagePlugin, ExifTags, Image

import mithridate as mi
from mithridate.core.errors import DataError, UserError
from mithridate.data import StreamSettings, open_stream
from mithridate.data.decode import MAX_PIXELS, Frame, decode_images
from mithridate.data.sources import split_files

if TYPE_CHECKING:
    from tests.data.conftest import Digits

PARTS = ("burn_in", "victim", "trusted", "validation", "test")


def opened(path: Path, **more: Any) -> mi.Stream:
    return open_stream(StreamSettings(name="parquet", path=path, **more))


def total(stream: mi.Stream) -> int:
    return sum(len(getattr(stream, part)) for part in PARTS)


def outcome(path: Path) -> int | UserError:
    """How many rows a folder gives, or the message that it is refused with; no other exception."""
    try:
        return total(opened(path))
    except UserError as error:
        return error


def encoded(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **how)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side: int, *more: bytes) -> bytes:
    """A PNG whose header claims a size, and that has no pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IEND", b"")


GREY = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
GOOD = encoded(GREY)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def write(path: Path, images: list[Any], labels: list[Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    column = [{"bytes": image, "path": None} for image in images]
    pq.write_table(pa.table({"image": column, "label": labels or [n % 2 for n in range(len(images))]}), path)
    return path


# An image in a row.


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (EPS, "is not a readable image"),
        (b"%PDF-1.4\n", "is not a readable image"),
        (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "is not a readable image"),
        (encoded(GREY, "GIF"), "is not a readable image .*Read are PNG, JPEG"),
        (encoded(GREY, "ICO"), "is not a readable image"),
        (b"", "is not a readable image"),
        (png(2**12 + 1, chunk(b"IDAT", b"")), "4097x4097 pixels; .*has mode L, 8x8"),
        (png(10_000, chunk(b"IDAT", b"")), "10000x10000 pixels; .*has mode L, 8x8"),  # where Pillow warns
        (png(100_000, chunk(b"IDAT", b"")), f"too many pixels, and {MAX_PIXELS:,} are the most"),  # where it raises
        (png(8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))), "is not a readable image"),
        (encoded(GREY.convert("P")), "mode P"),
        (encoded(GREY.convert("CMYK"), "JPEG"), "mode CMYK"),
        (encoded(GREY.convert("1")), "mode 1"),
        (encoded(Image.new("I;16", (8, 8))), "mode I;16"),
        (encoded(GREY, save_all=True, append_images=[GREY.rotate(90)]), "holds 2 pictures"),
        (encoded(GREY, "TIFF")[:-30], "is not a readable image|0 pixels"),
        (GOOD[:-20], "is not a readable image"),
        (GOOD[:50] + b"\xff" + GOOD[51:], "is not a readable image"),
    ],
)
def test_an_image_that_is_not_taken_is_named_by_its_row(image: bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", [GOOD, GOOD, image, GOOD])
    with pytest.raises(DataError, match=rf"row 2 of {path} .*({message})") as caught:
        opened(tmp_path)
    assert len(str(caught.value)) < 600


def test_no_image_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs: list[object] = []  # whatever a decoder raises is a message, so it is noted

    def started(*what: object, **__: object) -> None:
        programs.append(what)
        raise OSError("none is started in a test")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    monkeypatch.setattr("subprocess.Popen.__init__", started)
    write(tmp_path / "train.parquet", [EPS, EPS, EPS])
    with pytest.raises(DataError, match=r"row 0 of .*train\.parquet is not a readable image"):
        opened(tmp_path)
    assert programs == []


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM"])
def test_the_formats_of_hub_sets_are_read(kind: str, tmp_path: Path) -> None:
    images = [encoded(Image.new("RGB", (8, 8), (n, 2 * n, 90 + n)), kind) for n in range(30)]
    assert total(opened(write(tmp_path / "train.parquet", images).parent)) == 30


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_image_is_told_or_decoded_whatever_is_wrong_with_it(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    kinds = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
    told = 0
    for n in range(60):
        content = bytearray(encoded(GREY if n % 2 else GREY.convert("RGB"), kinds[n % len(kinds)]))
        for at in rng.integers(0, len(content), rng.integers(1, 6)):
            content[at] = rng.integers(256)
        path = write(tmp_path / "train.parquet", [bytes(content[: rng.integers(1, len(content) + 1)])] * 24)
        answer = outcome(path.parent)
        assert answer == 24 or f"row 0 of {path}" in str(answer) or "is the same in every pixel" in str(answer)
        told += answer != 24
    assert told > 0


# Files beside each other.


def shards(*names: str) -> Callable[[Path], None]:
    def put(root: Path) -> None:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()

    return put


HASHED = "-0123456789abcdef"


@pytest.mark.parametrize(
    "names",
    [
        ["train.parquet"],
        ["train-00000-of-00001.parquet"],
        [f"train-00000-of-00002{HASHED}.parquet", f"train-00001-of-00002{HASHED[:-1]}0.parquet"],
        ["train-00001-of-00002.parquet", "train-00002-of-00002.parquet"],
        ["train/0000.parquet", "train/0001.parquet"],
        ["train/1.parquet", "train/2.parquet"],
        [f"train/{n}.parquet" for n in range(12)],
        ["train/part-00000-6f1d-c000.snappy.parquet", "train/part-00001-6f1d-c000.snappy.parquet"],
        ["data/train-v2.parquet"],
        ["train/.0000.parquet", "train/0000.parquet", "train/._0000.parquet", ".train.parquet"],
    ],
)
def test_the_shards_of_one_upload_are_read_in_the_order_of_their_numbers(names: list[str], tmp_path: Path) -> None:
    shards(*names)(tmp_path)
    wanted = [name for name in names if not Path(name).name.startswith(".")]
    assert split_files([tmp_path, tmp_path / "data"], "train") == [tmp_path / name for name in wanted]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.parquet", "train-00000-of-00001.parquet"], "not the shards of one upload"),
        (
            ["train-00000-of-00001.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
            "one upload",
        ),
        ([f"train-00000-of-00001{HASHED}.parquet", "train-00000-of-00001.parquet"], "one upload"),
        ([f"train-00000-of-00001{HASHED}.parquet", f"train-00000-of-00001{HASHED[:-1]}0.parquet"], "one upload"),
        (["train-00000-of-00001.parquet", "train-00000-of-00001 (1).parquet"], "one upload"),
        (["train.parquet", "train-copy.parquet"], "one upload"),
        (["train-a.parquet", "train-b.parquet"], "one upload"),
        (["train/part-00000-6f1d.parquet", "train/part-00000-77aa.parquet"], "one upload"),
        (["train/0001.parquet", "train/1.parquet"], "one upload"),
        (["train-00002-of-00002.parquet", "train-00003-of-00002.parquet"], "one upload"),
        (["train.parquet", "data/train.parquet"], "lies in two places"),
        (["train.parquet", "train/0000.parquet"], "lies in two places"),
        (["train-00000-of-00002.parquet"], r"incomplete: train-00001-of-00002\.parquet is missing"),
        ([f"train-00001-of-00002{HASHED}.parquet"], "incomplete: train-00000-of-00002-"),
        (["train-00000-of-99999999999.parquet"], r"incomplete: train-00001-of-99999999999\.parquet, "),
        (["train/0000.parquet", "train/0002.parquet"], r"incomplete: 0001\.parquet is missing"),
        (["train/0003.parquet"], r"incomplete: 0001\.parquet, 0002\.parquet is missing"),
    ],
)
def test_two_uploads_and_half_an_upload_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    shards(*names)(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        split_files([tmp_path, tmp_path / "data"], "train")
    assert len(str(caught.value)) < 600


def test_a_doubled_column_is_refused(tmp_path: Path) -> None:
    column = pa.array([{"bytes": GOOD, "path": None}] * 24)
    labels, others = pa.array([0, 1] * 12), pa.array([1, 0] * 12)
    for names in (["image", "label", "label"], ["image", "label", "image"]):
        arrays = [column, labels, others if names[2] == "label" else column]
        pq.write_table(pa.Table.from_arrays(arrays, names=names), tmp_path / "train.parquet")
        for more in ({}, {"columns": ["image", "label"]}):
            with pytest.raises(UserError, match=rf"train\.parquet has 2 columns called '{names[2]}'"):
                opened(tmp_path, **more)


def test_class_names_that_differ_between_shards_or_splits_are_refused(digits: "Digits", tmp_path: Path) -> None:
    whole = digits.dataset()
    names = list(reversed(digits.names))
    turned = whole.cast_column("label", datasets.ClassLabel(num_classes=3)).cast_column(
        "label", datasets.ClassLabel(names=names)
    )
    (tmp_path / "shards").mkdir()
    (tmp_path / "splits").mkdir()
    for dataset, shard, split in ((whole, "train-00000-of-00002", "train"), (turned, "train-00001-of-00002", "test")):
        table = dataset.with_format("arrow")[:]
        pq.write_table(table, tmp_path / "shards" / f"{shard}.parquet")
        pq.write_table(table, tmp_path / "splits" / f"{split}.parquet")
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet has other columns, types or classes than"):
        opened(tmp_path / "shards")
    with pytest.raises(DataError, match="the classes of 'label' in train and test have other names or another order"):
        opened(tmp_path / "splits")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", [GOOD] * 24)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(60):
        damaged = bytearray(content)
        for at in rng.integers(0, len(content), 3):
            damaged[at] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        answer = outcome(tmp_path)
        assert answer == 24 or str(tmp_path) in str(answer)
        told += answer != 24
    assert told > 0


# Arrays.


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_other_arrays_of_an_npz_are_not_looked_at(tmp_path: Path) -> None:
    x, y = np.tile(np.asarray(GREY), (30, 1, 1)), np.arange(30) % 2
    path = npz(tmp_path / "own.npz", x=x, y=y, notes=np.array([{"by": "me"}], dtype=object))
    assert total(open_stream(StreamSettings(name="npz", path=path))) == 30


def doubled(path: Path) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("y.npy", zipfile.ZipFile(path).read("y.npy"))


def claiming(path: Path) -> None:
    """x says that it is larger than any memory."""
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 1000000), }"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


def strange_compression(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for at in (content.index(b"PK\x03\x04") + 8, content.index(b"PK\x01\x02") + 10):
        content[at] = 77
    path.write_bytes(content)


def encrypted(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for at in (content.index(b"PK\x03\x04") + 6, content.index(b"PK\x01\x02") + 8):
        content[at] |= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (doubled, r"own\.npz holds y twice"),
        (claiming, r"own\.npz cannot be read"),
        (strange_compression, r"own\.npz cannot be read"),
        (encrypted, r"own\.npz cannot be read"),
    ],
)
def test_a_spoilt_npz_is_named(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = npz(tmp_path / "own.npz", x=np.zeros((30, 8, 8), np.uint8), y=np.arange(30) % 2)
    spoil(path)
    with pytest.raises(DataError, match=message):
        open_stream(StreamSettings(name="npz", path=path))


# A saved set whose files are damaged after it was opened.


def test_a_saved_set_with_a_file_cut_off_is_named(digits: "Digits", tmp_path: Path) -> None:
    path = digits.saved(tmp_path / "saved")
    (arrow,) = path.glob("*.arrow")
    os.truncate(arrow, arrow.stat().st_size // 2)
    with pytest.raises(DataError, match="saved"):
        open_stream(StreamSettings(name="saved", path=path))


def turned(kind: str, orientation: int) -> bytes:
    """An image of 8x12 pixels, a bright corner top left in what is stored, and how the camera was held."""
    pixels = np.full((8, 12, 3), 20, np.uint8)
    pixels[:4, :6] = 230
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    how = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(pixels).save(buffer, kind, exif=exif, **how)
    return buffer.getvalue()


TURNS: dict[int, tuple[tuple[int, int], tuple[str, str]]] = {
    1: ((8, 12), ("top", "left")),
    2: ((8, 12), ("top", "right")),
    3: ((8, 12), ("bottom", "right")),
    4: ((8, 12), ("bottom", "left")),
    5: ((12, 8), ("top", "left")),
    6: ((12, 8), ("top", "right")),
    7: ((12, 8), ("bottom", "right")),
    8: ((12, 8), ("bottom", "left")),
}
"""By EXIF orientation: the size that is seen, and where the corner that is stored first is seen (EXIF 2.3, tag 274)."""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_images_are_turned_as_their_exif_says(kind: str, orientation: int) -> None:
    (height, width), (vertical, horizontal) = TURNS[orientation]
    (pixels,) = decode_images([("it", turned(kind, orientation))], frame=Frame("RGB", height, width), whose="the set")
    assert pixels.shape == (3, height, width)
    corners = {
        (v, h): float(pixels[:, y, x].mean())
        for v, y in (("top", 1), ("bottom", height - 2))
        for h, x in (("left", 1), ("right", width - 2))
    }
    assert max(corners, key=lambda c: corners[c]) == (vertical, horizontal)


def test_the_size_that_must_be_alike_is_the_one_that_is_seen() -> None:
    both = [("a", turned("JPEG", 1)), ("b", turned("JPEG", 3))]
    assert decode_images(both).shape == (2, 3, 8, 12)
    with pytest.raises(DataError, match="b is an image of mode RGB, 12x8 pixels; a has mode RGB, 8x12"):
        decode_images([("a", turned("JPEG", 1)), ("b", turned("JPEG", 6))])
