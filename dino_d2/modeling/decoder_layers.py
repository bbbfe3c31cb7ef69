"""The layers of the decoder."""

from collections.abc import Callable

from torch import Tensor, nn

from ..layers import MLP, DeformableAttention
from ..layers.blocks import xavier_uniform_
from ..structures import FeaturePyramid
from .tokens import scale_to_levels


class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable attention to the memory, feed-forward.

    Each has a residual connection followed by a norm.
    """

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
        self.self_attn = nn.MultiheadAttention(embed_dim, num_heads, dropout, batch_first=True)
        self.cross_attn = DeformableAttention(
            embed_dim=embed_dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points
        )
        self.ffn = MLP(embed_dim, ffn_dim, embed_dim, dropout=dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(embed_dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        xavier_uniform_(self.self_attn)
        xavier_uniform_(self.ffn)

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
            position: (B, Q, C), added to it wherever attention is computed
            reference: (B, Q, 4) boxes or (B, Q, 2) points, where to look
            memory: of the encoder
            attn_mask: (Q, Q) or (B * H, Q, Q), True where self-attention is forbidden, or numbers
                that are added to its logits
            attend: in place of `attend`, called with the layer before the arguments; this and the
                next are for further passes through the decoder
            ffn: in place of the feed-forward part
        """
        x = (attend or type(self).attend)(self, x, position, attn_mask)
        scaled = scale_to_levels(reference, memory.valid_ratios)
        y = self.cross_attn(x + position, scaled, memory)
        x = self.norm2(x + self.dropout(y))
        return self.norm3(x + self.dropout((ffn or self.ffn)(x)))

    def attend(
        self, x: Tensor, position: Tensor, attn_mask: Tensor | None, norm: nn.Module | None = None
    ) -> Tensor:
        """Self-attention among queries with its residual connection and norm, by default its own;
        arguments and result are as of `forward`."""
        q = x + position
        y = self.self_attn(q, q, x, attn_mask=attn_mask, need_weights=False)[0]
        return (norm or self.norm1)(x + self.dropout(y))
