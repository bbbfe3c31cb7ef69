"""Optimal one-to-one assignment of predictions to ground truth (DETR, section 3.1)."""

import numpy as np
import torch
from fvcore.nn import sigmoid_focal_loss
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..boxes import cxcywh_to_xyxy, generalized_iou
from ..structures import Match, Predictions, Target, send

# A crowded image is looked at in parts, so that only its costs grow with its boxes and not the many
# intermediate results too.
BOXES_AT_ONCE = 256


class HungarianMatcher:
    """A plain callable: it has no parameters.

    Args:
        class_cost, bbox_cost, giou_cost: weights of the focal, L1 and generalized IoU costs
        alpha, gamma: of the focal cost (Deformable DETR)
    """

    def __init__(
        self,
        *,
        class_cost: float = 2.0,
        bbox_cost: float = 5.0,
        giou_cost: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ):
        self.class_cost, self.bbox_cost, self.giou_cost = class_cost, bbox_cost, giou_cost
        self.alpha, self.gamma = alpha, gamma

    @torch.no_grad()
    def __call__(self, predictions: Predictions, targets: list[Target]) -> Match:
        """Matches every stage and image by itself; the device is waited for once.

        Args:
            predictions: of N stages, (N, B, Q, .)
            targets: of B images; those with more boxes than queries match their best Q

        Raises:
            FloatingPointError: a cost is not finite, i.e. a prediction is not
        """
        costs = self.costs(predictions, targets)
        packed = assign(costs.cpu(), [len(target.labels) for target in targets])
        images, queries, matched = send(packed, like=costs)
        return Match(images[0], queries, matched)

    def costs(self, predictions: Predictions, targets: list[Target]) -> Tensor:
        """Costs (N, Q, M) of all boxes of the batch, each for the queries of its own image."""
        stages, _, queries, _ = predictions.boxes.shape
        total = sum(len(target.labels) for target in targets)
        costs = predictions.logits.new_empty(stages, queries, total)
        start = 0
        for image, target in enumerate(targets):
            own = Predictions(*(x[:, image] for x in predictions))
            for labels, boxes in zip(*(x.split(BOXES_AT_ONCE) for x in target), strict=True):
                costs[..., start : start + len(labels)] = self.cost(own, labels, boxes)
                start += len(labels)
        return costs

    def cost(self, predictions: Predictions, labels: Tensor, boxes: Tensor) -> Tensor:
        """Cost (..., Q, M) of giving each query of an image each of the boxes (M, 4), labels (M,).

        The predictions are those of the image, (..., Q, .).
        """
        class_cost = focal_change(predictions.logits[..., labels], self.alpha, self.gamma)
        giou = generalized_iou(
            cxcywh_to_xyxy(predictions.boxes)[..., None, :], cxcywh_to_xyxy(boxes)
        )
        return (
            self.class_cost * class_cost
            + self.bbox_cost * torch.cdist(predictions.boxes, boxes, p=1)
            - self.giou_cost * giou
        )


def focal_change(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """By how much the focal loss of each logit is more for an object than for background."""
    there, absent = (
        sigmoid_focal_loss(logits, torch.full_like(logits, is_object), alpha, gamma)
        for is_object in (1.0, 0.0)
    )
    return there - absent


def assign(costs: Tensor, counts: list[int]) -> Tensor:
    """The cheapest assignment of every stage and image, on the CPU.

    Args:
        costs: (N, Q, M) of all boxes of the batch, each for the queries of its own image
        counts: how many of the boxes each image has

    Returns:
        (3, N, n) int64, of each of n pairs its image, its query and its box, counted through the
        batch; every stage has the same images
    """
    table = costs.numpy()
    if not np.isfinite(table).all():
        raise FloatingPointError(
            "predictions or boxes are NaN or infinite: if training has diverged, resume from "
            "an earlier checkpoint with a lower learning rate"
        )
    packed, end = [], 0
    for image, count in enumerate(counts):
        start, end = end, end + count
        pairs = [linear_sum_assignment(stage) for stage in table[..., start:end]]
        queries, boxes = np.stack(pairs, axis=1)  # (N, n) each
        packed.append(np.stack([np.full_like(queries, image), queries, start + boxes]))
    return torch.from_numpy(np.concatenate(packed, axis=-1))
