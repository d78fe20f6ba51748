"""Where the encoded rows of an image set come from: a folder that mirrors hub repositories, or the hub itself."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mithridate.core.errors import DataError
from mithridate.data.catalogue import NamedSet

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
    parquet = sorted(str(path.relative_to(root)) for path in repository.glob("**/*.parquet"))
    alone = f" To cut every part from what is there, set {' or '.join(others)} in [data]." if others else ""
    raise DataError(
        f"{info.name}: no split '{split}' under the data root {root}. "
        f"Looked for {split}*.parquet and {split}/*.parquet in {', '.join(str(folder) for folder in folders)}; "
        f"there is {', '.join(parquet) or 'no Parquet file'}. Put the split there, or unset MITHRIDATE_DATA to "
        f"load it from the hub.{alone}"
    )


def split_files(folders: Sequence[Path], split: str) -> list[Path]:
    """The Parquet files of one split, in order, from the first folder that has some; empty if none has.

    Args:
        folders: Where to look, for files that begin with the split's name or lie in a folder of that name.
        split: Which split.

    Raises:
        DataError: Some shards are missing.
    """
    in_name = re.compile(rf"{re.escape(split)}([-_.].*)?\.parquet")
    for folder in folders:
        for paths in (
            [path for path in folder.glob("*.parquet") if in_name.fullmatch(path.name)],
            list((folder / split).glob("*.parquet")),
        ):
            if paths:
                files = sorted(paths)
                _require_all_shards(files)
                return files
    return []


def _require_all_shards(files: list[Path]) -> None:
    for path in files:
        numbered = re.search(r"-(\d{5})-of-(\d{5})\.parquet$", path.name)
        if numbered is None:
            continue
        start, total = path.name[: numbered.start()], numbered.group(2)
        wanted = {f"{start}-{i:05}-of-{total}.parquet" for i in range(int(total))}
        missing = sorted(wanted - {other.name for other in files})
        if missing:
            raise DataError(f"{path.parent} is incomplete: {', '.join(missing)} is missing; fetch it again.")


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
            with pq.ParquetFile(path) as file:
                _require_columns(columns, file.schema_arrow.names, str(path), whose)
                first = 0
                for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(columns)):
                    yield Rows(str(path), first, *(batch.column(column).to_pylist() for column in columns))
                    first += len(batch)
        except (OSError, pa.ArrowException) as error:
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


def dataset_rows(dataset: Any, columns: tuple[str, str], *, place: str) -> Iterator[Rows]:  # noqa: ANN401  (a datasets.Dataset, of no known type)
    """The rows of a loaded Hugging Face data set, as they are stored.

    Args:
        dataset: One split.
        columns: The columns of images and labels.
        place: Where it is from, for messages.
    """
    first = 0
    for table in dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
        yield Rows(place, first, *(table.column(column).to_pylist() for column in columns))
        first += len(table)


def _require_columns(columns: Sequence[str], known: Sequence[str], place: str, whose: str) -> None:
    for column in columns:
        if column not in known:
            raise DataError(f"{place} has no column '{column}', but {', '.join(known)}; is this {whose}?")


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
