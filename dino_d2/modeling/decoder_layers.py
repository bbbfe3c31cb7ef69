"""The layers of the decoder.

    DecoderLayer             deformable attention to the memory (Deformable DETR)
    DenseDecoderLayer        attention to every token (DETR)
    ConditionalDecoderLayer  likewise, and content and position are told apart (DAB-DETR)

:class:`Decoder` is made of any of them.
"""

from collections.abc import Callable

from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..layers import (
    MLP,
    ConditionalCrossAttention,
    ConditionalSelfAttention,
    DeformableAttention,
    DenseAttention,
    SelfAttention,
)
from ..layers.blocks import xavier_uniform_
from ..structures import FeaturePyramid
from .tokens import scale_to_levels

DECODER_LAYER_REGISTRY = Registry("DECODER_LAYER")


@DECODER_LAYER_REGISTRY.register()
class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable attention to the memory, feed-forward.

    Each has a residual connection followed by a norm.
    """

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
        self.self_attn = self.make_self_attention(
            embed_dim=embed_dim, num_heads=num_heads, dropout=dropout
        )
        self.cross_attn = self.make_cross_attention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            dropout=dropout,
            num_levels=num_levels,
            num_points=num_points,
        )
        self.ffn = MLP(embed_dim, ffn_dim, embed_dim, dropout=dropout, activation=self.activation)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(embed_dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        xavier_uniform_(self.self_attn)
        xavier_uniform_(self.ffn)

    def make_self_attention(self, *, embed_dim: int, num_heads: int, dropout: float) -> nn.Module:
        return SelfAttention(embed_dim=embed_dim, num_heads=num_heads, dropout=dropout)

    def make_cross_attention(
        self, *, embed_dim: int, num_heads: int, dropout: float, num_levels: int, num_points: int
    ) -> nn.Module:
        return DeformableAttention(
            embed_dim=embed_dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points
        )

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        memory: FeaturePyramid,
        attn_mask: Tensor | None = None,
        *,
        attend: Callable[..., Tensor] | None = None,
        ffn: nn.Module | None = None,
    ) -> Tensor:
        """Update the content of the queries; returns (B, Q, C).

        Args:
            x: (B, Q, C) content of the queries
            position: (B, Q, C), added to it wherever attention is computed; or what the position
                head of other layers gives
            reference: (B, Q, 4) boxes or (B, Q, 2) points, where to look; or (B, Q, 0)
            memory: of the encoder
            attn_mask: (Q, Q) or (B * H, Q, Q), True where self-attention is forbidden, or numbers
                that are added to its logits
            attend: in place of `attend`, called with the layer before the arguments; this and the
                next are for extra passes through the decoder
            ffn: in place of the feed-forward part
        """
        x = (attend or type(self).attend)(self, x, position, attn_mask)
        x = self.norm2(x + self.dropout(self.look(x, position, reference, memory)))
        return self.norm3(x + self.dropout((ffn or self.ffn)(x)))

    def attend(
        self, x: Tensor, position: Tensor, attn_mask: Tensor | None, norm: nn.Module | None = None
    ) -> Tensor:
        """Self-attention among queries with its residual connection and norm, by default its own;
        arguments and result are as of `forward`."""
        y = self.self_attn(x, position, attn_mask)
        return (norm or self.norm1)(x + self.dropout(y))

    def look(
        self, x: Tensor, position: Tensor, reference: Tensor, memory: FeaturePyramid
    ) -> Tensor:
        """Attention to the memory (B, Q, C), without residual connection and norm."""
        scaled = scale_to_levels(reference, memory.valid_ratios)
        return self.cross_attn(x + position, scaled, memory)


@DECODER_LAYER_REGISTRY.register()
class DenseDecoderLayer(DecoderLayer):
    """DETR's: every query attends to every token."""

    def make_cross_attention(
        self, *, embed_dim: int, num_heads: int, dropout: float, **unused: int
    ) -> nn.Module:
        return DenseAttention(embed_dim=embed_dim, num_heads=num_heads, dropout=dropout)

    def look(
        self, x: Tensor, position: Tensor, reference: Tensor, memory: FeaturePyramid
    ) -> Tensor:
        return self.cross_attn(x + position, memory)


@DECODER_LAYER_REGISTRY.register()
class ConditionalDecoderLayer(DenseDecoderLayer):
    """DAB-DETR's, of a :class:`ConditionalPosition`, with a PReLU of its own slope."""

    activation = nn.PReLU
    first = False

    def make_self_attention(self, *, embed_dim: int, num_heads: int, dropout: float) -> nn.Module:
        return ConditionalSelfAttention(embed_dim=embed_dim, num_heads=num_heads, dropout=dropout)

    def make_cross_attention(
        self, *, embed_dim: int, num_heads: int, dropout: float, **unused: int
    ) -> nn.Module:
        return ConditionalCrossAttention(
            embed_dim=embed_dim, num_heads=num_heads, dropout=dropout, first=self.first
        )

    def attend(
        self, x: Tensor, position: Tensor, attn_mask: Tensor | None, norm: nn.Module | None = None
    ) -> Tensor:
        y = self.self_attn(x, position.chunk(2, -1)[0], attn_mask)
        return (norm or self.norm1)(x + self.dropout(y))

    def look(
        self, x: Tensor, position: Tensor, reference: Tensor, memory: FeaturePyramid
    ) -> Tensor:
        return self.cross_attn(x, *position.chunk(2, -1), memory)


@DECODER_LAYER_REGISTRY.register()
class FirstConditionalDecoderLayer(ConditionalDecoderLayer):
    """The first of DAB-DETR, whose content has not seen the image: positions are added to it."""

    first = True
