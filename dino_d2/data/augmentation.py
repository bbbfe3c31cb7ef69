"""The augmentation of DETR and its descendants, from Detectron2's own transforms."""

from collections.abc import Sequence

import numpy as np
from detectron2.data import transforms as T

MIN_SIZES = tuple(range(480, 801, 32))
# Of the long side before a crop, in pixels: a strip of 1 x 10,000 would become one of gigabytes.
MAX_SIZE_BEFORE_CROP = 10_000


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's, except that no side vanishes: a strip of 1 x 10,000 that may have 1333 pixels
    becomes one of 1 x 1333, not of 0 x 1333."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        resize = super().get_transform(image)
        if isinstance(resize, T.ResizeTransform):  # a short side of 0 stands for no resize
            resize.new_h, resize.new_w = max(resize.new_h, 1), max(resize.new_w, 1)
        return resize


def detr_augmentation(
    min_sizes: Sequence[int] = MIN_SIZES,
    max_size: int = 1333,
    crop_min_sizes: Sequence[int] = (400, 500, 600),
    crop_size: tuple[int, int] | None = (384, 600),
    crop_prob: float = 0.5,
    flip: str = "horizontal",
) -> list[T.Augmentation]:
    """Flip; with probability ``crop_prob`` resize and crop; resize. For ``Mapper``.

    As in DETR, ``max_size`` does not limit the resize before the crop; what does, unlike there, is
    `MAX_SIZE_BEFORE_CROP`, which only strips reach. An image smaller than the crop is cropped to
    what it has (DETR's own crop fails there).

    Args:
        min_sizes: lengths of the short side to choose from, in pixels.
        max_size: limit of the long side, in pixels.
        crop_min_sizes: lengths of the short side before the crop to choose from, in pixels.
        crop_size: smallest and largest side of the crop, in pixels; None never crops.
        crop_prob: probability of the crop.
        flip: "horizontal", "vertical" or "none", as Detectron2's INPUT.RANDOM_FLIP.

    Raises:
        ValueError: another kind of flip.
    """
    # tuple(): a LazyConfig hands over OmegaConf's lists, which are slow to sample from.
    crop = crop_size and T.RandomApply(
        T.AugmentationList(
            [
                ResizeShortestEdge(tuple(crop_min_sizes), MAX_SIZE_BEFORE_CROP, "choice"),
                T.RandomCrop("absolute_range", tuple(crop_size)),
            ]
        ),
        prob=crop_prob,
    )
    resize = ResizeShortestEdge(tuple(min_sizes), max_size, sample_style="choice")
    flips = {
        "horizontal": [T.RandomFlip(horizontal=True)],
        "vertical": [T.RandomFlip(horizontal=False, vertical=True)],
        "none": [],
    }
    if flip not in flips:
        raise ValueError(f"flip is {flip!r}; it can be {', '.join(flips)}")
    return [*flips[flip], *([crop] if crop else []), resize]
