"""Multi-scale deformable attention in plain PyTorch, for every device and dtype.

Other kernels have the same two functions and are tested against these. The backward pass is
explicit because autograd does not run inside a custom operator.
"""

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

# grid_sample's arguments for the sampling of Deformable DETR
BILINEAR, ZERO_PADDING, ALIGN_CORNERS = 0, 0, False


def forward(
    value: Tensor,
    shapes: list[int],
    points: Tensor,
    weights: Tensor,
    reference: Tensor | None = None,
) -> Tensor:
    """Sum over levels and points of weight times value at location (Deformable DETR, eq. 3).

    Args:
        value: (B, S, H, D), the levels one after the other
        shapes: H_0, W_0, H_1, W_1, ...; L pairs
        points: (B, Q, H, L, P, 2), locations (x, y) in [0, 1] on each level, zero is sampled
            outside; or, with a reference, offsets from it
        weights: (B, Q, H, L, P), or, with a reference, their logits
        reference: (B, Q, L, 2) points or (B, Q, L, 4) boxes, or None

    Returns:
        (B, Q, H * D) in the dtype of value, computed in that of points
    """
    batch, _, heads, channels = value.shape
    queries = points.shape[1]
    locations, weights = resolve(shapes, points, weights, reference)
    parts = (
        (sample(image, grid) * weight[:, None]).sum(-2)
        for image, grid, weight in levels(value, shapes, locations, weights)
    )
    out = reduce(torch.add, parts)  # not in place: exported graphs have this function in them
    out = out.view(batch, heads * channels, queries).transpose(1, 2)
    return out.to(value.dtype).contiguous()


def backward(
    grad: Tensor,
    value: Tensor,
    shapes: list[int],
    points: Tensor,
    weights: Tensor,
    reference: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`.

    Args:
        grad: (B, Q, H * D), gradient of the output; the others as in `forward`

    Returns:
        gradients of value, of the *locations* (even with a reference), and of the weights (with a
        reference, of their logits); contiguous, in the dtype of value and that of points
    """
    batch, _, heads, channels = value.shape
    locations, weights = resolve(shapes, points, weights, reference)
    grad = grad.to(locations.dtype).transpose(1, 2).reshape(batch * heads, channels, 1, -1)
    grads = []
    for image, grid, weight in levels(value, shapes, locations, weights):
        grad_weight = (sample(image, grid) * grad).sum(1)
        grad_image, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
            *(grad * weight[:, None], image, grid),
            *(BILINEAR, ZERO_PADDING, ALIGN_CORNERS, [True, True]),
        )
        grads.append((grad_image.flatten(2), 2 * grad_grid, grad_weight))
    images, grids, level_weights = zip(*grads, strict=True)
    grad_value = torch.cat(images, -1).unflatten(0, (batch, heads)).permute(0, 3, 1, 2)
    grad_locations = torch.stack(grids).unflatten(1, (batch, heads)).permute(1, 4, 2, 0, 3, 5)
    grad_weights = torch.stack(level_weights).unflatten(1, (batch, heads)).permute(1, 4, 2, 0, 3)
    if reference is not None:  # gradient of the softmax
        mean = (grad_weights * weights).sum((-2, -1), keepdim=True)
        grad_weights = weights * (grad_weights - mean)
    results = grad_value.to(value.dtype), grad_locations, grad_weights
    return tuple(x.contiguous() for x in results)


def resolve(
    shapes: list[int], points: Tensor, weights: Tensor, reference: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Locations and weights from offsets and logits, or unchanged without a reference."""
    if reference is None:
        return points, weights
    unit = offset_unit(shapes, reference, points.shape[-2])[:, :, None, :, None]
    locations = reference[:, :, None, :, None, :2] + points * unit
    return locations, weights.flatten(-2).softmax(-1).view_as(weights)


def offset_unit(shapes: list[int], reference: Tensor, num_points: int) -> Tensor:
    """The length of an offset of 1, (B, Q, L, 2): a pixel or, with boxes, half the size / points.

    Deformable DETR, appendix A.4.
    """
    if reference.shape[-1] == 4:
        return reference[..., 2:] * (0.5 / num_points)
    # Built on the device, as a copy from the host would synchronise.
    sides = torch.cat([reference.new_full((1,), 1 / side) for side in shapes])
    return sides.view(1, 1, -1, 2).flip(-1)


def levels(
    value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs of grid_sample per level, with batch and heads merged.

    Yields image (B * H, D, H_l, W_l), grid (B * H, P, Q, 2) in [-1, 1], weights (B * H, P, Q).
    With queries last, the sum over points is fastest, here and in exported files.
    """
    pairs = list(zip(shapes[::2], shapes[1::2], strict=True))
    images = value.to(locations.dtype).permute(0, 2, 3, 1).flatten(0, 1)
    images = images.split([h * w for h, w in pairs], -1)
    grids = (2 * locations - 1).permute(0, 2, 3, 4, 1, 5).flatten(0, 1).unbind(1)
    parts = weights.permute(0, 2, 3, 4, 1).flatten(0, 1).unbind(1)
    for image, shape, grid, weight in zip(images, pairs, grids, parts, strict=True):
        yield image.unflatten(-1, shape), grid, weight


def sample(image: Tensor, grid: Tensor) -> Tensor:
    """Sample an image at a grid: (B * H, D, P, Q)."""
    return F.grid_sample(image, grid, align_corners=ALIGN_CORNERS)
