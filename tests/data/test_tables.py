"""Hugging Face data sets on disk: saved ones, and repositories of Parquet files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mithridate as mi
from mithridate.core.errors import ConfigError, DataError
from mithridate.data import StreamSettings, open_stream

if TYPE_CHECKING:
    from tests.data.conftest import Digits

PARTS = ("burn_in", "victim", "trusted", "validation", "test")


def opened(name: str, path: Path, **more: Any) -> mi.Stream:
    return open_stream(StreamSettings(name=name, path=path, **more))


def total(stream: mi.Stream) -> int:
    return sum(len(getattr(stream, part)) for part in PARTS)


def saved(path: Path, content: Any) -> Path:
    content.save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["saved", "npz"])
def test_all_sources_of_the_same_images_give_the_same_stream(
    name: str, digits: "Digits", written: dict[str, Path]
) -> None:
    stream, folder = opened(name, written[name]), opened("folder", written["folder"])
    assert stream.fingerprint == folder.fingerprint
    assert (stream.info.classes, stream.info.mean) == (digits.names, folder.info.mean)
    assert all(np.array_equal(getattr(stream, p).x, getattr(folder, p).x) for p in PARTS)


def test_splits_of_a_saved_set(digits: "Digits", tmp_path: Path) -> None:
    whole = digits.dataset()
    splits = {"train": whole, "test": whole.select(range(0, 240, 3)), "more": whole.select(range(0, 240, 2))}
    both = opened("saved", saved(tmp_path / "three", datasets.DatasetDict(splits)))
    assert (len(both.burn_in) + len(both.victim) + len(both.trusted), len(both.test) + len(both.validation)) == (
        240,
        80,
    )
    assert total(opened("saved", tmp_path / "three", split="more")) == 120
    with pytest.raises(ConfigError, match="has no split 'mroe': did you mean 'more'"):
        opened("saved", tmp_path / "three", split="mroe")
    odd = saved(tmp_path / "odd", datasets.DatasetDict({"train": whole, "dev": whole}))
    with pytest.raises(ConfigError, match="has the splits dev, train, and a stream is cut from train and test"):
        opened("saved", odd)


def test_columns_are_found_by_their_type_or_named(digits: "Digits", tmp_path: Path) -> None:
    renamed = digits.dataset().rename_columns({"image": "scan", "label": "digit"}).add_column("weight", [0.5] * 240)
    assert opened("saved", saved(tmp_path / "a", renamed)).info.classes == digits.names
    twice = renamed.add_column("label", (1 + digits.y).tolist())
    path = saved(tmp_path / "b", twice)
    with pytest.raises(ConfigError, match=r"2 columns that may be the label: scan \(Image\), digit \(ClassLabel\)"):
        opened("saved", path)
    assert opened("saved", path, columns=["scan", "digit"]).info.classes == digits.names
    with pytest.raises(ConfigError, match=r"has no column 'digits'; there is scan \(Image\)"):
        opened("saved", path, columns=["scan", "digits"])
    with pytest.raises(DataError, match=r"labels span \[1, 3\]; of 0 to 3 there is no 0"):
        opened("saved", path, columns=["scan", "label"])
    with pytest.raises(ConfigError, match="no column that may be the image: weight"):
        opened("saved", saved(tmp_path / "c", renamed.remove_columns(["scan", "digit"])))


def test_a_row_without_its_own_image_or_label_is_named(digits: "Digits", tmp_path: Path) -> None:
    rows = digits.dataset().with_format("arrow")[:].to_pydict()
    good = rows["image"][0]
    for bad, label, message in (
        ({"bytes": None, "path": "/etc/passwd"}, 0, "row 1 of .*holds no encoded image"),
        ({"bytes": b"nothing", "path": None}, 0, "row 1 of .*is not a readable image"),
        (good, None, "row 1 of .*has the label None"),
    ):
        pq.write_table(pa.table({"image": [good, bad], "label": [1, label]}), tmp_path / "train.parquet")
        with pytest.raises(DataError, match=message):
            opened("parquet", tmp_path)


def test_layouts_of_parquet_files(digits: "Digits", written: dict[str, Path], tmp_path: Path) -> None:
    table = digits.dataset().with_format("arrow")[:]
    for place in ("a/data/train-00000-of-00001.parquet", "b/train/0000.parquet", "c/odd.parquet"):
        (tmp_path / place).parent.mkdir(parents=True)
        pq.write_table(table, tmp_path / place)
    found = [opened("parquet", tmp_path / place) for place in ("a", "b", "c/odd.parquet")]
    assert [stream.info.classes for stream in found] == [digits.names] * 3
    assert found[2].info.name == "odd"
    assert found[2].fingerprint == opened("folder", written["folder"]).fingerprint
    assert total(opened("parquet", tmp_path / "c", split="odd")) == 240
    with pytest.raises(DataError, match=r"holds no train\*\.parquet and no test\*\.parquet.*there is odd\.parquet"):
        opened("parquet", tmp_path / "c")
    (tmp_path / "c" / "train.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match=r"train\.parquet is not a readable Parquet file"):
        opened("parquet", tmp_path / "c")
    without = table.replace_schema_metadata(None)  # an image is then a struct of bytes, and classes have no names
    pq.write_table(without, tmp_path / "c" / "train.parquet")
    assert opened("parquet", tmp_path / "c").info.classes == ("0", "1", "2")


def test_a_known_set_can_be_read_as_an_unknown_one(data_root: Path) -> None:
    known = open_stream(StreamSettings(name="svhn", split="test"), data_root=data_root)
    path = data_root / "ufldl-stanford" / "svhn" / "cropped_digits"
    settings = {part: len(getattr(known, part)) for part in PARTS}
    own = opened("parquet", path, split="test", **settings)
    assert own.info.classes == known.info.classes
    assert np.array_equal(own.victim.x, known.victim.x)
    assert own.info.mean == pytest.approx(known.info.mean, abs=0.03)


def test_what_is_no_saved_set_is_said(written: dict[str, Path], tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", written["folder"], written["npz"]):
        with pytest.raises(DataError, match="is not a data set that `save_to_disk` wrote"):
            opened("saved", path)
