"""Error analysis of a detector, in numbers.

AP, AR and curves come from COCO's evaluation; confusions and types of errors count detections above
a score threshold; the cost of each type in AP is over all detections.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.evaluation.coco_evaluation import COCOeval_opt
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .costs import IOU_50, IOU_75, Costs, Outcomes, costs_of, outcomes_of
from .matching import (
    OUTCOMES,
    ImageMatches,
    confusions,
    detection_kinds,
    false_positives,
    match_image,
)

THRESHOLD = 0.5  # lowest score of a detection, as in demo.py
SIZES = ("all", "small", "medium", "large")  # COCO's, in the order of its evaluation


class BestThreshold(NamedTuple):
    """The score threshold with the highest F1 at IoU 0.5, and precision, recall and F1 in percent.

    NaN if no box is annotated or found.
    """

    threshold: float
    precision: float
    recall: float
    F1: float


class ClassScores(NamedTuple):
    """AP and AR of a class in percent; NaN if it has no box (of a size).

    `best_threshold`, `precision`, `recall` and `F1` are a `BestThreshold`.
    """

    category_id: int
    name: str
    boxes: int  # annotated, without crowd regions
    AP: float
    AP50: float
    AP75: float
    APs: float
    APm: float
    APl: float
    AR: float
    best_threshold: float
    precision: float
    recall: float
    F1: float


class SizeScores(NamedTuple):
    """Means over the classes for boxes of a size, in percent; areas in square pixels."""

    size: str
    min_area: float
    max_area: float
    boxes: int
    AP: float
    AP50: float
    AP75: float
    AR: float


class ErrorCounts(NamedTuple):
    """Detections of a class by `matching.detection_kinds`, and the number of its missed boxes."""

    category_id: int
    name: str
    correct: int
    classification: int
    localisation: int
    both: int
    duplicate: int
    background: int
    missed: int


class Analysis(NamedTuple):
    """An analysis of K classes, sorted by id, at R = 101 recalls from 0 to 1 and I = 10 IoUs."""

    classes: list[ClassScores]
    sizes: list[SizeScores]
    precision: np.ndarray  # (I, R, K) in [0, 1], NaN for classes without boxes
    scores: np.ndarray  # (I, R, K) score that reaches a recall, 0 if none does
    errors: list[ErrorCounts]
    confusion: np.ndarray  # (K + 1, K + 1) counts: true class by detected one, background last
    threshold: float  # lowest score in `errors` and `confusion`, and of what is drawn
    of_class: dict[int, float]  # those of classes that have one of their own, by category id
    images: list[ImageMatches]  # all detections
    costs: Costs  # of all detections
    overall: BestThreshold  # of the detections of all classes
    shape: str = "box"  # or "mask", whose IoU decides

    @property
    def limit(self) -> str:
        """In words, which detections are counted and drawn."""
        return f"score ≥ {'that of best F1' if self.of_class else f'{self.threshold:g}'}"

    @property
    def shown(self) -> list[ImageMatches]:
        """The images with the detections that are counted and drawn."""
        return [image.above(self.threshold, self.of_class) for image in self.images]


def evaluate_boxes(dataset: dict[str, list], results: list[dict]) -> COCOeval:
    """Run COCO's evaluation of boxes without printing, by Detectron2's fast code if available.

    Args:
        dataset: COCO annotations that `data.check` accepts as a test set
        results: as `data.read_results` returns them; may be empty
    """
    truth, detections = COCO(), COCO()
    truth.dataset = dataset | {"annotations": [dict(x) for x in dataset["annotations"]]}
    results = [
        # COCO ignores id 0
        dict(x, id=number, area=x["bbox"][2] * x["bbox"][3], iscrowd=0)
        for number, x in enumerate(results, start=1)
    ]
    detections.dataset = dataset | {"annotations": results}
    with contextlib.redirect_stdout(io.StringIO()):
        for api in (truth, detections):
            api.createIndex()
        evaluation = COCOeval_opt(truth, detections, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def analyse(evaluation: COCOeval, threshold: float | None = THRESHOLD) -> Analysis:
    """Compute all tables of the error analysis.

    Args:
        evaluation: of boxes or of masks, accumulated, COCO's or Detectron2's
        threshold: lowest score of detections in the confusion matrix and the types of errors; None:
            the best of each class, see `ClassScores`, for a class without one that of all classes,
            and 0.5 if nothing is found at all
    """
    categories = evaluation.cocoGt.loadCats(evaluation.params.catIds)
    ids = [x["id"] for x in categories]
    has_masks = evaluation.params.iouType == "segm"  # in RLE, as COCO's evaluation leaves them
    images = match_images(
        evaluation.cocoGt,
        evaluation.cocoDt.imgToAnns,
        evaluation.params.maxDets[-1],
        "segmentation" if has_masks else "bbox",
    )
    outcomes = outcomes_of(images, ids)
    classes, overall = class_scores(evaluation, categories, outcomes), pooled_threshold(outcomes)
    of_class = {}
    if threshold is None:
        threshold = THRESHOLD if np.isnan(overall.threshold) else overall.threshold
        own = {x.category_id: x.best_threshold for x in classes}
        of_class = {id: value for id, value in own.items() if not np.isnan(value)}
    precision = np.where(evaluation.eval["precision"] < 0, np.nan, evaluation.eval["precision"])
    shown = [image.above(threshold, of_class) for image in images]
    return Analysis(
        classes=classes,
        sizes=size_scores(evaluation),
        precision=precision[..., 0, -1],
        scores=evaluation.eval["scores"][..., 0, -1],
        errors=error_counts(shown, categories),
        confusion=confusion_matrix(shown, ids),
        threshold=threshold,
        of_class=of_class,
        images=images,
        costs=costs_of(outcomes),
        overall=overall,
        shape="mask" if has_masks else "box",
    )


def match_images(
    truth: COCO,
    results: Mapping[int | str, list[dict]],
    max_detections: int,
    shape: str = "bbox",
) -> list[ImageMatches]:
    """Match the boxes of all images, in the order of their ids.

    Args:
        truth: the annotations
        results: in COCO's format, by the id of their image
        max_detections: per image and class
        shape: as of `match_image`
    """
    return [
        match_image(record, truth.imgToAnns.get(id, []), results.get(id, []), max_detections, shape)
        for id, record in sorted(truth.imgs.items())
    ]


def thresholds(analysis: Analysis) -> dict[str, Any]:
    """The score thresholds with the highest F1 at IoU 0.5, for use in inference.

    Returns:
        under "all" that of the detections of all classes together, None if nothing is found; under
        "classes" those of single classes by name, without classes that have none
    """
    own = {x.name: x.best_threshold for x in analysis.classes}
    return {
        "all": None if np.isnan(analysis.overall.threshold) else analysis.overall.threshold,
        "classes": {name: value for name, value in own.items() if not np.isnan(value)},
    }


def class_scores(
    evaluation: COCOeval, categories: list[dict], outcomes: Outcomes
) -> list[ClassScores]:
    precision, recall = (
        100 * np.where(evaluation.eval[key] < 0, np.nan, evaluation.eval[key])[..., -1]
        for key in ("precision", "recall")
    )
    # A class without boxes of a size is NaN at every IoU and recall, so plain means are right.
    ap, ar = precision.mean(axis=(0, 1)), recall.mean(axis=0)[:, 0]
    ap50, ap75 = precision[[IOU_50, IOU_75]].mean(axis=1)
    return [
        ClassScores(
            *(category["id"], category["name"], int(outcomes.boxes[k])),
            *(ap[k, 0], ap50[k, 0], ap75[k, 0], ap[k, 1], ap[k, 2], ap[k, 3], ar[k]),
            *pooled_threshold(outcomes, [k]),
        )
        for k, category in enumerate(categories)
    ]


def pooled_threshold(outcomes: Outcomes, classes: Sequence[int] | None = None) -> BestThreshold:
    """The best threshold for the detections of some classes together, by index; None: of all."""
    chosen = np.arange(len(outcomes.boxes)) if classes is None else np.array(classes)
    at_50 = outcomes.outcomes[IOU_50]
    counted = np.isin(outcomes.labels, chosen) & (at_50 != OUTCOMES.index("ignored"))
    found = at_50[counted] == OUTCOMES.index("correct")
    pairs = np.column_stack([outcomes.scores[counted], found])
    return best_threshold(pairs, outcomes.boxes[chosen].sum())


def best_threshold(
    outcomes: np.ndarray | Sequence[tuple[float, bool]], boxes: int
) -> BestThreshold:
    """The score threshold with the highest F1.

    Args:
        outcomes: (D, 2), score of each detection, and whether it finds a box
        boxes: number of annotated boxes
    """
    scores, found = np.array(outcomes, dtype=float).reshape(-1, 2).T
    if not boxes or not found.any():
        return BestThreshold(*(np.nan,) * 4)
    order = np.argsort(-scores)
    scores, correct, count = scores[order], found[order].cumsum(), np.arange(1, len(found) + 1)
    f1 = 2 * correct / (count + boxes)
    last_of_its_score = np.append(scores[1:] != scores[:-1], True)
    best = np.where(last_of_its_score, f1, 0).argmax()
    shares = correct[best] / count[best], correct[best] / boxes, f1[best]
    return BestThreshold(float(scores[best]), *(float(100 * x) for x in shares))


def size_scores(evaluation: COCOeval) -> list[SizeScores]:
    params, scores = evaluation.params, evaluation.eval
    areas = [x["area"] for x in evaluation.cocoGt.anns.values() if not x["iscrowd"]]
    return [
        SizeScores(
            *(size, low, high, sum(low <= area <= high for area in areas)),
            _mean(scores["precision"][:, :, :, index, -1]),
            _mean(scores["precision"][IOU_50, :, :, index, -1]),
            _mean(scores["precision"][IOU_75, :, :, index, -1]),
            _mean(scores["recall"][:, :, index, -1]),
        )
        for index, (size, (low, high)) in enumerate(zip(SIZES, params.areaRng, strict=True))
    ]


def _mean(values: np.ndarray) -> float:
    """The mean in percent, without COCO's -1 for classes without boxes."""
    valid = values[values > -1]
    return 100 * valid.mean() if valid.size else np.nan


def error_counts(images: list[ImageMatches], categories: list[dict]) -> list[ErrorCounts]:
    counts: dict[int, Counter[str]] = {category["id"]: Counter() for category in categories}
    for image in images:
        for detection, kind in zip(image.detections, detection_kinds(image), strict=True):
            counts[detection["category_id"]][kind] += 1
        for annotation, missed in zip(image.truth, image.missed, strict=True):
            counts[annotation["category_id"]]["missed"] += int(missed)
    return [
        ErrorCounts(id, category["name"], *(counts[id][kind] for kind in ErrorCounts._fields[2:]))
        for id, category in zip(counts, categories, strict=True)
    ]


def confusion_matrix(images: list[ImageMatches], category_ids: list[int]) -> np.ndarray:
    """(K + 1, K + 1) counts, true class by detected class; the last row and column are background.

    Detections first match boxes of their class, as in COCO's evaluation; the rest are matched at
    IoU 0.5 regardless of class. So a row has all boxes of a class, and a column all its detections
    except those on crowd regions.
    """
    places = {id: index for index, id in enumerate(category_ids)}
    background = len(places)
    counts = np.zeros((background + 1, background + 1), dtype=int)
    for image in images:
        matches = np.maximum(image.matches, confusions(image))
        for detection, index, ignored in zip(image.detections, matches, image.ignored, strict=True):
            true = places[image.truth[index]["category_id"]] if index >= 0 else background
            counts[true, places[detection["category_id"]]] += not ignored
        lost = set(np.flatnonzero(~image.crowd)) - set(matches)
        for index in lost:
            counts[places[image.truth[index]["category_id"]], background] += 1
    return counts


def worst_first(analysis: Analysis) -> list[tuple[float, ImageMatches]]:
    """Images with the detections that are drawn, in descending order of badness.

    The badness is the number of missed boxes plus the scores of false positives.
    """
    rated = []
    for image in analysis.shown:
        mistakes = sum(x["score"] for x in false_positives(image))
        rated.append((mistakes + int(image.missed.sum()), image))
    return sorted(rated, key=lambda pair: -pair[0])
