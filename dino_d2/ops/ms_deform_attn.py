"""`dino_d2::ms_deform_attn`, multi-scale deformable attention as a PyTorch operator.

The operator is declared here with its shapes and gradient; its kernels are registered per device
and PyTorch's dispatcher chooses among them. `reference.py` serves every device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference


def ms_deform_attn(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Sum over levels and points of weight times value at location (Deformable DETR, eq. 3).

    Args:
        value: (B, S, H, D), the levels one after the other; may be of lower precision than the
            others, which decide what is computed in
        shapes: ((H_0, W_0), ...), whose areas add up to S
        locations: (B, Q, H, L, P, 2), (x, y) in [0, 1] on each level, where 0 and 1 are the outer
            edges of the border pixels; zero is sampled outside
        weights: (B, Q, H, L, P)

    Returns:
        (B, Q, H * D) in the dtype of value. Once differentiable in all three tensors.

    Raises:
        ValueError: a shape does not fit the others
    """
    batch, tokens, heads, _ = value.shape
    if sum(h * w for h, w in shapes) != tokens:
        raise ValueError(f"levels of {tuple(shapes)} do not make up the {tokens} tokens of value")
    _, queries, _, _, points, _ = locations.shape
    expected = (batch, queries, heads, len(shapes), points)
    if locations.shape != (*expected, 2) or weights.shape != expected:
        raise ValueError(
            f"for value {tuple(value.shape)} and {len(shapes)} levels, locations "
            f"{tuple(locations.shape)} should be {(*expected, 2)} and weights "
            f"{tuple(weights.shape)} should be {expected}"
        )
    flat_shapes = [side for shape in shapes for side in shape]
    return _forward(value, flat_shapes, locations, weights)


@torch.library.custom_op("dino_d2::ms_deform_attn", mutates_args=())
def _forward(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    return reference.forward(value, shapes, locations, weights)


@_forward.register_fake
def _(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, locations.shape[1], heads * channels)


@torch.library.custom_op("dino_d2::ms_deform_attn_backward", mutates_args=())
def _backward(
    grad: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.backward(grad, value, shapes, locations, weights)


@_backward.register_fake
def _(
    grad: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (value, locations, weights))


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, locations, weights = ctx.saved_tensors
    grads = _backward(grad, value, ctx.shapes, locations, weights)
    return grads[0], None, grads[1], grads[2]


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
