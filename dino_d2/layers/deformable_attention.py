"""Multi-scale deformable attention (Deformable DETR, equation 3)."""

import math

import torch
from torch import Tensor, nn

from ..ops import ms_deform_attn_from_offsets
from ..ranges import require_whole
from ..structures import FeaturePyramid


class DeformableAttention(nn.Module):
    """Every query attends to `num_points` points on every level, at locations that it predicts.

    Args:
        embed_dim: C, a multiple of `num_heads`
        num_heads: H
        num_levels: L
        num_points: P, per head and level
    """

    def __init__(
        self, *, embed_dim: int = 256, num_heads: int = 8, num_levels: int = 4, num_points: int = 4
    ):
        super().__init__()
        require_whole(embed_dim=embed_dim, num_heads=num_heads, num_points=num_points)
        require_whole(num_levels=num_levels)
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}: change either"
            )
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dim, samples * 2)
        self.attention_weights = nn.Linear(embed_dim, samples)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with head h looking in direction h, and its p-th point p pixels away."""
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1.0, self.num_points + 1)
        offsets = direction[:, None, None] * distance[:, None]  # (H, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())

    def forward(self, query: Tensor, reference: Tensor, memory: FeaturePyramid) -> Tensor:
        """Attend to tokens of the encoder; returns (B, Q, C).

        Args:
            query: (B, Q, C)
            reference: (B, Q, L, 2) points or (B, Q, L, 4) boxes, relative to each padded level
            memory: the tokens
        """
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        # in place, in rows of two dimensions: gradients of a view would be copied
        rows = self.value_proj(memory.tokens.flatten(0, 1))
        rows = rows.masked_fill_(memory.padding.flatten()[:, None], 0)
        value = rows.view(*memory.padding.shape, heads, -1)  # (B, S, H, D)
        offsets = self.sampling_offsets(query).unflatten(-1, (heads, levels, points, 2))
        logits = self.attention_weights(query).unflatten(-1, (heads, levels, points))
        return self.output_proj(
            ms_deform_attn_from_offsets(value, memory.shapes, reference, offsets, logits)
        )
