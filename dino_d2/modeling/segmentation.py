"""Masks at the size of images, and maps of their pixels: semantic and panoptic segmentation.

At full resolution there are never more than `MASKS_AT_ONCE` maps, so that memory does not grow with
detections or queries.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MASKS_AT_ONCE = 16  # at full resolution


def sharpen(scores: Tensor, temperature: float | None) -> Tensor:
    """Scores (Q, K) as by a softmax with a temperature; None: as they are.

    Those of sigmoids, made for detection, are alike for many queries (Mask DINO's code).
    """
    return scores if temperature is None else (scores / temperature).softmax(-1)


def semantic_map(scores: Tensor, logits: Iterable[Tensor], size: tuple[int, int]) -> Tensor:
    """Scores (K, height, width) of every class at every pixel (MaskFormer, arXiv 2107.06278,
    section 3.4): over all queries, the sum of class score times mask probability.

    Args:
        scores: (Q, K)
        logits: maps (n, height, width) of all queries, some at a time
        size: height and width
    """
    total, start = scores.new_zeros(scores.shape[1], size[0] * size[1]), 0
    for maps in logits:
        part = scores[start : start + len(maps)]
        total.addmm_(part.T, maps.sigmoid_().flatten(1).to(total.dtype))
        start += len(maps)
    return total.unflatten(1, size)


def panoptic_map(
    scores: Tensor,
    labels: Tensor,
    logits: Iterable[Tensor],
    size: tuple[int, int],
    stuff: Collection[int],
    overlap: float,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """A map of segments, and what they are (MaskFormer, arXiv 2107.06278, section 3.4).

    Each pixel goes to the query with the highest score times mask probability, if that mask covers
    it. Queries that keep too small a part of their mask become no segment, and their pixels stay
    empty.

    Args:
        scores, labels: (n,), of the queries that may become segments
        logits: maps (m, height, width) of all of them, some at a time
        size: height and width
        stuff: classes whose segments are one
        overlap: least area won, relative to that of the mask

    Returns:
        ids (height, width) int32, 0 for none; and for each segment a dict of "id", "isthing" and
        "category_id"
    """
    best = scores.new_full(size, -1.0)
    owner = torch.zeros(size, dtype=torch.int64, device=scores.device)
    inside = torch.zeros(size, dtype=torch.bool, device=scores.device)
    areas, start = [labels[:0]], 0
    for maps in logits:
        maps = maps.sigmoid_().to(best.dtype)
        areas.append((maps >= 0.5).sum((1, 2)))
        weighted, index = (maps * scores[start : start + len(maps), None, None]).max(0)
        covers = maps.gather(0, index[None])[0] >= 0.5
        better = weighted > best
        best = torch.where(better, weighted, best)
        owner = torch.where(better, index + start, owner)
        inside = torch.where(better, covers, inside)
        start += len(maps)
    count = len(scores)
    won, kept = (
        x.flatten().bincount(minlength=count)[:count] for x in (owner, owner.where(inside, count))
    )
    table = torch.stack([labels, won, torch.cat(areas), kept]).tolist()
    ids, segments = _segments(zip(*table, strict=True), stuff, overlap)
    known = torch.tensor([*ids, 0], dtype=torch.int32, device=scores.device)
    return known[owner].where(inside, 0), segments


def _segments(
    queries: Iterable[Sequence[int]], stuff: Collection[int], overlap: float
) -> tuple[list[int], list[dict[str, Any]]]:
    """The id of each query's segment, 0 for none, and the segments.

    Args:
        queries: of each the label, its area won, that of its mask, and that of both
    """
    ids: list[int] = []
    segments: list[dict[str, Any]] = []
    of_stuff: dict[int, int] = {}
    for label, won, area, kept in queries:
        if not kept or won / area < overlap:
            ids.append(0)
        elif label in of_stuff:
            ids.append(of_stuff[label])
        else:
            ids.append(len(segments) + 1)
            is_stuff = label in stuff
            if is_stuff:
                of_stuff[label] = ids[-1]
            segments.append({"id": ids[-1], "isthing": not is_stuff, "category_id": label})
    return ids, segments


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
    for start in range(0, len(logits), MASKS_AT_ONCE):
        part = slice(start, start + MASKS_AT_ONCE)
        maps = resize_maps(logits[part], stride, image_size, size)
        masks[part] = inside = maps > 0
        total = (maps.sigmoid_() * inside).sum((1, 2))
        certainty[part] = total / inside.sum((1, 2)).clamp(min=1)
    return masks, certainty


def resize_maps(
    logits: Tensor, stride: int, image_size: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Maps of logits (n, height, width) in float32 or wider; arguments as of `resize_masks`."""
    padded = [stride * x for x in logits.shape[-2:]]
    maps = interpolate(logits.to(torch.promote_types(logits.dtype, torch.float32)), padded)
    return interpolate(maps[:, : image_size[0], : image_size[1]], size)


def in_parts(masks: Tensor) -> Sequence[Tensor]:
    """Embeddings (n, C), `MASKS_AT_ONCE` at a time."""
    return masks.split(MASKS_AT_ONCE) if len(masks) else ()


def interpolate(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, (n, h, w) to (n, height, width)."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps[None], tuple(size), mode="bilinear", align_corners=False)[0]
