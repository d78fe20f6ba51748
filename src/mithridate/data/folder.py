"""A folder of images, one folder a class."""

from pathlib import Path

from mithridate.core.errors import DataError
from mithridate.data.samples import LONE, Row, Samples, image_samples, wanted_splits

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
"""Endings of the files that are read."""


def folder_samples(path: Path, split: str | None, *, name: str) -> Samples:
    """The images of `path/CLASS/*.png`, or of `path/train/CLASS/*.png` and `path/test/CLASS/*.png`.

    Class numbers follow the names of the class folders in order; samples follow the names of their files. Names that
    start with a dot are passed over.

    Args:
        path: The folder.
        split: `train` or `test` alone; None: whatever there is.
        name: What messages call the data set.

    Raises:
        ConfigError: There is no such split.
        DataError: The folder holds something else, or a file that is unreadable, of another size or mode than the
            others, or outside the folder.
    """
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; set [data] path to one that holds a folder of images for each class.")
    folders = _folders(path)
    by_split = {folder.name: folder for folder in folders if folder.name in {"train", "test"} and _folders(folder)}
    if by_split and len(by_split) < len(folders):
        others = ", ".join(folder.name for folder in folders if folder.name not in by_split)
        raise DataError(
            f"{path} holds {others} beside {' and '.join(by_split)}; keep either class folders in it, or train and "
            "test with class folders in them."
        )
    splits = by_split or {LONE: path}
    chosen = {split: splits[split] for split in wanted_splits(splits, split, where=path)}
    classes = [folder.name for folder in _classes(next(iter(chosen.values())))]
    root = path.resolve()
    return image_samples(name, {split: _rows(folder, classes, root) for split, folder in chosen.items()}, classes)


def _folders(path: Path) -> list[Path]:
    return [entry for entry in _entries(path) if entry.is_dir()]


def _entries(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give this user the right to.") from error


def _classes(path: Path) -> list[Path]:
    classes = _folders(path)
    if not classes:
        raise DataError(f"{path} has no class folders; put its images into one folder a class, such as {path}/cat.")
    return classes


def _rows(path: Path, classes: list[str], root: Path) -> list[Row]:
    rows: list[Row] = []
    for folder in _classes(path):
        if folder.name not in classes:
            raise DataError(f"{folder} is a class that the training images lack; take it out, or add it there.")
        files = _entries(folder)
        if not files:
            raise DataError(f"{folder} holds no image; take the folder out, or fill it.")
        for file in files:
            _check(file, root)
            rows.append((str(file), file, classes.index(folder.name)))
    return rows


def _check(file: Path, root: Path) -> None:
    """Refuse what is no image by its name, no plain file, or a link that leads out."""
    if file.suffix.lower() not in SUFFIXES or not file.is_file():
        raise DataError(f"{file} is no image file ({', '.join(SUFFIXES)}); take it out of the class folder.")
    if not file.resolve().is_relative_to(root):
        raise DataError(f"{file} is a link that leads out of {root}; put the image itself there.")
