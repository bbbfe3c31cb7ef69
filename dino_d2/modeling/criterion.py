"""Set loss: every prediction of every stage is matched to the ground truth, then supervised."""

import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn import functional as F

from ..boxes import cxcywh_to_xyxy, generalized_iou
from ..structures import (
    DenoisingBatch,
    DetectorOutput,
    Match,
    Predictions,
    Target,
    join_targets,
    stack_predictions,
)
from .matcher import HungarianMatcher, focal_change


class SetCriterion(nn.Module):
    """Focal loss of the classes, L1 and generalized IoU loss of the boxes (Deformable DETR).

    Queries without a box, negative denoising queries among them, have no class: only the focal
    loss sees them. Losses are named after their stage: no suffix for the last decoder layer,
    `_0`, `_1`, ... for the layers before, `_enc` for the encoder's proposals; `_dn` and `_dn_0`,
    ... for the denoising queries.

    Args:
        matcher: assigns predictions to ground truth
        class_weight, bbox_weight, giou_weight: of the losses, the same for every stage
        alpha, gamma: of the focal loss; alpha, the weight of objects against background, in [0, 1]
    """

    def __init__(
        self,
        *,
        matcher: HungarianMatcher,
        class_weight: float = 1.0,
        bbox_weight: float = 5.0,
        giou_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ):
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha of the focal loss is {alpha}; it has to be between 0 and 1")
        self.matcher = matcher
        self.weights = {
            "loss_class": class_weight,
            "loss_bbox": bbox_weight,
            "loss_giou": giou_weight,
        }
        self.alpha, self.gamma = alpha, gamma

    def forward(self, output: DetectorOutput, targets: list[Target]) -> dict[str, Tensor]:
        """The weighted losses of all stages, each a scalar; their sum is to be minimised."""
        truth = join_targets(targets)
        num_boxes = average_over_workers(truth.boxes.new_full((), len(truth.boxes)))

        stages, suffixes = list(output.layers), layer_suffixes(len(output.layers))
        if output.proposals is not None:
            stages, suffixes = [*stages, output.proposals], [*suffixes, "_enc"]
        predictions = stack_predictions(stages)
        match = self.matcher(predictions, targets)
        losses = self.losses(predictions, match, truth, num_boxes, suffixes)

        if output.denoising is not None:
            predictions = stack_predictions(output.denoised)
            losses |= self.denoising_losses(predictions, output.denoising, truth, num_boxes)
        return losses

    def denoising_losses(
        self,
        predictions: Predictions,
        denoising: DenoisingBatch,
        truth: Target,
        num_boxes: Tensor,
    ) -> dict[str, Tensor]:
        """Losses of the denoising queries: predictions (N, B, T, .), matched by construction."""
        suffixes = layer_suffixes(len(predictions.logits), stage="_dn")
        num_boxes = num_boxes * denoising.num_groups
        losses = self.losses(predictions, denoising.match, truth, num_boxes, suffixes)
        # A batch without boxes has nothing to denoise, yet its queries keep their place in the
        # backward pass: every parameter gets a gradient on every worker.
        share = float(len(truth.boxes) > 0)
        return {name: share * loss for name, loss in losses.items()}

    def losses(
        self,
        predictions: Predictions,
        match: Match,
        truth: Target,
        num_boxes: Tensor,
        suffixes: list[str],
    ) -> dict[str, Tensor]:
        """Losses of N stages at once: predictions (N, B, Q, .), `truth` of the whole batch."""
        logits, boxes = predictions
        stages = torch.arange(len(logits), device=logits.device)[:, None]
        matched = stages, match.images, match.queries  # (N, n) when broadcast

        classes = logits[(*matched, truth.labels[match.targets])]  # of the boxes, (N, n)
        predicted, expected = boxes[matched], truth.boxes[match.targets]
        giou = generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(expected))
        background = (1 - self.alpha) * BackgroundLoss.apply(logits, self.gamma)
        losses = {
            "loss_class": background + focal_change(classes, self.alpha, self.gamma).sum(1),
            "loss_bbox": (predicted - expected).abs().sum((1, 2)),
            "loss_giou": (1 - giou).sum(1),
        }
        return {
            name + suffix: loss
            for name, values in losses.items()
            for suffix, loss in zip(
                suffixes, (self.weights[name] * values / num_boxes).unbind(), strict=True
            )
        }


class BackgroundLoss(torch.autograd.Function):
    """Focal loss without alpha (RetinaNet, equation 4) of logits (N, ...) where nothing is: (N,).

    For the probability p of a logit x it is p^gamma * softplus(x), with the derivative
    p^gamma * (gamma * (1 - p) * softplus(x) + p). Autograd would keep several tensors of the size
    of the logits, the largest there are where classes are many; this keeps the logits alone.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, gamma: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.gamma = gamma
        return (logits.sigmoid() ** gamma * F.softplus(logits)).flatten(1).sum(1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        p = logits.sigmoid()
        slope = p**ctx.gamma * (ctx.gamma * (1 - p) * F.softplus(logits) + p)
        return slope * grad.view(-1, *[1] * (logits.dim() - 1)), None


def layer_suffixes(num_layers: int, stage: str = "") -> list[str]:
    return [f"{stage}_{i}" for i in range(num_layers - 1)] + [stage]


def average_over_workers(count: Tensor) -> Tensor:
    """Mean of a count over all workers, at least 1, so that each box weighs the same wherever it
    is trained on."""
    if comm.get_world_size() > 1:
        count = count.clone()
        torch.distributed.all_reduce(count)
    return (count / comm.get_world_size()).clamp(min=1)
