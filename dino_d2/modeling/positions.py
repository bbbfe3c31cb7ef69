"""The positional part of the decoder's queries."""

from torch import Tensor, nn

from ..layers import MLP, encode_boxes
from ..layers.blocks import xavier_uniform_
from ..structures import FeaturePyramid, Queries
from .tokens import scale_to_levels


class AnchorPosition(nn.Module):
    """Positional part of a query, from its anchor box (DAB-DETR, equation 1)."""

    def __init__(self, *, embed_dim: int):
        super().__init__()
        self.embed_dim = embed_dim
        self.mlp = MLP(2 * embed_dim, embed_dim, embed_dim)
        xavier_uniform_(self.mlp)

    def forward(self, queries: Queries, memory: FeaturePyramid, layer: int) -> Tensor:
        """(B, Q, C) for a decoder layer, counted from 0; content and reference are its input."""
        padded = scale_to_levels(queries.reference, memory.valid_ratios)[:, :, 0]
        return self.mlp(encode_boxes(padded, self.embed_dim // 2))


class LearnedPosition(nn.Module):
    """Position head of Deformable DETR's decoder: the learned positions of the queries."""

    def forward(self, queries: Queries, memory: FeaturePyramid, layer: int) -> Tensor:
        """(B, Q, C), the same for every layer."""
        assert queries.position is not None
        return queries.position


class ScaledAnchorPosition(AnchorPosition):
    """Position head of DAB-Deformable-DETR, scaled by the content except in the first layer.

    (Conditional scale, DAB-DETR, equation 4.)
    """

    def __init__(self, *, embed_dim: int):
        super().__init__(embed_dim=embed_dim)
        self.scale = MLP(embed_dim, embed_dim, embed_dim)
        xavier_uniform_(self.scale)

    def forward(self, queries: Queries, memory: FeaturePyramid, layer: int) -> Tensor:
        position = super().forward(queries, memory, layer)
        return position * self.scale(queries.content) if layer else position
