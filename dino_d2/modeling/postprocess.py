"""Turns the predictions of the last layer into detections and Detectron2's instances."""

from typing import NamedTuple, TypeVar

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..boxes import cxcywh_to_xyxy, distinct
from ..structures import Detections, MaskDetections, Predictions
from .tokens import take_tokens

D = TypeVar("D", Detections, MaskDetections)


def reorder(detections: D, order: Tensor) -> D:
    """Those of each image that `order` (B, N) names."""
    parts = [
        take_tokens(x.flatten(2), order).view_as(x) if x.dim() > 2 else x.gather(1, order)
        for x in detections
    ]
    return type(detections)(*parts)


class Choice(NamedTuple):
    """The N best pairs of query and class of each image, in descending order of score."""

    scores: Tensor  # (B, N), in [0, 1]
    labels: Tensor  # (B, N), int64 in [0, K)
    queries: Tensor  # (B, N), int64 in [0, Q)


def choose_pairs(scores: Tensor, max_detections: int) -> Choice:
    """The best (query, class) pairs of each image, without NMS; a query may appear several times.

    Args:
        scores: (B, Q, K), in [0, 1]
        max_detections: N, at most Q * K
    """
    num_classes = scores.shape[-1]
    scores = scores.flatten(1)
    scores, indices = scores.topk(min(max_detections, scores.shape[1]), dim=1)
    return Choice(scores, indices % num_classes, indices // num_classes)


def choose_classes(scores: Tensor, max_detections: int) -> Choice:
    """The best class of each query, of those of an image the best (DETR's code).

    Args:
        scores: (B, Q, K), in [0, 1]
        max_detections: N, at most Q
    """
    scores, labels = scores.max(-1)
    scores, queries = scores.topk(min(max_detections, scores.shape[1]), dim=1)
    return Choice(scores, labels.gather(1, queries), queries)


def detections_of(predictions: Predictions, choice: Choice) -> Detections:
    """The chosen ones, with boxes relative to the image without its padding."""
    corners = take_tokens(cxcywh_to_xyxy(predictions.boxes), choice.queries)
    return Detections(corners, choice.scores, choice.labels)


def non_maximum_suppression(detections: Detections | MaskDetections, iou: float) -> Tensor:
    """Which detections have no better one of their class and image that overlaps them by more.

    Args:
        iou: largest overlap of two detections of a class, in (0, 1]

    Returns:
        (B, N) bool
    """
    boxes = detections.boxes.clamp(0, 1)  # detections are cut to the image
    return distinct(boxes, detections.scores, iou, detections.labels)


def to_instances(
    detections: Detections | MaskDetections, image_sizes: list[tuple[int, int]]
) -> list[Instances]:
    """Detections of each image (height, width) as instances, with boxes in its pixels."""
    results = []
    parts = detections.boxes, detections.scores, detections.labels
    for box, score, label, (height, width) in zip(*parts, image_sizes, strict=True):
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
    # Different logits can have equal probabilities in bfloat16.
    logits = predictions.logits
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
    choice = choose_pairs(scores, max_detections)
    return to_instances(detections_of(predictions, choice), image_sizes)
