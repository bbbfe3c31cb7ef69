"""Mask DINO as a Detectron2 meta-architecture (arXiv 2206.02777)."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, PolygonMasks
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.blocks import recompute
from ..structures import (
    Branch,
    DetectorOutput,
    MaskTarget,
    Pixels,
    send_to_device,
)
from .detector import Batch
from .dino import DINO
from .mask_loss import MaskCriterion, MaskMatcher
from .masks import MaskDecoder, PixelEmbedding, UnifiedQuerySelection, mask_logits
from .postprocess import MaskDetections, detections_of, to_instances
from .tokens import take_tokens, valid_ratio

MASKS_AT_ONCE = 16  # at full resolution, so that memory does not grow with detections


@META_ARCH_REGISTRY.register()
class MaskDINO(DINO):
    """DINO that also predicts the mask of every object.

    Results have "pred_masks", (n, height, width) bool, and scores that are the class score times
    the mean probability of the mask's pixels; a mask without pixels scores 0.

    Unlike in the published code, padding is told apart from the image, so that detections do not
    depend on what else is in a batch. They are equal where nothing is padded.

    Args:
        pixel_embedding: maps the backbone's features and the encoder's memory to pixel embeddings
        arguments: of :class:`DINO`, with a :class:`MaskDecoder`, a :class:`MaskCriterion` and a
            :class:`MaskMatcher`. Its query selection is a :class:`UnifiedQuerySelection`; others,
            whose proposals have no masks, are possible

    Raises:
        ValueError: a part is not made for masks
    """

    decoder_type, has_masks = MaskDecoder, True
    decoder: MaskDecoder

    @configurable
    def __init__(self, *, pixel_embedding: PixelEmbedding, **arguments: Any):
        super().__init__(**arguments)
        self.check_parts()
        self.pixel_embedding = pixel_embedding.to(memory_format=torch.channels_last)
        self.size_divisibility = pixel_embedding.stride  # a pixel of masks is of whole pixels

    def check_parts(self) -> None:
        """Raise a ValueError for parts that are not made for masks."""
        for kind, part, name in (
            (MaskDecoder, self.decoder, "decoder"),
            (MaskCriterion, self.criterion, "criterion"),
            (MaskMatcher, self.criterion.matcher, "matcher"),
        ):
            if not isinstance(part, kind):
                raise ValueError(
                    f"the {name} of Mask DINO has to be a {kind.__name__}, but it is a "
                    f"{type(part).__name__}: start from a config of configs/MaskDINO/"
                )
        if further := [*self.branches, *self.passes]:
            raise ValueError(
                f"{type(further[0]).__name__} (MODEL.DINO.BRANCHES and PASSES, model.branches and "
                "passes) does not know masks: leave it out, or train a DINO"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        arguments = super().from_config(cfg)
        pixel_embedding = PixelEmbedding(
            input_shape=arguments["backbone"].output_shape(),
            in_feature=cfg.MODEL.DINO.MASK.FEATURE,
            embed_dim=cfg.MODEL.DINO.EMBED_DIM,
        )
        return arguments | {"pixel_embedding": pixel_embedding}

    def settings(self) -> dict[str, Any]:
        selection = self.query_selection
        if not isinstance(selection, UnifiedQuerySelection):
            return super().settings()
        return super().settings() | {
            "anchor_sides": list(selection.anchor_sides),
            "initialize_box_type": selection.initialize_box_type,
        }

    def detect(
        self, pixels: Tensor, padding: Tensor, targets: list[Any] | None = None
    ) -> DetectorOutput:
        call = recompute if self.recompute_backbone else nn.Module.__call__
        features = call(self.backbone, pixels)
        memory = self.encoder(self.neck(features), padding)
        maps = self.pixel_embedding(features, memory)
        embedded = Pixels(maps, valid_ratio(padding, memory.valid_ratios.dtype))
        selection = self.query_selection
        if isinstance(selection, UnifiedQuerySelection):
            queries, proposals = selection(memory, self.decoder, embedded)
        else:  # has heads of its own, or none
            queries, proposals = selection(memory)
        result = Branch("", queries, proposals=proposals)
        return DetectorOutput(self.decode(memory, result, targets), embedded)

    def best(self, predictions: Any) -> Any:
        choice = self.choose(predictions)
        found = detections_of(predictions, choice)
        return MaskDetections(*found, take_tokens(predictions.masks, choice.queries))

    def to_instances(
        self, output: DetectorOutput, found: Any, images: ImageList
    ) -> list[Instances]:
        """Detections of each image; "mask_logits" (n, h, w) are those of the padded image."""
        assert output.pixels is not None
        results = to_instances(found, images.image_sizes)
        for instances, masks, maps in zip(results, found.masks, output.pixels.maps, strict=True):
            instances.mask_logits = mask_logits(masks, maps)
        return results

    def rescale(self, instances: Instances, x: dict[str, Any]) -> Instances:
        """Detections in the size that the input asks for, in descending order of score."""
        size = (
            int(x.get("height", instances.image_size[0])),
            int(x.get("width", instances.image_size[1])),
        )
        boxes = Boxes(instances.pred_boxes.tensor.clone())
        boxes.scale(size[1] / instances.image_size[1], size[0] / instances.image_size[0])
        boxes.clip(size)
        masks, certainty = resize_masks(
            instances.mask_logits, self.pixel_embedding.stride, instances.image_size, size
        )
        scores, order = (instances.scores * certainty).sort(descending=True, stable=True)
        return Instances(
            size,
            pred_boxes=boxes[order],
            scores=scores,
            pred_classes=instances.pred_classes[order],
            pred_masks=masks[order],
        )

    def prepare_targets(self, batched_inputs: Batch) -> list[Any]:
        """As DINO's, and masks."""
        targets = super().prepare_targets(batched_inputs)
        return [
            MaskTarget(
                *target, *(send_to_device(part, like=self.pixel_mean) for part in masks_of(x))
            )
            for target, x in zip(targets, batched_inputs, strict=True)
        ]


def masks_of(x: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The masks (M, H, W) bool of a training input, and (M,) which are known.

    All are, unless instances say otherwise by "has_mask". A ValueError if there are boxes, but no
    masks at all.
    """
    instances: Instances = x["instances"]
    if instances.has("gt_masks"):
        masks = instances.gt_masks
        if isinstance(masks, PolygonMasks):
            masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
        everything = torch.ones(len(instances), dtype=torch.bool)
        return masks.tensor, instances.has_mask if instances.has("has_mask") else everything
    if len(instances):
        raise ValueError(
            f"{x.get('file_name', 'an image')} has boxes but no masks, which Mask DINO learns: set "
            "MODEL.MASK_ON to True (use_instance_mask of the mapper), or train a DINO"
        )
    return torch.zeros(0, *instances.image_size, dtype=torch.bool), torch.zeros(0, dtype=torch.bool)


def resize_masks(
    logits: Tensor, stride: int, image_size: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Masks of an image at another size, and how certain they are.

    Args:
        logits: (n, h, w) of the padded image, of which a pixel is `stride` of the image's
        image_size: height and width of the image without padding
        size: height and width of the masks

    Returns:
        masks (n, height, width) bool; and (n,) the mean probability of each one's pixels, in [0, 1]
    """
    masks = torch.empty(len(logits), *size, dtype=torch.bool, device=logits.device)
    certainty = logits.new_empty(
        len(logits), dtype=torch.promote_types(logits.dtype, torch.float32)
    )
    padded = [stride * x for x in logits.shape[-2:]]
    for start in range(0, len(logits), MASKS_AT_ONCE):
        part = slice(start, start + MASKS_AT_ONCE)
        maps = interpolate(logits[part].to(certainty.dtype), padded)
        maps = interpolate(maps[:, : image_size[0], : image_size[1]], size)
        masks[part] = inside = maps > 0
        total = (maps.sigmoid_() * inside).sum((1, 2))
        certainty[part] = total / inside.sum((1, 2)).clamp(min=1)
    return masks, certainty


def interpolate(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, (n, h, w) to (n, height, width)."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps[None], tuple(size), mode="bilinear", align_corners=False)[0]
