"""Flattens multi-scale features and lets every pixel attend to a few others, on all levels."""

from collections.abc import Callable

from torch import Tensor, nn

from ..layers import MLP, DeformableAttention
from ..layers.blocks import recompute, xavier_uniform_
from ..ranges import require_positive, require_share, require_whole
from ..structures import FeaturePyramid
from .tokens import flatten, scale_to_levels, token_centers
from .tokens import valid_ratio as valid_ratio


class EncoderLayer(nn.Module):
    """Deformable self-attention and feed-forward, each with residual and norm after it."""

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        num_levels: int,
        num_points: int,
    ):
        super().__init__()
        self.self_attn = DeformableAttention(
            embed_dim=embed_dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points
        )
        self.ffn = MLP(embed_dim, ffn_dim, embed_dim, dropout=dropout)
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)
        xavier_uniform_(self.ffn)

    def forward(self, pyramid: FeaturePyramid, centers: Tensor) -> FeaturePyramid:
        """`centers` (B, S, 2) are those of the tokens, relative to the image without padding."""
        x, reference = pyramid.tokens, scale_to_levels(centers, pyramid.valid_ratios)
        y = self.self_attn(x + pyramid.position, reference, pyramid)
        x = self.norm1(x + self.dropout(y))
        return pyramid._replace(tokens=self.norm2(x + self.dropout(self.ffn(x))))


class Encoder(nn.Module):
    """Deformable DETR's encoder (section 4.1, "deformable transformer encoder").

    Args:
        num_layers: at least 1
        embed_dim: C
        num_heads: H
        ffn_dim: hidden width of the feed-forward part
        dropout: probability
        num_levels: L
        num_points: P, per head and level
        layer: makes each layer of the numbers above; it takes what it needs of them
        position_temperature, position_offset: of the encoding of pixels, see `encode_pixels`

    Raises:
        ValueError: a number is none that can be, or the channels cannot be shared by the heads
    """

    recompute = False  # DINO(activation_checkpointing=["encoder"]) sets it

    def __init__(
        self,
        *,
        num_layers: int = 6,
        embed_dim: int = 256,
        num_heads: int = 8,
        ffn_dim: int = 2048,
        dropout: float = 0.0,
        num_levels: int = 4,
        num_points: int = 4,
        layer: Callable[..., nn.Module] = EncoderLayer,
        position_temperature: float = 20.0,
        position_offset: float = 0.0,
    ):
        super().__init__()
        # Without a layer the level embedding would not be used.
        require_whole(**{"num_layers of the encoder": num_layers})
        require_whole(embed_dim=embed_dim, ffn_dim=ffn_dim, num_levels=num_levels)
        require_share(dropout=dropout)
        require_positive(position_temperature=position_temperature)
        self.position_temperature, self.position_offset = position_temperature, position_offset
        self.level_embed = nn.Embedding(num_levels, embed_dim)
        self.layers = nn.ModuleList(
            layer(
                embed_dim=embed_dim,
                num_heads=num_heads,
                ffn_dim=ffn_dim,
                dropout=dropout,
                num_levels=num_levels,
                num_points=num_points,
            )
            for _ in range(num_layers)
        )

    def forward(self, levels: list[Tensor], padding: Tensor) -> FeaturePyramid:
        """Flatten and encode feature maps; returns the memory for the decoder.

        Args:
            levels: one (B, C, H_l, W_l) map per level, finest first
            padding: (B, H, W) of the input images
        """
        pyramid = flatten(
            levels,
            padding,
            self.level_embed.weight,
            temperature=self.position_temperature,
            offset=self.position_offset,
        )
        centers = token_centers(pyramid)
        call = recompute if self.recompute else nn.Module.__call__
        for layer in self.layers:
            pyramid = call(layer, pyramid, centers)
        return pyramid
