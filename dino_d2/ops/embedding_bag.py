"""CPU kernels without anything compiled: multi-scale deformable attention as a lookup of weighted
rows, for which PyTorch has a fast kernel. Only the forward pass; the backward is the reference's.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import backward, resolve

__all__ = ["backward", "forward"]


def forward(
    value: Tensor,
    shapes: list[int],
    points: Tensor,
    weights: Tensor,
    reference: Tensor | None = None,
) -> Tensor:
    """As `reference.forward`, computed in float32."""
    batch, _, heads, channels = value.shape
    locations, weights = resolve(shapes, points, weights, reference)
    table, starts = with_borders(value.float(), shapes)
    rows, shares = [], []
    for level, start in enumerate(starts):
        height, width = shapes[2 * level : 2 * level + 2]
        x, right = between_pixels(locations[:, :, :, level, :, 0], width)
        y, below = between_pixels(locations[:, :, :, level, :, 1], height)
        row = (start + y * (width + 2) + x) * heads
        weight = weights[:, :, :, level]
        upper, lower = weight * (1 - below), weight * below
        rows += row, row + heads, row + (width + 2) * heads, row + (width + 3) * heads
        shares += upper * (1 - right), upper * right, lower * (1 - right), lower * right
    row, share = torch.cat(rows, -1), torch.cat(shares, -1)  # (B, Q, H, L * 4 * P)
    row += torch.arange(heads, dtype=row.dtype)[:, None]
    row += torch.arange(batch, dtype=row.dtype).view(-1, 1, 1, 1) * (table.shape[1] * heads)
    out = F.embedding_bag(
        row.flatten(0, 2),
        table.view(-1, channels),
        per_sample_weights=share.flatten(0, 2),
        mode="sum",
    )
    return out.view(batch, -1, heads * channels).to(value.dtype)


def with_borders(value: Tensor, shapes: list[int]) -> tuple[Tensor, list[int]]:
    """A border of zeros around every level, so that no point needs a mask: (B, S', H, D) and the
    token at which each level starts."""
    pairs = list(zip(shapes[::2], shapes[1::2], strict=True))
    images = value.split([h * w for h, w in pairs], 1)
    padded = [
        F.pad(image.unflatten(1, shape), (0, 0, 0, 0, 1, 1, 1, 1)).flatten(1, 2)
        for image, shape in zip(images, pairs, strict=True)
    ]
    ends = torch.tensor([image.shape[1] for image in padded]).cumsum(0).tolist()
    return torch.cat(padded, 1), [0, *ends[:-1]]


def between_pixels(location: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The pixel before a location, counted with the border, and how far behind it the location is,
    in [0, 1]. NaN keeps its place there, next to a valid pixel."""
    pixel = (location * side + 0.5).clamp(0, side + 1)
    before = pixel.nan_to_num(0).int().clamp(max=side)
    return before, pixel - before
