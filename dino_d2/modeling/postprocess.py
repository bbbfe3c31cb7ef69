"""From the predictions of the last layer to detections, and to Detectron2's instances."""

from typing import NamedTuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..boxes import cxcywh_to_xyxy
from ..structures import Predictions


class Detections(NamedTuple):
    """The N best (query, class) pairs of each image, the surest first."""

    boxes: Tensor  # (B, N, 4), corners
    scores: Tensor  # (B, N), in [0, 1]
    labels: Tensor  # (B, N), int64 in [0, K)


def best_pairs(predictions: Predictions, max_detections: int) -> Detections:
    """The best (query, class) pairs of each image; a query may give several. No NMS.

    Args:
        predictions: of B images
        max_detections: N; at most Q * K can be had

    Returns:
        boxes are relative to the image without its padding, as those of the predictions
    """
    num_classes = predictions.logits.shape[-1]
    # Probabilities in bfloat16 would tie where logits do not.
    logits = predictions.logits.to(torch.promote_types(predictions.logits.dtype, torch.float32))
    scores = logits.flatten(1).sigmoid()
    scores, indices = scores.topk(min(max_detections, scores.shape[1]), dim=1)
    queries, labels = indices // num_classes, indices % num_classes
    corners = cxcywh_to_xyxy(predictions.boxes)
    return Detections(corners.gather(1, queries[..., None].expand(-1, -1, 4)), scores, labels)


def postprocess(
    predictions: Predictions, image_sizes: list[tuple[int, int]], max_detections: int
) -> list[Instances]:
    """The best pairs of each image as instances.

    Args:
        predictions: of B images
        image_sizes: (height, width) of each image without padding, to which boxes are scaled
        max_detections: per image, at most Q * K can be had

    Returns:
        instances with pred_boxes, scores (falling) and pred_classes
    """
    results = []
    for box, score, label, (height, width) in zip(
        *best_pairs(predictions, max_detections), image_sizes, strict=True
    ):
        boxes = Boxes(box.clone())  # they are scaled in place
        boxes.scale(scale_x=width, scale_y=height)
        results.append(
            Instances((height, width), pred_boxes=boxes, scores=score, pred_classes=label)
        )
    return results
