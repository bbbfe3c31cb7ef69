"""Sine encodings of pixels and of boxes."""

import math

import torch
from torch import Tensor


def encode(x: Tensor, channels: int, temperature: float) -> Tensor:
    """Encode numbers (...) in [0, 1] as (..., channels): sines and cosines, interleaved.

    >>> encode(torch.tensor([0, 1 / 12]), channels=2, temperature=20)
    tensor([[0.0000, 1.0000],
            [0.5000, 0.8660]])
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    i = torch.arange(channels // 2, device=x.device, dtype=dtype)
    phase = 2 * math.pi * x[..., None] / temperature ** (2 * i / channels)
    return torch.stack([phase.sin(), phase.cos()], -1).flatten(-2)


def encode_pixels(
    padding: Tensor,
    channels: int,
    temperature: float = 20.0,
    offset: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Encode the pixels of padding masks (B, H, W) as (B, H, W, channels), y first.

    Pixel i of n that are not padding is at (i + 1 + offset) / n. Temperature and offset must be
    those of the weights: 20 and 0 in official DINO, 10000 and -0.5 in Deformable DETR and some of
    detrex's checkpoints.
    """
    inside = (~padding).to(dtype)
    y, x = inside.cumsum(1), inside.cumsum(2)
    y, x = (y + offset) / (y[:, -1:] + 1e-6), (x + offset) / (x[:, :, -1:] + 1e-6)
    return encode(torch.stack([y, x], -1), channels // 2, temperature).flatten(-2)


def encode_boxes(boxes: Tensor, channels: int, temperature: float = 10000.0) -> Tensor:
    """Encode boxes (..., 4) as (..., 4 * channels), in order y, x, w, h (DAB-DETR, sec. 4.2)."""
    x, y, w, h = boxes.unbind(-1)
    return encode(torch.stack([y, x, w, h], -1), channels, temperature).flatten(-2)
