"""Optimal one-to-one assignment of predictions to ground truth (DETR, section 3.1)."""

from collections.abc import Iterator

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor
from torch.nn import functional as F

from ..boxes import cxcywh_to_xyxy, generalized_iou
from ..ranges import require_not_negative
from ..structures import Match, Predictions, Target

# At most this many boxes at a time, so that intermediate tensors do not grow with the boxes.
BOXES_AT_ONCE = 256
# Above any cost in training, but small enough to keep the precision of others in float64.
NOT_FINITE = 1e9

MATCHER_REGISTRY = Registry("MATCHER")


@MATCHER_REGISTRY.register()
class HungarianMatcher:
    """Optimal matching; a plain callable without parameters.

    >>> logits = torch.tensor([[4.0], [-4.0], [-4.0]])  # of three queries, for one class
    >>> boxes = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1], [0.5, 0.5, 1.0, 1.0]])
    >>> target = Target(torch.tensor([0]), torch.tensor([[0.2, 0.2, 0.1, 0.1]]))
    >>> match = HungarianMatcher()(Predictions(logits[None, None], boxes[None, None]), [target])
    >>> match.queries, match.targets
    (tensor([[0]]), tensor([[0]]))

    Args:
        class_cost, bbox_cost, giou_cost: weights of the focal, L1 and generalized IoU costs
        alpha, gamma: of the focal cost (Deformable DETR)
        giou_eps: added to both divisors of the generalized IoU
    """

    further_costs: tuple[str, ...] = ()  # of a subclass, keys under MODEL.DINO.MATCHER in YAML

    def __init__(
        self,
        *,
        class_cost: float = 2.0,
        bbox_cost: float = 5.0,
        giou_cost: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        giou_eps: float = 0.0,
    ):
        require_not_negative(class_cost=class_cost, bbox_cost=bbox_cost, giou_cost=giou_cost)
        require_not_negative(giou_eps=giou_eps)
        self.giou_eps = giou_eps
        self.class_cost, self.bbox_cost, self.giou_cost = class_cost, bbox_cost, giou_cost
        self.alpha, self.gamma = alpha, gamma

    @torch.no_grad()
    def __call__(self, predictions: Predictions, targets: list[Target]) -> Match:
        """Match every stage and image; synchronises with the device once. The match is on the CPU.

        Costs that are not finite, because a prediction or a box is not, count as very high, so
        there is always a match. The trainer handles losses that are not finite on all workers
        together; an exception here would leave the other workers waiting.

        Args:
            predictions: of N stages, (N, B, Q, .)
            targets: of B images; those with more boxes than queries match their best Q
        """
        costs = self.costs(predictions, targets)
        counts = [len(target.labels) for target in targets]
        images, queries, matched = assign_queries(costs.cpu(), counts)
        return Match(images[0], queries, matched)

    def costs(self, predictions: Predictions, targets: list[Target]) -> Tensor:
        """Costs (N, Q, M) of all boxes of the batch, for the queries of their own image."""
        stages, _, queries, _ = predictions.boxes.shape
        counts = [len(target.labels) for target in targets]
        costs = predictions.logits.new_empty(stages, queries, sum(counts))
        for image, part in enumerate(costs.split(counts, -1)):
            if counts[image]:
                own = type(predictions)(*(x[:, image] for x in predictions))
                self.fill(part, own, targets[image])
        return costs

    def fill(self, costs: Tensor, predictions: Predictions, target: Target) -> None:
        """Write the costs (N, Q, M) of an image with boxes, whose predictions are (N, Q, .)."""
        for part, labels, boxes in in_parts(costs, target):
            part.copy_(self.cost(predictions.logits[..., labels], predictions.boxes, boxes))

    def cost(self, logits: Tensor, predicted: Tensor, boxes: Tensor) -> Tensor:
        """Cost (..., Q, M) of matching each query of an image with each of M boxes.

        Args:
            logits: (..., Q, M), of each query for the class of each box
            predicted: boxes (..., Q, 4)
            boxes: (M, 4)
        """
        return (
            self.class_cost * self.cost_of_class(logits)
            + self.bbox_cost * torch.cdist(predicted, boxes, p=1)
            - self.giou_cost * pairwise_giou(predicted, boxes, self.giou_eps)
        )

    def cost_of_class(self, logits: Tensor) -> Tensor:
        """Elementwise, without its weight."""
        return focal_change(logits, self.alpha, self.gamma)


@MATCHER_REGISTRY.register()
class SoftmaxMatcher(HungarianMatcher):
    """The cost of a class is minus its probability by softmax (DETR, section 3.1).

    The last logit is that of no object.
    """

    def fill(self, costs: Tensor, predictions: Predictions, target: Target) -> None:
        logits = predictions.logits.log_softmax(-1)
        super().fill(costs, predictions._replace(logits=logits), target)

    def cost_of_class(self, logits: Tensor) -> Tensor:
        return -logits.exp()


@MATCHER_REGISTRY.register()
class PositionModulatedMatcher(HungarianMatcher):
    """Class costs are modulated by how well boxes fit (Stable-DINO, arXiv 2304.04742).

    The focal cost is that of the probability p * u^0.5, where u = (GIoU + 1) / 2 is divided by the
    largest u of the image, over all its queries and boxes in a stage. (The published code includes
    boxes of other images in the batch and, of several boxes of a class, uses the last.)
    """

    power = 0.5

    def fill(self, costs: Tensor, predictions: Predictions, target: Target) -> None:
        for part, _, boxes in in_parts(costs, target):
            # 2 u: the factor cancels in the ratio
            part.copy_(pairwise_giou(predictions.boxes, boxes, self.giou_eps) + 1)
        tiny = torch.finfo(costs.dtype).tiny
        best = costs.amax((-2, -1), keepdim=True).clamp(min=tiny)
        for part, labels, boxes in in_parts(costs, target):
            factor = (part / best).clamp(min=tiny) ** self.power
            logits = scale_probability(predictions.logits[..., labels], factor)
            part.copy_(self.cost(logits, predictions.boxes, boxes))


def costs_from_config(c: CfgNode, matcher: type[HungarianMatcher]) -> dict[str, float]:
    """The weights of costs under MODEL.DINO.MATCHER, as arguments of a matcher."""
    names = ("class_cost", "bbox_cost", "giou_cost", *getattr(matcher, "further_costs", ()))
    return {name: c.MATCHER[name.upper()] for name in names}


def in_parts(costs: Tensor, target: Target) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Costs (N, Q, m), labels (m,) and boxes (m, 4), of at most BOXES_AT_ONCE boxes at a time."""
    parts = (target.labels.split(BOXES_AT_ONCE), target.boxes.split(BOXES_AT_ONCE))
    return zip(costs.split(BOXES_AT_ONCE, -1), *parts, strict=True)


def pairwise_giou(predicted: Tensor, boxes: Tensor, eps: float = 0.0) -> Tensor:
    """Generalized IoU (..., Q, M) of boxes (..., Q, 4) with boxes (M, 4)."""
    return generalized_iou(cxcywh_to_xyxy(predicted)[..., None, :], cxcywh_to_xyxy(boxes), eps)


def scale_probability(logits: Tensor, factor: Tensor) -> Tensor:
    """Logits of probabilities that are `factor`, in (0, 1], times those of the given logits.

    With p = sigmoid(x) it is log(p f) - log(1 - p f), where 1 - p f = (1 - p) + p (1 - f).
    """
    present, absent = F.logsigmoid(logits), F.logsigmoid(-logits)
    return present + factor.log() - torch.logaddexp(absent, present + torch.log1p(-factor))


def focal_change(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """How much larger the focal loss of each logit is for an object than for background."""
    there, absent = (
        sigmoid_focal_loss(logits, torch.full_like(logits, is_object), alpha, gamma)
        for is_object in (1.0, 0.0)
    )
    return there - absent


def assign_queries(costs: Tensor, counts: list[int]) -> Tensor:
    """The cheapest assignment of every stage and image, on the CPU.

    Args:
        costs: (N, Q, M) of all boxes of the batch, each for the queries of its own image; those
            that are not finite count as NOT_FINITE
        counts: how many of the boxes each image has

    Returns:
        (3, N, n) int64, of each of n pairs its image, its query and its box, counted through the
        batch; every stage has the same images
    """
    from scipy.optimize import linear_sum_assignment  # takes half a second to import

    table = np.nan_to_num(costs.numpy(), nan=NOT_FINITE, posinf=NOT_FINITE, neginf=NOT_FINITE)
    packed, end = [], 0
    for image, count in enumerate(counts):
        start, end = end, end + count
        pairs = [linear_sum_assignment(stage) for stage in table[..., start:end]]
        queries, boxes = np.stack(pairs, axis=1)  # (N, n) each
        packed.append(np.stack([np.full_like(queries, image), queries, start + boxes]))
    return torch.from_numpy(np.concatenate(packed, axis=-1))


def queries_of_boxes(match: Match, num_boxes: int) -> Tensor:
    """The matched query of each box of the batch, (N, num_boxes), from the match of N stages.

    -1 for boxes without a query, if there are more boxes than queries.
    """
    table = match.queries.new_full((len(match.queries), num_boxes), -1)
    return table.scatter(1, match.targets, match.queries)


def instability(queries: Tensor) -> Tensor:
    """The share of boxes whose query differs from that of the stage before, in [0, 1].

    After DN-DETR (section 3), which compares two epochs in place of two stages, and counts queries
    whose box differs, so that a box that changes its query counts twice.

    >>> instability(torch.tensor([[0, 1, 2, 3], [0, 1, 3, 2]]))
    tensor([0.5000])

    Args:
        queries: (N, M) of `queries_of_boxes`, stages in the order in which they refine each other

    Returns:
        (N - 1,), NaN without boxes
    """
    return (queries[1:] != queries[:-1]).float().mean(1)
