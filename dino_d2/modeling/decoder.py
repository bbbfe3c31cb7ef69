"""Refines queries and their reference boxes, layer by layer."""

from torch import Tensor, nn

from ..boxes import refine
from ..layers import MLP, DeformableAttention, box_head, class_head, encode_boxes
from ..layers.blocks import recompute, xavier_uniform_
from ..ranges import require_share, require_whole
from ..structures import FeaturePyramid, Predictions, Queries


class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable attention to the memory, feed-forward; each with
    residual and norm after it."""

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
    ) -> Tensor:
        """
        Args:
            x: (B, Q, C) content of the queries
            position: (B, Q, C), added to it wherever attention is computed
            reference: (B, Q, L, 4) boxes or (B, Q, L, 2) points, relative to each padded level
            memory: the encoder's
            attn_mask: (Q, Q), True where self-attention is forbidden

        Returns:
            (B, Q, C)
        """
        q = x + position
        y = self.self_attn(q, q, x, attn_mask=attn_mask, need_weights=False)[0]
        x = self.norm1(x + self.dropout(y))
        y = self.cross_attn(x + position, reference, memory)
        x = self.norm2(x + self.dropout(y))
        return self.norm3(x + self.dropout(self.ffn(x)))


class AnchorPosition(nn.Module):
    """Positional part of a query, from its anchor box (DAB-DETR, equation 1)."""

    def __init__(self, *, embed_dim: int):
        super().__init__()
        self.embed_dim = embed_dim
        self.mlp = MLP(2 * embed_dim, embed_dim, embed_dim)
        xavier_uniform_(self.mlp)

    def forward(self, queries: Queries, layer: int) -> Tensor:
        """(B, Q, C) for a decoder layer, counted from 0; content and reference are its input."""
        return self.mlp(encode_boxes(queries.reference, self.embed_dim // 2))


class Decoder(nn.Module):
    """DINO's decoder: every layer predicts classes and boxes, and passes refined boxes on.

    Args:
        num_classes: K
        num_layers: at least 1
        embed_dim: C
        num_heads: H
        ffn_dim: hidden width of the feed-forward part
        dropout: probability
        num_levels: L
        num_points: P, per head and level
        shared_heads: whether all layers share one class head and one box head (official DINO)
            or have one each (detrex)
        look_forward: how many box heads the box loss of a layer trains. 1: that of the layer
            alone; 2, "look forward twice" (DINO, section 3.5): that of the layer before as well.
            0: boxes are predicted but not refined, each layer looks where the first one did
        position_head: makes the positional part of the queries; None: :class:`AnchorPosition`
        final_norm: whether predictions see the queries through a norm (Deformable DETR: no)
        size_bias: where the first box head starts with width and height, before the sigmoid
    """

    checkpoint = False  # DINO(checkpoint=["decoder"]) sets it

    def __init__(
        self,
        *,
        num_classes: int,
        num_layers: int = 6,
        embed_dim: int = 256,
        num_heads: int = 8,
        ffn_dim: int = 2048,
        dropout: float = 0.0,
        num_levels: int = 4,
        num_points: int = 4,
        shared_heads: bool = True,
        look_forward: int = 2,
        position_head: nn.Module | None = None,
        final_norm: bool = True,
        size_bias: float = 0.0,
    ):
        super().__init__()
        require_whole(**{"num_layers of the decoder": num_layers})
        require_whole(num_classes=num_classes, embed_dim=embed_dim, ffn_dim=ffn_dim)
        require_share(dropout=dropout)
        if look_forward not in (0, 1, 2):
            raise ValueError(
                f"look_forward is {look_forward!r}; it can be 2 (twice), 1 (once) or 0 (no "
                "refinement of boxes)"
            )
        self.look_forward = look_forward
        self.layers = nn.ModuleList(
            DecoderLayer(
                embed_dim=embed_dim,
                num_heads=num_heads,
                ffn_dim=ffn_dim,
                dropout=dropout,
                num_levels=num_levels,
                num_points=num_points,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(embed_dim) if final_norm else nn.Identity()
        self.position_head = position_head or AnchorPosition(embed_dim=embed_dim)
        copies = 1 if shared_heads else num_layers
        self.class_heads = nn.ModuleList(class_head(embed_dim, num_classes) for _ in range(copies))
        self.box_heads = nn.ModuleList(box_head(embed_dim) for _ in range(copies))
        nn.init.constant_(self.box_heads[0].layers[-1].bias[2:], size_bias)

    def forward(
        self, queries: Queries, memory: FeaturePyramid, attn_mask: Tensor | None = None
    ) -> list[Predictions]:
        """
        Args:
            queries: their references are relative to the image without padding
            memory: the encoder's
            attn_mask: (Q, Q), True where self-attention is forbidden

        Returns:
            the predictions of every layer, the last is the result
        """
        x, reference, position = queries
        anchor = reference  # what the next prediction is relative to
        predictions = []
        call = recompute if self.checkpoint else nn.Module.__call__
        for i, layer in enumerate(self.layers):
            to_class, to_box = (
                heads[min(i, len(heads) - 1)] for heads in (self.class_heads, self.box_heads)
            )
            scaled = scale_to_levels(reference, memory.valid_ratios)
            where = self.position_head(Queries(x, scaled[:, :, 0], position), i)
            x = call(layer, x, where, scaled, memory, attn_mask)
            y = self.norm(x)
            delta = to_box(y)
            predictions.append(Predictions(to_class(y), refine(anchor, delta)))
            if self.look_forward and layer is not self.layers[-1]:
                # Without the norm: the published weights were trained with boxes refined like this.
                refined = refine(reference, delta if y is x else to_box(x))
                reference = refined.detach()
                anchor = refined if self.look_forward == 2 else reference
        return predictions


def scale_to_levels(reference: Tensor, valid_ratios: Tensor) -> Tensor:
    """Boxes (B, Q, 4) or points (B, Q, 2) relative to the image to (B, Q, L, .) relative to each
    padded level."""
    return reference[:, :, None] * valid_ratios.tile(reference.shape[-1] // 2)[:, None]
