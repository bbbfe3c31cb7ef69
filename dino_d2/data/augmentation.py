"""The augmentation of DETR and its descendants, and more, from Detectron2's own transforms."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data import transforms as T
from detectron2.structures import Boxes
from detectron2.utils.registry import Registry
from omegaconf import OmegaConf
from torch import Tensor

from ..names import hint
from ..ranges import require_positive, require_share

AUGMENTATION_REGISTRY = Registry("AUGMENTATION")
MIN_SIZES = tuple(range(480, 801, 32))
# Long side in pixels before a crop: resizing a strip of 1 x 10,000 would take gigabytes.
MAX_SIZE_BEFORE_CROP = 10_000


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's, but no side becomes 0: a strip of 1 x 10,000 is resized to 1 x 1333."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return _at_least_a_pixel(super().get_transform(image))


class ResizeScale(T.ResizeScale):
    """Detectron2's, but no side becomes 0."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return _at_least_a_pixel(super().get_transform(image))


class RandomSaturation(T.RandomSaturation):
    """Detectron2's, for channels of any number and order: gray is their mean."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        weight = np.random.uniform(self.intensity_min, self.intensity_max)
        gray = image.mean(axis=2, keepdims=True)
        return T.BlendTransform(src_image=gray, src_weight=1 - weight, dst_weight=weight)


def detr_augmentation(
    min_sizes: Sequence[int] = MIN_SIZES,
    max_size: int = 1333,
    crop_min_sizes: Sequence[int] = (400, 500, 600),
    crop_size: tuple[float, float] | None = (384, 600),
    crop_prob: float = 0.5,
    flip: str = "horizontal",
    sampling: str = "choice",
    crop_type: str = "absolute_range",
    scale_jitter: Sequence[float] = (),
    photometric: float = 0.0,
    further: Sequence = (),
) -> list[T.Augmentation]:
    """Flip; with probability ``crop_prob`` resize and crop; resize; colours; further ones. For
    ``Mapper``.

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
        flip: "horizontal", "vertical", "both" (each half of the time) or "none", as
            INPUT.RANDOM_FLIP
        sampling: "choice" of one of `min_sizes`, or "range" between two, as
            INPUT.MIN_SIZE_TRAIN_SAMPLING
        crop_type: as INPUT.CROP.TYPE, see Detectron2's `RandomCrop`
        scale_jitter: empty, or smallest and largest factor: in place of the last resize, the long
            side becomes `max_size` times a factor, and what exceeds `max_size` is cropped
            (large-scale jitter, Simple Copy-Paste, https://arxiv.org/abs/2012.07177, sec. 3)
        photometric: brightness, contrast and saturation are multiplied by a factor each, which
            deviates from 1 by this at most; 0: unchanged
        further: the last ones, by name, see `named_augmentations`

    Raises:
        ValueError: an unknown kind of flip, sampling or crop, or numbers that do not go with it
    """
    _check_kinds(flip, sampling, crop_type)
    if sampling == "range" and len(min_sizes) != 2:
        raise ValueError(
            f"the range of the short side is {list(min_sizes)}; give two sizes, the smallest and "
            "the largest"
        )
    if crop_size and crop_type.startswith("relative") and max(crop_size) > 1:
        raise ValueError(f"the crop is {crop_type}, of size {list(crop_size)}; give fractions of 1")
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
    if scale_jitter:
        resize = _jitter_scale(scale_jitter, max_size)
    else:
        resize = [ResizeShortestEdge(tuple(min_sizes), max_size, sampling)]
    flips = {
        "horizontal": [T.RandomFlip(horizontal=True)],
        "vertical": [T.RandomFlip(horizontal=False, vertical=True)],
        "none": [],
    }
    flips["both"] = flips["horizontal"] + flips["vertical"]
    # Colours come last, as photographs are larger before the resize.
    colours = [*_change_colours(photometric), *named_augmentations(further)]
    return [*flips[flip], *([crop] if crop else []), *resize, *colours]


def named_augmentations(names: Sequence) -> list[T.Augmentation]:
    """Augmentations of INPUT.AUGMENTATIONS: registered ones, or Detectron2's transforms.

    Args:
        names: of each a name, [name, {arguments}] or {name: {arguments}}

    Raises:
        ValueError: a name is unknown, or its arguments are not those that it takes
    """
    known = {name: x for name, x in vars(T).items() if _is_augmentation(x)}
    known |= {x.__name__: x for x in (ResizeShortestEdge, ResizeScale, RandomSaturation)}
    known |= dict(AUGMENTATION_REGISTRY)
    if OmegaConf.is_config(names):
        names = OmegaConf.to_container(names)
    return [_named_augmentation(entry, known) for entry in names]


def _named_augmentation(entry: Any, known: Mapping[str, Callable]) -> T.Augmentation:
    name: Any = entry
    options: Any = {}
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, options),) = entry.items()
    elif isinstance(entry, list | tuple) and len(entry) == 2:
        name, options = entry
    if not isinstance(name, str) or not isinstance(options, dict):
        raise ValueError(
            f"INPUT.AUGMENTATIONS has {entry!r}: write a name, or [name, {{argument: value}}]"
        )
    if name not in known:
        raise ValueError(
            f"INPUT.AUGMENTATIONS has {name!r}, which is unknown; " + hint(name, sorted(known))
        )
    try:
        made: T.Augmentation = known[name](**options)
    except (AssertionError, TypeError, ValueError) as error:
        reason = str(error) or "it does not take these arguments"
        raise ValueError(f"INPUT.AUGMENTATIONS, {name}: {reason}") from error
    return made


_OF_OTHERS = (T.Augmentation, T.AugmentationList, T.RandomApply)  # which take augmentations


def _is_augmentation(x: object) -> bool:
    return isinstance(x, type) and issubclass(x, T.Augmentation) and x not in _OF_OTHERS


def _jitter_scale(scales: Sequence[float], size: int) -> list[T.Augmentation]:
    if len(scales) != 2 or scales[0] > scales[1]:
        raise ValueError(
            f"the scale jitter is {list(scales)}; give two factors, the smallest and the largest"
        )
    require_positive(**{"a factor of the scale jitter": scales[0]})
    return [ResizeScale(*scales, size, size), T.RandomCrop("absolute", (size, size))]


def _change_colours(strength: float) -> list[T.Augmentation]:
    require_share(**{"the strength of photometric augmentation": strength})
    kinds = T.RandomBrightness, T.RandomContrast, RandomSaturation
    return [kind(1 - strength, 1 + strength) for kind in kinds] if strength else []


def _at_least_a_pixel(resize: T.Transform) -> T.Transform:
    if isinstance(resize, T.ResizeTransform):  # a short side of 0 stands for no resize
        resize.new_h, resize.new_w = max(resize.new_h, 1), max(resize.new_w, 1)
    return resize


def visible(boxes: Boxes, size: tuple[int, int], share: float) -> Tensor:
    """Which boxes (N) have at least a share of their area inside an image of size (H, W)."""
    inside = boxes.clone()
    inside.clip(size)
    return inside.area() >= share * boxes.area()


def _check_kinds(flip: str, sampling: str, crop_type: str) -> None:
    for name, value, known in (
        ("flip", flip, ("horizontal", "vertical", "none", "both")),
        ("sampling", sampling, ("choice", "range")),
        ("crop_type", crop_type, ("absolute_range", "absolute", "relative", "relative_range")),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it can be {', '.join(known)}")
