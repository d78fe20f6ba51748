"""Encoded images as arrays of bytes. Files are not trusted: few formats, one size, and a limit on the pixels."""

import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mithridate.core.errors import DataError

FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")
"""What is read; Pillow knows more, and some of it runs other programs."""

CHANNELS = {"L": 1, "RGB": 3}
"""Modes of Pillow that are read: grey and colour, a byte a channel."""

MAX_PIXELS = 2**24
"""Largest image, in pixels; a larger one is refused before it is decoded."""


class Frame(NamedTuple):
    """What the header of an image says.

    Args:
        mode: `L` (grey) or `RGB`.
        height: In pixels, as the image is to be seen.
        width: In pixels, likewise.
    """

    mode: str
    height: int
    width: int

    def __str__(self) -> str:
        return f"mode {self.mode}, {self.height}x{self.width} pixels"


def decode_images(
    images: Iterable[tuple[str, Path | bytes]], *, frame: Frame | None = None, whose: str = ""
) -> NDArray[np.uint8]:
    """Decode images that share one size and mode, each turned as its EXIF orientation says.

    Args:
        images: For each image what messages call it, and its file or content.
        frame: The frame that all images must have; None: that of the first image.
        whose: What messages call the owner of `frame`.

    Shape:
        Returns (n, channels, height, width); (0, 0, 0, 0) if there are none.

    Raises:
        DataError: An image is unreadable, of another size or mode than the others, or too large.
    """
    pixels = []
    for where, image in images:
        decoded, image_frame = _decode(image, where, frame, whose)
        frame, whose = (image_frame, where) if frame is None else (frame, whose)
        pixels.append(decoded)
    if not pixels:
        return np.empty((0, 0, 0, 0), dtype=np.uint8)
    stacked = np.stack(pixels)
    return np.ascontiguousarray(stacked.transpose(0, 3, 1, 2) if stacked.ndim == 4 else stacked[:, None])


def _decode(image: Path | bytes, where: str, wanted: Frame | None, whose: str) -> tuple[NDArray[np.uint8], Frame]:
    try:
        with _opened(image) as opened:
            stored = Frame(opened.mode, opened.height, opened.width)
            lying = Frame(opened.mode, opened.width, opened.height)
            _check(lying if wanted == lying else stored, where, wanted, whose)
            _check_alone(opened, where)
            if opened.format != "PNG":
                return _turned(opened, where, wanted, whose)
            opened.verify()  # the sums of a PNG, which decoding passes over; the file must be opened again
        with _opened(image) as opened:
            return _turned(opened, where, wanted, whose)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{where} has too many pixels, and {MAX_PIXELS:,} are the most; shrink it.") from error
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them stumble over
        raise DataError(
            f"{where} is not a readable image ({type(error).__name__}: {str(error)[:200]}); fetch it again, or take it "
            f"out. Read are {', '.join(FORMATS)}."
        ) from error


def _opened(image: Path | bytes) -> Image.Image:
    """The header is read, and nothing is decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower, and comes next
        return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS)


def _turned(image: Image.Image, where: str, wanted: Frame | None, whose: str) -> tuple[NDArray[np.uint8], Frame]:
    """The pixels as they are to be seen: cameras store what the sensor saw, and beside it how they were held."""
    ImageOps.exif_transpose(image, in_place=True)
    pixels = np.asarray(image)
    frame = Frame(image.mode, *pixels.shape[:2])
    _check(frame, where, wanted, whose)
    return pixels, frame


def _check_alone(image: Image.Image, where: str) -> None:
    if (pictures := getattr(image, "n_frames", 1)) > 1:
        raise DataError(f"{where} holds {pictures} pictures; give one a file.")


def _check(frame: Frame, where: str, wanted: Frame | None, whose: str) -> None:
    if wanted is not None and frame != wanted:
        raise DataError(f"{where} is an image of {frame}; {whose} has {wanted}. All must be alike: convert it.")
    if frame.mode not in CHANNELS:
        raise DataError(f"{where} is an image of {frame}; convert it to grey (L) or colour (RGB), a byte a channel.")
    if frame.height * frame.width > MAX_PIXELS:
        raise DataError(f"{where} has {frame.height}x{frame.width} pixels, and {MAX_PIXELS:,} are the most; shrink it.")
