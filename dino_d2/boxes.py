"""Box arithmetic, elementwise over the leading dimensions."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert boxes (..., 4) from centre and size to two corners.

    >>> cxcywh_to_xyxy(torch.tensor([0.5, 0.5, 0.5, 1.0]))
    tensor([0.2500, 0.0000, 0.7500, 1.0000])
    """
    center, size = boxes.split(2, -1)
    return torch.cat([center - size / 2, center + size / 2], -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert boxes (..., 4) from two corners to centre and size."""
    low, high = boxes.split(2, -1)
    return torch.cat([(low + high) / 2, high - low], -1)


def inverse_sigmoid(x: Tensor, eps: float = 1e-3) -> Tensor:
    """Finite logit of `x` in [0, 1]: both `x` and `1 - x` are clamped to at least `eps`."""
    return torch.log(x.clamp(eps, 1.0) / (1 - x).clamp(eps, 1.0))


def refine(reference: Tensor, delta: Tensor, eps: float = 1e-3) -> Tensor:
    """Move boxes (..., 4) in [0, 1] by `delta` (..., 4) in the space of logits.

    A reference point (..., 2) is moved likewise and gets its size from `delta`; without a reference
    (..., 0), all is `delta`. Deformable DETR, appendix A.3 and "iterative bounding box refinement"
    in A.4. References are cut off at `eps`, see `inverse_sigmoid`.

    >>> refine(torch.tensor([0.5, 0.5, 0.2, 0.2]), torch.zeros(4))
    tensor([0.5000, 0.5000, 0.2000, 0.2000])
    """
    if not reference.shape[-1]:
        return delta.sigmoid()
    known, unknown = inverse_sigmoid(reference, eps), delta.shape[-1] - reference.shape[-1]
    if unknown:
        known = F.pad(known, (0, unknown))
    return (known + delta).sigmoid()


def iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU in [0, 1] of corner boxes (..., 4), broadcast over leading dimensions; 0 without area.

    >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0]])
    >>> iou(boxes[:, None], boxes)
    tensor([[1.0000, 0.3333],
            [0.3333, 1.0000]])
    """
    overlap, union = overlap_and_union(a, b)
    return (overlap / union.clamp(min=torch.finfo(union.dtype).tiny)).clamp(max=1)


def generalized_iou(a: Tensor, b: Tensor, eps: float = 0.0) -> Tensor:
    """Generalized IoU in [-1, 1] of corner boxes (..., 4), broadcast over leading dimensions.

    Rezatofighi et al., 2019. Boxes without area give 0, not NaN, which would end training. `eps`
    is added to both divisors, as by the code of some detectors.
    """
    (a_low, a_high), (b_low, b_high) = a.split(2, -1), b.split(2, -1)
    overlap, union = overlap_and_union(a, b)
    hull = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).prod(-1)
    tiny = torch.finfo(hull.dtype).tiny
    return overlap / (union + eps).clamp(min=tiny) - (hull - union) / (hull + eps).clamp(min=tiny)


def overlap_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas (...) of intersection and union of corner boxes (..., 4)."""
    (a_low, a_high), (b_low, b_high) = a.split(2, -1), b.split(2, -1)
    overlap = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(-1)
    return overlap, (a_high - a_low).prod(-1) + (b_high - b_low).prod(-1) - overlap


@torch.no_grad()
def distinct(
    corners: Tensor, scores: Tensor, threshold: float, labels: Tensor | None = None
) -> Tensor:
    """Which boxes non-maximum suppression keeps, in each image and of each label: (B, Q) bool.

    From the highest score down, a box is kept unless its IoU with a kept one is above `threshold`.
    Computed in one call for all images and labels, as exported graphs with a dynamic batch size
    need it: boxes are offset vertically by image and horizontally by label. Uses float64, as these
    offsets would round boxes in float32; exported graphs and MPS, which lack it, use float32. One
    GPU synchronisation, for how many are kept.

    >>> corners = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.6], [0.8, 0.8, 0.9, 0.9]]])
    >>> distinct(corners, torch.tensor([[0.7, 0.9, 0.1]]), 0.8)  # an IoU of 5/6
    tensor([[False,  True,  True]])

    Args:
        corners: (B, Q, 4), relative to their image, from -0.5 to 1.5
        scores: (B, Q)
        threshold: in [0, 1]
        labels: (B, Q), int64 from 0 on; None: all boxes have the same
    """
    images = torch.arange(corners.shape[0], device=corners.device)[:, None].expand_as(scores)
    right = torch.zeros_like(images) if labels is None else labels
    apart = 2 * torch.stack([right, images], -1).tile(2)
    narrow = torch.compiler.is_exporting() or corners.device.type == "mps"
    dtype = torch.float32 if narrow else torch.float64
    kept = nms((corners.to(dtype) + apart).flatten(0, 1), scores.to(dtype).flatten(), threshold)
    nothing = torch.zeros_like(scores, dtype=torch.bool)
    return nothing.flatten().index_fill(0, kept, 1).view_as(scores)
