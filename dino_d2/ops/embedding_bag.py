"""CPU kernels without a compiler: deformable attention as PyTorch's fast `embedding_bag`.

Only the forward pass is faster; the backward pass is the reference's.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import backward, resolve

__all__ = ["backward", "forward"]

QUERIES_AT_ONCE = 2048  # so that intermediate results fit in the cache


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
    """Pad every level by a border of zeros, so that no point needs a mask: (B, S', H, D)."""
    pairs = list(zip(shapes[::2], shapes[1::2], strict=True))
    images = value.split([h * w for h, w in pairs], 1)
    padded = [
        F.pad(image.unflatten(1, shape), (0, 0, 0, 0, 1, 1, 1, 1)).flatten(1, 2)
        for image, shape in zip(images, pairs, strict=True)
    ]
    return torch.cat(padded, 1)


def corners(shapes: list[int], locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Table rows and weights of the four pixels around each point, (Q * H, L * P * 4) each.

    Args:
        locations: (1, Q, H, L, P, 2)
        weights: (1, Q, H, L, P)
    """
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
    shape = rows.shape[1] * heads, -1
    return rows.view(shape), torch.stack(shares, -1).view(shape)


def between_pixels(location: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """The pixel before a location, counted with the border, and the distance to it in [0, 1].

    A NaN location gives a valid pixel and a NaN distance.
    """
    pixel = (location * side + 0.5).clamp_(min=0).minimum(side + 1)
    before = pixel.nan_to_num(0).int().minimum(side.int())
    return before, pixel - before
