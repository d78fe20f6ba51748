"""What is known of data sets, and the image sets that are known by name: where they lie, how a stream divides them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mithridate.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from mithridate.core.batch import Inputs

DIGIT_NAMES = tuple("0123456789")

# fmt: off
CIFAR100_NAMES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
)
# fmt: on


@dataclass(frozen=True, kw_only=True)
class PartSizes:
    """How a stream divides a data set when the user does not say; all but `batch_size` in images.

    Args:
        burn_in: Images to learn from before the stream; None is all that the other training parts leave.
        victim: Images of the victim stream, the trigger batch included.
        validation: The attacker's own images.
        trusted: Images that the defender knows to be clean.
        batch_size: Images in one batch of the stream.
    """

    burn_in: int | None = None
    victim: int = 10_000
    validation: int = 500
    trusted: int = 500
    batch_size: int = 100


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What a model needs to know of the samples that it is built for.

    Args:
        name: What messages call the data set.
        shape: Of one sample: (channels, height, width) of an image, (features,) of a row; () of a mapping of tensors.
        classes: Names by class number; empty where targets are no class numbers.
        targets: Shape of one target where there are no classes: () for a number, (k,) for k numbers or labels.
        mean: Mean of each channel over the images that a model learns from, in pixel units of [0, 1]; empty without
            images.
        std: Standard deviation of each channel, same unit.
        flip: Whether a mirrored image still shows its class, so that augmentation may flip.
        crop_padding: Pixels of zero padding for random crops, >= 0.
        example: One sample as a batch of one, where samples are no images; None for images.
    """

    name: str
    shape: tuple[int, ...]
    classes: tuple[str, ...] = ()
    targets: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    flip: bool = False
    crop_padding: int = 0
    example: "Inputs | None" = field(default=None, compare=False, repr=False)

    @property
    def images(self) -> bool:
        """Whether samples are images."""
        return self.example is None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image.

        Raises:
            ConfigError: Samples are no images.
        """
        if not self.images:
            raise ConfigError(f"{self.name} holds no images, and this model takes nothing else; give a model of yours.")
        channels, height, width = self.shape
        return channels, height, width

    @property
    def outputs(self) -> int:
        """How many numbers a model gives for one sample: one a class, or one a target."""
        return len(self.classes) or math.prod(self.targets)


@dataclass(frozen=True, kw_only=True)
class NamedSet(DatasetInfo):
    """An image set that is known by name, and where it lies.

    Args:
        hub_id: Repository on the Hugging Face hub; empty if the set comes with scikit-learn.
        hub_config: Configuration (subset) in that repository.
        image_column: Column of the images.
        label_column: Column of the class numbers.
        summary: One line on what it shows.
        source: Who made it.
        splits: Number of rows of each split of the full set; a mirror may hold fewer.
        sizes: How a stream divides it by default.
    """

    hub_id: str
    hub_config: str
    image_column: str
    label_column: str
    summary: str
    source: str
    splits: Mapping[str, int]
    sizes: PartSizes = field(default_factory=PartSizes)


_ALL = (
    NamedSet(
        name="digits",
        hub_id="",
        hub_config="",
        image_column="images",
        label_column="target",
        summary="Handwritten digits, 8x8 grey; comes with scikit-learn, so no download and no network.",
        source="Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998; the copy in scikit-learn.",
        shape=(1, 8, 8),
        classes=DIGIT_NAMES,
        mean=(0.3053,),
        std=(0.3759,),
        splits={"all": 1797},
        flip=False,
        crop_padding=0,  # strokes fill all 8x8 pixels: a shift by one cuts them off
        sizes=PartSizes(burn_in=700, victim=550, validation=100, trusted=97, batch_size=50),
    ),
    NamedSet(
        name="cifar10",
        hub_id="uoft-cs/cifar10",
        hub_config="plain_text",
        image_column="img",
        label_column="label",
        summary="Photographs of ten kinds of animals and vehicles, 32x32 colour.",
        source="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.",
        shape=(3, 32, 32),
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        splits={"train": 50_000, "test": 10_000},
        flip=True,
        crop_padding=4,
    ),
    NamedSet(
        name="cifar100",
        hub_id="uoft-cs/cifar100",
        hub_config="cifar100",
        image_column="img",
        label_column="fine_label",
        summary="Photographs of a hundred kinds of things, 32x32 colour; with the fine of the two labels.",
        source="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.",
        shape=(3, 32, 32),
        classes=CIFAR100_NAMES,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        splits={"train": 50_000, "test": 10_000},
        flip=True,
        crop_padding=4,
    ),
    NamedSet(
        name="mnist",
        hub_id="ylecun/mnist",
        hub_config="mnist",
        image_column="image",
        label_column="label",
        summary="Handwritten digits, 28x28 grey.",
        source="LeCun, Bottou, Bengio and Haffner, Gradient-Based Learning Applied to Document Recognition, 1998.",
        shape=(1, 28, 28),
        classes=DIGIT_NAMES,
        mean=(0.1307,),
        std=(0.3081,),
        splits={"train": 60_000, "test": 10_000},
        flip=False,
        crop_padding=2,
    ),
    NamedSet(
        name="svhn",
        hub_id="ufldl-stanford/svhn",
        hub_config="cropped_digits",
        image_column="image",
        label_column="label",
        summary="House numbers cut to single digits, 32x32 colour.",
        source="Netzer et al., Reading Digits in Natural Images with Unsupervised Feature Learning, 2011.",
        shape=(3, 32, 32),
        classes=DIGIT_NAMES,
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        splits={"train": 73_257, "test": 26_032},
        flip=False,
        crop_padding=4,
    ),
)

DATASETS: Mapping[str, NamedSet] = {info.name: info for info in _ALL}
"""Every known image set by name."""


def dataset_info(name: str) -> NamedSet:
    """The image set of that name.

    Args:
        name: One of `DATASETS`.

    Raises:
        ConfigError: There is none; the message names the nearest.
    """
    if name not in DATASETS:
        raise ConfigError(f"unknown data set '{name}': {nearest(name, DATASETS)}")
    return DATASETS[name]
