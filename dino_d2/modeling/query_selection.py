"""Where the decoder's queries come from (DINO, section 3.4 and figure 5).

    StaticQueries         learned content, learned anchors   (DAB- and DN-Deformable-DETR)
    PureQuerySelection    both from the encoder's best tokens (Deformable DETR's two stages)
    MixedQuerySelection   learned content, anchors from the encoder's best tokens (DINO)
    DistinctQuerySelection  both from the best tokens whose boxes differ (DDQ DETR)

and of the predecessors:

    ObjectQueries         learned positions                  (DETR)
    PointQueries          learned content, positions and reference points (Deformable DETR)
    ProposalQueries       content and positions of proposed boxes (its two-stage variant)
    PatternQueries        learned anchors                    (DAB-DETR)
    IndicatorPatternQueries, IndicatorQueries  with a channel for denoising (DN-DETR)

All map the encoder's FeaturePyramid to (Queries, Predictions or None): the predictions, if any,
are the encoder's proposals that became queries, and are supervised like a decoder layer.
"""

import math
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils.registry import Registry
from torch import Tensor, nn
from torch.nn import functional as F

from ..boxes import cxcywh_to_xyxy, distinct, inverse_sigmoid
from ..layers import box_head, class_head
from ..layers.blocks import xavier_uniform_
from ..layers.position import encode
from ..ranges import require_share, require_whole
from ..structures import FeaturePyramid, Predictions, Queries
from .tokens import take_tokens, token_centers

QUERY_SELECTION_REGISTRY = Registry("QUERY_SELECTION")


@QUERY_SELECTION_REGISTRY.register()
class StaticQueries(nn.Module):
    """The same `num_queries` learned queries for every image, without proposals.

    `num_classes` is ignored; it exists so that configs can switch the selection with one key.
    """

    @configurable
    def __init__(self, *, num_queries: int, embed_dim: int, num_classes: int):
        super().__init__()
        require_whole(num_queries=num_queries)
        self.content = nn.Embedding(num_queries, embed_dim)
        self.anchors = nn.Embedding(num_queries, 4)

    @classmethod
    def from_config(cls, cfg: CfgNode, num_classes: int) -> dict[str, object]:
        return selection_from_config(cfg, num_classes)

    def forward(self, memory: FeaturePyramid) -> tuple[Queries, None]:
        batch = memory.tokens.shape[0]
        content, anchors = self.content.weight, self.anchors.weight.sigmoid()
        return Queries(content.expand(batch, -1, -1), anchors.expand(batch, -1, -1)), None


@QUERY_SELECTION_REGISTRY.register()
class PureQuerySelection(nn.Module):
    """The tokens with the highest class scores, and boxes of the encoder's box head.

    An image with fewer tokens than `num_queries` gets as many queries as tokens (the published
    implementations fail). Tokens without an anchor take part with the score of a zero token, as in
    the published implementations; training keeps it low.
    """

    anchor_sides: Sequence[float] = ()  # of each level, see `proposal_anchors`

    @configurable
    def __init__(self, *, num_queries: int, embed_dim: int, num_classes: int):
        super().__init__()
        require_whole(num_queries=num_queries)
        self.num_queries = num_queries
        self.memory_proj = nn.Linear(embed_dim, embed_dim)
        self.memory_norm = nn.LayerNorm(embed_dim)
        self.make_heads(embed_dim, num_classes)
        xavier_uniform_(self.memory_proj)

    def make_heads(self, embed_dim: int, num_classes: int) -> None:
        self.class_head = class_head(embed_dim, num_classes)
        self.box_head = box_head(embed_dim)

    @classmethod
    def from_config(cls, cfg: CfgNode, num_classes: int) -> dict[str, object]:
        return selection_from_config(cfg, num_classes)

    def forward(self, memory: FeaturePyramid) -> tuple[Queries, Predictions]:
        return self.select(memory, self.class_head, self.box_head)

    def select(
        self, memory: FeaturePyramid, class_head: nn.Module, box_head: nn.Module
    ) -> tuple[Queries, Predictions]:
        """Queries and proposals by heads that need not be its own."""
        tokens, anchors = self.features(memory)
        logits = class_head(tokens)
        best = self.choose(tokens, anchors, logits, box_head)
        tokens, anchors, logits = (take_tokens(x, best) for x in (tokens, anchors, logits))
        boxes = (box_head(tokens) + anchors).sigmoid()
        return Queries(self.content_of(tokens), boxes.detach()), Predictions(logits, boxes)

    def candidates(self, memory: FeaturePyramid) -> tuple[Tensor, Tensor, Tensor]:
        """Of every token its feature and its anchor, see `features`, and its logits (B, S, K)."""
        tokens, anchors = self.features(memory)
        return tokens, anchors, self.class_head(tokens)

    def features(self, memory: FeaturePyramid) -> tuple[Tensor, Tensor]:
        """Of every token its feature (B, S, C) and its anchor (B, S, 4) before the sigmoid, inf
        where no object is expected."""
        anchors = proposal_anchors(memory, self.anchor_sides)
        invalid = anchors[..., :1].isinf()
        tokens = self.memory_norm(self.memory_proj(memory.tokens.masked_fill(invalid, 0)))
        return tokens, anchors

    def choose(
        self, tokens: Tensor, anchors: Tensor, logits: Tensor, box_head: nn.Module
    ) -> Tensor:
        """Which of the candidates become queries, best first: (B, Q)."""
        return self.best(logits.amax(-1))

    def best(self, scores: Tensor) -> Tensor:
        """The tokens (B, Q) of the highest scores (B, S)."""
        return scores.topk(min(self.num_queries, scores.shape[1]), dim=1).indices

    def content_of(self, tokens: Tensor) -> Tensor:
        """Content (B, Q, C) of the queries made from the selected tokens (B, Q, C)."""
        return tokens.detach()


@QUERY_SELECTION_REGISTRY.register()
class MixedQuerySelection(PureQuerySelection):
    """Anchors as in pure selection, but learned content.

    A token may contain several objects or part of one, so it only determines the position.
    """

    @configurable
    def __init__(self, *, num_queries: int, embed_dim: int, num_classes: int):
        super().__init__(num_queries=num_queries, embed_dim=embed_dim, num_classes=num_classes)
        self.content = nn.Embedding(num_queries, embed_dim)
        xavier_uniform_(self.content)

    def content_of(self, tokens: Tensor) -> Tensor:
        return self.content.weight[: tokens.shape[1]].expand(tokens.shape[0], -1, -1)


@QUERY_SELECTION_REGISTRY.register()
class DistinctQuerySelection(PureQuerySelection):
    """The best tokens whose boxes differ (DDQ DETR, arXiv 2303.12776): queries are distinct.

    Of the tokens' boxes, non-maximum suppression by the largest class score, whatever the class,
    keeps those whose IoU with a better one that is kept is at most `iou_threshold`. If fewer than
    `num_queries` are left, the best of the others follow. Content is a linear map of the token.

    Suppression takes the best `num_queries * 4` tokens, as its time grows with their square. The
    others cannot suppress any of them, so they change the queries only if fewer than
    `num_queries` of these are distinct.
    """

    @configurable
    def __init__(
        self, *, num_queries: int, embed_dim: int, num_classes: int, iou_threshold: float = 0.8
    ):
        super().__init__(num_queries=num_queries, embed_dim=embed_dim, num_classes=num_classes)
        require_share(iou_threshold=iou_threshold)
        self.iou_threshold = iou_threshold
        self.content_proj = nn.Linear(embed_dim, embed_dim)

    @classmethod
    def from_config(cls, cfg: CfgNode, num_classes: int) -> dict[str, object]:
        threshold = {"iou_threshold": cfg.MODEL.DINO.SELECTION_IOU}
        return selection_from_config(cfg, num_classes) | threshold

    @torch.no_grad()
    def choose(
        self, tokens: Tensor, anchors: Tensor, logits: Tensor, box_head: nn.Module
    ) -> Tensor:
        count = min(4 * self.num_queries, logits.shape[1])
        scores, order = logits.amax(-1).topk(count, dim=1)
        tokens, anchors = take_tokens(tokens, order), take_tokens(anchors, order)
        corners = cxcywh_to_xyxy((box_head(tokens) + anchors).float().sigmoid())
        keep = distinct(corners, scores, self.iou_threshold)
        rank = torch.arange(count, device=keep.device) + count * ~keep
        first = rank.topk(min(self.num_queries, count), dim=1, largest=False).indices
        return order.gather(1, first)

    def content_of(self, tokens: Tensor) -> Tensor:
        return self.content_proj(tokens.detach())


def selection_from_config(cfg: CfgNode, num_classes: int) -> dict[str, object]:
    """The arguments that all of them have in common."""
    return {
        "num_queries": cfg.MODEL.DINO.NUM_QUERIES,
        "embed_dim": cfg.MODEL.DINO.EMBED_DIM,
        "num_classes": num_classes,
    }


def proposal_anchors(memory: FeaturePyramid, sides: Sequence[float] = ()) -> Tensor:
    """One anchor per token, a square centred on it.

    Args:
        sides: of the anchors of each level, finest first; by default 0.05, 0.1, 0.2, ...

    Returns:
        (B, S, 4) anchors before the sigmoid, inf on padding and close to the border of the image
    """
    centers = token_centers(memory)
    sides = sides or [0.05 * 2**level for level in range(len(memory.shapes))]
    parts = [
        centers.new_full((height * width,), side)
        for side, (height, width) in zip(sides, memory.shapes, strict=True)
    ]
    sizes = torch.cat(parts)[:, None].expand_as(centers)
    anchors = torch.cat([centers, sizes], -1)
    valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1) & ~memory.padding
    return inverse_sigmoid(anchors, eps=1e-6).masked_fill(~valid[..., None], math.inf)


@QUERY_SELECTION_REGISTRY.register()
class PointQueries(nn.Module):
    """Queries of Deformable DETR: learned content and position.

    The reference point is a linear function of the position.

    Args:
        num_queries: Q
        embed_dim: C
    """

    @configurable
    def __init__(self, *, num_queries: int = 300, embed_dim: int = 256):
        super().__init__()
        require_whole(num_queries=num_queries)
        self.content = nn.Embedding(num_queries, embed_dim)
        self.position = nn.Embedding(num_queries, embed_dim)
        self.reference_points = nn.Linear(embed_dim, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, num_classes: int) -> dict[str, object]:
        return {"num_queries": cfg.MODEL.DINO.NUM_QUERIES, "embed_dim": cfg.MODEL.DINO.EMBED_DIM}

    def forward(self, memory: FeaturePyramid) -> tuple[Queries, None]:
        position = self.position.weight
        parts = self.content.weight, self.reference_points(position).sigmoid(), position
        batch = memory.tokens.shape[0]
        return Queries(*(x.expand(batch, -1, -1) for x in parts)), None


@QUERY_SELECTION_REGISTRY.register()
class ProposalQueries(PureQuerySelection):
    """Queries of two-stage Deformable DETR (appendix A.4): the proposals of the highest objectness.

    Objectness is the logit of class 0. Content and position are functions of the proposed box; the
    token's feature is not used.
    """

    @configurable
    def __init__(self, *, num_queries: int = 300, embed_dim: int = 256, num_classes: int):
        super().__init__(num_queries=num_queries, embed_dim=embed_dim, num_classes=num_classes)
        self.embed_dim = embed_dim
        self.box_proj = nn.Linear(2 * embed_dim, 2 * embed_dim)
        self.box_norm = nn.LayerNorm(2 * embed_dim)
        xavier_uniform_(self.box_proj)

    def forward(self, memory: FeaturePyramid) -> tuple[Queries, Predictions]:
        """Select queries; the predictions are those of all S tokens."""
        tokens, anchors, logits = self.candidates(memory)
        boxes = (self.box_head(tokens) + anchors).sigmoid()
        reference = take_tokens(boxes, self.choose(tokens, anchors, logits, self.box_head)).detach()
        encoding = encode(reference, self.embed_dim // 2, temperature=10000.0).flatten(-2)
        position, content = self.box_norm(self.box_proj(encoding)).chunk(2, dim=-1)
        return Queries(content, reference, position), Predictions(logits, boxes)

    def choose(
        self, tokens: Tensor, anchors: Tensor, logits: Tensor, box_head: nn.Module
    ) -> Tensor:
        return self.best(logits[..., 0])


@QUERY_SELECTION_REGISTRY.register()
class IndicatorQueries(StaticQueries):
    """Queries of DN-Deformable-DETR: the last channel is 0, for denoising queries it is 1."""

    @configurable
    def __init__(self, *, num_queries: int = 300, embed_dim: int = 256, num_classes: int):
        super().__init__(num_queries=num_queries, embed_dim=embed_dim - 1, num_classes=num_classes)

    def forward(self, memory: FeaturePyramid) -> tuple[Queries, None]:
        queries, _ = super().forward(memory)
        return Queries(F.pad(queries.content, (0, 1)), queries.reference), None


@QUERY_SELECTION_REGISTRY.register()
class ObjectQueries(nn.Module):
    """Queries of DETR: learned positions, without content and reference.

    Args:
        num_queries: Q
        embed_dim: C
    """

    @configurable
    def __init__(self, *, num_queries: int = 100, embed_dim: int = 256):
        super().__init__()
        require_whole(num_queries=num_queries)
        self.position = nn.Embedding(num_queries, embed_dim)

    @classmethod
    def from_config(cls, cfg: CfgNode, num_classes: int) -> dict[str, object]:
        return {"num_queries": cfg.MODEL.DINO.NUM_QUERIES, "embed_dim": cfg.MODEL.DINO.EMBED_DIM}

    def forward(self, memory: FeaturePyramid) -> tuple[Queries, None]:
        position = self.position.weight.expand(memory.tokens.shape[0], -1, -1)
        return Queries(torch.zeros_like(position), position[..., :0], position), None


@QUERY_SELECTION_REGISTRY.register()
class PatternQueries(nn.Module):
    """Queries of DAB-DETR: learned anchors, each with every pattern (Anchor DETR) as its content.

    Args:
        num_queries: anchors
        embed_dim: C
        num_patterns: learned contents; 0: a single one, which is zero
    """

    @configurable
    def __init__(
        self,
        *,
        num_queries: int = 300,
        embed_dim: int = 256,
        num_patterns: int = 0,
    ):
        super().__init__()
        require_whole(num_queries=num_queries)
        require_whole(0, num_patterns=num_patterns)
        self.embed_dim = embed_dim
        self.anchors = nn.Embedding(num_queries, 4)
        self.content = nn.Embedding(num_patterns, embed_dim) if num_patterns else None

    @classmethod
    def from_config(cls, cfg: CfgNode, num_classes: int) -> dict[str, object]:
        c = cfg.MODEL.DINO
        return {
            "num_queries": c.NUM_QUERIES,
            "embed_dim": c.EMBED_DIM,
            "num_patterns": c.NUM_PATTERNS,
        }

    def forward(self, memory: FeaturePyramid) -> tuple[Queries, None]:
        anchors = self.anchors.weight.sigmoid()
        content = anchors.new_zeros(1, self.embed_dim)
        if self.content is not None:
            content = self.content.weight
        parts = content.repeat_interleave(len(anchors), 0), anchors.repeat(len(content), 1)
        batch = memory.tokens.shape[0]
        return Queries(*(x.expand(batch, -1, -1) for x in parts)), None


@QUERY_SELECTION_REGISTRY.register()
class IndicatorPatternQueries(PatternQueries):
    """Queries of DN-DETR: those of DAB-DETR whose last channel is 0, as of `IndicatorQueries`."""

    @configurable
    def __init__(
        self,
        *,
        num_queries: int = 300,
        embed_dim: int = 256,
        num_patterns: int = 1,
    ):
        super().__init__(
            num_queries=num_queries, embed_dim=embed_dim - 1, num_patterns=num_patterns
        )

    def forward(self, memory: FeaturePyramid) -> tuple[Queries, None]:
        queries, _ = super().forward(memory)
        return Queries(F.pad(queries.content, (0, 1)), queries.reference), None
