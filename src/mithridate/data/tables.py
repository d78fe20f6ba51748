"""Images in a Hugging Face data set on disk: as `save_to_disk` wrote it, or as a repository of Parquet files."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mithridate.core.errors import ConfigError, DataError, shown
from mithridate.data.samples import LONE, Row, Samples, image_samples, wanted_splits
from mithridate.data.sources import Rows, dataset_rows, encoded, parquet_rows, quiet_hub, split_files

Columns = tuple[str, str]
"""The column of images and the column of labels."""


@dataclass(frozen=True)
class Table:
    """One split.

    Args:
        features: What each column holds, as `datasets` says it.
        rows: Gives the rows of an image and a label column.
    """

    features: Mapping[str, Any]
    rows: Callable[[Columns], Iterable[Rows]]


def saved_samples(path: Path, split: str | None, columns: Columns | None, *, name: str) -> Samples:
    """The images of a data set that `save_to_disk` wrote.

    Args:
        path: Its folder.
        split: One of its splits; None: train and test, or the only one.
        columns: The columns of images and labels; None: the only ones of their type.
        name: What messages call the data set.

    Raises:
        ConfigError: There is no such split or column, or it is not clear which is meant.
        DataError: It is not such a folder, or its rows are no images with class numbers.
    """
    import datasets

    try:
        with quiet_hub():
            loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # a folder that is something else breaks in many ways
        raise DataError(
            f"{path} is not a data set that `save_to_disk` wrote ({type(error).__name__}: {error}); set [data] path to "
            'the folder that was given to it, or name = "parquet" for a folder of Parquet files.'
        ) from error

    def table(one: datasets.Dataset, place: str) -> Table:
        return Table(one.features, lambda chosen: dataset_rows(one, chosen, place=place))

    splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {LONE: loaded}
    tables = {key: table(one, f"{path} ({key})") for key, one in splits.items()}
    return _samples(tables, split, columns, path, name)


def parquet_samples(path: Path, split: str | None, columns: Columns | None, *, name: str) -> Samples:
    """The images of a repository of Parquet files.

    Args:
        path: A folder laid out as `train*.parquet` and `test*.parquet`, or `train/*.parquet` and `test/*.parquet`, in
            it or in its `data/`; or a single file.
        split: What the names of the files begin with; None: train and test, or the only one of the two.
        columns: The columns of images and labels; None: the only ones of their type.
        name: What messages call the data set.

    Raises:
        ConfigError: There is no such split or column, or it is not clear which is meant.
        DataError: There is no such file, or its rows are no images with class numbers.
    """
    import datasets

    if split is not None and (not split or Path(split).name != split):
        raise ConfigError(f"split = {shown(split)}: give what the names of the files begin with, such as 'train'.")
    named = dict.fromkeys(["train", "test", *([split] if split else [])])
    by_split = {key: split_files([path, path / "data"], key) for key in named}
    files = {LONE: [path]} if path.is_file() else {key: shards for key, shards in by_split.items() if shards}
    if not files:
        others = sorted(str(file.relative_to(path)) for file in path.glob("**/*.parquet"))[:5]
        raise DataError(
            f"{path} holds no train*.parquet and no test*.parquet, in itself or in data/; there is "
            f"{', '.join(others) or 'no Parquet file'}. Set [data] path to their folder, or split to what their names "
            "begin with."
        )

    def features_of(shard: Path) -> Mapping[str, Any]:
        try:
            return dict(datasets.Features.from_arrow_schema(pq.read_schema(shard)))
        except Exception as error:  # a damaged file, and notes in it that are not what they should be
            raise DataError(f"{shard} is not a readable Parquet file ({error}); fetch it again.") from error

    def table(shards: list[Path]) -> Table:
        features = features_of(shards[0])
        for shard in shards[1:]:
            if features_of(shard) != features:
                raise DataError(
                    f"{shard} has other columns, types or classes than {shards[0]}; keep the shards of one upload."
                )
        return Table(features, lambda chosen: parquet_rows(shards, chosen, whose=name))

    return _samples({key: table(shards) for key, shards in files.items()}, split, columns, path, name)


def _samples(tables: Mapping[str, Table], split: str | None, columns: Columns | None, path: Path, name: str) -> Samples:
    chosen = wanted_splits(tables, split, where=path)
    features = tables[chosen[0]].features
    image, label = columns or (_only(features, _is_image, "image", path), _only(features, _is_label, "label", path))
    for key in chosen:
        for column in (image, label):
            if column not in tables[key].features:
                there = _listing(tables[key].features)
                raise ConfigError(f"{path} ({key}) has no column '{column}'; there is {there}.")
    classes, *others = (getattr(tables[key].features[label], "names", None) for key in chosen)
    if any(names != classes for names in others):
        raise DataError(
            f"{path}: the classes of '{label}' in {' and '.join(chosen)} have other names or another order, so that "
            "one number would stand for two classes; number them alike."
        )

    def rows(key: str) -> Iterator[Row]:
        for piece in tables[key].rows((image, label)):
            for where, content, number in piece.each(name):
                if type(number) is not int:
                    said = shown(number)
                    raise DataError(f"{where} has the label {said} in '{label}'; class numbers are whole numbers.")
                yield where, encoded(content, where), number

    return image_samples(name, {key: rows(key) for key in chosen}, classes)


def _only(features: Mapping[str, Any], fits: Callable[[str, Any], bool], what: str, path: Path) -> str:
    """The one column of a type.

    Raises:
        ConfigError: There is none, or several.
    """
    fitting = [column for column, feature in features.items() if fits(column, feature)]
    if len(fitting) != 1:
        many = f"{len(fitting)} columns" if fitting else "no column"
        raise ConfigError(
            f'{path} has {many} that may be the {what}: {_listing(features)}. Set columns = ["image", "label"] in '
            "[data] to the names of yours."
        )
    return fitting[0]


def _is_image(_: str, feature: object) -> bool:
    if isinstance(feature, dict):  # an image without the library's note on it
        return "bytes" in feature
    return type(feature).__name__ == "Image"


def _is_label(column: str, feature: object) -> bool:
    whole = str(getattr(feature, "dtype", "")).startswith(("int", "uint"))
    return type(feature).__name__ == "ClassLabel" or (whole and column in {"label", "labels"})


def _listing(features: Mapping[str, Any]) -> str:
    return ", ".join(f"{column} ({type(feature).__name__})" for column, feature in features.items())[:300]
