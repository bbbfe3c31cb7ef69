"""COCO's AP from matches, and what each type of error costs in AP."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .matching import ERRORS, IOUS, OUTCOMES, ImageMatches, matches_at, outcomes_at

COSTS = (*ERRORS, "missed")
CORRECTED = ("classification", "localisation")  # by an oracle; it suppresses the other errors
RECALLS = np.linspace(0, 1, 101)
IOU_50, IOU_75 = 0, 5  # indices into `IOUS`


class Outcomes(NamedTuple):
    """The D detections in N images of K classes, in descending order of score, at I = 10 IoUs."""

    scores: np.ndarray  # (D,)
    labels: np.ndarray  # (D,) index of the class
    outcomes: np.ndarray  # (I, D) index into `matching.OUTCOMES`
    gains: np.ndarray  # (I, D) class of the box that it would find if it were corrected, or -1
    boxes: np.ndarray  # (K,) number of annotated boxes, without crowd regions
    missed: np.ndarray  # (I, K) number of boxes that are not found, and would not be if corrected


class Costs(NamedTuple):
    """What each of `COSTS` costs: AP if an oracle fixed that type alone, minus AP; in percent.

    As TIDE defines it (dAP of arXiv 2008.08115, sec. 2.3), the oracle

    - classification: corrects the class,
    - localisation: corrects the box,
    - both, duplicate, background: suppresses the detection,
    - missed: removes the boxes that are missed, and still would be after either correction.

    If several detections would match the same box once corrected, the highest score does, and the
    others are suppressed; all are if the box is matched already. Costs do not add up to 100 - AP.

    Differences from TIDE: AP is COCO's, a mean over ten IoUs, where TIDE reports IoU 0.5; the types
    are those of `matching.outcomes_at`; and a class without remaining boxes does not count, as in
    COCO.
    """

    mean: dict[str, float]  # over all classes; NaN without boxes
    classes: np.ndarray  # (len(COSTS), K); NaN for classes without boxes, before or after


def outcomes_of(images: Sequence[ImageMatches], category_ids: Sequence[int]) -> Outcomes:
    """Match all detections at COCO's ten IoUs.

    Args:
        images: in COCO's order, by id, which decides between equal scores of two images
        category_ids: of the K classes
    """
    places = {id: index for index, id in enumerate(category_ids)}
    boxes, missed = np.zeros(len(places), dtype=int), np.zeros((len(IOUS), len(places)), dtype=int)
    detections = [x for image in images for x in image.detections]
    scores = np.array([x["score"] for x in detections], dtype=float)
    labels = np.array([places[x["category_id"]] for x in detections], dtype=int)
    outcomes = np.zeros((len(IOUS), len(detections)), dtype=np.int8)
    gains = np.zeros(outcomes.shape, dtype=np.int32)
    start = 0
    for image in images:
        of_image = slice(start, start := start + len(image.detections))
        true = np.array([places[x["category_id"]] for x in image.truth], dtype=int)
        outcomes[:, of_image], corrected, lost = _outcomes_of_image(image)
        gains[:, of_image] = np.append(true, -1)[corrected]
        np.add.at(boxes, true[~image.crowd], 1)
        np.add.at(missed.T, true, lost.T)
    order = np.argsort(-scores, kind="stable")
    return Outcomes(
        scores[order], labels[order], outcomes[:, order], gains[:, order], boxes, missed
    )


def _outcomes_of_image(image: ImageMatches) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outcomes (I, D), the box that each detection would find or -1 (I, D), missed boxes (I, T)."""
    matches = matches_at(image, IOUS)
    outcomes = outcomes_at(image, matches, IOUS)
    corrected = np.full_like(matches, -1)
    taken = np.tile(image.crowd, (len(IOUS), 1))  # (I, T)
    levels, indices = np.nonzero(matches >= 0)
    taken[levels, matches[levels, indices]] = True
    missed = ~taken
    for kind in CORRECTED if image.truth else ():
        of_kind = image.same_class == (kind == "localisation")
        nearest = np.where(of_kind & ~image.crowd, image.iou, 0).argmax(axis=1)
        wrong = (outcomes == OUTCOMES.index(kind)) & ~taken[:, nearest]
        levels, indices = np.nonzero(wrong)  # in descending order of score
        boxes = nearest[indices]
        _, first = np.unique(levels * len(image.truth) + boxes, return_index=True)
        levels, indices, boxes = levels[first], indices[first], boxes[first]
        corrected[levels, indices] = boxes
        missed[levels, boxes] = False
    return outcomes, corrected, missed


def average_precisions(outcomes: Outcomes, fixed: str | None = None) -> np.ndarray:
    """(I, K) AP in percent, if an oracle `fixed` an error; NaN for classes without boxes.

    Args:
        outcomes: of all images
        fixed: one of `COSTS`, see `Costs`
    """
    boxes = np.broadcast_to(outcomes.boxes, outcomes.missed.shape)
    if fixed == "missed":
        boxes = boxes - outcomes.missed
    error = OUTCOMES.index(fixed) if fixed in ERRORS else -1
    of_class = [np.flatnonzero(outcomes.labels == k) for k in range(len(outcomes.boxes))]
    result = np.full(boxes.shape, np.nan)
    for level, (kinds, gains) in enumerate(zip(outcomes.outcomes, outcomes.gains, strict=True)):
        kept = (kinds != OUTCOMES.index("ignored")) & (kinds != error)
        gained = np.flatnonzero((kinds == error) & (gains >= 0))
        correct = kinds == OUTCOMES.index("correct")
        correct[gained] = True
        for k in np.flatnonzero(boxes[level]):
            own = of_class[k][kept[of_class[k]]]
            ranked = np.sort(np.append(own, gained[gains[gained] == k]))
            result[level, k] = 100 * average_precision(correct[ranked], boxes[level, k])
    return result


def average_precision(correct: np.ndarray, boxes: int) -> float:
    """COCO's AP of a class at an IoU: the mean of the precision at 101 recalls, from 0 to 1.

    >>> correct = np.array([True, False, True])
    >>> round(average_precision(correct, boxes=2), 4)  # (51 * 1 + 50 * 2 / 3) / 101
    0.835

    Args:
        correct: (D,) bool, of detections in descending order of score
        boxes: annotated ones, at least 1
    """
    ranks = np.flatnonzero(correct) + 1
    found = np.arange(1, len(ranks) + 1)
    precision = np.maximum.accumulate((found / ranks)[::-1])[::-1]  # the best at a higher recall
    reached = np.searchsorted(found / boxes, RECALLS)
    return float(np.append(precision, 0)[reached].mean())


def costs_of(outcomes: Outcomes) -> Costs:
    """What each type of error costs; takes seconds for a million detections."""
    before = average_precisions(outcomes)
    after = {kind: average_precisions(outcomes, kind) for kind in COSTS}
    gains = [ap.mean(axis=0) - before.mean(axis=0) for ap in after.values()]
    return Costs({kind: mean(ap) - mean(before) for kind, ap in after.items()}, np.stack(gains))


def box_scores(outcomes: Outcomes) -> dict[str, float]:
    """AP, AP50 and AP75 in percent, as COCO's evaluation has them; NaN without boxes."""
    ap = average_precisions(outcomes)
    return {"AP": mean(ap), "AP50": mean(ap[IOU_50]), "AP75": mean(ap[IOU_75])}


def mean(values: np.ndarray) -> float:
    """Of the values that are numbers; NaN if there is none."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else float("nan")
