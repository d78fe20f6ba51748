"""Image sets by name and a user's own data, and the streams that are cut from them.

What needs torch is loaded when it is first used, so that a list of the data sets does not wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from mithridate.data.catalogue import DATASETS, DatasetInfo, NamedSet, PartSizes, dataset_info
from mithridate.data.settings import OWN, StreamSettings

if TYPE_CHECKING:
    from mithridate.data.augment import crop_and_flip
    from mithridate.data.images import ImageSet, load_images
    from mithridate.data.part import Part
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

if not TYPE_CHECKING:  # with it, a type checker would take any name for a public one
    _HOMES = {
        "ImageSet": "images",
        "Part": "part",
        "Stream": "stream",
        "crop_and_flip": "augment",
        "load_images": "images",
        "open_stream": "stream",
    }

    def __getattr__(name: str) -> object:
        """Load a public name when it is first used."""
        if name not in _HOMES:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
