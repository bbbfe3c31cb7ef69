"""Box algebra. Everything is elementwise over the leading dimensions."""

import torch
from torch import Tensor
from torch.nn import functional as F


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre and size to the two corners."""
    center, size = boxes.split(2, -1)
    return torch.cat([center - size / 2, center + size / 2], -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) two corners to centre and size."""
    low, high = boxes.split(2, -1)
    return torch.cat([(low + high) / 2, high - low], -1)


def inverse_sigmoid(x: Tensor, eps: float = 1e-3) -> Tensor:
    """Logit of `x` in [0, 1], finite: both `x` and `1 - x` are taken to be at least `eps`."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def refine(reference: Tensor, delta: Tensor) -> Tensor:
    """Move boxes (..., 4) in [0, 1] by `delta` (..., 4), both seen through a sigmoid.

    A reference point (..., 2) is moved likewise and gets the size that `delta` says. Deformable
    DETR, appendix A.3 and "iterative bounding box refinement" in A.4.
    """
    known, unknown = inverse_sigmoid(reference), delta.shape[-1] - reference.shape[-1]
    if unknown:
        known = F.pad(known, (0, unknown))
    return (known + delta).sigmoid()


def iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU in [0, 1] of corner boxes (..., 4); the leading dimensions broadcast. 0 without area."""
    overlap, union = overlap_and_union(a, b)
    return (overlap / union.clamp(min=torch.finfo(union.dtype).tiny)).clamp(max=1)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized IoU in [-1, 1] of corner boxes (..., 4); the leading dimensions broadcast.

    `generalized_iou(a[:, None], b)` is the matrix of all pairs. Rezatofighi et al., 2019.
    Boxes without area give 0 / 0 = 0 and not NaN, so that one of them cannot end a training.
    """
    (a_low, a_high), (b_low, b_high) = a.split(2, -1), b.split(2, -1)
    overlap, union = overlap_and_union(a, b)
    hull = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).prod(-1)
    tiny = torch.finfo(hull.dtype).tiny
    return overlap / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def overlap_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas (...) of what corner boxes (..., 4) have in common, and of both together."""
    (a_low, a_high), (b_low, b_high) = a.split(2, -1), b.split(2, -1)
    overlap = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(-1)
    return overlap, (a_high - a_low).prod(-1) + (b_high - b_low).prod(-1) - overlap
