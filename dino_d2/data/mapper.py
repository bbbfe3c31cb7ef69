"""From a record of a dataset to an input of the model; which images are refused, and how."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image, ImageMode, UnidentifiedImageError
from torch import Tensor

from ..names import hint
from .augmentation import ResizeShortestEdge
from .coco_json import DatasetError

# Of photographs, scans and drawings. Pillow opens more (.pcd, .h5, .mpg), which may be anything.
SUFFIXES = frozenset(
    (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
OF_DETECTRON2 = "BGR", "YUV-BT.601"  # formats that PIL does not know


class Mapper(DatasetMapper):
    """Detectron2's mapper, with one sentence about an image that cannot be used.

    Takes the arguments of Detectron2's, or its config. Built from a config for evaluation, it
    resizes with `ResizeShortestEdge`. An image that is read is that of Detectron2's mapper, bit by
    bit; boxes of whole numbers are not rounded when they are resized, as there. An error that no
    image caused is the one that was raised.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        arguments = super().from_config(cfg, is_train)
        if not is_train:
            resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
            arguments["augmentations"] = [resize]
        return arguments

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Args:
            dataset_dict: a record in Detectron2's format; it is not changed

        Returns:
            "image" (C, H, W) of uint8 and, in training, "instances", beside what the record has

        Raises:
            DatasetError: the image cannot be read, has more than 8 bits per channel or another
                size than its annotations say, or a box is not finite
        """
        check_header(dataset_dict["file_name"])
        try:
            return super().__call__(dataset_dict)
        except Exception:
            # Reads the image alone: if that works, the error is of an augmentation or a subclass.
            check_pixels(dataset_dict)
            raise

    def _transform_annotations(
        self, dataset_dict: dict, transforms: T.TransformList, image_shape: tuple[int, int]
    ) -> None:
        for annotation in dataset_dict["annotations"]:
            # Detectron2 would round what becomes of whole numbers down to whole numbers, drop NaN
            # and stretch an infinite box to the border, each without a word.
            annotation["bbox"] = [float(value) for value in annotation["bbox"]]
            if not np.isfinite(annotation["bbox"]).all():
                raise DatasetError(
                    f"image '{dataset_dict['file_name']}' has a box {annotation['bbox']}: "
                    "give finite numbers, in pixels"
                )
        super()._transform_annotations(dataset_dict, transforms, image_shape)


def read_image(path: str, image_format: str) -> np.ndarray:
    """The image (H, W, C) of uint8, turned as its EXIF orientation says.

    Args:
        path: file, or URL that Detectron2 knows
        image_format: "RGB", "BGR" or a mode of PIL

    Raises:
        DatasetError: it cannot be read, or has more than 8 bits per channel
    """
    check_header(path)
    with _read(path):
        return detection_utils.read_image(path, image_format)


def channels_of(image_format: str) -> int:
    """How many channels images of a format have.

    Args:
        image_format: "RGB", "BGR", "L" (grey values) or another that Detectron2 reads images in

    Raises:
        ValueError: neither it nor PIL knows the format, or it has not 8 bits a channel
    """
    if image_format in OF_DETECTRON2:
        return 3
    of_pil = [mode for mode in Image.MODES if ImageMode.getmode(mode).basetype == "L"]
    if image_format not in of_pil:
        raise ValueError(
            f"the image format is {image_format!r}, which is none of 8 bits a channel: change "
            f"INPUT.FORMAT (image_format of the mapper); "
            + hint(str(image_format), (*OF_DETECTRON2, *of_pil))
        )
    return Image.getmodebands(image_format)


def to_picture(image: np.ndarray | Tensor, image_format: str) -> Image.Image:
    """An image (H, W, C) in the format that a model gets it in, to be looked at in RGB."""
    pixels = detection_utils.convert_image_to_rgb(image, image_format)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def check_header(path: str) -> None:
    """Refuse what PIL would open and then misread; takes a hundredth of the time of decoding."""
    with _read(path), PathManager.open(path, "rb") as file, Image.open(file) as image:
        mode = image.mode
    check_mode(mode, f"image '{path}'")


def check_mode(mode: str, what: str) -> None:
    """
    Raises:
        DatasetError: PIL's `mode` is one of more than 8 bits per channel. PIL would cut off what
            exceeds 255 (nearly all, so the image is white), and which range matters in the image
            only its owner knows
    """
    if mode.startswith(("I", "F")):
        raise DatasetError(
            f"{what} has more than 8 bits per pixel (mode {mode}): save it with 8 bits, "
            "of the range that matters"
        )


def image_size(path: Path) -> tuple[int, int]:
    """Width and height, turned as the EXIF orientation says; pixels are not decoded.

    Raises:
        DatasetError: the file cannot be read, or has more than 8 bits per channel
    """
    check_header(str(path))
    with Image.open(path) as image:
        width, height = image.size
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        except Exception:  # damaged EXIF fails in any way, and Detectron2 then turns nothing
            orientation = None
    return (height, width) if orientation in SIDEWAYS else (width, height)


def check_pixels(record: dict) -> None:
    """Decode an image and compare its size with that of its record."""
    path = record["file_name"]
    height, width = read_image(path, "RGB").shape[:2]
    said = record.get("width", width), record.get("height", height)
    if said != (width, height):
        raise DatasetError(
            f"image '{path}' is {width} x {height} pixels, turned as its EXIF orientation says, "
            f"but its annotations say {said[0]} x {said[1]}: correct them and its boxes"
        )


@contextmanager
def _read(path: str) -> Iterator[None]:
    """Around what does nothing but read an image."""
    try:
        yield
    except MemoryError:  # not the fault of the image
        raise
    except Exception as error:  # a damaged image can fail in any way
        raise DatasetError(
            f"image '{path}' cannot be read ({_reason(error)}): replace the file, or remove the "
            "image from the dataset"
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # says how Python calls the opened file
        return "it is empty or of no known format"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0]
