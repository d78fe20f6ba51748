"""One small image set, real digits in the order of their classes, as each kind of own data that is read."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

NAMES = ("zero", "one", "two")


class Digits(NamedTuple):
    """8x8 grey images (n, 8, 8), class numbers (n,), what the classes are called; written as each kind of own data."""

    x: NDArray[np.uint8]
    y: NDArray[np.int64]
    names: tuple[str, ...]

    def folder(self, root: Path, split: str = "") -> Path:
        for number, (pixels, label) in enumerate(zip(self.x, self.y, strict=True)):
            folder = root / split / self.names[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number:04}.png")
        return root

    def dataset(self) -> Any:
        import datasets

        label = datasets.ClassLabel(names=list(self.names))
        columns = {"image": [Image.fromarray(pixels) for pixels in self.x], "label": self.y.tolist()}
        return datasets.Dataset.from_dict(columns, datasets.Features({"image": datasets.Image(), "label": label}))

    def saved(self, root: Path) -> Path:
        self.dataset().save_to_disk(root)
        return root

    def parquet(self, root: Path) -> Path:
        root.mkdir()
        pq.write_table(self.dataset().with_format("arrow")[:], root / "train-00000-of-00001.parquet")
        return root

    def npz(self, root: Path) -> Path:
        path = root.with_suffix(".npz")
        np.savez(path, x=self.x, y=self.y, classes=np.array(self.names))
        return path


@pytest.fixture(scope="session")
def digits() -> Digits:
    """80 images of each of three digits; names in the order of the alphabet, as a folder has them."""
    loaded = load_digits()
    names = tuple(sorted(NAMES))
    index = np.concatenate([np.flatnonzero(loaded.target == NAMES.index(name))[:80] for name in names])
    pixels = np.rint(loaded.images[index] * (255 / 16)).astype(np.uint8)
    return Digits(pixels, np.repeat(np.arange(3), 80), names)


@pytest.fixture(scope="session")
def written(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The digits on disk, by the name of each source."""
    root = tmp_path_factory.mktemp("own")
    writers = {"folder": digits.folder, "npz": digits.npz, "parquet": digits.parquet, "saved": digits.saved}
    return {name: write(root / f"some-{name}") for name, write in writers.items()}
