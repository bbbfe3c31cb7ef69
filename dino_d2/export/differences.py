"""Compares the detections of an exported file with those of the model."""

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from ..structures import Detections, MaskDetections

BOX_TOLERANCE, SCORE_TOLERANCE = 0.5, 1e-3  # in pixels, and absolute
MASK_TOLERANCE = 0.01  # of the IoU


class Differences(NamedTuple):
    """Differences of n pairs of detections; infinite if one has no partner of its class."""

    boxes: Tensor  # (n,), the largest difference of four coordinates, in pixels
    scores: Tensor  # (n,)
    masks: Tensor  # (n,), 1 - IoU; 0 without masks

    @property
    def tolerable(self) -> bool:
        close = (self.boxes <= BOX_TOLERANCE) & (self.scores <= SCORE_TOLERANCE)
        return bool((close & (self.masks <= MASK_TOLERANCE)).all())


def compare(
    expected: Detections | MaskDetections, actual: Detections | MaskDetections, threshold: float
) -> Differences:
    """Differences of detections whose score is at least `threshold` in either result.

    Detections are paired one to one by class, box and score, as rounding may change their order.
    """
    pairs = []
    for (box, score, label, *masks), (other_box, other_score, other_label, *other_masks) in zip(
        zip(*expected, strict=True), zip(*actual, strict=True), strict=True
    ):
        distance = (box[:, None] - other_box).abs().amax(-1)
        apart = torch.stack([distance, (score[:, None] - other_score).abs()], -1)
        apart[label[:, None] != other_label] = torch.inf
        count = max(len(score), len(other_score))  # pad the shorter one with no partners
        below, right = count - len(score), count - len(other_score)
        apart = F.pad(apart, (0, 0, 0, right, 0, below), value=torch.inf)
        tops = torch.maximum(F.pad(score, (0, below))[:, None], F.pad(other_score, (0, right)))
        cost = (apart / torch.tensor([BOX_TOLERANCE, SCORE_TOLERANCE])).amax(-1)
        rows, columns = map(torch.from_numpy, linear_sum_assignment(cost.nan_to_num(1e9, 1e9)))
        found, counted = apart[rows, columns], tops[rows, columns] >= threshold
        differing = found.new_zeros(count, 1)
        if masks and other_masks and len(score) == len(other_score):
            differing = 1 - mask_iou(masks[0][rows] > 0, other_masks[0][columns] > 0)[:, None]
        pairs.append(torch.cat([found, differing], 1)[counted])
    return Differences(*torch.cat(pairs).unbind(-1))


def mask_iou(masks: Tensor, others: Tensor) -> Tensor:
    """IoU (n,) of masks (n, h, w), one by one; 1 if both are empty."""
    both, either = (masks & others).sum((1, 2)), (masks | others).sum((1, 2))
    return torch.where(either > 0, both / either, 1)
