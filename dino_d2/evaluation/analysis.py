"""Where a detector goes wrong, in numbers.

AP, AR and the curves are those of COCO's evaluation; what is confused with what, and the kinds of
errors, are those of the detections above a score threshold.
"""

import contextlib
import io
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
from detectron2.evaluation.coco_evaluation import COCOeval_opt
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .matching import ImageMatches, confusions, detection_kinds, false_positives, match_image

THRESHOLD = 0.5  # least score of a detection, as in demo.py
SIZES = ("all", "small", "medium", "large")  # COCO's, in the order of its evaluation
IOU_50, IOU_75 = 0, 5  # places of the IoU thresholds 0.50, 0.55 ... 0.95


class ClassScores(NamedTuple):
    """A class: AP and AR in percent; NaN where it has no box (of a size).

    `best_threshold` is the score from which on its detections have the greatest F1, and
    `precision`, `recall` and `F1` (in percent) are those at IoU 0.5 there.
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
    """The mean over the classes of boxes of a size, in percent; areas in square pixels."""

    size: str
    min_area: float
    max_area: float
    boxes: int
    AP: float
    AP50: float
    AP75: float
    AR: float


class ErrorCounts(NamedTuple):
    """Detections of a class above the threshold by kind, see `matching.detection_kinds`, and how
    many of its boxes no detection of the class finds."""

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
    """K classes in the order of their ids, R = 101 recalls from 0 to 1, I = 10 IoUs."""

    classes: list[ClassScores]
    sizes: list[SizeScores]
    precision: np.ndarray  # (I, R, K) in [0, 1], NaN for classes without boxes
    scores: np.ndarray  # (I, R, K) score at which a recall is reached, 0 where it is not
    errors: list[ErrorCounts]
    confusion: np.ndarray  # (K + 1, K + 1) counts: true class by detected one, background last
    threshold: float
    images: list[ImageMatches]  # all detections


def evaluate_boxes(dataset: dict[str, list], results: list[dict]) -> COCOeval:
    """COCO's evaluation of boxes, by Detectron2's fast code where that is compiled, and without
    what it prints.

    Args:
        dataset: content of a file of COCO annotations that `data.check` accepts as a test set
        results: as `data.read_results` returns them; there may be none
    """
    truth, detections = COCO(), COCO()
    truth.dataset = dataset | {"annotations": [dict(x) for x in dataset["annotations"]]}
    results = [
        # COCO takes id 0 for no detection
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


def analyse(evaluation: COCOeval, threshold: float = THRESHOLD) -> Analysis:
    """
    Args:
        evaluation: of boxes, accumulated; Detectron2's fast one, too
        threshold: least score of detections in the confusion matrix and the kinds of errors
    """
    truth, detections = evaluation.cocoGt, evaluation.cocoDt
    limit = evaluation.params.maxDets[-1]
    images = [
        match_image(record, truth.imgToAnns.get(id, []), detections.imgToAnns.get(id, []), limit)
        for id, record in sorted(truth.imgs.items())
    ]
    shown = [image.above(threshold) for image in images]
    categories = truth.loadCats(evaluation.params.catIds)
    precision = np.where(evaluation.eval["precision"] < 0, np.nan, evaluation.eval["precision"])
    return Analysis(
        classes=class_scores(evaluation, categories, images),
        sizes=size_scores(evaluation),
        precision=precision[..., 0, -1],
        scores=evaluation.eval["scores"][..., 0, -1],
        errors=error_counts(shown, categories),
        confusion=confusion_matrix(shown, [x["id"] for x in categories]),
        threshold=threshold,
        images=images,
    )


def class_scores(
    evaluation: COCOeval, categories: list[dict], images: list[ImageMatches]
) -> list[ClassScores]:
    precision, recall = (
        100 * np.where(evaluation.eval[key] < 0, np.nan, evaluation.eval[key])[..., -1]
        for key in ("precision", "recall")
    )
    # A class has boxes of a size or has none, at every IoU and recall: plain means do.
    ap, ar = precision.mean(axis=(0, 1)), recall.mean(axis=0)[:, 0]
    ap50, ap75 = precision[[IOU_50, IOU_75]].mean(axis=1)
    outcomes = defaultdict(list)
    for image in images:
        for detection, found, ignored in zip(
            image.detections, image.matches >= 0, image.ignored, strict=True
        ):
            if not ignored:
                outcomes[detection["category_id"]].append((detection["score"], found))
    boxes = Counter(x["category_id"] for image in images for x in _objects(image))
    return [
        ClassScores(
            *(category["id"], category["name"], boxes[category["id"]]),
            *(ap[k, 0], ap50[k, 0], ap75[k, 0], ap[k, 1], ap[k, 2], ap[k, 3], ar[k]),
            *best_threshold(outcomes[category["id"]], boxes[category["id"]]),
        )
        for k, category in enumerate(categories)
    ]


def _objects(image: ImageMatches) -> list[dict]:
    """Annotations that are to be found."""
    return [x for x, crowd in zip(image.truth, image.crowd, strict=True) if not crowd]


def best_threshold(
    outcomes: list[tuple[float, bool]], boxes: int
) -> tuple[float, float, float, float]:
    """The score with the greatest F1 and, in percent, precision, recall and F1 from there on.

    Args:
        outcomes: score of each detection of a class, and whether it finds a box
        boxes: how many there are to be found; NaN is returned if none are, or none is found
    """
    if not boxes or not any(found for _, found in outcomes):
        return (np.nan,) * 4
    scores, found = (np.array(x) for x in zip(*sorted(outcomes, reverse=True), strict=True))
    correct, count = found.cumsum(), np.arange(1, len(found) + 1)
    f1 = 2 * correct / (count + boxes)
    last_of_its_score = np.append(scores[1:] != scores[:-1], True)
    best = np.where(last_of_its_score, f1, 0).argmax()
    shares = correct[best] / count[best], correct[best] / boxes, f1[best]
    return scores[best], *(100 * x for x in shares)


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
    """In percent, of what is there: COCO writes -1 where there are no boxes."""
    there = values[values > -1]
    return 100 * there.mean() if there.size else np.nan


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
    """(K + 1, K + 1) counts, true class by detected class; the last of either is the background.

    Detections find boxes of their class first, as in COCO's evaluation; what is left over is
    matched whatever its class is, at IoU 0.5 as well. So a row has all boxes of a class, a column
    all its detections but those on crowd regions.
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
    """Images by falling badness, with their detections above the threshold.

    The badness is the number of missed boxes and the sum of the scores of false positives: the
    surer a mistake, the worse.
    """
    rated = []
    for image in (x.above(analysis.threshold) for x in analysis.images):
        mistakes = sum(x["score"] for x in false_positives(image))
        rated.append((mistakes + int(image.missed.sum()), image))
    return sorted(rated, key=lambda pair: -pair[0])
