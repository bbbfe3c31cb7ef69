"""Masks at the size of images.

At full resolution there are never more than `MASKS_AT_ONCE` maps, so that memory does not grow with
detections or queries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MASKS_AT_ONCE = 16  # at full resolution


def resize_masks(
    logits: Tensor, stride: int, image_size: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Masks of an image at another size, and how certain they are.

    Args:
        logits: (n, h, w) of the padded image, of which a pixel is `stride` of the image's
        image_size: height and width of the image without padding
        size: height and width of the masks

    Returns:
        masks (n, height, width) bool; and (n,) the mean probability of each one's pixels, in [0, 1]
    """
    masks = torch.empty(len(logits), *size, dtype=torch.bool, device=logits.device)
    certainty = logits.new_empty(
        len(logits), dtype=torch.promote_types(logits.dtype, torch.float32)
    )
    for start in range(0, len(logits), MASKS_AT_ONCE):
        part = slice(start, start + MASKS_AT_ONCE)
        maps = resize_maps(logits[part], stride, image_size, size)
        masks[part], certainty[part] = masks_of_maps(maps)
    return masks, certainty


def masks_of_maps(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (n, height, width) bool of maps of logits, which are overwritten; and (n,) the mean
    probability of each one's pixels, in [0, 1]."""
    inside = maps > 0
    total = (maps.sigmoid_() * inside).sum((1, 2))
    return inside, total / inside.sum((1, 2)).clamp(min=1)


def resize_maps(
    logits: Tensor, stride: int, image_size: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Maps of logits (n, height, width) in float32 or wider; arguments as of `resize_masks`."""
    padded = [stride * x for x in logits.shape[-2:]]
    maps = interpolate(logits.to(torch.promote_types(logits.dtype, torch.float32)), padded)
    return interpolate(maps[:, : image_size[0], : image_size[1]], size)


def in_parts(masks: Tensor) -> Sequence[Tensor]:
    """Embeddings (n, C), `MASKS_AT_ONCE` at a time."""
    return masks.split(MASKS_AT_ONCE) if len(masks) else ()


def interpolate(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, (n, h, w) to (n, height, width)."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps[None], tuple(size), mode="bilinear", align_corners=False)[0]
