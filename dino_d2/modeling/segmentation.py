"""Maps of the pixels of an image, made of masks: semantic and panoptic segmentation."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


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
    it. Queries that keep too small a part of their mask do not become segments, and their pixels
    stay empty.

    Args:
        scores, labels: (n,), of the queries that may become segments
        logits: maps (m, height, width) of all of them, some at a time
        size: height and width
        stuff: classes whose segments are one
        overlap: minimal area won, relative to that of the mask

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
