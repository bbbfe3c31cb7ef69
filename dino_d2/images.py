"""Reads images: any format of Pillow, rotated by EXIF, as the arrays that Detectron2 makes of them.

Needs no Detectron2, as exported files are run where there is none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageMode, UnidentifiedImageError

from .detectron import PathManager
from .errors import DatasetError
from .names import hint

# Photographs, scans and drawings. Pillow also opens .pcd, .h5 or .mpg, which may be anything.
SUFFIXES = {".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# How EXIF orientations are made upright, and which of them exchange width and height.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)
OF_DETECTRON2 = "BGR", "YUV-BT.601"  # formats of Detectron2 that are not modes of PIL
WRONG_CHANNELS = (
    "images have {}, but the model has means and deviations for {}: change INPUT.FORMAT "
    "(image_format of the mappers), or MODEL.PIXEL_MEAN and MODEL.PIXEL_STD (model.pixel_mean and "
    "model.pixel_std)"
)
RGB_TO_YUV = (0.299, 0.587, 0.114), (-0.14713, -0.28886, 0.436), (0.615, -0.51499, -0.10001)


def read_image(path: str, image_format: str) -> np.ndarray:
    """Read an image (H, W, C) of uint8, rotated by its EXIF orientation.

    Args:
        path: a file, or an address that Detectron2 can read
        image_format: "RGB", "BGR" or a mode of PIL

    Raises:
        DatasetError: it cannot be read, or has more than 8 bits per channel
    """
    check_header(path)
    with _read(path), PathManager.open(path, "rb") as file, Image.open(file) as image:
        turn = TURNS.get(orientation_of(image))
        return to_array(image if turn is None else image.transpose(turn), image_format)


def to_array(image: Image.Image, image_format: str) -> np.ndarray:
    """An image (H, W, C) as Detectron2 gives it: uint8, or for YUV-BT.601 float64.

    Args:
        image: its EXIF orientation is ignored
        image_format: "RGB", "BGR", "YUV-BT.601" or a mode of PIL
    """
    pixels = np.asarray(image.convert("RGB" if image_format in OF_DETECTRON2 else image_format))
    if image_format == "BGR":
        return pixels[:, :, ::-1]
    if image_format == "YUV-BT.601":
        return pixels / 255.0 @ np.array(RGB_TO_YUV).T
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def channels_of(image_format: str) -> int:
    """The number of channels of an image format: "RGB", "BGR", "L" or another mode of PIL.

    Raises:
        ValueError: the format is unknown, or does not have 8 bits per channel
    """
    if image_format in OF_DETECTRON2:
        return 3
    of_pil = [mode for mode in Image.MODES if ImageMode.getmode(mode).basetype == "L"]
    if image_format not in of_pil:
        raise ValueError(
            f"the image format is {image_format!r}, not one of 8 bits per channel: change "
            f"INPUT.FORMAT (image_format of the mapper); "
            + hint(str(image_format), (*OF_DETECTRON2, *of_pil))
        )
    return Image.getmodebands(image_format)


def check_header(path: str) -> None:
    """Refuse images that PIL would misread, in a hundredth of the time of decoding."""
    with _read(path), PathManager.open(path, "rb") as file, Image.open(file) as image:
        mode = image.mode
    check_mode(mode, f"image '{path}'")


def check_mode(mode: str, what: str) -> None:
    """Raise a DatasetError for PIL's modes with more than 8 bits per channel.

    PIL would clip them to 255, so most images would be white; only their owner knows the range.
    """
    if mode.startswith(("I", "F")):
        raise DatasetError(
            f"{what} has more than 8 bits per pixel (mode {mode}): save it with 8 bits, "
            "scaled from the range that matters"
        )


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height after EXIF rotation, without decoding; a DatasetError if unreadable."""
    check_header(str(path))
    with Image.open(path) as image:
        width, height = image.size
        return (height, width) if orientation_of(image) in SIDEWAYS else (width, height)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, if there is none or the EXIF data are damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data may raise anything; Detectron2 ignores it, too
        return 1


@contextmanager
def _read(path: str) -> Iterator[None]:
    """Turns errors of code that only reads an image into a DatasetError."""
    try:
        yield
    except MemoryError:  # not the fault of the image
        raise
    except Exception as error:  # a damaged image may raise anything
        raise DatasetError(
            f"image '{path}' cannot be read ({_reason(error)}): replace the file, or remove the "
            "image from the dataset"
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text has the repr of a file object
        return "it is empty or of no known format"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0]
