"""Auxiliary detection heads on the encoder's memory, in training only (as in Co-DETR, arXiv
2211.12860).

Their heads and losses are Detectron2's. They assign many tokens or regions to each box, where
DINO's matching assigns one query.

    AuxiliaryFCOS         every token, by its centre
    AuxiliaryFasterRCNN   anchors and regions, by their IoU
"""

from contextlib import nullcontext

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, StandardROIHeads
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator.rpn import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage, has_event_storage
from torch import Tensor, nn

from ..boxes import cxcywh_to_xyxy
from ..ranges import require_not_negative, require_whole
from ..structures import Branch, FeaturePyramid, Queries, Target
from .branches import BRANCH_REGISTRY

STRIDE = 8  # of the finest level, by which pixels are counted here


class Levels(Backbone):
    """The memory as Detectron2's backbones give it: a map of each level, zero on padding."""

    def __init__(self, *, embed_dim: int, num_levels: int):
        super().__init__()
        require_whole(embed_dim=embed_dim, num_levels=num_levels)
        self.shapes = {
            f"level{i}": ShapeSpec(channels=embed_dim, stride=STRIDE * 2**i)
            for i in range(num_levels)
        }

    def forward(self, memory: FeaturePyramid) -> dict[str, Tensor]:
        tokens = memory.tokens.masked_fill(memory.padding[..., None], 0)
        levels = tokens.transpose(1, 2).split([h * w for h, w in memory.shapes], 2)
        maps = [x.unflatten(2, shape) for x, shape in zip(levels, memory.shapes, strict=True)]
        return dict(zip(self.shapes, maps, strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self.shapes


class AuxiliaryDetector(nn.Module):
    """A detector whose losses join those of the model; subclasses compute them.

    It has no queries. Its losses are normalised as in Detectron2, not by the number of boxes
    averaged over workers, so gradient accumulation and several workers do not equal one large
    batch. They need several GPU synchronisations.

    Args:
        embed_dim: C
        num_levels: L
        weight: of all its losses; Co-DETR has 2 for each of six decoder layers
    """

    def __init__(self, *, embed_dim: int, num_levels: int, weight: float):
        super().__init__()
        require_not_negative(weight=weight)
        self.weight = weight
        self.levels = Levels(embed_dim=embed_dim, num_levels=num_levels)

    @classmethod
    def from_config(cls, cfg: CfgNode, num_classes: int) -> dict[str, object]:
        c = cfg.MODEL.DINO
        return {"num_classes": num_classes, "embed_dim": c.EMBED_DIM, "num_levels": c.NUM_LEVELS}

    def forward(self, targets: list[Target], queries: Queries, memory: FeaturePyramid) -> Branch:
        sizes = image_sizes(memory)
        truth = [to_instances(*x) for x in zip(targets, sizes, strict=True)]
        # Detectron2's heads log what they sample, and fail where nothing is there to log to.
        with nullcontext() if has_event_storage() else EventStorage():
            losses = self.losses(ImageList(memory.tokens, sizes), self.levels(memory), truth)
        return Branch("aux", None, losses={k: self.weight * x for k, x in losses.items()})

    def losses(
        self, images: ImageList, features: dict[str, Tensor], targets: list[Instances]
    ) -> dict[str, Tensor]:
        """Losses by name.

        Args:
            images: of which only the sizes count
            features: (B, C, H_l, W_l) of each level
            targets: with gt_boxes and gt_classes
        """
        raise NotImplementedError


def image_sizes(memory: FeaturePyramid) -> list[tuple[int, int]]:
    """Height and width of each image without padding, in pixels of which STRIDE are a token of the
    finest level; synchronises with the GPU."""
    height, width = memory.shapes[0]
    shares = memory.valid_ratios[:, 0].tolist()
    return [(round(y * height) * STRIDE, round(x * width) * STRIDE) for x, y in shares]


def to_instances(target: Target, size: tuple[int, int]) -> Instances:
    """Detectron2's ground truth; boxes without area, or not finite, are left out."""
    height, width = size
    # Detectron2's heads fail for these; the loss of those that are not finite is that of the result
    valid = target.boxes.isfinite().all(1) & (target.boxes[:, 2:] > 0).all(1)
    scale = torch.tensor([width, height] * 2, device=valid.device)
    boxes = Boxes(cxcywh_to_xyxy(target.boxes[valid]) * scale)
    return Instances(size, gt_boxes=boxes, gt_classes=target.labels[valid])


@BRANCH_REGISTRY.register()
class AuxiliaryFCOS(AuxiliaryDetector):
    """Detectron2's FCOS: tokens near the centre of a box, on the level for its size, stand for it.

    Args:
        num_classes: K
        embed_dim, num_levels, weight: see :class:`AuxiliaryDetector`
    """

    @configurable
    def __init__(
        self, *, num_classes: int, embed_dim: int = 256, num_levels: int = 4, weight: float = 12.0
    ):
        super().__init__(embed_dim=embed_dim, num_levels=num_levels, weight=weight)
        shapes = self.levels.output_shape()
        self.detector = FCOS(
            backbone=self.levels,
            head=FCOSHead(
                input_shape=list(shapes.values()),
                conv_dims=[embed_dim] * 4,
                num_classes=num_classes,
                norm="GN",
            ),
            head_in_features=list(shapes),
            num_classes=num_classes,
            pixel_mean=[0.0],  # it sees no image
            pixel_std=[1.0],
        )
        # Detectron2's average of how many tokens stand for boxes: in checkpoints, for a resume.
        self.detector.register_buffer("loss_normalizer", torch.tensor(300.0))

    def losses(
        self, images: ImageList, features: dict[str, Tensor], targets: list[Instances]
    ) -> dict[str, Tensor]:
        maps = list(features.values())
        # Detectron2's loss fails for bfloat16, and for boxes that are not finite.
        logits, deltas, centerness = ([x.float() for x in y] for y in self.detector.head(maps))
        predictions = logits, [finite(x) for x in deltas], centerness
        losses = self.detector.forward_training(images, maps, predictions, targets)
        broken = 0 * torch.stack([x.sum() for x in deltas]).sum()
        return losses | {"loss_fcos_loc": losses["loss_fcos_loc"] + broken}


@BRANCH_REGISTRY.register()
class AuxiliaryFasterRCNN(AuxiliaryDetector):
    """Detectron2's region proposal network and box head, as with a feature pyramid.

    Args:
        num_classes: K
        fc_dim: hidden width of the box head
        embed_dim, num_levels, weight: see :class:`AuxiliaryDetector`
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        embed_dim: int = 256,
        num_levels: int = 4,
        fc_dim: int = 1024,
        weight: float = 12.0,
    ):
        super().__init__(embed_dim=embed_dim, num_levels=num_levels, weight=weight)
        names = list(self.levels.shapes)
        strides = [x.stride for x in self.levels.shapes.values()]
        ratios = [0.5, 1.0, 2.0]
        self.proposals = FiniteRPN(
            in_features=names,
            head=StandardRPNHead(in_channels=embed_dim, num_anchors=len(ratios)),
            anchor_generator=DefaultAnchorGenerator(
                sizes=[[8 * stride] for stride in strides], aspect_ratios=ratios, strides=strides
            ),
            anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
            box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_topk=(2000, 1000),
            post_nms_topk=(1000, 1000),
        )
        side = 7
        self.heads = StandardROIHeads(
            num_classes=num_classes,
            batch_size_per_image=512,
            positive_fraction=0.25,
            proposal_matcher=Matcher([0.5], [0, 1]),
            box_in_features=names,
            box_pooler=ROIPooler(side, [1 / stride for stride in strides], 0, "ROIAlignV2"),
            box_head=FastRCNNConvFCHead(
                ShapeSpec(channels=embed_dim, height=side, width=side),
                conv_dims=[],
                fc_dims=[fc_dim, fc_dim],
            ),
            box_predictor=FastRCNNOutputLayers(
                ShapeSpec(channels=fc_dim),
                box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
                num_classes=num_classes,
            ),
        )

    def losses(
        self, images: ImageList, features: dict[str, Tensor], targets: list[Instances]
    ) -> dict[str, Tensor]:
        regions, losses = self.proposals(images, features, targets)
        return losses | self.heads(images, features, regions, targets)[1]


class FiniteRPN(RPN):
    """Predictions that are not finite break its losses, but raise nothing, as in `SetCriterion`."""

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        logits, deltas = map(finite, pred_objectness_logits), map(finite, pred_anchor_deltas)
        return super().predict_proposals(anchors, [*logits], [*deltas], image_sizes)


def finite(x: Tensor) -> Tensor:
    """A tensor with 0 where it is not finite."""
    return x.nan_to_num(0.0, 0.0, 0.0)
