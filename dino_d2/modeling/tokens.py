"""Feature maps as one sequence of tokens."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers import encode_pixels
from ..structures import FeaturePyramid


def flatten(
    levels: list[Tensor], padding: Tensor, level_embed: Tensor | None, **encoding: float
) -> FeaturePyramid:
    """Flatten feature maps (B, C, H_l, W_l) to one sequence of tokens.

    Args:
        padding: mask (B, H, W)
        level_embed: (L, C), distinguishes levels; None: nothing does
        encoding: arguments of `encode_pixels`
    """
    masks = [F.interpolate(padding[None].float(), size=x.shape[-2:])[0].bool() for x in levels]
    dtype = torch.promote_types(levels[0].dtype, torch.float32)
    positions = [
        encode_pixels(mask, x.shape[1], **encoding, dtype=dtype)
        for mask, x in zip(masks, levels, strict=True)
    ]
    if level_embed is not None:
        positions = [p + embed for p, embed in zip(positions, level_embed, strict=True)]
    return FeaturePyramid(
        tokens=torch.cat([x.flatten(2).transpose(1, 2) for x in levels], 1),
        position=torch.cat([p.flatten(1, 2) for p in positions], 1),
        padding=torch.cat([mask.flatten(1) for mask in masks], 1),
        valid_ratios=torch.stack([valid_ratio(mask, dtype) for mask in masks], 1),
        shapes=tuple((x.shape[2], x.shape[3]) for x in levels),
    )


def valid_ratio(padding: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The share (B, 2) of width and height of a mask (B, H, W) that is not padding."""
    inside = (~padding).to(dtype)
    return torch.stack([inside[:, 0].mean(1), inside[:, :, 0].mean(1)], -1)


def token_centers(pyramid: FeaturePyramid) -> Tensor:
    """Centre (x, y) of every token, relative to the image without its padding: (B, S, 2)."""
    centers = []
    for (height, width), ratio in zip(pyramid.shapes, pyramid.valid_ratios.unbind(1), strict=True):
        y = (torch.arange(height, device=ratio.device, dtype=ratio.dtype) + 0.5) / height
        x = (torch.arange(width, device=ratio.device, dtype=ratio.dtype) + 0.5) / width
        xy = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
        centers.append(xy / ratio[:, None])
    return torch.cat(centers, 1)


def scale_to_levels(reference: Tensor, valid_ratios: Tensor) -> Tensor:
    """Convert boxes (B, Q, 4) or points (B, Q, 2) from image to padded levels: (B, Q, L, .).

    `valid_ratios` (B, L, 2) are those of the pyramid.
    """
    return reference[:, :, None] * valid_ratios.tile(reference.shape[-1] // 2)[:, None]


def take_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """The tokens, or queries, `indices` (B, Q) of `x` (B, S, .): (B, Q, .)."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))
