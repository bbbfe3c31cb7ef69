"""What Mask DINO (arXiv 2206.02777) adds to the stages of DINO.

    PixelEmbedding         an embedding of every pixel, from the backbone and the encoder
    MaskDecoder            its heads, the same for all layers, give masks as well
    UnifiedQuerySelection  ranks tokens by the decoder's heads, anchors are the boxes of masks

A mask is an embedding of C channels everywhere. Maps of logits are made where they are needed: of
matched queries for the losses, of selected tokens for their anchors, and of detections.
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn
from torch.nn import functional as F

from ..boxes import inverse_sigmoid, xyxy_to_cxcywh
from ..layers import MLP
from ..names import hint
from ..structures import (
    FeaturePyramid,
    MaskLayerOutput,
    MaskPredictions,
    Pixels,
    Queries,
)
from .decoder import Decoder
from .query_selection import (
    QUERY_SELECTION_REGISTRY,
    PureQuerySelection,
    selection_from_config,
)
from .tokens import take_tokens

BOX_TYPES = "bitmask", "mask2box", "no"


class PixelEmbedding(nn.Module):
    """A fine feature of the backbone joined with the encoder's finest level (section 3.3).

    Args:
        input_shape: of every backbone feature
        in_feature: which one, at the stride of masks
        embed_dim: C
    """

    def __init__(
        self, *, input_shape: dict[str, ShapeSpec], in_feature: str = "res2", embed_dim: int = 256
    ):
        super().__init__()
        if in_feature not in input_shape:
            raise ValueError(
                f"masks need the feature {in_feature!r}, but the backbone has only "
                f"{', '.join(input_shape)}: add it to MODEL.RESNETS.OUT_FEATURES (out_features of "
                "model.backbone), or change MODEL.DINO.MASK.FEATURE (model.pixel_embedding."
                "in_feature)"
            )
        self.in_feature, self.stride = in_feature, input_shape[in_feature].stride or 4
        channels, width = input_shape[in_feature].channels, embed_dim
        self.lateral = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), nn.GroupNorm(32, width)
        )
        self.output = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(32, width), nn.ReLU()
        )
        self.projection = nn.Conv2d(width, width, 1)
        for conv in (self.lateral[0], self.output[0], self.projection):
            c2_xavier_fill(conv)

    def forward(self, features: dict[str, Tensor], memory: FeaturePyramid) -> Tensor:
        """Embeddings (B, C, h, w) at the stride of the feature."""
        fine = self.lateral(features[self.in_feature])
        height, width = memory.shapes[0]
        coarse = memory.tokens[:, : height * width].transpose(1, 2).unflatten(2, (height, width))
        coarse = F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.projection(self.output(fine + coarse))


class MaskDecoder(Decoder):
    """DINO's decoder with a mask head, whose heads also see the queries before the first layer.

    One class head, box head and mask head serve all layers and the encoder's proposals. The first
    of its outputs is that of the queries themselves, with the boxes that they start from; so there
    is one more than there are layers. Class and mask head see a query of a layer through the final
    norm twice, the box head once, as in the published code.

    Args:
        arguments: of :class:`Decoder`
    """

    needs_masks = True

    def __init__(self, *, num_classes: int, embed_dim: int = 256, **arguments: Any):
        super().__init__(num_classes=num_classes, embed_dim=embed_dim, **arguments)
        if len(self.class_heads) > 1:
            raise ValueError(
                "Mask DINO has one class head and one box head for all layers: set "
                "MODEL.DINO.SHARED_HEADS (model.decoder.shared_heads) to True"
            )
        self.mask_head = MLP(embed_dim, embed_dim, embed_dim, embed_dim)

    def forward(
        self,
        queries: Queries,
        memory: FeaturePyramid,
        attn_mask: Tensor | None = None,
        layers: Sequence[Any] | None = None,
    ) -> list[Any]:
        """What the queries give before the first layer and after each, see `Decoder.forward`."""
        x, boxes, _ = queries
        first = self.output_of(0, x, boxes, boxes)
        return [first, *super().forward(queries, memory, attn_mask, layers)]

    def output_of(  # type: ignore[override]  # has masks, too
        self, layer: int, x: Tensor, boxes: Tensor, anchor: Tensor
    ) -> MaskLayerOutput:
        y = self.norm(x)
        return MaskLayerOutput(self.class_heads[0](y), boxes, self.mask_head(y), x, anchor)


@QUERY_SELECTION_REGISTRY.register()
class UnifiedQuerySelection(PureQuerySelection):
    """The tokens with the highest scores of the decoder's class head; anchors are the bounding
    boxes of their masks (section 3.4, "unified and enhanced query selection").

    Tokens are ranked by the class head on the token, without the final norm of the decoder, which
    the proposals pass, as in the published code. A mask without pixels gives the box (0, 0, 0, 0).

    Args:
        num_queries: Q
        embed_dim: C
        num_classes: K; unused, as the heads are the decoder's
        initialize_box_type: where decoding starts: "bitmask", boxes of masks; "mask2box", likewise,
            but the last pixel of a mask is outside, and masks without pixels are in the lower right
            corner; "no", boxes of the box head. Weights are trained with one of them
        anchor_sides: of the boxes that the box head refines, of each level, finest first; by
            default 0.05, 0.1, 0.2, ... Some published weights have them in descending order
    """

    needs_masks = True

    @configurable
    def __init__(
        self,
        *,
        num_queries: int,
        embed_dim: int,
        num_classes: int,
        initialize_box_type: str = "bitmask",
        anchor_sides: Sequence[float] = (),
    ):
        super().__init__(num_queries=num_queries, embed_dim=embed_dim, num_classes=num_classes)
        if initialize_box_type not in BOX_TYPES:
            raise ValueError(
                f"initialize_box_type is {initialize_box_type!r}; "
                + hint(str(initialize_box_type), BOX_TYPES)
            )
        self.initialize_box_type, self.anchor_sides = initialize_box_type, tuple(anchor_sides)

    @classmethod
    def from_config(cls, cfg: CfgNode, num_classes: int) -> dict[str, object]:
        c = cfg.MODEL.DINO.MASK
        return selection_from_config(cfg, num_classes) | {
            "initialize_box_type": c.INITIALIZE_BOX_TYPE,
            "anchor_sides": c.ANCHOR_SIDES,
        }

    def make_heads(self, embed_dim: int, num_classes: int) -> None:
        """None: they are the decoder's."""

    def forward(  # type: ignore[override]  # needs heads and pixels
        self, memory: FeaturePyramid, decoder: MaskDecoder, pixels: Pixels
    ) -> tuple[Queries, MaskPredictions]:
        tokens, anchors = self.features(memory)
        class_head, box_head = decoder.class_heads[0], decoder.box_heads[0]
        best = self.choose(tokens, anchors, class_head(tokens), box_head)
        tokens, anchors = take_tokens(tokens, best), take_tokens(anchors, best)
        boxes = (box_head(tokens) + anchors).sigmoid()
        proposals = decoder.output_of(0, tokens, boxes, anchors).predictions
        start = boxes
        if self.initialize_box_type != "no":
            exclusive = self.initialize_box_type == "mask2box"
            start = mask_boxes(proposals.masks, pixels, exclusive)
            # often at the border, where references are cut off
            start = inverse_sigmoid(start, decoder.eps).sigmoid()
        return Queries(self.content_of(tokens), start.detach()), proposals


@torch.no_grad()
def mask_boxes(masks: Tensor, pixels: Pixels, exclusive: bool = False) -> Tensor:
    """Bounding boxes of the pixels with a positive logit.

    Args:
        masks: embeddings (B, Q, C)
        exclusive: see `spans`

    Returns:
        (B, Q, 4) relative to the images without their padding
    """
    positive = mask_logits(masks, pixels.maps) > 0
    low, high = zip(*(spans(positive.any(axis), exclusive) for axis in (-2, -1)), strict=True)
    height, width = positive.shape[-2:]
    size = torch.stack([pixels.extent[:, 0] * width, pixels.extent[:, 1] * height], -1)
    corners = torch.stack([*low, *high], -1) / size.tile(2)[:, None]
    return xyxy_to_cxcywh(corners.clamp(max=1))


def spans(mask: Tensor, exclusive: bool = False) -> tuple[Tensor, Tensor]:
    """The index of the first True along the last axis, and the one behind the last; 0 for none.

    >>> spans(torch.tensor([False, True, True, False]))
    (tensor(1), tensor(3))

    Args:
        exclusive: the second is the last True, and for none both are the length of the axis
    """
    length, found = mask.shape[-1], mask.any(-1)
    first = mask.int().argmax(-1)
    end = length - int(exclusive) - mask.flip(-1).int().argmax(-1)
    nothing = length if exclusive else 0
    return torch.where(found, first, nothing), torch.where(found, end, nothing)


def mask_logits(masks: Tensor, maps: Tensor) -> Tensor:
    """Maps of logits (..., Q, h, w) of masks (..., Q, C), with pixel embeddings (..., C, h, w)."""
    return (masks @ maps.flatten(-2)).unflatten(-1, maps.shape[-2:])


def sample_maps(maps: Tensor, points: Tensor, padding: str = "zeros") -> Tensor:
    """Bilinear samples (B, C, h', w') of maps (B, C, h, w), in float32 or wider.

    In bfloat16, points are off by up to half a pixel of a map of 256, and PyTorch's kernel for CPUs
    reads outside the maps (2.14: wrong numbers, or the process dies).

    Args:
        points: (B, h', w', 2), as (x, y) in [0, 1]
        padding: of `grid_sample`, what is outside the maps
    """
    dtype = torch.promote_types(maps.dtype, torch.float32)
    grid = 2 * points.to(dtype) - 1
    return F.grid_sample(maps.to(dtype), grid, padding_mode=padding, align_corners=False)
