"""Turns the predictions of the last layer into detections and Detectron2's instances."""

from typing import NamedTuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..boxes import cxcywh_to_xyxy, distinct
from ..structures import Predictions


class Detections(NamedTuple):
    """The N best (query, class) pairs of each image, in descending order of score."""

    boxes: Tensor  # (B, N, 4), corners
    scores: Tensor  # (B, N), in [0, 1]
    labels: Tensor  # (B, N), int64 in [0, K)


def best_pairs(predictions: Predictions, max_detections: int) -> Detections:
    """The best (query, class) pairs of each image, without NMS; a query may appear several times.

    Args:
        predictions: of B images
        max_detections: N, at most Q * K

    Returns:
        with boxes relative to the image without its padding
    """
    num_classes = predictions.logits.shape[-1]
    # Different logits can have equal probabilities in bfloat16.
    logits = predictions.logits.to(torch.promote_types(predictions.logits.dtype, torch.float32))
    scores = logits.flatten(1).sigmoid()
    scores, indices = scores.topk(min(max_detections, scores.shape[1]), dim=1)
    queries, labels = indices // num_classes, indices % num_classes
    corners = cxcywh_to_xyxy(predictions.boxes)
    return Detections(corners.gather(1, queries[..., None].expand(-1, -1, 4)), scores, labels)


def best_classes(predictions: Predictions, max_detections: int) -> Detections:
    """The best class of each query, of those of an image the best (DETR's code).

    Args:
        predictions: of B images, by softmax; the last logit is that of no object
        max_detections: N, at most Q
    """
    logits = predictions.logits.to(torch.promote_types(predictions.logits.dtype, torch.float32))
    scores, labels = logits.softmax(-1)[..., :-1].max(-1)
    scores, best = scores.topk(min(max_detections, scores.shape[1]), dim=1)
    corners = cxcywh_to_xyxy(predictions.boxes)
    boxes = corners.gather(1, best[..., None].expand(-1, -1, 4))
    return Detections(boxes, scores, labels.gather(1, best))


def non_maximum_suppression(detections: Detections, iou: float) -> Tensor:
    """Which detections have no better one of their class and image that overlaps them by more.

    Args:
        iou: largest overlap of two detections of a class, in (0, 1]

    Returns:
        (B, N) bool
    """
    boxes, scores, labels = detections
    return distinct(boxes.clamp(0, 1), scores, iou, labels)  # detections are cut to the image


def to_instances(detections: Detections, image_sizes: list[tuple[int, int]]) -> list[Instances]:
    """Detections of each image (height, width) as instances, with boxes in its pixels."""
    results = []
    for box, score, label, (height, width) in zip(*detections, image_sizes, strict=True):
        boxes = Boxes(box.clone())  # scaling is in place
        boxes.scale(scale_x=width, scale_y=height)
        results.append(
            Instances((height, width), pred_boxes=boxes, scores=score, pred_classes=label)
        )
    return results


def postprocess(
    predictions: Predictions, image_sizes: list[tuple[int, int]], max_detections: int
) -> list[Instances]:
    """The best pairs of each image as instances.

    >>> predictions = Predictions(torch.zeros(1, 1, 1), torch.tensor([[[0.5, 0.5, 1.0, 1.0]]]))
    >>> (instances,) = postprocess(predictions, [(480, 640)], max_detections=1)
    >>> instances.pred_boxes, instances.scores, instances.pred_classes
    (Boxes(tensor([[  0.,   0., 640., 480.]])), tensor([0.5000]), tensor([0]))

    Args:
        predictions: of B images
        image_sizes: (height, width) of each image without padding, to scale boxes to
        max_detections: per image, at most Q * K

    Returns:
        instances with pred_boxes, scores in descending order, and pred_classes
    """
    return to_instances(best_pairs(predictions, max_detections), image_sizes)
