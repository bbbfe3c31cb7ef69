"""Relations between queries, from the predictions of a layer for the next decoder layers.

    DistinctQueries   duplicates are not seen and not supervised (DDQ DETR, arXiv 2303.12776)
    PositionRelation  a bias of attention, from how boxes lie to each other (Relation-DETR)

`Decoder` constructs one from its number of heads, and calls it after every layer.
"""

import math

import torch
from detectron2.utils.registry import Registry
from torch import Tensor, nn
from torch.nn import functional as F

from ..boxes import cxcywh_to_xyxy, distinct
from ..layers.position import encode
from ..ranges import require_share
from ..structures import LayerOutput

RELATION_REGISTRY = Registry("RELATION")

# Logit of a suppressed query: no score, and a higher cost of matching than any box has, but finite.
SUPPRESSED = -100.0


@RELATION_REGISTRY.register()
class DistinctQueries(nn.Module):
    """Of queries at the same place, only the one with the highest score counts (DDQ DETR).

    In each layer non-maximum suppression by the largest class score, whatever the class, suppresses
    queries of the result whose box has an IoU above `iou_threshold` with that of a better one. They
    predict nothing in this layer: they are detections and background only where they are distinct,
    and are matched with a box only if there are more boxes than distinct queries. In the next
    layer, the other queries of the result do not attend to them; they attend to themselves and the
    distinct ones.

    Queries of other branches are not suppressed, and their attention mask does not change.

    (In the published code a layer supervises the queries that were distinct before it, and
    detections are those that were so before the last layer; distinct queries see suppressed ones.)
    """

    def __init__(self, *, num_heads: int, iou_threshold: float = 0.8):
        super().__init__()
        require_share(iou_threshold=iou_threshold)
        self.num_heads, self.iou_threshold = num_heads, iou_threshold

    def forward(
        self, output: LayerOutput, attn_mask: Tensor | None, last: bool
    ) -> tuple[LayerOutput, Tensor | None]:
        """A layer's predictions without duplicates, and the attention mask of the next layer.

        Synchronises with the GPU once, and once more if there are other branches.

        Args:
            output: of a layer
            attn_mask: (Q, Q), True where attention is forbidden in every layer; the queries of the
                result come last and only attend to each other
            last: whether no layer follows

        Returns:
            the output with logits of suppressed queries at `SUPPRESSED`, and the mask of the next
            layer (B * H, Q, Q), if there is one
        """
        total = output.boxes.shape[1]
        count = total if attn_mask is None else int((~attn_mask[-1]).sum())
        others = total - count
        logits, boxes = output.logits[:, others:], output.boxes[:, others:]
        corners = cxcywh_to_xyxy(boxes.float())
        suppressed = ~distinct(corners, logits.amax(-1), self.iou_threshold)  # (B, count)
        hidden = F.pad(suppressed, (others, 0))[..., None]
        output = output._replace(logits=output.logits.masked_fill(hidden, SUPPRESSED))
        if last:
            return output, None
        itself = torch.eye(count, dtype=torch.bool, device=boxes.device)
        mask = F.pad(suppressed[:, None] & ~itself, (others, 0, others, 0))
        if attn_mask is not None:
            mask = mask | attn_mask
        return output, mask[:, None].expand(-1, self.num_heads, -1, -1).flatten(0, 1)


@RELATION_REGISTRY.register()
class PositionRelation(nn.Module):
    """An attention bias for every head, from the relation of two boxes (Relation-DETR, 2024).

    The relation from box 1, with which a layer started, of the attending query, to box 2, which the
    layer predicted, of the attended query is, for both axes,

        log(|center 1 - center 2| / size 1 + 1)  and  log(size 1 / size 2)

    Sines and cosines of these four numbers, without gradient, a linear layer and ReLU make the bias
    of the next layer, for all queries that may see each other, those of denoising as well.

    Encodings take 4 * channels numbers for every pair of queries; in training they are kept for the
    gradient of the linear layer, or recomputed with the decoder's activations.

    Args:
        num_heads: H
        channels: of the encoding of a number
        temperature, scale: of the encoding
    """

    def __init__(
        self,
        *,
        num_heads: int,
        channels: int = 16,
        temperature: float = 10000.0,
        scale: float = 100.0,
    ):
        super().__init__()
        self.channels, self.temperature, self.scale = channels, temperature, scale
        self.proj = nn.Linear(4 * channels, num_heads)

    def forward(
        self, output: LayerOutput, attn_mask: Tensor | None, last: bool
    ) -> tuple[LayerOutput, Tensor | None]:
        """The output of a layer as it is, and the bias (B * H, Q, Q) of the next, if there is one.

        Args:
            output: of a layer
            attn_mask: (Q, Q), True where attention is forbidden: there the bias is -inf
            last: whether no layer follows

        Raises:
            ValueError: queries are points, not boxes
        """
        if output.anchors.shape[-1] != 4:
            raise ValueError(
                "PositionRelation needs queries with boxes: choose another decoder.relation "
                "for a detector whose queries are reference points"
            )
        if last:
            return output, None
        relation = position_relation(output.anchors.detach(), output.boxes.detach())
        numbers = relation * (self.scale / (2 * math.pi))
        encoding = encode(numbers, self.channels, self.temperature).flatten(-2)
        bias = self.proj(encoding).relu().permute(0, 3, 1, 2)  # (B, H, Q, Q)
        if attn_mask is not None:
            bias = bias.masked_fill(attn_mask, -math.inf)
        return output, bias.flatten(0, 1)


def position_relation(boxes: Tensor, others: Tensor, eps: float = 1e-5) -> Tensor:
    """The relations (B, Q, Q, 4) of boxes (B, Q, 4) to other boxes (B, Q, 4).

    In order distance in x and y, ratio of widths and of heights, all as logarithms.
    """
    (center, size), (other_center, other_size) = (x.float().split(2, -1) for x in (boxes, others))
    distance = (center[:, :, None] - other_center[:, None]).abs()
    size, other_size = size[:, :, None] + eps, other_size[:, None] + eps
    return torch.cat([torch.log1p(distance / size), torch.log(size / other_size)], -1)
