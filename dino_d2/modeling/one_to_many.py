"""One-to-many matching: several queries per box, in training only.

OneToManyMatcher   assigns queries by a score of their box and their class
RepeatedMatcher    assigns them optimally, as if every box were there several times
MixedMatching      Align-DETR: so are the queries of the result, but for the last layer
OneToManyHead      MS-DETR: another class head for the queries of the result
OneToManyQueries   H-DETR: further queries
DenseQueries       DDQ DETR: further queries, with heads of their own
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..boxes import cxcywh_to_xyxy, iou, refine
from ..layers import box_head, class_head
from ..ranges import require_positive, require_share, require_whole
from ..structures import Branch, FeaturePyramid, LayerOutput, Match, Predictions, Queries, Target
from .branches import BRANCH_REGISTRY
from .class_losses import AlignLoss
from .criterion import CRITERION_REGISTRY, SetCriterion
from .matcher import MATCHER_REGISTRY, HungarianMatcher, costs_from_config, in_parts
from .query_selection import MixedQuerySelection, PureQuerySelection

Matcher = Callable[[Predictions, list[Target]], Match]


class OneToManyMatcher:
    """The queries that fit a box best, up to a number; a plain callable without parameters.

    The score of a query for a box is `iou_weight * IoU + (1 - iou_weight) * p`, with the
    probability p of the box's class. A query belongs to the box for which its score is highest, and
    is matched with it if that is at least `threshold`, or if no other query scores higher for some
    box, but only if it is among the `max_queries` best (as in MS-DETR, arXiv 2401.03989, after the
    anchors of Faster R-CNN). So no query is matched with two boxes, and a box whose best queries
    belong to others has none.

    Everything is computed on the device, without synchronisation.

    Args:
        iou_weight: in [0, 1]; the rest is the weight of the class
        threshold: in [0, 1]
        max_queries: for a box, at least 1

    Raises:
        ValueError: a number is out of range
    """

    def __init__(self, *, iou_weight: float = 0.7, threshold: float = 0.4, max_queries: int = 6):
        require_share(iou_weight=iou_weight, threshold=threshold)
        require_whole(max_queries=max_queries)
        self.iou_weight, self.threshold = iou_weight, threshold
        self.max_queries = max_queries

    @torch.no_grad()
    def __call__(self, predictions: Predictions, targets: list[Target]) -> Match:
        """Match every stage and image; the targets of matches that a box does not have are -1.

        Args:
            predictions: of N stages, (N, B, Q, .)
            targets: of B images
        """
        none = predictions.boxes.new_zeros(0, dtype=torch.int64)
        by_stage = none.expand(len(predictions.boxes), 0)
        parts, start = [Match(none, by_stage, by_stage)], 0
        for image, target in enumerate(targets):
            if count := len(target.labels):
                own = Predictions(*(x[:, image] for x in predictions))
                queries, is_match = self.assign(self.scores(own, target))
                boxes = torch.arange(start, start + count, device=none.device)
                found = boxes.where(is_match, -1).flatten(1)
                parts.append(Match(torch.full_like(found[0], image), queries.flatten(1), found))
            start += count
        return Match(*(torch.cat(x, -1) for x in zip(*parts, strict=True)))

    def scores(self, predictions: Predictions, target: Target) -> Tensor:
        """Scores (N, Q, M) in [0, 1] of the queries of an image, (N, Q, .), for its boxes."""
        corners = cxcywh_to_xyxy(predictions.boxes)[..., None, :]
        scores = predictions.logits.new_empty(*predictions.boxes.shape[:2], len(target.labels))
        for part, labels, boxes in in_parts(scores, target):
            fit = iou(corners, cxcywh_to_xyxy(boxes))
            probability = predictions.logits[..., labels].sigmoid()
            part.copy_(self.iou_weight * fit + (1 - self.iou_weight) * probability)
        return scores

    def assign(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The best k queries of each box, and whether they stand for it: (N, k, M) each, of scores
        (N, Q, M) with M > 0."""
        best, box = scores.max(-1)
        positive = best >= self.threshold
        positive = positive.scatter(1, scores.argmax(1), True)
        boxes = torch.arange(scores.shape[-1], device=scores.device)
        is_match = positive[..., None] & (box[..., None] == boxes)
        ranked, queries = scores.where(is_match, -1).topk(min(self.max_queries, len(best[0])), 1)
        return queries, ranked >= 0


class RepeatedMatcher:
    """Optimal matching with every box `repeats` times (H-DETR, arXiv 2207.13080, section 3.2).

    In an image with too few queries for this, every box is repeated as often as possible, so that
    no box goes unmatched because of others.

    Args:
        matcher: one to one
        repeats: queries for a box, at least 1
    """

    def __init__(self, matcher: Matcher, *, repeats: int):
        require_whole(repeats=repeats)
        self.matcher, self.repeats = matcher, repeats

    def __call__(self, predictions: Predictions, targets: list[Target]) -> Match:
        """Match every stage and image; synchronises with the GPU as the matcher does."""
        queries = predictions.boxes.shape[2]
        repeated, boxes, start = [], [], 0
        for target in targets:
            count = len(target.labels)
            times = max(1, min(self.repeats, queries // max(count, 1)))
            repeated.append(Target(target.labels.repeat(times), target.boxes.repeat(times, 1)))
            boxes.append(torch.arange(start, start + count).repeat(times))
            start += count
        match = self.matcher(predictions, repeated)
        return match._replace(targets=torch.cat(boxes)[match.targets])


@CRITERION_REGISTRY.register()
class MixedMatching(SetCriterion):
    """Criterion of Align-DETR (arXiv 2304.07527), which mixes two kinds of matching.

    In all stages but the last decoder layer a box has `repeats` queries. These are ranked by how
    well they fit (:meth:`AlignLoss.quality`), and that with rank r = 0, 1, ... has the weight
    exp(-r / tau), of its losses of boxes and in the target of its class loss. The last layer, and
    denoising, have one query for a box, so that the result needs no suppression.

    Instability of the matching is not logged.

    Args:
        repeats: at least 1
        tau: above 0
        arguments: of :class:`SetCriterion`

    Raises:
        ValueError: a number is out of range, or the class loss is not :class:`AlignLoss`
    """

    class_loss: AlignLoss

    def __init__(self, *, repeats: int = 2, tau: float = 1.5, **arguments: Any):
        super().__init__(**arguments)
        require_whole(repeats=repeats)
        require_positive(tau=tau)
        if not isinstance(self.class_loss, AlignLoss):
            raise ValueError(
                "MixedMatching ranks queries as AlignLoss does, and the class loss is "
                f"{type(self.class_loss).__name__}: choose AlignLoss, or another criterion"
            )
        self.tau = tau
        self.several = RepeatedMatcher(self.matcher, repeats=repeats)

    def match(self, branch: Branch, predictions: Predictions, targets: list[Target]) -> Match:
        if branch.match is not None:
            return super().match(branch, predictions, targets)
        match, last = self.several(predictions, targets), len(branch.layers) - 1
        one = self.matcher(Predictions(*(x[[last]] for x in predictions)), targets)
        # Pairs of an image follow each other: its k-th pair takes the place of the k-th of several.
        first = torch.searchsorted(one.images, one.images)
        place = torch.searchsorted(match.images, one.images) + torch.arange(len(first)) - first
        match.targets[last] = -1
        match.targets[last, place], match.queries[last, place] = one.targets[0], one.queries[0]
        return match

    def pair_weights(self, branch: Branch, logits: Tensor, iou: Tensor, targets: Tensor) -> Tensor:
        weights = super().pair_weights(branch, logits, iou, targets)
        if branch.match is not None:
            return weights
        return weights * torch.exp(-ranks(self.class_loss.quality(logits, iou), targets) / self.tau)


def ranks(scores: Tensor, groups: Tensor) -> Tensor:
    """The rank (N, n) of each score (N, n) among those of its group: 0, 1, ... from the highest.

    >>> ranks(torch.tensor([[0.5, 0.7, 0.2, 0.9]]), torch.tensor([[3, 8, 3, 3]]))
    tensor([[1, 0, 2, 0]])

    Args:
        groups: (N, n), whole numbers
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, groups.gather(1, order).argsort(dim=1, stable=True))
    by_group = groups.gather(1, order)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(
        1, order, places - torch.searchsorted(by_group, by_group)
    )


@BRANCH_REGISTRY.register()
class OneToManyHead(nn.Module):
    """Another class head for the queries of the result, supervised one to many (MS-DETR, arXiv
    2401.03989, variant (a)).

    The boxes are those of the result. There is one head for all layers, as the decoder has it.

    Args:
        num_classes: K
        embed_dim: C
        class_weight: of its class losses, relative to those of the result
        matcher: None: :class:`OneToManyMatcher`
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        embed_dim: int = 256,
        class_weight: float = 2.0,
        matcher: Matcher | None = None,
    ):
        super().__init__()
        self.class_head = class_head(embed_dim, num_classes)
        self.class_weight = class_weight
        self.matcher = matcher or OneToManyMatcher()

    @classmethod
    def from_config(cls, cfg: CfgNode, num_classes: int) -> dict[str, object]:
        return {"num_classes": num_classes, "embed_dim": cfg.MODEL.DINO.EMBED_DIM}

    def forward(self, targets: list[Target], queries: Queries, memory: FeaturePyramid) -> Branch:
        return Branch(
            "many", None, match=self.matcher, class_weight=self.class_weight, heads=self.predict
        )

    def predict(self, outputs: Sequence[LayerOutput]) -> list[Predictions]:
        """The predictions of every layer."""
        return [Predictions(self.class_head(x.features), x.boxes) for x in outputs]


@BRANCH_REGISTRY.register()
class OneToManyQueries(nn.Module):
    """Additional queries, several of which are matched with each box (hybrid branch of H-DETR,
    arXiv 2207.13080).

    Their proposals are supervised in the same way. In the published code the result and these
    queries take different proposals of the same heads; here they have heads of their own.

    Args:
        num_classes: K
        embed_dim: C
        num_queries: beside those of the result
        repeats: queries for each box
        weight: of all its losses
        matcher: one to one; None: :class:`HungarianMatcher`
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        embed_dim: int = 256,
        num_queries: int = 1500,
        repeats: int = 6,
        weight: float = 1.0,
        matcher: Matcher | None = None,
    ):
        super().__init__()
        self.query_selection = MixedQuerySelection(
            num_queries=num_queries, embed_dim=embed_dim, num_classes=num_classes
        )
        self.matcher = RepeatedMatcher(matcher or HungarianMatcher(), repeats=repeats)
        self.weight = weight

    @classmethod
    def from_config(cls, cfg: CfgNode, num_classes: int) -> dict[str, object]:
        c = cfg.MODEL.DINO
        make = MATCHER_REGISTRY.get(c.MATCHER.NAME)
        matcher = make(**costs_from_config(c, make))
        return {"num_classes": num_classes, "embed_dim": c.EMBED_DIM, "matcher": matcher}

    def forward(self, targets: list[Target], queries: Queries, memory: FeaturePyramid) -> Branch:
        own, proposals = self.query_selection(memory)
        return Branch(
            "hybrid",
            own,
            match=self.matcher,
            repeats=self.matcher.repeats,
            weight=self.weight,
            proposals=proposals,
        )


@BRANCH_REGISTRY.register()
class DenseQueries(nn.Module):
    """Additional queries, from the top-scoring tokens, distinct or not (dense branch of DDQ
    DETR, arXiv 2303.12776).

    Their content is a linear map of the token. They and the result do not attend to each other.
    They have separate class and box heads, one for all layers and one for the proposals. Between
    the layers their boxes are refined by the decoder's heads. (In the published code the heads
    differ between layers and refine the boxes, and queries are assigned to boxes differently.)

    Args:
        num_classes: K
        embed_dim: C
        num_queries: beside those of the result, published as 1.5 times as many
        matcher: None: :class:`OneToManyMatcher`
    """

    repeats = 3  # of at most 6 queries that a box has, as Mr. DETR divides the losses

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        embed_dim: int = 256,
        num_queries: int = 1350,
        matcher: Matcher | None = None,
    ):
        super().__init__()
        self.query_selection = PureQuerySelection(
            num_queries=num_queries, embed_dim=embed_dim, num_classes=num_classes
        )
        self.content_proj = nn.Linear(embed_dim, embed_dim)
        self.class_head = class_head(embed_dim, num_classes)
        self.box_head = box_head(embed_dim)
        self.matcher = matcher or OneToManyMatcher()

    @classmethod
    def from_config(cls, cfg: CfgNode, num_classes: int) -> dict[str, object]:
        c = cfg.MODEL.DINO
        count = 3 * c.NUM_QUERIES // 2
        return {"num_classes": num_classes, "embed_dim": c.EMBED_DIM, "num_queries": count}

    def forward(self, targets: list[Target], queries: Queries, memory: FeaturePyramid) -> Branch:
        own, proposals = self.query_selection(memory)
        return Branch(
            "dense",
            own._replace(content=self.content_proj(own.content)),
            match=self.matcher,
            repeats=self.repeats,
            heads=self.predict,
            proposals=proposals,
        )

    def predict(self, outputs: Sequence[LayerOutput]) -> list[Predictions]:
        """The predictions of every layer."""
        return [
            Predictions(self.class_head(x.features), refine(x.anchors, self.box_head(x.features)))
            for x in outputs
        ]
