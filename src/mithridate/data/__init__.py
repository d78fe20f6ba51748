"""Named image sets as arrays, and the streams that are cut from them."""

from mithridate.data.augment import crop_and_flip
from mithridate.data.catalogue import DATASETS, DatasetInfo, PartSizes, dataset_info
from mithridate.data.images import ImageSet, load_images
from mithridate.data.stream import Part, Stream, StreamSettings, open_stream

__all__ = [
    "DATASETS",
    "DatasetInfo",
    "ImageSet",
    "Part",
    "PartSizes",
    "Stream",
    "StreamSettings",
    "crop_and_flip",
    "dataset_info",
    "load_images",
    "open_stream",
]
