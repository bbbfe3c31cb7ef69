"""`dino_d2::ms_deform_attn`, multi-scale deformable attention as a PyTorch operator.

Declares its shapes, gradient and behaviour under autocast; `dispatch.py` chooses the kernels.

It has two forms. Without a reference, points are locations and weights are weights. With one,
points are offsets from the reference and weights are logits: kernels that include the softmax and
the arithmetic save several passes over memory.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import dispatch
from .reference import offset_unit

Shapes = Sequence[tuple[int, int]]


def ms_deform_attn(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sum over levels and points of weight times value at location (Deformable DETR, eq. 3).

    Args:
        value: (B, S, H, D), the levels one after the other
        shapes: ((H_0, W_0), ...), whose areas add up to S
        locations: (B, Q, H, L, P, 2), (x, y) in [0, 1] on each level, where 0 and 1 are the outer
            edges of the border pixels; zero is sampled outside
        weights: (B, Q, H, L, P)

    Returns:
        (B, Q, H * D) in the dtype of value, computed in float32 (float64 if locations are).
        Once differentiable in all three tensors.

    Raises:
        ValueError: a shape does not fit the others
    """
    return _checked(value, shapes, locations, weights, None)


def ms_deform_attn_from_offsets(
    value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """The same from predicted offsets and logits (Deformable DETR, sec. 4.1 and appendix A.4).

    Args:
        value, shapes: as of `ms_deform_attn`
        reference: (B, Q, L, 2) points (x, y) or (B, Q, L, 4) boxes (cx, cy, w, h), in [0, 1] on
            each level
        offsets: (B, Q, H, L, P, 2) from the reference: in pixels of the level from a point; from
            the centre of a box in half its size, divided by P
        logits: (B, Q, H, L, P), to be softmaxed over the L * P points

    Returns:
        as `ms_deform_attn`; once differentiable in all four tensors

    Raises:
        ValueError: a shape does not fit the others
    """
    return _checked(value, shapes, offsets, logits, reference)


def _checked(
    value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor, reference: Tensor | None
) -> Tensor:
    batch, tokens, heads, _ = value.shape
    if any(h < 1 or w < 1 for h, w in shapes):
        raise ValueError(f"levels of {tuple(shapes)} include an empty one: leave it out")
    if sum(h * w for h, w in shapes) != tokens:
        raise ValueError(f"levels of {tuple(shapes)} do not make up the {tokens} tokens of value")
    _, queries, _, _, num_points, _ = points.shape
    expected = (batch, queries, heads, len(shapes), num_points)
    if points.shape != (*expected, 2) or weights.shape != expected:
        names = ("locations", "weights") if reference is None else ("offsets", "logits")
        raise ValueError(
            f"for value {tuple(value.shape)} and {len(shapes)} levels, {names[0]} "
            f"{tuple(points.shape)} should be {(*expected, 2)} and {names[1]} "
            f"{tuple(weights.shape)} should be {expected}"
        )
    boxes, centers = ((batch, queries, len(shapes), numbers) for numbers in (4, 2))
    if reference is not None and reference.shape not in (boxes, centers):
        raise ValueError(f"reference {tuple(reference.shape)} should be {boxes} or {centers}")
    flat_shapes = [side for shape in shapes for side in shape]
    tensors = _widened(points, weights, reference)
    return torch.ops.dino_d2.ms_deform_attn(value, flat_shapes, *tensors)


def _widened(*tensors: Tensor | None) -> list[Tensor | None]:
    """Convert to at least float32: bfloat16 coordinates are off by up to a third of a pixel."""
    return [x if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


ARGUMENTS = "Tensor value, int[] shapes, Tensor points, Tensor weights, Tensor? reference"
library = torch.library.Library("dino_d2", "FRAGMENT")
library.define(f"ms_deform_attn({ARGUMENTS}) -> Tensor")
library.define(f"ms_deform_attn_backward(Tensor grad, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)")


def _forward(value: Tensor, shapes: list[int], points: Tensor, *others: Tensor | None) -> Tensor:
    return dispatch.kernels_for(value, points).forward(value, shapes, points, *others)


def _backward(
    grad: Tensor, value: Tensor, shapes: list[int], points: Tensor, *others: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return dispatch.kernels_for(value, points).backward(grad, value, shapes, points, *others)


def _fake_forward(value: Tensor, shapes: list[int], points: Tensor, *others: Any) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, points.shape[1], heads * channels)


def _fake_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    value, _, points, weights, _ = inputs
    return tuple(x.new_empty(x.shape) for x in (value, points, weights))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.shapes, points, weights, reference = inputs
    ctx.save_for_backward(value, points, weights, reference)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, points, weights, reference = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = torch.ops.dino_d2.ms_deform_attn_backward(
        grad, value, ctx.shapes, points, weights, reference
    )
    if reference is None:
        return grad_value, None, grad_locations, grad_weights, None
    unit = offset_unit(ctx.shapes, reference, points.shape[-2])[:, :, None, :, None]
    grad_reference = None
    if ctx.needs_input_grad[4]:
        grad_reference = grad_locations.sum((2, 4))
        if reference.shape[-1] == 4:  # the unit depends on the size
            share = 0.5 / points.shape[-2]
            grad_size = (grad_locations * points).sum((2, 4)) * share
            grad_reference = torch.cat([grad_reference, grad_size], -1)
    return grad_value, None, grad_locations * unit, grad_weights, grad_reference


def _refuse_twice(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError("ms_deform_attn can be differentiated only once")


def _autocast(value: Tensor, shapes: list[int], *others: Tensor | None) -> Tensor:
    """Convert only value to the autocast dtype; locations and weights stay exact."""
    device = value.device.type
    if value.dtype != torch.float64:
        value = value.to(torch.get_autocast_dtype(device))
    tensors = _widened(*others)
    with torch.autocast(device, enabled=False):
        return torch.ops.dino_d2.ms_deform_attn(value, shapes, *tensors)


library.impl("ms_deform_attn", _forward, "CompositeExplicitAutograd")
library.impl("ms_deform_attn_backward", _backward, "CompositeExplicitAutograd")
for key in ("AutocastCPU", "AutocastCUDA"):
    library.impl("ms_deform_attn", _autocast, key)
torch.library.register_fake("dino_d2::ms_deform_attn", _fake_forward, lib=library)
torch.library.register_fake("dino_d2::ms_deform_attn_backward", _fake_backward, lib=library)
torch.library.register_autograd(
    "dino_d2::ms_deform_attn", _differentiate, setup_context=_save_for_backward, lib=library
)
torch.library.register_autograd("dino_d2::ms_deform_attn_backward", _refuse_twice, lib=library)
