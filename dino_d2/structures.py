"""The values that are passed between the stages of the detector.

Shape legend of the whole package:

    B: images in the batch               L: feature levels
    S: tokens, the sum of H_l * W_l      Q: queries
    C: embedding channels                K: classes
    M: ground-truth boxes of one image   T: denoising queries
    h, w: size of the map of pixel embeddings, at stride 4, of Mask DINO
    H, D, P: attention heads, channels per head, sampling points
    N: supervised stages, i.e. decoder layers and the encoder's proposals

Boxes are (cx, cy, w, h) in [0, 1], relative to the image without its padding.
Padding masks are True on padding, attention masks are True where attention is forbidden.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor


class FeaturePyramid(NamedTuple):
    """Multi-scale features, flattened to one sequence of tokens, finest level first."""

    tokens: Tensor  # (B, S, C)
    position: Tensor  # (B, S, C), sine encoding + level embedding
    padding: Tensor  # (B, S)
    valid_ratios: Tensor  # (B, L, 2), share of each level's (width, height) that is not padding
    shapes: tuple[tuple[int, int], ...]  # ((H_0, W_0), ...), plain ints: no GPU synchronisation


class Queries(NamedTuple):
    """Decoder queries: content and reference."""

    content: Tensor  # (B, Q, C)
    reference: Tensor  # (B, Q, 4) boxes, or (B, Q, 2) points
    position: Tensor | None = None  # (B, Q, C) if learned, not computed from the reference


class Predictions(NamedTuple):
    """Class logits and boxes; `stack_predictions` adds a leading axis of N stages."""

    logits: Tensor  # (B, Q, K), before the sigmoid
    boxes: Tensor  # (B, Q, 4)


class LayerOutput(NamedTuple):
    """The output of a decoder layer for its queries: its predictions, and their inputs."""

    logits: Tensor  # (B, Q, K), before the sigmoid
    boxes: Tensor  # (B, Q, 4)
    features: Tensor  # (B, Q, C), what the heads see
    anchors: Tensor  # (B, Q, 4) boxes, or (B, Q, 2) points, that the box head refined

    @property
    def predictions(self) -> Predictions:
        """Those of the decoder's own heads."""
        return Predictions(self.logits, self.boxes)


class MaskPredictions(NamedTuple):
    """Predictions of Mask DINO. A mask travels as an embedding; its product with the embedding of
    every pixel is its map of logits (h, w)."""

    logits: Tensor  # (B, Q, K), before the sigmoid
    boxes: Tensor  # (B, Q, 4)
    masks: Tensor  # (B, Q, C)


class MaskLayerOutput(NamedTuple):
    """What a decoder layer of Mask DINO gives, see :class:`LayerOutput`."""

    logits: Tensor  # (B, Q, K), before the sigmoid
    boxes: Tensor  # (B, Q, 4)
    masks: Tensor  # (B, Q, C)
    features: Tensor  # (B, Q, C)
    anchors: Tensor  # (B, Q, 4)

    @property
    def predictions(self) -> MaskPredictions:
        return MaskPredictions(self.logits, self.boxes, self.masks)


class Detections(NamedTuple):
    """The N best (query, class) pairs of each image, in descending order of score."""

    boxes: Tensor  # (B, N, 4), corners
    scores: Tensor  # (B, N), in [0, 1]
    labels: Tensor  # (B, N), int64 in [0, K)


class MaskDetections(NamedTuple):
    """Those of Mask DINO."""

    boxes: Tensor  # (B, N, 4), corners
    scores: Tensor  # (B, N), in [0, 1]
    labels: Tensor  # (B, N), int64 in [0, K)
    masks: Tensor  # (B, N, C) embeddings; of exported files, (B, N, h, w) logits


class Target(NamedTuple):
    """Ground truth of one image."""

    labels: Tensor  # (M,), int64 in [0, K)
    boxes: Tensor  # (M, 4)


class MaskTarget(NamedTuple):
    """Ground truth of one image with masks."""

    labels: Tensor  # (M,), int64 in [0, K)
    boxes: Tensor  # (M, 4)
    masks: Tensor  # (M, H, W) bool, of the image without its padding
    known: Tensor  # (M,) bool, False for objects whose mask is unknown
    has_box: Tensor  # (M,) bool, False for stuff, which has no box losses


class Match(NamedTuple):
    """Which queries are matched to which ground-truth boxes.

    Query `queries[..., i]` of image `images[i]` is matched to box `targets[..., i]`. Targets are
    counted through the batch: image 1 starts where image 0 ends. A leading axis of queries and
    targets, if any, is the stage; every stage has the same number of matches.
    """

    images: Tensor  # (n,), in ascending order; on the CPU until losses are computed
    queries: Tensor  # (n,) or (N, n)
    targets: Tensor  # (n,) or (N, n); -1 is no match, so that stages may have fewer than others


class Branch(NamedTuple):
    """A group of queries that are supervised by one rule, and their predictions.

    The result is the branch without a name. Others, such as denoising, exist only in training.
    """

    name: str  # part of the names of its losses: "dn" makes loss_class_dn
    queries: Queries | None  # Q of them; None: it has no queries of its own
    # (Q,), from -Q to Q, the groups of `group_attn_mask`; None: all attend to each other
    groups: Tensor | None = None
    # Known by construction, or a function of stacked predictions and targets; None: the matcher of
    # the criterion.
    match: "Match | Callable[[Predictions, list[Target]], Match] | None" = None
    repeats: int = 1  # queries matched with each box; losses are divided by boxes * repeats
    weight: float = 1.0  # of all its losses
    class_weight: float = 1.0  # of its class losses, on top of `weight`
    denoising: bool = False  # whether class loss and class weight are those of denoising
    # Computes its predictions from the outputs of the decoder layers for its queries or, if it has
    # none, for those of the result; None: the decoder's heads do, for its queries.
    heads: Callable[[Sequence[LayerOutput]], Sequence[Predictions]] | None = None
    # Weighted losses of heads with their own losses, besides those of its layers and proposals.
    losses: Mapping[str, Tensor] = MappingProxyType({})
    layers: Sequence[Predictions] = ()  # one per decoder layer, once there are
    proposals: Predictions | None = None  # the encoder's, None without query selection


class Pixels(NamedTuple):
    """Embeddings of pixels, which those of masks are multiplied with (Mask DINO, section 3.3)."""

    maps: Tensor  # (B, C, h, w)
    extent: Tensor  # (B, 2), share of their (width, height) that is not padding


class DetectorOutput(NamedTuple):
    """Everything that is supervised."""

    branches: list[Branch]  # the result first
    pixels: "Pixels | None" = None  # of Mask DINO

    @property
    def result(self) -> Branch:
        """The branch that detections are made of, by the last of its layers."""
        return self.branches[0]

    def named(self, name: str) -> Branch | None:
        """The branch with a name, or None."""
        return next((x for x in self.branches if x.name == name), None)


def join_queries(parts: Sequence[Queries]) -> Queries:
    """Concatenate queries; a ValueError if they mix boxes and points, or kinds of positions."""
    widths = {x.reference.shape[-1] for x in parts}
    if len(widths) > 1 or len({x.position is None for x in parts}) > 1:
        raise ValueError(
            "denoising and other branches need queries with boxes, but those of this model are "
            "points or learned positions: train it without them"
        )
    joined = (None if x[0] is None else torch.cat(x, 1) for x in zip(*parts, strict=True))
    return Queries._make(joined)


# Predictions, LayerOutput, Target, or those of another detector
P = TypeVar("P", bound=NamedTuple)


def split_predictions(predictions: P, sizes: Sequence[int]) -> list[P]:
    """Split predictions, or outputs of a layer, (B, Q, .) by numbers of queries."""
    parts = zip(*(x.split(sizes, 1) for x in predictions), strict=True)
    return [predictions._make(part) for part in parts]


def stack_predictions(stages: Sequence[P]) -> P:
    """Stack N stages of (B, Q, .) to (N, B, Q, .), with logits in float32 or wider."""
    stacked = stages[0]._make(torch.stack(parts) for parts in zip(*stages, strict=True))
    logits: Tensor = stacked._asdict()["logits"]
    return stacked._replace(logits=logits.to(torch.promote_types(logits.dtype, torch.float32)))


def send_to_device(x: Tensor, like: Tensor) -> Tensor:
    """Copy a tensor to the device of `like` without waiting, through pinned memory for CUDA."""
    if like.is_cuda and x.is_cpu:
        x = x.pin_memory()
    return x.to(like.device, non_blocking=True)


def join_targets(targets: Sequence[Target]) -> Target:
    """Concatenate labels and boxes of a batch, in the order that `Match` counts in."""
    parts = zip(*((x.labels, x.boxes) for x in targets), strict=True)
    return Target(*map(torch.cat, parts))
