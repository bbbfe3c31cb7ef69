"""Costs and losses of masks, at random points (Mask2Former, arXiv 2112.01527, section 3.3).

As bilinear sampling is linear, the logit of a mask at a point is the product of its embedding with
the pixel embedding that is sampled there. So maps are only computed for matched queries, some at a
time, and recomputed in the backward pass.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers.blocks import recompute
from ..ranges import require_not_negative, require_share, require_whole
from ..structures import (
    Branch,
    DetectorOutput,
    MaskPredictions,
    MaskTarget,
    Match,
    send_to_device,
)
from .criterion import CRITERION_REGISTRY, SetCriterion
from .masks import mask_logits, sample_maps
from .matcher import MATCHER_REGISTRY, HungarianMatcher
from .tokens import take_tokens

# Of the maps that are made at once, so that memory does not grow with masks and stages.
MAP_ELEMENTS = 2**20


class MaskTruth(NamedTuple):
    """Ground truth of an image, with what its masks are compared with."""

    labels: Tensor  # (M,)
    boxes: Tensor  # (M, 4)
    masks: Tensor  # (M, H, W) bool
    known: Tensor  # (M,) bool
    has_box: Tensor  # (M,) bool
    pixels: Tensor  # (C, h, w), pixel embeddings
    extent: Tensor  # (2,), share of their (width, height) that is not padding


class PointTruth(NamedTuple):
    """Ground truth of an image at P of its points."""

    labels: Tensor  # (M,)
    boxes: Tensor  # (M, 4)
    masks: Tensor  # (M, P), in [0, 1]
    known: Tensor  # (M,) bool
    pixels: Tensor  # (C, P), pixel embeddings


@MATCHER_REGISTRY.register()
class MaskMatcher(HungarianMatcher):
    """Optimal matching that also uses masks (Mask DINO, section 3.4).

    Args:
        mask_cost, dice_cost: weights of the binary cross-entropy and of the dice loss
        arguments: of :class:`HungarianMatcher`
    """

    further_costs = "mask_cost", "dice_cost"

    def __init__(self, *, mask_cost: float = 5.0, dice_cost: float = 5.0, **arguments: float):
        super().__init__(**arguments)
        require_not_negative(mask_cost=mask_cost, dice_cost=dice_cost)
        self.mask_cost, self.dice_cost = mask_cost, dice_cost

    def fill(self, costs: Tensor, predictions: Any, target: Any) -> None:
        super().fill(costs, predictions, target)
        if not isinstance(predictions, MaskPredictions):  # proposals of boxes alone
            return
        for part, masks in zip(costs, predictions.masks, strict=True):
            logits = (masks @ target.pixels).to(costs.dtype)  # (Q, P), of a stage
            with torch.autocast(costs.device.type, enabled=False):
                cost = self.mask_cost * pairwise_cross_entropy(logits, target.masks)
                cost += self.dice_cost * pairwise_dice(logits, target.masks)
                part += cost.where(target.known, 0)


@CRITERION_REGISTRY.register()
class MaskCriterion(SetCriterion):
    """Losses of classes and boxes, and of masks binary cross-entropy and dice loss.

    These are means over points of each mask: of uniform random ones, those are kept whose
    predictions are least certain, and some more are drawn (PointRend, arXiv 1912.08193). Boxes of
    stuff are matched, as in the published code, but have no losses of boxes.

    Args:
        mask_weight, dice_weight: of the losses of masks
        num_points: P, per mask, of matching and of the losses
        oversample: points that are drawn for each that is kept as uncertain; at least 1
        importance: share of the points that are chosen as uncertain
        arguments: of :class:`SetCriterion`; the matcher is a :class:`MaskMatcher`
    """

    needs_masks = True
    further_options = "mask_weight", "dice_weight", "num_points"

    def __init__(
        self,
        *,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        num_points: int = 12544,
        oversample: float = 3.0,
        importance: float = 0.75,
        **arguments: Any,
    ):
        super().__init__(**arguments)
        require_not_negative(mask_weight=mask_weight, dice_weight=dice_weight)
        require_whole(num_points=num_points)
        require_share(importance=importance)
        if oversample < 1:
            raise ValueError(f"oversample is {oversample}; it has to be at least 1")
        self.num_points, self.oversample, self.importance = num_points, oversample, importance
        of_masks = {"loss_mask": mask_weight, "loss_dice": dice_weight}
        self.weights |= of_masks
        self.denoising_weights |= of_masks

    def forward(  # type: ignore[override]  # targets have masks
        self, output: DetectorOutput, targets: list[MaskTarget]
    ) -> dict[str, Tensor]:
        assert output.pixels is not None
        parts = zip(targets, *output.pixels, strict=True)
        truth: list[Any] = [MaskTruth(*target, maps, extent) for target, maps, extent in parts]
        return super().forward(output, truth)

    def branch_losses(
        self, branch: Branch, targets: list[Any], num_boxes: Tensor
    ) -> dict[str, Tensor]:
        proposals = branch.proposals
        if proposals is None or isinstance(proposals, MaskPredictions):
            return super().branch_losses(branch, targets, num_boxes)
        losses = super().branch_losses(branch._replace(proposals=None), targets, num_boxes)
        without_masks = Branch("enc", queries=None, layers=[proposals])
        return losses | super().branch_losses(without_masks, targets, num_boxes)

    def match(self, branch: Branch, predictions: Any, targets: list[Any]) -> Match:
        if isinstance(predictions, MaskPredictions) and not isinstance(branch.match, Match):
            targets = [self.at_points(target) for target in targets]
        return super().match(branch, predictions, targets)

    @torch.no_grad()
    def at_points(self, target: MaskTruth) -> PointTruth:
        """At the same random points for all masks of an image."""
        points = draw_points(1, self.num_points, like=target.boxes)
        which = torch.arange(len(target.masks), device=points.device)
        masks = sample_masks(target.masks, which, points)
        (pixels,) = sample(target.pixels[None], points * target.extent).to(target.pixels.dtype)
        return PointTruth(target.labels, target.boxes, masks, target.known, pixels)

    def sums(
        self, branch: Branch, predictions: Any, match: Match, targets: list[Any]
    ) -> dict[str, Tensor]:
        sums = super().sums(branch, predictions, match, targets)
        if isinstance(predictions, MaskPredictions):
            sums |= self.mask_sums(predictions.masks, match, targets)
        return sums

    def box_weights(self, weights: Tensor, match: Match, targets: list[Any]) -> Tensor:
        return weights * torch.cat([target.has_box for target in targets])[match.targets]

    def mask_sums(self, masks: Tensor, match: Match, targets: list[MaskTruth]) -> dict[str, Tensor]:
        """Sums (N,) of the losses of masks over the matched queries of N stages.

        Args:
            masks: embeddings (N, B, Q, C)
        """
        stages, counts = len(masks), match.images.bincount(minlength=len(targets)).tolist()
        sent = (send_to_device(x, like=masks).expand(stages, -1) for x in match[1:])
        pairs = (x.split(counts, 1) for x in sent)
        sums, start = masks.new_zeros(2, stages), 0
        for image, (target, queries, boxes) in enumerate(zip(targets, *pairs, strict=True)):
            own = take_tokens(masks[:, image], queries).flatten(0, 1)  # of all stages
            boxes = (boxes - start).flatten()
            at_once = max(1, MAP_ELEMENTS // target.pixels[0].numel())
            parts = zip(own.split(at_once), boxes.split(at_once), strict=True)
            # Few maps can be kept; of many, those of a part are made again in the backward pass.
            call = recompute if len(own) > at_once else lambda losses, *args: losses(*args)
            losses = [call(self.losses, part, target, box) for part, box in parts]
            sums = sums + torch.cat(losses, 1).unflatten(1, queries.shape).sum(2)
            start += len(target.labels)
        return dict(zip(("loss_mask", "loss_dice"), sums, strict=True))

    def losses(self, masks: Tensor, target: MaskTruth, boxes: Tensor) -> Tensor:
        """Cross-entropy and dice loss (2, n) of masks of an image.

        Args:
            masks: embeddings (n, C)
            boxes: (n,), what they are matched with
        """
        maps = mask_logits(masks, target.pixels)
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        if not len(maps):  # everything takes part in the backward pass
            return maps.sum((1, 2)).expand(2, -1)
        points = self.uncertain_points(maps.detach(), target.extent)
        logits = sample(maps[:, None], points * target.extent)[:, 0]
        expected = sample_masks(target.masks, boxes, points).to(logits.dtype)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, expected, reduction="none")
        both = torch.stack([cross_entropy.mean(1), dice(logits.sigmoid(), expected)])
        return both * target.known[boxes]

    @torch.no_grad()
    def uncertain_points(self, maps: Tensor, extent: Tensor) -> Tensor:
        """Points (n, P, 2) for maps of logits (n, h, w)."""
        count = int(self.importance * self.num_points)
        drawn = draw_points(len(maps), int(self.oversample * self.num_points), like=maps)
        certainty = sample(maps[:, None], drawn * extent)[:, 0].abs()
        least = certainty.topk(count, largest=False).indices
        chosen = drawn.gather(1, least[..., None].expand(-1, -1, 2))
        rest = draw_points(len(maps), self.num_points - count, like=maps)
        return torch.cat([chosen, rest], 1)


def draw_points(masks: int, count: int, *, like: Tensor) -> Tensor:
    """Uniform random points (masks, count, 2), as (x, y) in [0, 1], in float32 or wider."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.rand(masks, count, 2, device=like.device, dtype=dtype)


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples (n, C, P) of maps (n, C, h, w) at points (n, P, 2) in [0, 1]."""
    return sample_maps(maps, points[:, :, None])[..., 0]


def sample_masks(masks: Tensor, which: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples (n, P) of masks (M, H, W) bool, zero outside, without a copy in floats.

    Args:
        which: (n,), the mask of each row
        points: (n, P, 2), or (1, P, 2) for all, as (x, y) in [0, 1]
    """
    height, width = masks.shape[-2:]
    flat, row = masks.flatten(), which[:, None] * height
    x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
    left, top = x.floor(), y.floor()
    total = x.new_zeros(len(which), points.shape[1])
    for near_x, near_y in ((0, 0), (1, 0), (0, 1), (1, 1)):
        to_x, to_y = left + near_x, top + near_y
        inside = (to_x >= 0) & (to_x < width) & (to_y >= 0) & (to_y < height)
        weight = (1 - (x - to_x).abs()) * (1 - (y - to_y).abs()) * inside
        index = row + to_y.clamp(0, height - 1).long()
        index = index * width + to_x.clamp(0, width - 1).long()
        total += weight * flat[index]
    return total


def pairwise_cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean over P points (Q, M) of logits (Q, P) with masks (M, P)."""
    total = F.softplus(logits).sum(1, keepdim=True) - logits @ masks.to(logits.dtype).T
    return total / logits.shape[1]


def pairwise_dice(logits: Tensor, masks: Tensor) -> Tensor:
    """Dice loss (Q, M) of logits (Q, P) with masks (M, P), see `dice`."""
    found, masks = logits.sigmoid(), masks.to(logits.dtype)
    total = found.sum(1, keepdim=True) + masks.sum(1)
    return 1 - (2 * found @ masks.T + 1) / (total + 1)


def dice(found: Tensor, masks: Tensor) -> Tensor:
    """1 - (2 overlap + 1) / (sum of both areas + 1), over the last axis (V-Net, section 3)."""
    return 1 - (2 * (found * masks).sum(-1) + 1) / (found.sum(-1) + masks.sum(-1) + 1)
