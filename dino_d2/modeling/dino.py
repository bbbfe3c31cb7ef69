"""DINO as a Detectron2 meta-architecture. All Detectron2 conventions end in this file."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone, detector_postprocess
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from ..boxes import xyxy_to_cxcywh
from ..images import WRONG_CHANNELS
from ..layers.blocks import SoftmaxHead, recompute
from ..layouts.dino import detect_format
from ..layouts.renaming import CheckpointError
from ..names import hint, plural
from ..ranges import require_positive, require_share, require_whole
from ..structures import (
    Branch,
    Detections,
    DetectorOutput,
    FeaturePyramid,
    Predictions,
    Target,
    send_to_device,
)
from .branches import decode
from .build import build_parts
from .class_losses import SoftmaxLoss
from .criterion import BoxesOnly, SetCriterion
from .decoder import Decoder
from .detector import Batch, Detector
from .encoder import Encoder
from .matcher import SoftmaxMatcher
from .postprocess import (
    Choice,
    choose_classes,
    choose_pairs,
    detections_of,
    non_maximum_suppression,
    to_instances,
)
from .relations import DistinctQueries

NMS = "nms (TEST.NMS, model.nms)"


@META_ARCH_REGISTRY.register()
class DINO(Detector):
    """DETR with improved denoising anchor boxes, as a composition of stages.

    Args:
        backbone: follows Detectron2's backbone interface
        neck: maps the backbone's features to a list of (B, C, H_l, W_l)
        encoder: maps that list and a padding mask to a :class:`FeaturePyramid`
        query_selection: maps the encoded pyramid to queries and, possibly, proposals
        decoder: maps queries and pyramid to the predictions of each layer
        criterion: maps a :class:`DetectorOutput` and targets to a dict of losses
        denoising: maps targets to a :class:`Branch`; None trains without
        branches, passes: other training-only branches, and extra passes through the decoder, see
            `branches.py`
        num_classes: K
        max_detections: per image
        nms: IoU threshold in (0, 1] of class-wise NMS. None, as in the paper: no suppression
        one_class_per_query: whether a query is only detected as its best class, as always with
            softmax; by default, as in the paper, it may be detected as several classes
        pixel_mean, pixel_std: per channel, in the order and range of the input images
        activation_checkpointing: stages, of "backbone", "encoder" and "decoder", whose activations
            are recomputed in the backward pass: less memory, more time

    Raises:
        ValueError: there is no such stage to recompute, a number is out of range, or parts exclude
            each other
    """

    decoder_type: type[Decoder] = Decoder  # what a YAML config makes
    softmax_in_matching = True  # whether class scores by a softmax need costs by a softmax
    has_masks = False  # whether it computes what parts need that have `needs_masks`
    size_divisibility = 1  # images are padded to multiples of it, and of the backbone's

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        neck: nn.Module,
        encoder: Encoder,
        query_selection: nn.Module,
        decoder: Decoder,
        criterion: SetCriterion,
        denoising: nn.Module | None = None,
        branches: Sequence[nn.Module] = (),
        passes: Sequence[nn.Module] = (),
        num_classes: int,
        max_detections: int = 300,
        nms: float | None = None,
        one_class_per_query: bool = False,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        activation_checkpointing: Sequence[str] = (),
    ):
        stages = ("backbone", "encoder", "decoder")
        for name in activation_checkpointing:
            if name not in stages:
                raise ValueError(
                    "activation_checkpointing (MODEL.DINO.ACTIVATION_CHECKPOINTING, model."
                    f"activation_checkpointing) names {name!r}, which is no stage; "
                    + hint(str(name), stages)
                )
        if len(pixel_mean) != len(pixel_std):
            raise ValueError(
                f"pixel_mean has {len(pixel_mean)} channels, and pixel_std has {len(pixel_std)}: "
                "give both for each channel of an image"
            )
        require_whole(num_classes=num_classes, max_detections=max_detections)
        if passes and isinstance(getattr(decoder, "relation", None), DistinctQueries):
            raise ValueError(
                "extra passes (MODEL.DINO.PASSES, model.passes) match several queries with a box, "
                "which DistinctQueries (MODEL.DINO.RELATION, model.decoder.relation) suppresses: "
                "use one or the other"
            )
        if nms is not None:
            require_positive(**{NMS: nms})
            require_share(**{NMS: nms})
        require_positive(**{f"pixel_std[{i}]": x for i, x in enumerate(pixel_std)})
        # Fastest for convolutions on CPUs and in half precision on GPUs; values do not change.
        super().__init__(
            backbone=backbone.to(memory_format=torch.channels_last),
            num_classes=num_classes,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
        )
        # PyTorch 2.10 has no type of this:
        self.neck = neck.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.encoder = encoder
        self.query_selection = query_selection
        self.decoder = decoder
        self.denoising = denoising
        self.branches, self.passes = nn.ModuleList(branches), nn.ModuleList(passes)
        self.criterion = criterion
        self.recompute_backbone = "backbone" in activation_checkpointing
        self.encoder.recompute = "encoder" in activation_checkpointing
        self.decoder.recompute = "decoder" in activation_checkpointing
        self.max_detections, self.nms = max_detections, nms
        self.one_class_per_query = one_class_per_query
        self.softmax = isinstance(decoder.class_heads[0], SoftmaxHead)
        self.check_softmax()
        for part in (query_selection, decoder, criterion):
            if getattr(part, "needs_masks", False) and not self.has_masks:
                raise ValueError(
                    f"{type(part).__name__} is for MaskDINO, and the model is a "
                    f"{type(self).__name__}: start from a config of configs/MaskDINO/"
                )
        self.register_load_state_dict_pre_hook(refuse_other_layouts)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            **build_parts(cfg, backbone.output_shape(), cls.decoder_type),
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            "nms": cfg.TEST.NMS,
            "one_class_per_query": cfg.TEST.ONE_CLASS_PER_QUERY,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "activation_checkpointing": cfg.MODEL.DINO.ACTIVATION_CHECKPOINTING,
        }

    def check_softmax(self) -> None:
        """Raise a ValueError for parts that do not go with the decoder's class heads."""
        head, criterion = self.decoder.class_heads[0], self.criterion
        kinds: list[tuple[Any, type]] = [
            (criterion.class_loss, SoftmaxLoss),
            (criterion.denoising_class_loss, SoftmaxLoss),
        ]
        if self.softmax_in_matching:
            kinds.append((criterion.matcher, SoftmaxMatcher))
        for part, kind in kinds:
            if isinstance(part, kind) != self.softmax:
                raise ValueError(
                    "SoftmaxHead, SoftmaxLoss and SoftmaxMatcher go together, but the model has a "
                    f"{type(head).__name__} and a {type(part).__name__}: use all or none of them"
                )
        if not self.softmax:
            return
        parts = self.query_selection, *self.branches, *self.passes
        others = [x for x in parts if hasattr(x, "class_head") or hasattr(x, "matcher")]
        if isinstance(criterion, BoxesOnly):
            others.append(criterion)
        if others:
            raise ValueError(
                f"{type(others[0]).__name__} needs sigmoid class scores, not those of "
                "SoftmaxLoss: leave it out, or use another class loss and matcher"
            )

    def settings(self) -> dict[str, Any]:
        encoding = {
            "position_temperature": float(self.encoder.position_temperature),
            "position_offset": float(self.encoder.position_offset),
        }
        return super().settings() | encoding

    def forward(self, batched_inputs: Batch) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Detectron2's standard interface.

        Args:
            batched_inputs: one dict per image with "image" (C, H, W); in training also "instances"
                with gt_boxes and gt_classes; in inference optionally "height" and "width" of the
                results

        Returns:
            in training a dict of weighted losses, otherwise a dict with "instances" per image and,
            with NMS, the "suppressed" ones
        """
        if not self.training:
            return self.inference(batched_inputs)
        targets = self.prepare_targets(batched_inputs)
        images = self.preprocess_images(batched_inputs)
        return self.criterion(self.detect(images.tensor, padding_mask(images), targets), targets)

    def inference(self, batched_inputs: Batch) -> list[dict[str, Any]]:
        """Detect, independently of the other images in the batch.

        Only images of the same size share a forward pass. Padding is masked in the attention, but
        convolutions see across its border and GroupNorm averages over it.
        """
        same_size = defaultdict(list)
        for i, x in enumerate(batched_inputs):
            same_size[x["image"].shape[-2:]].append(i)
        results: list[dict[str, Any]] = [{}] * len(batched_inputs)
        for indices in same_size.values():
            images = self.preprocess_images([batched_inputs[i] for i in indices])
            output = self.detect(images.tensor, padding_mask(images))
            inputs = [batched_inputs[i] for i in indices]
            for i, result in zip(indices, self.results(output, images, inputs), strict=True):
                results[i] = result
        return results

    def results(
        self, output: DetectorOutput, images: ImageList, batched_inputs: Batch
    ) -> list[dict[str, Any]]:
        """The results of each image of a forward pass, in the size that its input asks for."""
        return [
            {name: self.rescale(part, x) for name, part in parts.items()}
            for parts, x in zip(self.detections(output, images), batched_inputs, strict=True)
        ]

    def detections(self, output: DetectorOutput, images: ImageList) -> list[dict[str, Instances]]:
        """The "instances" of each image of a forward pass, in its pixels; with NMS also those
        "suppressed"."""
        found = self.best(output.result.layers[-1])
        everything = self.to_instances(output, found, images)
        if self.nms is None:
            return [{"instances": instances} for instances in everything]
        kept = non_maximum_suppression(found, self.nms)
        return [
            {"instances": instances[own], "suppressed": instances[~own]}
            for instances, own in zip(everything, kept, strict=True)
        ]

    def detect(
        self, pixels: Tensor, padding: Tensor, targets: list[Target] | None = None
    ) -> DetectorOutput:
        """All predictions of every stage.

        Args:
            pixels: (B, C, H, W), normalised, zero on padding
            padding: (B, H, W), True on padding
            targets: for training, adds denoising, other branches and extra passes
        """
        call = recompute if self.recompute_backbone else nn.Module.__call__
        memory = self.encoder(self.neck(call(self.backbone, pixels)), padding)
        queries, proposals = self.query_selection(memory)
        result = Branch("", queries, proposals=proposals)
        return DetectorOutput(self.decode(memory, result, targets))

    def decode(
        self, memory: FeaturePyramid, result: Branch, targets: list[Target] | None
    ) -> list[Branch]:
        """The result and, with targets, training-only branches, all with their predictions."""
        if targets is None:
            return decode(self.decoder, memory, result)
        parts = [x for x in (self.denoising, *self.branches) if x is not None]
        others = [make(targets, result.queries, memory) for make in parts]
        branches = decode(self.decoder, memory, result, others)
        for once_more in self.passes:
            branches += once_more(self, memory, result, others)
        return branches

    def best(self, predictions: Predictions) -> Detections:
        """The best detections of each image, before NMS."""
        return detections_of(predictions, self.choose(predictions))

    def choose(self, predictions: Predictions) -> Choice:
        choose = choose_classes if self.softmax or self.one_class_per_query else choose_pairs
        return choose(self.class_scores(predictions.logits), self.max_detections)

    def to_instances(
        self, output: DetectorOutput, found: Detections, images: ImageList
    ) -> list[Instances]:
        """Detections of each image, in its pixels."""
        return to_instances(found, images.image_sizes)

    def rescale(self, instances: Instances, x: dict[str, Any]) -> Instances:
        """Scale detections to the size that the input asks for, by default its own size."""
        height, width = instances.image_size
        return detector_postprocess(instances, x.get("height", height), x.get("width", width))

    def class_scores(self, logits: Tensor) -> Tensor:
        """In [0, 1], of each class: (..., K), in float32 or wider."""
        # Different logits can have equal probabilities in bfloat16.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.softmax(-1)[..., :-1] if self.softmax else logits.sigmoid()

    def preprocess_images(self, batched_inputs: Batch) -> ImageList:
        """Normalise and pad images; a ValueError for no image or wrong numbers of channels."""
        if not batched_inputs:
            raise ValueError("a training batch has no images; is the data loader's batch size 0?")
        for x in batched_inputs:  # a single channel would broadcast
            if len(x["image"]) != len(self.pixel_mean):
                raise ValueError(
                    WRONG_CHANNELS.format(plural(len(x["image"]), "channel"), len(self.pixel_mean))
                )
        images = [send_to_device(x["image"], like=self.pixel_mean) for x in batched_inputs]
        images = [(x.to(self.pixel_mean) - self.pixel_mean) / self.pixel_std for x in images]
        return ImageList.from_tensors(
            images,
            max(self.backbone.size_divisibility, self.size_divisibility),
            padding_constraints=self.backbone.padding_constraints,
        )

    def prepare_targets(self, batched_inputs: Batch) -> list[Target]:
        """Labels and relative boxes; a ValueError for a class that the model does not have."""
        targets = []
        for x in batched_inputs:
            instances: Instances = x["instances"]
            classes = instances.gt_classes
            # before the copy to the device, where the check would synchronise
            unknown = classes[(classes < 0) | (classes >= self.num_classes)]
            if len(unknown):
                raise ValueError(
                    f"{x.get('file_name', 'an image')} has an object, or pixels in its "
                    f"map, of class {int(unknown[0])}, but the model has "
                    f"{plural(self.num_classes, 'class')}, counted from 0: correct the data, or "
                    "set the number of classes to that of the data"
                )
            height, width = instances.image_size
            boxes = xyxy_to_cxcywh(instances.gt_boxes.tensor)
            boxes = boxes / boxes.new_tensor([width, height] * 2)
            targets.append(
                Target(*(send_to_device(x, like=self.pixel_mean) for x in (classes, boxes)))
            )
        return targets


def padding_mask(images: ImageList) -> Tensor:
    """(B, H, W), True on padding."""
    mask = images.tensor.new_ones(images.tensor[:, 0].shape, dtype=torch.bool)
    for image, (height, width) in zip(mask, images.image_sizes, strict=True):
        image[:height, :width] = False
    return mask


def refuse_other_layouts(model: DINO, state: dict[str, Tensor], *_: Any) -> None:
    """Detectron2's own checkpointer would only load the few tensors whose names fit by chance."""
    layout = detect_format(state)
    if layout not in (None, "dino_d2", "model_zoo", "torchvision", "convnext"):
        raise CheckpointError(
            f"these weights have the layout of {layout}, which Detectron2's checkpointer does not "
            "know: load them with dino_d2.Checkpointer(model).load(path)"
        )
