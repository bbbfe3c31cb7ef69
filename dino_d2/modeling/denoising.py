"""Denoising training: noised ground truth as extra decoder queries.

    Denoising             DN-DETR: every group is a noised copy of the ground truth
    ContrastiveDenoising  DINO, section 3.3: every group is a positive and a harder, negative copy

Layout of the T queries, for a batch with at most three boxes in an image (`slots`):

    group 0                        group 1
    positives 0 1 2, negatives ... positives 0 1 2, negatives ...
"""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils.registry import Registry
from torch import Tensor, nn
from torch.nn import functional as F

from ..boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from ..names import plural
from ..ranges import require_not_negative, require_share, require_whole
from ..structures import (
    Branch,
    FeaturePyramid,
    Match,
    Queries,
    Target,
    join_targets,
    send_to_device,
)

DENOISING_REGISTRY = Registry("DENOISING")


@DENOISING_REGISTRY.register()
class Denoising(nn.Module):
    """Denoising of DN-DETR: every group is a noised copy of the ground truth.

    Args:
        num_classes: K
        embed_dim: C
        budget: boxes that are noised per image, in as many groups as fit. From an image with more
            boxes, a random subset is drawn in every step, so that T and memory are limited (in the
            published implementations they are not); the loss is still divided by the number of all
            boxes
        label_noise: half of it is the probability that a label is drawn again
        box_noise: reach of the shift of a box corner, relative to half the size of the box
        eps: where noised boxes are cut off, as references of the decoder, see `boxes.refine`
    """

    copies_per_group = 1

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        embed_dim: int,
        budget: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        eps: float = 1e-3,
    ):
        super().__init__()
        # To disable denoising, use no Denoising in place of a budget of 0.
        require_whole(**{"the budget of denoising": budget})
        require_share(label_noise=label_noise)
        require_not_negative(box_noise=box_noise)
        self.num_classes = num_classes
        self.budget = budget
        self.label_noise = label_noise
        self.box_noise, self.eps = box_noise, eps
        # The last row stands for empty slots. Every batch looks something up, with ground truth
        # or without, so the embedding takes part in every backward pass.
        self.label_embed = nn.Embedding(num_classes + 1, embed_dim, padding_idx=num_classes)

    @classmethod
    def from_config(cls, cfg: CfgNode, num_classes: int) -> dict[str, object]:
        c = cfg.MODEL.DINO
        return {
            "num_classes": num_classes,
            "embed_dim": c.EMBED_DIM,
            "budget": c.DENOISING.BUDGET,
            "label_noise": c.DENOISING.LABEL_NOISE,
            "box_noise": c.DENOISING.BOX_NOISE,
            "eps": c.INVERSE_SIGMOID_EPS,
        }

    def forward(
        self,
        targets: list[Target],
        queries: Queries | None = None,
        memory: FeaturePyramid | None = None,
    ) -> Branch:
        """Noises the ground truth of a batch; without any box it is one group of empty slots, whose
        losses weigh nothing. Queries and memory, which every branch is given, are not used."""
        counts = [min(len(target.labels), self.max_boxes) for target in targets]
        slots = max(1, *counts)
        num_groups = self.num_groups(slots) if any(counts) else 1
        copies = num_groups * self.copies_per_group

        index = self.choose(targets, slots).repeat(1, copies)  # (B, T)
        real = index >= 0
        truth = join_targets(targets)  # with a last row for empty slots, which have index -1
        labels = F.pad(truth.labels, (0, 1))[index]
        boxes = F.pad(truth.boxes, (0, 0, 0, 1))[index]
        copy = torch.arange(copies, device=labels.device).repeat_interleave(slots)  # (T,)
        labels = noise_labels(labels, self.num_classes, self.label_noise / 2)
        labels = torch.where(real, labels, self.num_classes)
        noised = self.noise_boxes(boxes, copy)
        # Clamped to the range of the decoder's logits; empty slots have logit 0.
        reference = inverse_sigmoid(noised, self.eps).where(real[..., None], 0).sigmoid()
        return Branch(
            "dn",
            queries=Queries(self.content_of(labels), reference),
            groups=copy // self.copies_per_group + 1,
            match=self.match(index, counts, num_groups),
            repeats=num_groups,
            weight=float(any(counts)),
            denoising=True,
        )

    def choose(self, targets: list[Target], slots: int) -> Tensor:
        """The boxes that take part, counted through the batch, -1 in empty slots: (B, slots)."""
        index = targets[0].labels.new_full((len(targets), slots), -1)
        start = 0
        for row, target in zip(index, targets, strict=True):
            count = len(target.labels)
            part = subset(count, self.max_boxes, row.device)
            row[: len(part)] = start + part
            start += count
        return index

    @property
    def max_boxes(self) -> int:
        """The largest number of boxes of an image that are noised."""
        return self.budget

    def num_groups(self, slots: int) -> int:
        """The number of groups of so many boxes that fit into the budget."""
        return self.budget // slots

    def content_of(self, labels: Tensor) -> Tensor:
        """Content (B, T, C) of the queries of noised labels (B, T), K in empty slots."""
        return self.label_embed(labels)

    def noise_boxes(self, boxes: Tensor, copy: Tensor) -> Tensor:
        """Noised boxes (B, T, 4); `copy` (T,) is the copy of the ground truth of each query."""
        return noise_boxes(boxes, self.box_noise, harder=self.is_negative(copy)[:, None])

    def is_negative(self, copy: Tensor) -> Tensor:
        """Whether the queries of the given copies are negatives."""
        return torch.zeros_like(copy, dtype=torch.bool)

    def match(self, index: Tensor, counts: list[int], num_groups: int) -> Match:
        """The first copy of each group is positive: its i-th query stands for the i-th box.

        Args:
            index: (B, T), which box is in a slot
            counts: of the images, how many boxes take part
            num_groups: of all T queries
        """
        group_start = torch.arange(num_groups)[:, None] * (index.shape[1] // num_groups)
        parts = [(group_start + torch.arange(count)).flatten() for count in counts]
        images = torch.cat([torch.full_like(part, i) for i, part in enumerate(parts)])
        queries = send_to_device(torch.cat(parts), like=index)
        return Match(images, queries, index[send_to_device(images, like=index), queries])


@DENOISING_REGISTRY.register()
class ContrastiveDenoising(Denoising):
    """Also teaches to reject anchors without a box near enough."""

    copies_per_group = 2

    def is_negative(self, copy: Tensor) -> Tensor:
        return copy % 2 == 1


def subset(count: int, budget: int, device: torch.device) -> Tensor:
    """All of `count` boxes or, if there are more, a random `budget` of them."""
    if count <= budget:
        return torch.arange(count, device=device)
    return torch.rand(count, device=device).topk(budget).indices


def noise_labels(labels: Tensor, num_classes: int, probability: float) -> Tensor:
    """Replace labels by random ones (possibly the same) with a given probability."""
    drawn_anew = torch.rand(labels.shape, device=labels.device) < probability
    return torch.where(drawn_anew, torch.randint_like(labels, num_classes), labels)


def noise_boxes(boxes: Tensor, scale: float, harder: Tensor) -> Tensor:
    """Shift each coordinate of both corners by a random part of its reach, in either direction.

    Args:
        boxes: (..., 4)
        scale: the reach is half the size of the box times this
        harder: broadcastable to boxes; if True, the shift is between once and twice the reach

    Returns:
        (..., 4) inside the image; DINO, figure 3
    """
    reach = boxes[..., 2:].tile(2) * (scale / 2)
    sign = torch.randint_like(boxes, 2) * 2 - 1
    corners = cxcywh_to_xyxy(boxes) + sign * (torch.rand_like(boxes) + harder) * reach
    return xyxy_to_cxcywh(corners.clamp(0, 1))


def noise_centers(boxes: Tensor, scale: float) -> Tensor:
    """Shift centres by up to half the size, and change sizes by up to the size, times `scale`.

    Args:
        boxes: (..., 4)

    Returns:
        (..., 4), each number in [0, 1]
    """
    size = boxes[..., 2:]
    reach = torch.cat([size / 2, size], -1) * scale
    return (boxes + (2 * torch.rand_like(boxes) - 1) * reach).clamp(0, 1)


@DENOISING_REGISTRY.register()
class IndicatorDenoising(Denoising):
    """Denoising of DN-DETR (section 4.3): a fixed number of groups, centre and size of a box
    noised, not its corners, and a last channel that says whether a query is to be denoised.

    Args:
        groups: of `budget` queries altogether
        box_noise: reach of the noise, relative to half the size for the centre and to the size
            for the size
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        embed_dim: int = 256,
        groups: int = 5,
        budget: int = 500,
        label_noise: float = 0.4,
        box_noise: float = 0.4,
        eps: float = 1e-3,
    ):
        super().__init__(
            num_classes=num_classes,
            embed_dim=embed_dim - 1,
            budget=budget,
            label_noise=label_noise,
            box_noise=box_noise,
            eps=eps,
        )
        if not 1 <= groups <= budget:
            raise ValueError(
                f"{plural(groups, 'group')} cannot share a denoising budget of {budget}: each "
                "needs room for a box"
            )
        self.groups = groups

    @classmethod
    def from_config(cls, cfg: CfgNode, num_classes: int) -> dict[str, object]:
        return super().from_config(cfg, num_classes) | {"groups": cfg.MODEL.DINO.DENOISING.GROUPS}

    @property
    def max_boxes(self) -> int:
        return self.budget // self.groups

    def num_groups(self, slots: int) -> int:
        return self.groups

    def content_of(self, labels: Tensor) -> Tensor:
        indicator = (labels != self.num_classes)[..., None]
        return torch.cat([self.label_embed(labels), indicator], -1)

    def noise_boxes(self, boxes: Tensor, copy: Tensor) -> Tensor:
        return noise_centers(boxes, self.box_noise)


@DENOISING_REGISTRY.register()
class CenterDenoising(Denoising):
    """Denoising of Mask DINO: as DN-DETR's, of as many groups as fit and without an indicator."""

    def noise_boxes(self, boxes: Tensor, copy: Tensor) -> Tensor:
        return noise_centers(boxes, self.box_noise)
