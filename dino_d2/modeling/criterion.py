"""Set loss: predictions of every stage are matched to the ground truth, then supervised."""

from typing import Any

import torch
from detectron2.utils.events import get_event_storage, has_event_storage
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..boxes import cxcywh_to_xyxy, generalized_iou, iou
from ..distributed.sharing import mean_over_workers
from ..ranges import require_not_negative
from ..structures import (
    Branch,
    DetectorOutput,
    Match,
    Predictions,
    Target,
    join_targets,
    send_to_device,
    stack_predictions,
)
from .class_losses import ClassLoss, FocalLoss, SoftmaxLoss
from .matcher import HungarianMatcher, instability, queries_of_boxes

CRITERION_REGISTRY = Registry("CRITERION")


@CRITERION_REGISTRY.register()
class SetCriterion(nn.Module):
    """A classification loss, and L1 and generalized IoU losses of the boxes (Deformable DETR).

    Unmatched queries, also negative denoising queries, only have a classification loss. Names of
    losses have a suffix for their stage: none for the last decoder layer, `_0`, `_1`, ... for the
    layers before, `_enc` for the encoder's proposals; `_dn` and `_dn_0`, ... for the denoising
    queries.

    Losses are sums over queries (SoftmaxLoss: a mean), divided by the number of boxes of the batch
    (for denoising queries, by boxes times groups). The number is averaged over workers, once per
    call, and at least 1, so that each box has the same weight on every worker.

    Predictions and boxes that are NaN or infinite give such losses (except a logit of minus
    infinity, which is certain background), never an exception, for which other workers would wait.
    The trainer checks the losses.

    Args:
        matcher: assigns predictions to ground truth
        class_loss: of all but the denoising queries; None: :class:`FocalLoss`
        denoising_class_loss: None: as the others
        class_weight, bbox_weight, giou_weight: of the losses, the same for every stage
        denoising_class_weight: None: `class_weight`
        giou_eps: added to both divisors of the generalized IoU
    """

    further_options: tuple[str, ...] = ()  # of a subclass, keys under MODEL.DINO.LOSS in YAML

    def __init__(
        self,
        *,
        matcher: HungarianMatcher,
        class_loss: ClassLoss | SoftmaxLoss | None = None,
        denoising_class_loss: ClassLoss | SoftmaxLoss | None = None,
        class_weight: float = 1.0,
        bbox_weight: float = 5.0,
        giou_weight: float = 2.0,
        denoising_class_weight: float | None = None,
        giou_eps: float = 0.0,
    ):
        super().__init__()
        require_not_negative(
            class_weight=class_weight, bbox_weight=bbox_weight, giou_weight=giou_weight
        )
        require_not_negative(giou_eps=giou_eps)
        self.giou_eps = giou_eps
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
        """The weighted losses of all branches, each a scalar; minimise their sum."""
        boxes = join_targets(targets).boxes
        num_boxes = average_over_workers(boxes.new_full((), len(boxes)))
        losses: dict[str, Tensor] = {}
        for branch in output.branches:
            own = {f"{name}_{branch.name}": x for name, x in branch.losses.items()}
            if branch.layers or branch.proposals is not None:
                own |= self.branch_losses(branch, targets, num_boxes)
            if twice := own.keys() & losses.keys():
                raise ValueError(f"two branches have the loss {min(twice)}: name them differently")
            losses |= own
        return losses

    def branch_losses(
        self, branch: Branch, targets: list[Target], num_boxes: Tensor
    ) -> dict[str, Tensor]:
        """Losses of the decoder layers of a branch and, if any, of its proposals."""
        suffix = f"_{branch.name}" if branch.name else ""
        stages, suffixes = [*branch.layers], layer_suffixes(len(branch.layers), suffix)
        if branch.proposals is not None:
            stages, suffixes = [*stages, branch.proposals], [*suffixes, f"{suffix}_enc"]
        predictions = stack_predictions(stages)
        match = self.match(branch, predictions, targets)
        sums = self.sums(branch, predictions, match, targets)
        weights = self.denoising_weights if branch.denoising else self.weights
        weights = {name: branch.weight * weight for name, weight in weights.items()}
        weights["loss_class"] *= branch.class_weight
        divisors = dict.fromkeys(sums, num_boxes * branch.repeats)
        if not self.class_loss_of(branch).per_box:  # it is a mean
            divisors["loss_class"] = torch.ones_like(num_boxes)
        return weigh(sums, weights, divisors, suffixes)

    def match(self, branch: Branch, predictions: Predictions, targets: list[Target]) -> Match:
        """The pairs of a branch's stages: given, or by its matcher or that of the criterion."""
        if isinstance(branch.match, Match):
            return branch.match
        match = (branch.match or self.matcher)(predictions, targets)
        if not branch.name:
            boxes = sum(len(target.labels) for target in targets)
            log_instability(match, boxes, proposals_last=branch.proposals is not None)
        return match

    def sums(
        self, branch: Branch, predictions: Predictions, match: Match, targets: list[Target]
    ) -> dict[str, Tensor]:
        """Sums (N,) of each kind of loss over the queries of the N stages of a branch.

        Predictions are (N, B, Q, .).
        """
        logits, boxes, truth = predictions.logits, predictions.boxes, join_targets(targets)
        match = Match(*(send_to_device(x, like=logits) for x in match))
        stages = torch.arange(len(logits), device=logits.device)[:, None]
        matched = stages, match.images, match.queries  # (N, n) when broadcast

        predicted, expected = boxes[matched], truth.boxes[match.targets]
        corners = cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(expected)
        matched_logits = *matched, truth.labels[match.targets]
        fit = iou(*corners).detach()
        weights = self.pair_weights(branch, logits[matched_logits], fit, match.targets)
        of_boxes = self.box_weights(weights, match, targets)
        # NaN if a box is not finite, matched or not, otherwise 0.
        broken = 0 * (boxes.detach().sum((1, 2, 3)) + truth.boxes.sum())
        return {
            "loss_class": self.class_loss_of(branch)(logits, matched_logits, fit, weights),
            "loss_bbox": (of_boxes * (predicted - expected).abs().sum(2)).sum(1) + broken,
            "loss_giou": (of_boxes * (1 - generalized_iou(*corners, self.giou_eps))).sum(1),
        }

    def class_loss_of(self, branch: Branch) -> ClassLoss | SoftmaxLoss:
        return self.denoising_class_loss if branch.denoising else self.class_loss

    def pair_weights(self, branch: Branch, logits: Tensor, iou: Tensor, targets: Tensor) -> Tensor:
        """Weights of the n pairs of N stages of a branch: 1, or 0 for those without a box.

        Args:
            logits: (N, n), of the classes of the boxes
            iou: (N, n), without gradient
            targets: (n,) or (N, n), the boxes, -1 for none
        """
        return (targets >= 0).to(logits.dtype)

    def box_weights(self, weights: Tensor, match: Match, targets: list[Any]) -> Tensor:
        """Weights of pairs for the losses of boxes: `weights`, as of `pair_weights`."""
        return weights


def log_instability(match: Match, num_boxes: int, *, proposals_last: bool) -> None:
    """Log `matching/instability_i` in [0, 1], see `instability`, from decoder layer i - 1 to layer
    i.

    Layers count from 0 as in the names of losses; layer 0 is compared with the proposals. The
    number is of one batch, on the main worker only (metrics.json has a median of many). Nothing is
    logged without boxes, or outside of training, where Detectron2 has no event storage.

    Args:
        match: on the CPU, of all stages
        num_boxes: of the batch
        proposals_last: whether the last stage is the proposals, before layer 0
    """
    if not num_boxes or not has_event_storage():
        return
    queries = queries_of_boxes(match, num_boxes)
    if proposals_last:
        queries = queries.roll(1, 0)
    storage, first = get_event_storage(), 0 if proposals_last else 1
    for layer, share in enumerate(instability(queries).tolist(), first):
        storage.put_scalar(f"matching/instability_{layer}", share)


def weigh(
    sums: dict[str, Tensor],
    weights: dict[str, float],
    divisors: dict[str, Tensor],
    suffixes: list[str],
) -> dict[str, Tensor]:
    """One weighted mean per kind and stage, from the sums (N,) of each kind."""
    return {
        name + suffix: loss
        for name, values in sums.items()
        for suffix, loss in zip(
            suffixes, (weights[name] * values / divisors[name]).unbind(), strict=True
        )
    }


def layer_suffixes(num_layers: int, stage: str = "") -> list[str]:
    """The suffixes of the names of losses: the number of the layer, but "" for the last."""
    return [f"{stage}_{i}" for i in range(num_layers - 1)] + [stage] * (num_layers > 0)


def average_over_workers(count: Tensor) -> Tensor:
    """The mean of a count over all workers, at least 1."""
    return mean_over_workers(count).clamp(min=1)


@CRITERION_REGISTRY.register()
class AllProposals(SetCriterion):
    """Criterion of two-stage Deformable DETR, which supervises the proposals of all tokens.

    Class 0 stands for any object.
    """

    def branch_losses(
        self, branch: Branch, targets: list[Target], num_boxes: Tensor
    ) -> dict[str, Tensor]:
        if branch.proposals is None:
            return super().branch_losses(branch, targets, num_boxes)
        objects = [target._replace(labels=torch.zeros_like(target.labels)) for target in targets]
        proposals = Branch("enc", queries=None, layers=[branch.proposals])
        losses = super().branch_losses(branch._replace(proposals=None), targets, num_boxes)
        return losses | super().branch_losses(proposals, objects, num_boxes)


@CRITERION_REGISTRY.register()
class BoxesOnly(SetCriterion):
    """Criterion of DN-DETR, which does not supervise the empty slots of denoising."""

    def branch_losses(
        self, branch: Branch, targets: list[Target], num_boxes: Tensor
    ) -> dict[str, Tensor]:
        if branch.denoising:
            assert isinstance(branch.match, Match)  # known by construction
            images, queries, _ = branch.match
            logits = branch.layers[0].logits
            empty = logits.new_ones(logits.shape[:2], dtype=torch.bool)
            images = send_to_device(images, like=logits)
            empty = empty.index_put((images, queries), torch.zeros_like(images, dtype=torch.bool))
            # Where a logit is -inf nothing is lost and nothing is learned.
            supervised = [
                x._replace(logits=x.logits.masked_fill(empty[..., None], -torch.inf))
                for x in branch.layers
            ]
            branch = branch._replace(layers=supervised)
        return super().branch_losses(branch, targets, num_boxes)
