"""Mask DINO as a Detectron2 meta-architecture (arXiv 2206.02777)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, PolygonMasks
from torch import Tensor, nn

from ..data import stuff_classes
from ..layers.blocks import recompute
from ..names import plural
from ..ranges import require_positive, require_share
from ..resizing import in_parts, interpolate, resize_maps, resize_masks
from ..structures import (
    Branch,
    DetectorOutput,
    MaskDetections,
    MaskTarget,
    Pixels,
    send_to_device,
)
from .detector import Batch
from .dino import DINO
from .mask_loss import MaskCriterion, MaskMatcher
from .masks import MaskDecoder, PixelEmbedding, UnifiedQuerySelection, mask_logits
from .postprocess import detections_of, to_instances
from .segmentation import panoptic_map, semantic_map, sharpen
from .tokens import take_tokens, valid_ratio


@META_ARCH_REGISTRY.register()
class MaskDINO(DINO):
    """DINO that also predicts the mask of every object.

    Results have, in Detectron2's format and if enabled,

    - "instances" with "pred_masks", (n, height, width) bool, and scores that are the class score
      times the mean probability of the mask's pixels; a mask without pixels scores 0
    - "panoptic_seg", a map (height, width) int32 of the ids of segments, 0 for none, and for each
      segment a dict of "id", "isthing" and "category_id", see `panoptic_map`
    - "sem_seg", scores (K, height, width) of every class at every pixel, see `semantic_map`

    Unlike in the published code, padding is masked, so that detections do not depend on the other
    images in a batch. Without padding, results are equal.

    Args:
        pixel_embedding: maps the backbone's features and the encoder's memory to pixel embeddings
        arguments: of :class:`DINO`, with a :class:`MaskDecoder`, a :class:`MaskCriterion` and a
            :class:`MaskMatcher`. Its query selection is a :class:`UnifiedQuerySelection`; others,
            whose proposals have no masks, are possible
        instance_on, panoptic_on, semantic_on: which results are made
        object_mask_threshold: lowest score, in [0, 1], of queries that become segments
        overlap_threshold: minimal share, in [0, 1], of its mask's pixels that a segment has to win
            from others
        temperature: of the softmax that makes scores of sigmoids sharper, for segments and pixels;
            None: they stay as they are
        stuff_classes: indices of classes without instances, such as sky; their segments in an image
            are one. With `panoptic_on` they are no "instances"

    Raises:
        ValueError: a component does not support masks, or a number is out of range
    """

    decoder_type, has_masks = MaskDecoder, True
    softmax_in_matching = False  # as in the published code, MaskMatcher is for both
    decoder: MaskDecoder

    @configurable
    def __init__(
        self,
        *,
        pixel_embedding: PixelEmbedding,
        instance_on: bool = True,
        panoptic_on: bool = False,
        semantic_on: bool = False,
        object_mask_threshold: float = 0.25,
        overlap_threshold: float = 0.8,
        temperature: float | None = 0.06,
        stuff_classes: Sequence[int] = (),
        **arguments: Any,
    ):
        super().__init__(**arguments)
        self.check_parts()
        require_share(
            object_mask_threshold=object_mask_threshold, overlap_threshold=overlap_threshold
        )
        if temperature is not None:
            require_positive(temperature=temperature)
        if not (instance_on or panoptic_on or semantic_on):
            raise ValueError(
                "Mask DINO has no output enabled: set one of MODEL.DINO.TEST.INSTANCE_ON, "
                "PANOPTIC_ON and SEMANTIC_ON (model.instance_on, ...) to True"
            )
        if unknown := [x for x in stuff_classes if x not in range(self.num_classes)]:
            raise ValueError(
                f"class {unknown[0]} is stuff (model.stuff_classes), but the model has "
                f"{plural(self.num_classes, 'class')}, counted from 0"
            )
        self.instance_on, self.panoptic_on, self.semantic_on = instance_on, panoptic_on, semantic_on
        self.object_mask_threshold, self.overlap_threshold = (
            object_mask_threshold,
            overlap_threshold,
        )
        self.temperature, self.stuff_classes = temperature, frozenset(stuff_classes)
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
        if self.softmax and isinstance(self.query_selection, UnifiedQuerySelection):
            raise ValueError(
                "UnifiedQuerySelection ranks tokens by sigmoid class scores, not by those of "
                "SoftmaxLoss: use StaticQueries (MODEL.DINO.QUERY_SELECTION), or another loss"
            )
        if further := [*self.branches, *self.passes]:
            raise ValueError(
                f"{type(further[0]).__name__} (MODEL.DINO.BRANCHES and PASSES, model.branches and "
                "passes) does not support masks: leave it out, or train a DINO"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        arguments = super().from_config(cfg)
        pixel_embedding = PixelEmbedding(
            input_shape=arguments["backbone"].output_shape(),
            in_feature=cfg.MODEL.DINO.MASK.FEATURE,
            embed_dim=cfg.MODEL.DINO.EMBED_DIM,
        )
        test = cfg.MODEL.DINO.TEST
        return arguments | {
            "pixel_embedding": pixel_embedding,
            "stuff_classes": stuff_classes(cfg.DATASETS.TRAIN) if test.PANOPTIC_ON else (),
            **{name.lower(): value for name, value in test.items()},
        }

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

    def results(
        self, output: DetectorOutput, images: ImageList, batched_inputs: Batch
    ) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = [{} for _ in batched_inputs]
        if self.instance_on:
            results = super().results(output, images, batched_inputs)
        if not (self.panoptic_on or self.semantic_on):
            return results
        assert output.pixels is not None
        last: Any = output.result.layers[-1]
        logits = last.logits.to(torch.promote_types(last.logits.dtype, torch.float32))
        of_images = self.class_scores(logits), last.masks, output.pixels.maps
        parts = zip(*of_images, images.image_sizes, strict=True)
        for result, part, x in zip(results, parts, batched_inputs, strict=True):
            result |= self.segment(*part, output_size(x, part[-1]))
        return results

    def segment(
        self,
        scores: Tensor,
        masks: Tensor,
        pixels: Tensor,
        image_size: tuple[int, int],
        size: tuple[int, int],
    ) -> dict[str, Any]:
        """The maps of an image that are asked for.

        Args:
            scores: (Q, K), in [0, 1]
            masks: embeddings (Q, C)
            pixels: embeddings (C, h, w), of the padded image
            image_size: height and width of the image without padding
            size: height and width of the maps
        """
        maps: dict[str, Any] = {}
        resize = partial(resize_maps, stride=self.pixel_embedding.stride, image_size=image_size)
        temperature = None if self.softmax else self.temperature
        sharp = sharpen(scores, temperature)
        if self.panoptic_on:
            found = scores.amax(1) > self.object_mask_threshold
            maps["panoptic_seg"] = panoptic_map(
                *sharp[found].max(1),
                (resize(mask_logits(x, pixels), size=size) for x in in_parts(masks[found])),
                size,
                self.stuff_classes,
                self.overlap_threshold,
            )
        if self.semantic_on:
            # alone, scores are resized, and not masks, as in the published code
            own = size if self.instance_on or self.panoptic_on else image_size
            logits = (resize(mask_logits(x, pixels), size=own) for x in in_parts(masks))
            maps["sem_seg"] = interpolate(semantic_map(sharp, logits, own), size)
        return maps

    def is_stuff(self, labels: Tensor) -> Tensor:
        """Which labels, of any shape, are of `stuff_classes`."""
        stuff = torch.tensor(sorted(self.stuff_classes), dtype=labels.dtype, device=labels.device)
        return (labels[..., None] == stuff).any(-1)

    def rescale(self, instances: Instances, x: dict[str, Any]) -> Instances:
        """Detections in the size that the input asks for, in descending order of score."""
        size = output_size(x, instances.image_size)
        if self.panoptic_on:
            instances = instances[~self.is_stuff(instances.pred_classes)]
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


def output_size(x: dict[str, Any], image_size: tuple[int, int]) -> tuple[int, int]:
    """The height and width that an input asks for, by default those of its image."""
    return int(x.get("height", image_size[0])), int(x.get("width", image_size[1]))


def masks_of(x: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The masks (M, H, W) bool of a training input, and (M,) which are known and which have a box.

    By default all are known and have a box; "has_mask" and "has_box" of instances override this. A
    ValueError if there are boxes, but no masks at all.
    """
    instances: Instances = x["instances"]
    everything = torch.ones(len(instances), dtype=torch.bool)
    known, boxed = (
        instances.get(name) if instances.has(name) else everything
        for name in ("has_mask", "has_box")
    )
    if instances.has("gt_masks"):
        masks = instances.gt_masks
        if isinstance(masks, PolygonMasks):
            masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
        return masks.tensor, known, boxed
    if len(instances):
        raise ValueError(
            f"{x.get('file_name', 'an image')} has boxes but no masks, which Mask DINO needs: set "
            "MODEL.MASK_ON to True (use_instance_mask of the mapper), or train a DINO"
        )
    return torch.zeros(0, *instances.image_size, dtype=torch.bool), known, boxed
