"""Sine encodings of pixels and of boxes."""

import math

import torch
from torch import Tensor


def encode(x: Tensor, channels: int, temperature: float) -> Tensor:
    """(...) in [0, 1] to (..., channels): sines and cosines of falling frequency, interleaved."""
    i = torch.arange(channels // 2, device=x.device)
    phase = 2 * math.pi * x[..., None] / temperature ** (2 * i / channels)
    return torch.stack([phase.sin(), phase.cos()], -1).flatten(-2)


def encode_pixels(padding: Tensor, channels: int, temperature: float = 20.0) -> Tensor:
    """Padding mask (B, H, W) to (B, H, W, channels), y first.

    Positions are relative to the part that is not padding. The published weights go with a
    temperature of 20; DETR had 10000.
    """
    inside = (~padding).float()
    y, x = inside.cumsum(1), inside.cumsum(2)
    y, x = y / (y[:, -1:] + 1e-6), x / (x[:, :, -1:] + 1e-6)
    return torch.cat([encode(v, channels // 2, temperature) for v in (y, x)], -1)


def encode_boxes(boxes: Tensor, channels: int, temperature: float = 10000.0) -> Tensor:
    """Boxes (..., 4) to (..., 4 * channels), in the order y, x, w, h (DAB-DETR, section 4.2)."""
    x, y, w, h = boxes.unbind(-1)
    return torch.cat([encode(v, channels, temperature) for v in (y, x, w, h)], -1)
