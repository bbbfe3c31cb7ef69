"""CPU kernels without anything compiled: multi-scale deformable attention as a lookup of weighted
rows, for which PyTorch has a fast kernel. Only the forward pass; the backward is the reference's.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import backward, resolve

__all__ = ["backward", "forward"]

QUERIES_AT_ONCE = 2048  # what is computed of them then stays in the cache


def forward(
    value: Tensor,
    shapes: list[int],
    points: Tensor,
    weights: Tensor,
    reference: Tensor | None = None,
) -> Tensor:
    """As `reference.forward`, computed in float32."""
    batch, _, heads, channels = value.shape
    table = with_borders(value.float(), shapes).flatten(1, 2)  # (B, S' * H, D)
    out = table.new_empty(batch, points.shape[1], heads * channels)
    for image in range(batch):
        for start in range(0, points.shape[1], QUERIES_AT_ONCE):
            part = slice(image, image + 1), slice(start, start + QUERIES_AT_ONCE)
            place = reference if reference is None else reference[part]
            rows, shares = corners(shapes, *resolve(shapes, points[part], weights[part], place))
            sums = F.embedding_bag(rows, table[image], per_sample_weights=shares, mode="sum")
            out[part] = sums.view(1, -1, heads * channels)
    return out.to(value.dtype)


def with_borders(value: Tensor, shapes: list[int]) -> Tensor:
    """A border of zeros around every level, so that no point needs a mask: (B, S', H, D)."""
    pairs = list(zip(shapes[::2], shapes[1::2], strict=True))
    images = value.split([h * w for h, w in pairs], 1)
    padded = [
        F.pad(image.unflatten(1, shape), (0, 0, 0, 0, 1, 1, 1, 1)).flatten(1, 2)
        for image, shape in zip(images, pairs, strict=True)
    ]
    return torch.cat(padded, 1)


def corners(shapes: list[int], locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Of the four corners around all points of a query and head, the rows in the table of an image
    and the shares: (Q * H, L * P * 4) each, for (1, Q, H, L, P, 2) and (1, Q, H, L, P)."""
    heads = locations.shape[2]
    height, width = torch.tensor(shapes).view(-1, 2, 1).unbind(1)  # (L, 1)
    areas = (height + 2) * (width + 2)
    start = (areas.cumsum(0) - areas).int()
    x, right = between_pixels(locations[..., 0], width)
    y, below = between_pixels(locations[..., 1], height)
    to_next, to_row = heads, ((width + 2) * heads).int()
    head = torch.arange(heads, dtype=torch.int32).view(-1, 1, 1)
    row = (start + x) * heads + y * to_row + head
    rows = torch.stack([row, row + to_next, row + to_row, row + to_row + to_next], -1)
    lower = weights * below
    upper = weights - lower
    lower_right, upper_right = lower * right, upper * right
    shares = [upper - upper_right, upper_right, lower - lower_right, lower_right]
    return rows.view(rows.shape[1] * heads, -1), torch.stack(shares, -1).view(
        rows.shape[1] * heads, -1
    )


def between_pixels(location: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """The pixel before a location, counted with the border, and how far behind it the location is,
    in [0, 1]. NaN keeps its place there, next to a valid pixel."""
    pixel = (location * side + 0.5).clamp_(min=0).minimum(side + 1)
    before = pixel.nan_to_num(0).int().minimum(side.int())
    return before, pixel - before
