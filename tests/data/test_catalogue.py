from pathlib import Path

import numpy as np
import pytest

from mithridate.core.errors import ConfigError
from mithridate.data import DATASETS, DatasetInfo, dataset_info, load_images


def test_the_known_sets() -> None:
    assert sorted(DATASETS) == ["cifar10", "cifar100", "digits", "mnist", "svhn"]
    assert {name: len(info.classes) for name, info in DATASETS.items()} == {
        "cifar10": 10,
        "cifar100": 100,
        "digits": 10,
        "mnist": 10,
        "svhn": 10,
    }
    assert len(set(DATASETS["cifar100"].classes)) == 100


@pytest.mark.parametrize("info", DATASETS.values(), ids=list(DATASETS))
def test_constants_fit_the_channels_and_only_photographs_are_flipped(info: DatasetInfo) -> None:
    known = dataset_info(info.name)
    assert len(known.mean) == len(known.std) == known.shape[0]
    assert known.flip == known.name.startswith("cifar")


def test_a_slip_of_the_pen_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="unknown data set 'cifar1O': did you mean 'cifar10'"):
        dataset_info("cifar1O")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "split"), [("digits", "all"), ("mnist", "train"), ("cifar10", "train")])
def test_mean_and_std_are_those_of_the_data(name: str, split: str, request: pytest.FixtureRequest) -> None:
    root: Path | None = None if name == "digits" else request.getfixturevalue("data_root")
    images = load_images(name, split, data_root=root)
    counts = [np.bincount(images.x[:, c].ravel(), minlength=256) for c in range(images.x.shape[1])]
    levels = np.arange(256) / 255
    mean = [float((n * levels).sum() / n.sum()) for n in counts]
    std = [float(np.sqrt((n * levels**2).sum() / n.sum() - m**2)) for n, m in zip(counts, mean, strict=True)]
    assert mean == pytest.approx(images.info.mean, abs=1e-4)
    assert std == pytest.approx(images.info.std, abs=1e-4)
