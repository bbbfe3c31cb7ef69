"""Detection in overlapping tiles, for small objects in large images."""

import logging
import math
from types import ModuleType
from typing import Any

import numpy as np
import torch

from .detectron import Boxes, Instances
from .predictor import Predictor
from .ranges import require_share, require_whole

logger = logging.getLogger(__name__)

OVERLAP = 0.2  # of neighbouring tiles, as a share of their size
MANY = 300  # tiles of an image
COVERED = 0.5  # share of a detection, from which on a better one of its class replaces it


def supervision() -> ModuleType:
    """Import supervision; raise an ImportError with a hint if it is not installed."""
    try:
        import supervision
    except ImportError as error:
        raise ImportError("tiles need supervision: pip install supervision") from error
    return supervision


def warn_of_many(height: int, width: int, size: int, shared: int) -> None:
    """Warn of an image with many tiles, neighbours of which share so many pixels."""
    number = math.prod(max(1, -(-(side - shared) // (size - shared))) for side in (height, width))
    if number > MANY:
        logger.warning(
            f"An image of {width} x {height} pixels has {number:,} tiles of {size} pixels, which "
            "take as long as that many images: larger tiles are faster"
        )


def detect_in_tiles(
    predictor: Predictor,
    image: np.ndarray,
    size: int,
    overlap: float = OVERLAP,
    batch_size: int = 1,
    threshold: float | None = None,
) -> Instances:
    """Detect in square tiles of an image, each of which is resized like an image.

    Detections of all tiles are merged by class-wise non-maximum suppression, by the covered share
    of the smaller detection (its mask, otherwise its box): so the part of an object at the border
    of a tile is suppressed by the whole object in the next one. Objects larger than the overlap may
    be cut in every tile.

    Args:
        predictor: detects in each tile
        image: (H, W, 3) of uint8 in RGB
        size: height and width of a tile, in pixels of the image
        overlap: of neighbouring tiles, as a share of their size, below 1
        batch_size: tiles at once
        threshold: as of `Predictor`

    Returns:
        as of `Predictor`; pred_masks only where there are detections

    Raises:
        ValueError: a size, an overlap or a threshold is invalid
        ImportError: supervision, which cuts and merges, is not installed
    """
    require_whole(size=size, batch_size=batch_size)
    require_share(overlap=overlap)
    sv = supervision()
    shared = min(round(overlap * size), size - 1)
    warn_of_many(image.shape[0], image.shape[1], size, shared)

    def detect(tiles: Any) -> Any:
        """In one tile or, with a batch size of more than 1, in a list of them."""
        found = predictor(tiles, threshold)
        if isinstance(found, list):
            return [sv.Detections.from_detectron2({"instances": x}) for x in found]
        return sv.Detections.from_detectron2({"instances": found})

    found = sv.InferenceSlicer(
        detect,
        slice_wh=size,
        overlap_wh=shared,
        overlap_metric="IOS",  # intersection over the smaller one
        iou_threshold=COVERED,
        compact_masks=True,  # run lengths: of a large image, thousands of masks would not fit
        batch_size=batch_size,
    )(image)
    order = np.argsort(-found.confidence, kind="stable")
    instances = Instances(
        image.shape[:2],
        pred_boxes=Boxes(torch.from_numpy(found.xyxy[order]).float()),
        scores=torch.from_numpy(found.confidence[order]),
        pred_classes=torch.from_numpy(found.class_id[order]),
    )
    if found.mask is not None:
        instances.pred_masks = torch.from_numpy(found.mask.to_dense()[order])
    return instances
