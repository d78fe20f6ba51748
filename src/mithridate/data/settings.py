"""`[data]` of a recipe: which samples a run sees, and in what portions."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from mithridate.core.errors import ConfigError, nearest
from mithridate.core.files import AbsolutePath
from mithridate.core.registry import settings
from mithridate.data.catalogue import DATASETS
from mithridate.data.division import Size, counts, pools, sizes_by_default

OWN: Mapping[str, str] = {
    "folder": "Image files in a folder a class: path/CLASS/*.png, or path/train/CLASS/*.png and path/test/CLASS/*.png.",
    "npz": "Arrays of any kind in one .npz file: x and y, or x_train, y_train, x_test and y_test; names in classes.",
    "parquet": "Images of a Hugging Face repository as it lies on disk: path/train*.parquet, path/test*.parquet.",
    "saved": "Images of a Hugging Face data set as `save_to_disk` wrote it.",
}
"""How a user's own data may lie: the names for it in `[data]`, and what `path` then leads to."""

ARRAYS = "arrays"
"""The name of what was made by `Stream.from_arrays`; no recipe can find it again."""


def _size(smallest: int) -> PlainValidator:
    """A number of samples, or a share: 1 is one sample, and 1.0 is neither."""

    def check(value: object) -> Size:
        if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= smallest:
            return int(value)
        if isinstance(value, float) and 0 < value < 1:
            return float(value)
        raise ValueError(
            f"give a number of samples, {smallest} or more, without a point (such as 500), or a share of the split "
            "between 0 and 1 (such as 0.25)"
        )

    return PlainValidator(check)


def _domain(value: object) -> Literal["observed"] | tuple[float, float]:
    if isinstance(value, str) and value == "observed":
        return "observed"
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(v) in {int, float} for v in value):
        low, high = map(float, value)
        if low < high:  # false for NaN
            return low, high
    raise ValueError("give two numbers, the lower first (-inf and inf are no bounds), or 'observed'")


AnyNumber = Annotated[Size, _size(0)]
Some = Annotated[Size, _size(1)]


@settings
class StreamSettings:
    """Which samples a run sees, and in what portions.

    A size is a number of samples, or a share in (0, 1) of the split that they are cut from (0.25 is a quarter of it).
    Sets with a train and a test split give burn-in, victim and trusted samples from the first, validation and test
    samples from the second; a lone split gives all parts.

    Args:
        name: An image set (one of `DATASETS`), or how own data lie: one of `OWN`.
        path: File or folder of own data. In a recipe, one that is not absolute starts at the recipe's folder.
        split: Cut every part from this split alone. Unset: train and test, or the only one there is.
        columns: Image and label column of `parquet` and `saved`. Unset: the only ones of their type.
        burn_in: Samples to learn from before the stream, >= 0. Unset: 700 of digits; else all that the others leave.
        victim: Samples of the victim stream, >= 1: the accumulative batches and the trigger batch. Unset: 550 of
            digits, 10,000 of other image sets by name; of own data three tenths, 10,000 at most.
        validation: The attacker's own samples S_val, >= 0. Unset: 100 of digits, 500 of other image sets by name; of
            own data a twentieth, 500 at most.
        trusted: Samples that the defender knows to be clean, >= 0. Unset: 97 of digits, 500 of other image sets by
            name; of own data a twentieth, 500 at most.
        test: Samples on which accuracy is reported, >= 1. Unset: the rest of the test split; of a lone split a fifth,
            or what the others leave if `burn_in` is set (350 of digits).
        overlap: Whether victim samples are some of the burn-in part, so that the stream shows what the burn-in has
            seen; then they take nothing from the other parts.
        passes: How often the stream may go over the victim part, >= 1. Part and batch of one size repeat one batch.
        reshuffle: Whether every pass has an order of its own; false: all have that of the first.
        batch_size: Samples in one batch of the stream, >= 1. Unset: 50 of digits, 100 of other image sets by name; of
            own data as many as leave 20 accumulative batches and the trigger, 100 at most.
        augment: Whether burn-in batches are randomly cropped and flipped, as far as `crop_padding` and `flip` go.
            Unset: images are.
        augment_stream: Whether the victim's batches are cropped and flipped, too, before anyone poisons them.
        flip: Whether a mirrored image still shows its class, so that augmentation may flip. Unset: known of image
            sets by name; false for own ones.
        crop_padding: Pixels of zero padding for random crops, >= 0. Unset: known of image sets by name; 0 for own.
        mean: Mean of each channel, in pixel units of [0, 1]; models subtract it. Unset: known of image sets by name;
            of own images measured on the burn-in part.
        std: Standard deviation of each channel, same unit, > 0; models divide by it. Unset: known of image sets
            by name; of own images measured on the burn-in part.
        domain: What a valid input of `npz` is, if it is no image: the least and the largest value of each feature, or
            `observed` for those of the data, feature by feature. Unset: any number.
        seed: Decides which sample goes to which part.

    Source:
        Pang et al., NeurIPS 2021: two epochs of the training set after forty of it (`overlap`, `passes = 2`); their
        code feeds one batch at every step, cropped and flipped anew (`augment_stream`), and divides by a `std` of
        0.2023, 0.1994, 0.2010.
    """

    name: str = "digits"
    path: AbsolutePath | None = None
    split: str | None = None
    columns: tuple[str, str] | None = None
    burn_in: AnyNumber | None = None
    victim: Some | None = None
    validation: AnyNumber | None = None
    trusted: AnyNumber | None = None
    test: Some | None = None
    overlap: bool = False
    passes: Annotated[int, Field(ge=1)] = 1
    reshuffle: bool = True
    batch_size: Annotated[int, Field(ge=1)] | None = None
    augment: bool | None = None
    augment_stream: bool = False
    flip: bool | None = None
    crop_padding: Annotated[int, Field(ge=0)] | None = None
    mean: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] | None = None
    std: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] | None = None
    domain: Annotated[Literal["observed"] | tuple[float, float], PlainValidator(_domain)] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in {*DATASETS, *OWN, ARRAYS}:
            raise ConfigError(f"unknown data set '{self.name}': {nearest(self.name, [*DATASETS, *OWN])}")
        known = DATASETS.get(self.name)
        if known and self.split is not None and self.split not in known.splits:
            raise ConfigError(f"{self.name} has no split '{self.split}': {nearest(self.split, known.splits)}")
        if self.name in OWN and self.path is None:
            raise ConfigError(f"[data] name = '{self.name}' needs a `path`: where the data lie.")
        belongs: dict[str, Collection[str]] = {
            "path": OWN,
            "split": (*DATASETS, *OWN),
            "columns": ("parquet", "saved"),
            "domain": ("npz", ARRAYS),
        }
        for key, of in belongs.items():
            if getattr(self, key) is not None and self.name not in of:
                raise ConfigError(f"[data] {key} says nothing of '{self.name}', but of {', '.join(of)}; leave it out.")

    @property
    def label(self) -> str:
        """What messages and tables call the data: the name, or the last part of the path."""
        if self.path is None:
            return self.name
        return Path(self.path).name.removesuffix(".npz").removesuffix(".parquet")

    def resolved(self, rows: Mapping[str, int] | None = None) -> "StreamSettings":
        """The same settings with a number of samples as every size.

        Args:
            rows: Samples that each split really holds; None: as many as the full set, where that is known by name (own
                data are returned as they are).

        Raises:
            DataError: The parts need more samples than there are.
        """
        known = DATASETS.get(self.name)
        if rows is None:
            if known is None:
                return self
            rows = known.splits if self.split is None else {self.split: known.splits[self.split]}
        sizes: dict[str, Any] = {}
        for split, parts in pools(rows).items():
            asked: dict[str, Size | None] = {part: getattr(self, part) for part in parts}
            default: dict[str, int | None] = dict(sizes_by_default(rows[split], asked))
            if known is not None and rows.keys() == known.splits.keys():
                default = {part: getattr(known.sizes, part, None) for part in parts}
            inside = {"victim"} if self.overlap else set()
            sizes |= counts(asked, default, rows[split], inside=inside, where=f"{self.label}: the split '{split}'")
        batch_size = known.sizes.batch_size if known else max(1, min(100, sizes["victim"] // 21))
        augment = self.augment if known is None or self.augment is not None else True
        return replace(self, **sizes, batch_size=self.batch_size or batch_size, augment=augment)
