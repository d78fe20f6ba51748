"""Image sets by name and a user's own data, and the streams that are cut from them."""

from mithridate.data.augment import crop_and_flip
from mithridate.data.catalogue import DATASETS, DatasetInfo, NamedSet, PartSizes, dataset_info
from mithridate.data.images import ImageSet, load_images
from mithridate.data.part import Part
from mithridate.data.settings import OWN, StreamSettings
from mithridate.data.stream import Stream, open_stream

__all__ = [
    "DATASETS",
    "OWN",
    "DatasetInfo",
    "ImageSet",
    "NamedSet",
    "Part",
    "PartSizes",
    "Stream",
    "StreamSettings",
    "crop_and_flip",
    "dataset_info",
    "load_images",
    "open_stream",
]
