"""Flattens feature maps and lets every pixel attend to others.

    EncoderLayer             to a few, on all levels (Deformable DETR)
    DenseEncoderLayer        to all (DETR)
    ConditionalEncoderLayer  likewise, in DAB-DETR

:class:`Encoder` is made of any of them.
"""

from collections.abc import Callable

from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..layers import MLP, DeformableAttention, DenseAttention
from ..layers.blocks import recompute, xavier_uniform_
from ..ranges import require_positive, require_share, require_whole
from ..structures import FeaturePyramid
from .tokens import flatten, scale_to_levels, token_centers
from .tokens import valid_ratio as valid_ratio

ENCODER_LAYER_REGISTRY = Registry("ENCODER_LAYER")


@ENCODER_LAYER_REGISTRY.register()
class EncoderLayer(nn.Module):
    """Deformable self-attention and feed-forward, each with residual and norm after it."""

    activation: type[nn.Module] | None = None  # of the feed-forward part; None: ReLU

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
        self.self_attn = self.make_attention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            dropout=dropout,
            num_levels=num_levels,
            num_points=num_points,
        )
        self.ffn = MLP(embed_dim, ffn_dim, embed_dim, dropout=dropout, activation=self.activation)
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)
        xavier_uniform_(self.ffn)

    def make_attention(
        self, *, embed_dim: int, num_heads: int, dropout: float, num_levels: int, num_points: int
    ) -> nn.Module:
        return DeformableAttention(
            embed_dim=embed_dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points
        )

    def forward(self, pyramid: FeaturePyramid, centers: Tensor) -> FeaturePyramid:
        """`centers` (B, S, 2) are those of the tokens, relative to the image without padding."""
        x = pyramid.tokens
        x = self.norm1(x + self.dropout(self.look(pyramid, centers)))
        return pyramid._replace(tokens=self.norm2(x + self.dropout(self.ffn(x))))

    def look(self, pyramid: FeaturePyramid, centers: Tensor) -> Tensor:
        """Attention among tokens (B, S, C), without residual connection and norm."""
        reference = scale_to_levels(centers, pyramid.valid_ratios)
        return self.self_attn(pyramid.tokens + pyramid.position, reference, pyramid)


@ENCODER_LAYER_REGISTRY.register()
class DenseEncoderLayer(EncoderLayer):
    """DETR's: every token attends to every other."""

    def make_attention(
        self, *, embed_dim: int, num_heads: int, dropout: float, **unused: int
    ) -> nn.Module:
        return DenseAttention(embed_dim=embed_dim, num_heads=num_heads, dropout=dropout)

    def look(self, pyramid: FeaturePyramid, centers: Tensor) -> Tensor:
        return self.self_attn(pyramid.tokens + pyramid.position, pyramid)


@ENCODER_LAYER_REGISTRY.register()
class ConditionalEncoderLayer(DenseEncoderLayer):
    """DAB-DETR's: a PReLU with a slope of its own."""

    activation = nn.PReLU


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
        layer: constructs each layer from the dimensions above; it accepts those that it needs
        position_temperature, position_offset: of the position encoding, see `encode_pixels`
        level_embed: whether levels have a learned embedding; not in DETR, which has one level
        scale_position: whether positions of tokens are multiplied by an MLP of their content, the
            same in all layers (DAB-DETR's code)

    Raises:
        ValueError: a number is invalid, or the channels cannot be divided among the heads
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
        level_embed: bool = True,
        scale_position: bool = False,
    ):
        super().__init__()
        # Without a layer the level embedding would not be used.
        require_whole(**{"num_layers of the encoder": num_layers})
        require_whole(embed_dim=embed_dim, ffn_dim=ffn_dim, num_levels=num_levels)
        require_share(dropout=dropout)
        require_positive(position_temperature=position_temperature)
        self.position_temperature, self.position_offset = position_temperature, position_offset
        self.level_embed = nn.Embedding(num_levels, embed_dim) if level_embed else None
        self.position_scale = MLP(embed_dim, embed_dim, embed_dim) if scale_position else None
        if self.position_scale is not None:
            xavier_uniform_(self.position_scale)
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
            None if self.level_embed is None else self.level_embed.weight,
            temperature=self.position_temperature,
            offset=self.position_offset,
        )
        centers = token_centers(pyramid)
        call = recompute if self.recompute else nn.Module.__call__
        position = pyramid.position
        for layer in self.layers:
            if self.position_scale is not None:
                pyramid = pyramid._replace(position=position * self.position_scale(pyramid.tokens))
            pyramid = call(layer, pyramid, centers)
        return pyramid._replace(position=position)
