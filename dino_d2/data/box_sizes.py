"""Box sizes after resizing, and boxes per image: warnings about what makes training hard."""

import logging
from collections.abc import Iterator, Sequence
from math import sqrt
from random import Random
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import transforms as T
from detectron2.data.common import MapDataset
from detectron2.structures import BoxMode

from ..names import plural

logger = logging.getLogger(__name__)

SMALL = 16  # pixels; on the finest level of features, of stride 8, two
MAX_IMAGES = 10_000  # to look at, in about a second: most of it is Detectron2's unpickling


class BoxSizes(NamedTuple):
    """The boxes of training images."""

    sides: list[float]  # square roots of their areas, in pixels as trained
    counts: list[int]  # of each image


def log_box_sizes(loader: Any, num_queries: int | None) -> None:
    """Log the sizes of boxes and `warnings_of` them, for Detectron2's loaders of lists of records.

    Args:
        loader: of training data
        num_queries: of the model; None: not known
    """
    dataset = loader
    while dataset is not None and not isinstance(dataset, MapDataset):
        dataset = getattr(dataset, "dataset", None)
    if dataset is None:
        return
    augmentations = getattr(dataset._map_func, "augmentations", None)
    found = resized_boxes(dataset._dataset, getattr(augmentations, "augs", ()))
    if found.sides:
        logger.info(sizes_line(found))
    for warning in warnings_of(found, num_queries):
        logger.warning(warning)


def resized_boxes(records: Sequence[dict], augmentations: Sequence[Any]) -> BoxSizes:
    """Box sizes in training after the last resize alone, at the middle of its sizes.

    No image is read, and of many records only random ones are used, always the same. Crops,
    mixing and augmentations of other kinds are not taken into account.

    Args:
        records: in Detectron2's format; crowd regions, and boxes of images without a size, are left
            out
        augmentations: of a mapper
    """
    resizes = T.ResizeShortestEdge, T.ResizeScale, T.Resize
    resize = next((x for x in reversed(augmentations) if isinstance(x, resizes)), None)
    found = BoxSizes([], [])
    indices: Sequence[int] = range(len(records))
    if len(records) > MAX_IMAGES:  # not every n-th, as neighbours may be frames of a video
        indices = sorted(Random(0).sample(indices, MAX_IMAGES))
    for record in (records[index] for index in indices):
        boxes = [x for x in record.get("annotations", ()) if not x.get("iscrowd")]
        found.counts.append(len(boxes))
        if "height" in record and "width" in record:
            scale = _scale(resize, record["height"], record["width"])
            found.sides.extend(scale * _side(x["bbox"], x["bbox_mode"]) for x in boxes)
    return found


def _scale(resize: Any, height: int, width: int) -> float:
    """The square root of the factor of areas."""
    new_height, new_width = height, width
    if isinstance(resize, T.ResizeShortestEdge):
        sizes = resize.short_edge_length  # two ends of a range, or a list to choose from
        middle = sum(sizes) / 2 if resize.is_range else sorted(sizes)[len(sizes) // 2]
        if middle:  # 0 stands for no resize
            limit = resize.max_size
            new_height, new_width = resize.get_output_shape(height, width, middle, limit)
    elif isinstance(resize, T.ResizeScale):
        middle = (resize.min_scale + resize.max_scale) / 2
        factor = min(resize.target_height / height, resize.target_width / width)
        return middle * factor
    elif isinstance(resize, T.Resize):
        new_height, new_width = resize.shape
    return sqrt(new_height * new_width / (height * width))


def _side(box: Sequence[float], mode: BoxMode) -> float:
    a, b, c, d = box[:4]  # of a rotated box, all but the angle
    width, height = (c - a, d - b) if mode == BoxMode.XYXY_ABS else (c, d)
    return sqrt(max(width, 0) * max(height, 0))


def sizes_line(found: BoxSizes) -> str:
    """One line with the sizes of boxes, of which there is one at least."""
    few, median, many = np.percentile(found.sides, [5, 50, 95])
    return f"Boxes as trained: {few:.0f}, {median:.0f} and {many:.0f} pixels (5 %, median, 95 %)"


def warnings_of(found: BoxSizes, num_queries: int | None) -> Iterator[str]:
    """Sentences on boxes that are too small, and on images with more boxes than queries.

    Args:
        num_queries: of the model; None: not known
    """
    if found.sides and np.percentile(found.sides, 10) < SMALL:
        yield (
            f"A tenth of the boxes is below {SMALL} pixels, which is hard to learn: train on "
            "larger images (INPUT.MIN_SIZE_TRAIN and MIN_SIZE_TEST, or min_sizes and "
            "short_edge_length of a LazyConfig; train_net.py --size changes all)"
        )
    full = sum(num_queries is not None and count > num_queries for count in found.counts)
    if full:
        yield (
            f"{full:,} of {plural(len(found.counts), 'image')} checked: more boxes (up to "
            f"{max(found.counts):,}) than the model has queries ({num_queries:,}), so it cannot "
            "detect all; raise MODEL.DINO.NUM_QUERIES (model.query_selection.num_queries)"
        )
