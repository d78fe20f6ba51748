"""Where the encoded rows of an image set come from: a folder that mirrors hub repositories, or the hub itself."""

import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from mithridate.core.errors import DataError
from mithridate.data.catalogue import NamedSet

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_AT_ONCE = 1_000


@dataclass(frozen=True)
class Rows:
    """Some consecutive rows as they are stored: encoded images and labels.

    Args:
        place: The file or repository that the rows are from, for messages.
        first: Number of the first row in that place, from 0.
        images: One entry a row.
        labels: One entry a row.
    """

    place: str
    first: int
    images: Sequence[Any]
    labels: Sequence[Any]

    def each(self, whose: str) -> Iterator[tuple[str, Any, Any]]:
        """Row by row: what messages call it, its image, its label."""
        for offset, (image, label) in enumerate(zip(self.images, self.labels, strict=True)):
            yield f"{whose}: row {self.first + offset} of {self.place}", image, label


def encoded(image: object, where: str) -> bytes:
    """The content of an image file, as a row of a Hugging Face data set holds it; a path in it is not followed.

    Raises:
        DataError: The row holds no such content.
    """
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise DataError(f"{where} holds no encoded image; fetch the data again, or store images with their content.")
    return data


def mirror_files(info: NamedSet, split: str, root: Path) -> list[Path]:
    """The Parquet files of one split, in order, in a folder that mirrors hub repositories.

    Args:
        info: The image set.
        split: Which split.
        root: Folder laid out as `<root>/<hub id>/<config>/<split>*.parquet`; the files may also lie in
            `<root>/<hub id>/`, in its `data/`, or in a folder named like the split in any of the three.

    Raises:
        DataError: The folder, the data set or the split is not there, or some of its shards are missing.
    """
    if not root.is_dir():
        raise DataError(
            f"the data root {root} is not a folder; set MITHRIDATE_DATA (or the data root) to one that exists."
        )
    repository = root / info.hub_id
    folders = [repository / info.hub_config, repository / "data", repository]
    if files := split_files(folders, split):
        return files
    others = [f"split = '{other}'" for other in info.splits if other != split and split_files(folders, other)]
    parquet = sorted(str(path.relative_to(root)) for path in repository.glob("**/*.parquet"))[:4]
    places = [str(folder.relative_to(root)) for folder in folders]
    alone = f" To cut every part from what is there, set {' or '.join(others)} in [data]." if others else ""
    raise DataError(
        f"{info.name}: no split '{split}' under the data root {root}. "
        f"Looked for {split}*.parquet and {split}/*.parquet in {', '.join(places)}; "
        f"there is {', '.join(parquet) or 'no Parquet file'}. Put the split there, or unset MITHRIDATE_DATA to "
        f"load it from the hub.{alone}"
    )


def split_files(folders: Sequence[Path], split: str) -> list[Path]:
    """The Parquet files of one split, in order, from the one place that has some; empty if none has.

    Names that start with a dot are passed over.

    Args:
        folders: Where to look, for files that begin with the split's name or lie in a folder of that name.
        split: Which split.

    Raises:
        DataError: Some shards are missing, or the files are not those of one upload.
    """
    in_name = re.compile(rf"{re.escape(split)}([-_.].*)?\.parquet")
    places = [
        files
        for folder in dict.fromkeys(folders)
        for files in (
            [path for path in folder.glob("*.parquet") if in_name.fullmatch(path.name)],
            [path for path in (folder / split).glob("*.parquet") if not path.name.startswith(".")],
        )
        if files
    ]
    if len(places) > 1:
        first, second = (places[n][0] for n in (0, 1))
        raise DataError(
            f"the split '{split}' lies in two places, {first} and {second}; which of them is meant is not clear: keep "
            "one."
        )
    return _in_order(places[0], split) if places else []


_OF_TOTAL = re.compile(r"(.*)-(\d+)-of-(\d+)(?:-[0-9a-f]{16})?\.parquet")
"""As `datasets` names shards: `train-00000-of-00002.parquet`; in older uploads each has a hash behind."""


def _in_order(files: Sequence[Path], split: str) -> list[Path]:
    """The shards of one upload, each once and none missing.

    Raises:
        DataError: They are more, less, or of several uploads.
    """
    folder, names = files[0].parent, [path.name for path in files]
    numbers, total = _numbers(names)
    known = set(numbers)
    one_based = int(0 not in known and (total is None or total in known))
    if len(known) < len(names) or (total is not None and max(known) >= total + one_based):
        raise DataError(
            f"{folder} holds files of '{split}' that are not the shards of one upload "
            f"({', '.join(sorted(names)[:4])}); rows would count twice, or be those of other data: keep the files of "
            "one."
        )
    wanted = range(one_based, max(known) + 1 if total is None else total + one_based)
    if missing := list(itertools.islice((number for number in wanted if number not in known), 3)):
        lacking = [_renumbered(names[0], numbers[0], number) for number in missing]
        raise DataError(f"{folder} is incomplete: {', '.join(lacking)} is missing; fetch it again.")
    return [path for _, path in sorted(zip(numbers, files, strict=True))]


def _renumbered(name: str, was: int, number: int) -> str:
    """The name of another shard."""
    return re.sub(rf"(?<!\d)0*{was}(?!\d)", lambda digits: f"{number:0{len(digits[0])}}", name, count=1)


def _numbers(names: Sequence[str]) -> tuple[list[int], int | None]:
    """The number of each shard, and how many there are if the names say so; no numbers if it is no single upload."""
    shards = [_OF_TOTAL.fullmatch(name) for name in names]
    if len({(m[1], m[3]) if m else None for m in shards}) == 1 and (first := shards[0]):
        return [int(m[2]) for m in shards if m], int(first[3])
    if len(names) == 1:  # a lone 0001.parquet is half of something
        return [int(number[1]) if (number := re.fullmatch(r"(\d+)\.parquet", names[0])) else 0], None
    pieces = [re.split(r"(\d+)", name) for name in names]  # as others do: 0000.parquet, part-00000-JOB.snappy.parquet
    if len({len(split) for split in pieces}) > 1:
        return [], None
    differing = [at for at, column in enumerate(zip(*pieces, strict=True)) if len(set(column)) > 1]
    return ([int(split[differing[0]]) for split in pieces] if len(differing) == 1 and differing[0] % 2 else []), None


def parquet_rows(files: Sequence[Path], columns: tuple[str, str], *, whose: str) -> Iterator[Rows]:
    """The rows of Parquet files, in order.

    Args:
        files: As `split_files` returns them.
        columns: The columns of images and labels.
        whose: Named in messages.

    Raises:
        DataError: A file is unreadable, or lacks a column.
    """
    for path in files:
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                _require_columns(columns, file.schema_arrow.names, str(path), whose)
                first = 0
                for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(columns)):
                    yield Rows(str(path), first, *(batch.column(column).to_pylist() for column in columns))
                    first += len(batch)
        except DataError:
            raise
        except Exception as error:  # a damaged file, or text in it that is none, breaks the reader in many ways
            raise DataError(f"{path} is not a readable Parquet file ({error}); fetch it again.") from error


def hub_rows(info: NamedSet, split: str) -> Iterator[Rows]:
    """The rows of one split from the Hugging Face hub, or from that library's own cache.

    Args:
        info: The image set.
        split: Which split.

    Raises:
        DataError: The hub is out of reach, or its repository does not look as expected.
    """
    place = f"{info.hub_id} ({info.hub_config}, {split}) on the hub"
    with quiet_hub():
        import datasets

        try:
            rows = datasets.load_dataset(info.hub_id, info.hub_config, split=split)
        except Exception as error:
            raise DataError(
                f"{info.name}: could not load {place} ({type(error).__name__}: {error}). Without a network, set "
                f"MITHRIDATE_DATA to a folder laid out as <folder>/{info.hub_id}/{info.hub_config}/{split}*.parquet, "
                "or use the data set 'digits', which needs neither."
            ) from error
        columns = (info.image_column, info.label_column)
        _require_columns(columns, rows.column_names, place, info.name)
        yield from dataset_rows(rows.cast_column(columns[0], datasets.Image(decode=False)), columns, place=place)


def dataset_rows(dataset: "Dataset", columns: tuple[str, str], *, place: str) -> Iterator[Rows]:
    """The rows of a loaded Hugging Face data set, as they are stored.

    Args:
        dataset: One split.
        columns: The columns of images and labels.
        place: Where it is from, for messages.

    Raises:
        DataError: Its files are damaged.
    """
    first = 0
    try:
        for table in dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
            yield Rows(place, first, *(table.column(column).to_pylist() for column in columns))
            first += len(table)
    except Exception as error:  # as with a file of Parquet
        raise DataError(f"{place}: row {first} or one after it is not readable ({error}); fetch it again.") from error


def _require_columns(columns: Sequence[str], known: Sequence[str], place: str, whose: str) -> None:
    for column in columns:
        if column not in known:
            raise DataError(f"{place} has no column '{column}', but {', '.join(known)[:300]}; is this {whose}?")
        if list(known).count(column) > 1:
            raise DataError(f"{place} has {list(known).count(column)} columns called '{column}'; keep one of them.")


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep progress bars and retry notices off; the settings come back as they were."""
    import datasets.utils
    import huggingface_hub.utils

    loggers = [logging.getLogger("datasets"), logging.getLogger("huggingface_hub")]
    levels = [logger.level for logger in loggers]
    shown = [m for m in (datasets.utils, huggingface_hub.utils) if not m.are_progress_bars_disabled()]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    for module in shown:
        module.disable_progress_bars()
    try:
        yield
    finally:
        for module in shown:
            module.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
