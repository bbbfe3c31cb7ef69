"""Set loss: every prediction of every stage is matched to the ground truth, then supervised."""

import torch
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from ..boxes import cxcywh_to_xyxy, generalized_iou, iou
from ..distributed.sharing import mean_over_workers
from ..ranges import require_not_negative
from ..structures import (
    DenoisingBatch,
    DetectorOutput,
    Match,
    Predictions,
    Target,
    join_targets,
    send,
    stack_predictions,
)
from .class_losses import ClassLoss, FocalLoss
from .matcher import HungarianMatcher, instability, queries_of_boxes


class SetCriterion(nn.Module):
    """A loss of the classes, L1 and generalized IoU loss of the boxes (Deformable DETR).

    Queries without a box, negative denoising queries among them, have no class: only the class
    loss sees them. Losses are named after their stage: no suffix for the last decoder layer,
    `_0`, `_1`, ... for the layers before, `_enc` for the encoder's proposals; `_dn` and `_dn_0`,
    ... for the denoising queries.

    All are sums over queries, divided by the number of boxes of the batch (for the denoising
    queries, of which each box has one per group, by boxes times groups). The number is averaged
    over workers, once per call, and at least 1: each box weighs the same wherever it is trained on.

    Predictions and boxes that are NaN or infinite make losses that are, too (a logit of minus
    infinity apart, which is sure that nothing is there), never an exception: a worker that raised
    would leave the others waiting for it. Whoever trains looks at the losses.

    Args:
        matcher: assigns predictions to ground truth
        class_loss: of every part but the denoising queries; None is :class:`FocalLoss`
        denoising_class_loss: None is that of the other parts
        class_weight, bbox_weight, giou_weight: of the losses, the same for every stage
        denoising_class_weight: None is `class_weight`
    """

    def __init__(
        self,
        *,
        matcher: HungarianMatcher,
        class_loss: ClassLoss | None = None,
        denoising_class_loss: ClassLoss | None = None,
        class_weight: float = 1.0,
        bbox_weight: float = 5.0,
        giou_weight: float = 2.0,
        denoising_class_weight: float | None = None,
    ):
        super().__init__()
        require_not_negative(
            class_weight=class_weight, bbox_weight=bbox_weight, giou_weight=giou_weight
        )
        self.matcher = matcher
        self.class_loss = class_loss or FocalLoss()
        self.denoising_class_loss = denoising_class_loss or self.class_loss
        self.weights = {
            "loss_class": class_weight,
            "loss_bbox": bbox_weight,
            "loss_giou": giou_weight,
        }
        self.denoising_weights = dict(self.weights)
        if denoising_class_weight is not None:
            require_not_negative(denoising_class_weight=denoising_class_weight)
            self.denoising_weights["loss_class"] = denoising_class_weight

    def forward(self, output: DetectorOutput, targets: list[Target]) -> dict[str, Tensor]:
        """The weighted losses of all stages, each a scalar; their sum is to be minimised."""
        truth = join_targets(targets)
        num_boxes = average_over_workers(truth.boxes.new_full((), len(truth.boxes)))
        losses = self.matching_losses(output, targets, num_boxes)
        if output.denoising is not None:
            predictions = stack_predictions(output.denoised)
            losses |= self.denoising_losses(predictions, output.denoising, truth, num_boxes)
        return losses

    def matching_losses(
        self, output: DetectorOutput, targets: list[Target], num_boxes: Tensor
    ) -> dict[str, Tensor]:
        """Losses of the decoder layers and, if any, of the proposals."""
        stages, suffixes = list(output.layers), layer_suffixes(len(output.layers))
        if output.proposals is not None:
            stages, suffixes = [*stages, output.proposals], [*suffixes, "_enc"]
        predictions = stack_predictions(stages)
        match, truth = self.matcher(predictions, targets), join_targets(targets)
        log_instability(match, len(truth.boxes), proposals_last=output.proposals is not None)
        match = Match(*(send(x, like=predictions.boxes) for x in match))
        sums = stage_sums(predictions, match, truth, self.class_loss)
        return weigh(sums, self.weights, num_boxes, suffixes)

    def denoising_losses(
        self,
        predictions: Predictions,
        denoising: DenoisingBatch,
        truth: Target,
        num_boxes: Tensor,
    ) -> dict[str, Tensor]:
        """Losses of the denoising queries: predictions (N, B, T, .), matched by construction."""
        sums = stage_sums(predictions, denoising.match, truth, self.denoising_class_loss)
        # A batch without boxes has nothing to denoise, yet its queries keep their place in the
        # backward pass: every parameter gets a gradient on every worker.
        share = float(len(truth.boxes) > 0)
        weights = {name: share * weight for name, weight in self.denoising_weights.items()}
        suffixes = layer_suffixes(len(predictions.logits), stage="_dn")
        return weigh(sums, weights, num_boxes * denoising.num_groups, suffixes)


def log_instability(match: Match, num_boxes: int, *, proposals_last: bool) -> None:
    """Logs `matching/instability_i`, in [0, 1], see `instability`: from decoder layer i - 1 to
    layer i, counted from 0 as in the names of losses; to layer 0 it is from the proposals.

    It is that of one batch: of several workers the main one's, of several batches that make a step
    each by itself (metrics.json has a median of many). Nothing is logged without boxes, nor where
    Detectron2 has no storage of events, outside of training.

    Args:
        match: on the CPU, of all stages
        num_boxes: of the batch
        proposals_last: whether the last stage are the proposals, from which layer 0 goes on
    """
    if not num_boxes or not has_event_storage():
        return
    queries = queries_of_boxes(match, num_boxes)
    if proposals_last:
        queries = queries.roll(1, 0)
    storage, first = get_event_storage(), 0 if proposals_last else 1
    for layer, share in enumerate(instability(queries).tolist(), first):
        storage.put_scalar(f"matching/instability_{layer}", share)


def stage_sums(
    predictions: Predictions, match: Match, truth: Target, class_loss: ClassLoss
) -> dict[str, Tensor]:
    """Each kind of loss, summed over the queries of N stages: predictions (N, B, Q, .), `truth` of
    the whole batch, sums (N,)."""
    logits, boxes = predictions
    stages = torch.arange(len(logits), device=logits.device)[:, None]
    matched = stages, match.images, match.queries  # (N, n) when broadcast

    predicted, expected = boxes[matched], truth.boxes[match.targets]
    corners = cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(expected)
    matched_logits = *matched, truth.labels[match.targets]
    # NaN if a box is not finite, matched or not, otherwise 0.
    broken = 0 * (boxes.detach().sum((1, 2, 3)) + truth.boxes.sum())
    return {
        "loss_class": class_loss(logits, matched_logits, iou(*corners).detach()),
        "loss_bbox": (predicted - expected).abs().sum((1, 2)) + broken,
        "loss_giou": (1 - generalized_iou(*corners)).sum(1),
    }


def weigh(
    sums: dict[str, Tensor], weights: dict[str, float], num_boxes: Tensor, suffixes: list[str]
) -> dict[str, Tensor]:
    """Sums (N,) of each kind as one weighted mean over boxes per kind and stage."""
    return {
        name + suffix: loss
        for name, values in sums.items()
        for suffix, loss in zip(
            suffixes, (weights[name] * values / num_boxes).unbind(), strict=True
        )
    }


def layer_suffixes(num_layers: int, stage: str = "") -> list[str]:
    return [f"{stage}_{i}" for i in range(num_layers - 1)] + [stage]


def average_over_workers(count: Tensor) -> Tensor:
    """Mean of a count over all workers, at least 1."""
    return mean_over_workers(count).clamp(min=1)


class AllProposals(SetCriterion):
    """Criterion of two-stage Deformable DETR: the proposals of all tokens are supervised, with
    class 0 for any object."""

    def matching_losses(
        self, output: DetectorOutput, targets: list[Target], num_boxes: Tensor
    ) -> dict[str, Tensor]:
        objects = [target._replace(labels=torch.zeros_like(target.labels)) for target in targets]
        proposals = DetectorOutput([output.proposals], None, [], None)
        losses = super().matching_losses(proposals, objects, num_boxes)
        return super().matching_losses(output._replace(proposals=None), targets, num_boxes) | {
            f"{name}_enc": loss for name, loss in losses.items()
        }


class BoxesOnly(SetCriterion):
    """Criterion of DN-DETR: the empty slots of denoising are not supervised."""

    def denoising_losses(
        self,
        predictions: Predictions,
        denoising: DenoisingBatch,
        truth: Target,
        num_boxes: Tensor,
    ) -> dict[str, Tensor]:
        images, queries, _ = denoising.match
        empty = predictions.logits.new_ones(predictions.logits.shape[1:3], dtype=torch.bool)
        empty = empty.index_put((images, queries), torch.zeros_like(images, dtype=torch.bool))
        # Where a logit is -inf nothing is lost and nothing is learned.
        logits = predictions.logits.masked_fill(empty[..., None], -torch.inf)
        predictions = predictions._replace(logits=logits)
        return super().denoising_losses(predictions, denoising, truth, num_boxes)
