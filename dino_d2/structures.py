"""The values that travel between the stages of the detector.

Shape legend of the whole package:

    B: images in the batch               L: feature levels
    S: tokens, the sum of H_l * W_l      Q: queries
    C: embedding channels                K: classes
    M: ground-truth boxes of one image   T: denoising queries
    H, D, P: attention heads, channels per head, sampling points
    N: supervised stages, i.e. decoder layers and the encoder's proposals

Boxes are (cx, cy, w, h) in [0, 1], relative to the image without its padding.
Padding masks are True on padding, attention masks are True where attention is forbidden.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class FeaturePyramid(NamedTuple):
    """Multi-scale features, flattened to one sequence of tokens, finest level first."""

    tokens: Tensor  # (B, S, C)
    position: Tensor  # (B, S, C), sine encoding + level embedding
    padding: Tensor  # (B, S)
    valid_ratios: Tensor  # (B, L, 2), share of each level's (width, height) that is not padding
    shapes: tuple[tuple[int, int], ...]  # ((H_0, W_0), ...), plain ints: no device sync


class Queries(NamedTuple):
    """Decoder queries: what they carry and where they look."""

    content: Tensor  # (B, Q, C)
    reference: Tensor  # (B, Q, 4) boxes, or (B, Q, 2) points
    position: Tensor | None = None  # (B, Q, C) where it is learned and not made of the reference


class Predictions(NamedTuple):
    """Class logits and boxes; `stack_predictions` puts a leading axis of N stages before B."""

    logits: Tensor  # (B, Q, K), before the sigmoid
    boxes: Tensor  # (B, Q, 4)


class Target(NamedTuple):
    """Ground truth of one image."""

    labels: Tensor  # (M,), int64 in [0, K)
    boxes: Tensor  # (M, 4)


class Match(NamedTuple):
    """Query `queries[..., i]` of image `images[i]` stands for ground-truth box `targets[..., i]`.

    Targets are counted through the batch: image 1 starts where image 0 ends. A leading axis of
    queries and targets, if any, is the stage; every stage matches equally many.
    """

    images: Tensor  # (n,)
    queries: Tensor  # (n,) or (N, n)
    targets: Tensor  # (n,) or (N, n)


class DenoisingBatch(NamedTuple):
    """Noised ground truth, to be prepended to the matching queries."""

    queries: Queries  # T of them
    groups: Tensor  # (T,), group of every query; groups do not see each other
    match: Match  # known by construction, no assignment needed
    num_groups: int


class DetectorOutput(NamedTuple):
    """Everything that is supervised; at inference only the last of `layers` is of interest."""

    layers: list[Predictions]  # one per decoder layer, the last is the result
    proposals: Predictions | None  # the encoder's, None without query selection
    denoised: list[Predictions]  # one per decoder layer, empty without denoising
    denoising: DenoisingBatch | None


def prepend(first: Queries, second: Queries) -> Queries:
    """Both sets of queries as one, `first` (denoising queries) in front.

    Raises:
        ValueError: the others are no boxes: denoising is defined for boxes only
    """
    if second.position is not None or second.reference.shape[-1] != 4:
        raise ValueError("denoising needs queries made of boxes: train points without denoising")
    return Queries(
        torch.cat([first.content, second.content], 1),
        torch.cat([first.reference, second.reference], 1),
    )


def split_predictions(predictions: Predictions, index: int) -> tuple[Predictions, Predictions]:
    """The predictions of the first `index` queries and those of the others."""
    front = (x[:, :index] for x in predictions)
    back = (x[:, index:] for x in predictions)
    return Predictions(*front), Predictions(*back)


def stack_predictions(stages: list[Predictions]) -> Predictions:
    """N stages of (B, Q, .) as one of (N, B, Q, .), in float32 or wider whatever autocast chose."""
    logits, boxes = (torch.stack(parts) for parts in zip(*stages, strict=True))
    return Predictions(logits.to(torch.promote_types(logits.dtype, torch.float32)), boxes)


def send(x: Tensor, like: Tensor) -> Tensor:
    """`x` on the device of `like`, without waiting for that: CUDA copies from pinned memory alone
    while the program goes on."""
    if like.is_cuda and x.is_cpu:
        x = x.pin_memory()
    return x.to(like.device, non_blocking=True)


def join_targets(targets: list[Target]) -> Target:
    """Ground truth of a batch as that of one image, in the order that `Match` counts in."""
    return Target(*(torch.cat(parts) for parts in zip(*targets, strict=True)))
