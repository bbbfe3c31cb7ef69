"""The augmentation of DETR and its descendants, from Detectron2's own transforms."""

from collections.abc import Sequence

from detectron2.data import transforms as T

MIN_SIZES = tuple(range(480, 801, 32))


def detr_augmentation(
    min_sizes: Sequence[int] = MIN_SIZES,
    max_size: int = 1333,
    crop_min_sizes: Sequence[int] = (400, 500, 600),
    crop_size: tuple[int, int] | None = (384, 600),
    crop_prob: float = 0.5,
    flip: str = "horizontal",
) -> list[T.Augmentation]:
    """Flip; with probability ``crop_prob`` resize and crop; resize. For ``DatasetMapper``.

    As in DETR, the resize before the crop has no limit of its long side. An image smaller than
    the crop is cropped to what it has (DETR's own crop fails there).

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
                T.ResizeShortestEdge(tuple(crop_min_sizes), sample_style="choice"),
                T.RandomCrop("absolute_range", tuple(crop_size)),
            ]
        ),
        prob=crop_prob,
    )
    resize = T.ResizeShortestEdge(tuple(min_sizes), max_size, sample_style="choice")
    flips = {
        "horizontal": [T.RandomFlip(horizontal=True)],
        "vertical": [T.RandomFlip(horizontal=False, vertical=True)],
        "none": [],
    }
    if flip not in flips:
        raise ValueError(f"flip is {flip!r}; it can be {', '.join(flips)}")
    return [*flips[flip], *([crop] if crop else []), resize]
