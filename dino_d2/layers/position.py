"""Sine encodings of pixels and of boxes."""

import math

import torch
from torch import Tensor


def encode(x: Tensor, channels: int, temperature: float) -> Tensor:
    """(...) in [0, 1] to (..., channels): sines and cosines of falling frequency, interleaved."""
    i = torch.arange(channels // 2, device=x.device)
    phase = 2 * math.pi * x[..., None] / temperature ** (2 * i / channels)
    return torch.stack([phase.sin(), phase.cos()], -1).flatten(-2)


def encode_pixels(
    padding: Tensor, channels: int, temperature: float = 20.0, offset: float = 0.0
) -> Tensor:
    """Padding mask (B, H, W) to (B, H, W, channels), y first.

    Positions are relative to the part that is not padding, pixel i of n being at
    (i + 1 + offset) / n. What temperature and offset are belongs to the weights: official DINO has
    20 and 0, Deformable DETR and some of detrex's checkpoints 10000 and -0.5.
    """
    inside = (~padding).float()
    y, x = inside.cumsum(1), inside.cumsum(2)
    y, x = (y + offset) / (y[:, -1:] + 1e-6), (x + offset) / (x[:, :, -1:] + 1e-6)
    return torch.cat([encode(v, channels // 2, temperature) for v in (y, x)], -1)


def encode_boxes(boxes: Tensor, channels: int, temperature: float = 10000.0) -> Tensor:
    """Boxes (..., 4) to (..., 4 * channels), in the order y, x, w, h (DAB-DETR, section 4.2)."""
    x, y, w, h = boxes.unbind(-1)
    return torch.cat([encode(v, channels, temperature) for v in (y, x, w, h)], -1)
