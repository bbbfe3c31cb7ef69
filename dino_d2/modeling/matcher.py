"""Optimal one-to-one assignment of predictions to ground truth (DETR, section 3.1)."""

import numpy as np
import torch
from fvcore.nn import sigmoid_focal_loss
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..boxes import cxcywh_to_xyxy, generalized_iou
from ..structures import Match, Predictions, Target, pad_targets


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
        """Matches every stage and image by itself, with a single transfer from the device.

        Args:
            predictions: of N stages, (N, B, Q, .)
            targets: of B images; those with more boxes than queries match their best Q

        Raises:
            FloatingPointError: a cost is not finite, i.e. a prediction is not
        """
        counts = [len(target.labels) for target in targets]
        labels, boxes, _ = pad_targets(targets, slots=max(counts))
        costs = self.cost(predictions, labels, boxes).cpu().numpy()
        if not np.isfinite(costs).all():
            raise FloatingPointError(
                "predictions or boxes are NaN or infinite: if training has diverged, resume from "
                "an earlier checkpoint with a lower learning rate"
            )
        images, queries, matched, offset = [], [], [], 0
        for image, count in enumerate(counts):
            pairs = [linear_sum_assignment(stage[:, :count]) for stage in costs[:, image]]
            query, box = np.stack(pairs, axis=1)  # (N, n) each
            images.append(np.full(query.shape[1], image))
            queries.append(query)
            matched.append(box + offset)
            offset += count
        parts = np.concatenate(images), np.concatenate(queries, 1), np.concatenate(matched, 1)
        return Match(*(torch.from_numpy(x).to(boxes.device) for x in parts))

    def cost(self, predictions: Predictions, labels: Tensor, boxes: Tensor) -> Tensor:
        """Cost (N, B, Q, M) of giving each query each of the boxes (B, M, 4), labels (B, M)."""
        index = labels[None, :, None].expand(*predictions.logits.shape[:-1], -1)
        logits = predictions.logits.gather(-1, index)
        object_cost, background_cost = (
            sigmoid_focal_loss(logits, torch.full_like(logits, is_object), self.alpha, self.gamma)
            for is_object in (1.0, 0.0)
        )
        giou = generalized_iou(
            cxcywh_to_xyxy(predictions.boxes)[..., None, :], cxcywh_to_xyxy(boxes)[:, None]
        )
        return (
            self.class_cost * (object_cost - background_cost)
            + self.bbox_cost * torch.cdist(predictions.boxes, boxes, p=1)
            - self.giou_cost * giou
        )
