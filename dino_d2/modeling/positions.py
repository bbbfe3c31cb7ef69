"""The positional part of the decoder's queries."""

import torch
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..layers import MLP, encode_boxes
from ..layers.blocks import xavier_uniform_
from ..structures import FeaturePyramid, Queries
from .tokens import scale_to_levels

POSITION_HEAD_REGISTRY = Registry("POSITION_HEAD")


@POSITION_HEAD_REGISTRY.register()
class AnchorPosition(nn.Module):
    """Positional part of a query, from its anchor box (DAB-DETR, equation 1)."""

    def __init__(self, *, embed_dim: int):
        super().__init__()
        self.embed_dim = embed_dim
        self.mlp = MLP(2 * embed_dim, embed_dim, embed_dim)
        xavier_uniform_(self.mlp)

    def forward(self, queries: Queries, memory: FeaturePyramid, layer: int) -> Tensor:
        """(B, Q, C) for a decoder layer, counted from 0; content and reference are its input."""
        require_boxes(queries)
        padded = scale_to_levels(queries.reference, memory.valid_ratios)[:, :, 0]
        return self.mlp(encode_boxes(padded, self.embed_dim // 2))


@POSITION_HEAD_REGISTRY.register()
class LearnedPosition(nn.Module):
    """Position head of DETR's and Deformable DETR's decoder: the learned positions of the queries.

    `embed_dim` is ignored; it exists so that configs can switch the position head with one key.
    """

    def __init__(self, *, embed_dim: int | None = None):
        super().__init__()

    def forward(self, queries: Queries, memory: FeaturePyramid, layer: int) -> Tensor:
        """(B, Q, C), the same for every layer."""
        if queries.position is None:
            raise ValueError(
                "LearnedPosition (MODEL.DINO.POSITION_HEAD, model.decoder.position_head) is for "
                "queries with a position, and those of this model (MODEL.DINO.QUERY_SELECTION, "
                "model.query_selection) have none: use AnchorPosition"
            )
        return queries.position


@POSITION_HEAD_REGISTRY.register()
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


@POSITION_HEAD_REGISTRY.register()
class ConditionalPosition(ScaledAnchorPosition):
    """Position head of DAB-DETR, for layers with conditional attention.

    Of the encoding of an anchor box, an MLP makes the position for self-attention; its part of the
    centre, scaled by the content except in the first layer, is that for attention to the memory.
    There it is modulated by the size of the anchor (DAB-DETR, section 4): the x part is multiplied
    by w' / w and the y part by h' / h, with w' and h' from the content.
    """

    def __init__(self, *, embed_dim: int):
        super().__init__(embed_dim=embed_dim)
        self.size = MLP(embed_dim, embed_dim, 2)
        xavier_uniform_(self.size)

    def forward(self, queries: Queries, memory: FeaturePyramid, layer: int) -> Tensor:
        """(B, Q, 2 C): the positions for self-attention and for attention to the memory."""
        require_boxes(queries)
        content, reference = queries.content, queries.reference
        encoding = encode_boxes(reference, self.embed_dim // 2)
        center = encoding[..., : self.embed_dim]  # y, then x
        if layer:
            center = center * self.scale(content)
        ratio = (self.size(content).sigmoid() / reference[..., 2:]).flip(-1)  # of h, then of w
        center = center * ratio.repeat_interleave(self.embed_dim // 2, -1)
        return torch.cat([self.mlp(encoding), center], -1)


def require_boxes(queries: Queries) -> None:
    """Raise a ValueError for queries whose references are points, or that have none."""
    if queries.reference.shape[-1] != 4:
        raise ValueError(
            "positions are computed from anchor boxes (MODEL.DINO.POSITION_HEAD, model.decoder."
            "position_head), and the queries of this model (MODEL.DINO.QUERY_SELECTION, "
            "model.query_selection) have none: use LearnedPosition"
        )
