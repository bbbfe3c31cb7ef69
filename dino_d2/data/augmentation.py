"""The augmentation of DETR and its descendants, from Detectron2's own transforms."""

from collections.abc import Sequence

import numpy as np
from detectron2.data import transforms as T

MIN_SIZES = tuple(range(480, 801, 32))
# Long side in pixels before a crop: resizing a strip of 1 x 10,000 would take gigabytes.
MAX_SIZE_BEFORE_CROP = 10_000


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's, but no side becomes 0: a strip of 1 x 10,000 is resized to 1 x 1333."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        resize = super().get_transform(image)
        if isinstance(resize, T.ResizeTransform):  # a short side of 0 stands for no resize
            resize.new_h, resize.new_w = max(resize.new_h, 1), max(resize.new_w, 1)
        return resize


def detr_augmentation(
    min_sizes: Sequence[int] = MIN_SIZES,
    max_size: int = 1333,
    crop_min_sizes: Sequence[int] = (400, 500, 600),
    crop_size: tuple[float, float] | None = (384, 600),
    crop_prob: float = 0.5,
    flip: str = "horizontal",
    sampling: str = "choice",
    crop_type: str = "absolute_range",
) -> list[T.Augmentation]:
    """Flip; with probability ``crop_prob`` resize and crop; resize. For ``Mapper``.

    As in DETR, ``max_size`` does not limit the resize before the crop. Unlike in DETR,
    `MAX_SIZE_BEFORE_CROP` does, which only strips reach, and an image smaller than the crop is
    not an error.

    Args:
        min_sizes: short sides to choose from, in pixels
        max_size: limit of the long side, in pixels
        crop_min_sizes: short sides to choose from before the crop, in pixels
        crop_size: smallest and largest side of the crop, in pixels unless `crop_type` says
            otherwise; None never crops
        crop_prob: probability of the crop
        flip: "horizontal", "vertical" or "none", as INPUT.RANDOM_FLIP
        sampling: "choice" of one of `min_sizes`, or "range" between two, as
            INPUT.MIN_SIZE_TRAIN_SAMPLING
        crop_type: as INPUT.CROP.TYPE, see Detectron2's `RandomCrop`

    Raises:
        ValueError: an unknown kind of flip, sampling or crop, or sizes that do not go with it
    """
    _check_kinds(flip, sampling, crop_type)
    if sampling == "range" and len(min_sizes) != 2:
        raise ValueError(
            f"the short side is in a range of {list(min_sizes)}; give two sizes, the smallest and "
            "the largest"
        )
    if crop_size and crop_type.startswith("relative") and max(crop_size) > 1:
        raise ValueError(f"the crop is {crop_type} and of {list(crop_size)}; give parts of 1")
    # tuple(): a LazyConfig passes OmegaConf's lists, which are slow to sample from.
    crop = crop_size and T.RandomApply(
        T.AugmentationList(
            [
                ResizeShortestEdge(tuple(crop_min_sizes), MAX_SIZE_BEFORE_CROP, "choice"),
                T.RandomCrop(crop_type, tuple(crop_size)),
            ]
        ),
        prob=crop_prob,
    )
    resize = ResizeShortestEdge(tuple(min_sizes), max_size, sampling)
    flips = {
        "horizontal": [T.RandomFlip(horizontal=True)],
        "vertical": [T.RandomFlip(horizontal=False, vertical=True)],
        "none": [],
    }
    return [*flips[flip], *([crop] if crop else []), resize]


def _check_kinds(flip: str, sampling: str, crop_type: str) -> None:
    for name, value, known in (
        ("flip", flip, ("horizontal", "vertical", "none")),
        ("sampling", sampling, ("choice", "range")),
        ("crop_type", crop_type, ("absolute_range", "absolute", "relative", "relative_range")),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it can be {', '.join(known)}")
