"""Matches the D detections and T annotated boxes of an image, and classifies errors."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from pycocotools import mask
from torchvision.ops import batched_nms

IOUS = np.linspace(0.5, 0.95, 10)  # COCO's, between a detection and the object that it finds
MIN_IOU = 0.5  # the first of them, at which errors are counted
NEAR = 0.1  # IoU below which a detection is unrelated to an object, as in TIDE

# What a detection can be; all but the first are false positives.
ERRORS = ("classification", "localisation", "both", "duplicate", "background")
KINDS = ("correct", *ERRORS)
OUTCOMES = ("ignored", *KINDS)  # ignored: on a crowd region


class ImageMatches(NamedTuple):
    """The boxes of one image and their matches."""

    image: dict  # its record in the annotations
    truth: list[dict]  # T annotations, including crowd regions
    detections: list[dict]  # D results in COCO's format, in descending order of score
    iou: np.ndarray  # (D, T); for a crowd region, the share of the detection inside
    crowd: np.ndarray  # (T,) bool: evaluation ignores crowd regions and detections on them
    matches: np.ndarray  # (D,) index of the box that a detection finds, or -1

    @property
    def same_class(self) -> np.ndarray:
        """Whether detection and annotation have the same class, (D, T) bool."""
        detected, annotated = (
            np.array([x["category_id"] for x in boxes], dtype=int)
            for boxes in (self.detections, self.truth)
        )
        return np.equal.outer(detected, annotated)

    @property
    def ignored(self) -> np.ndarray:
        """Matched to a crowd region, so neither right nor wrong, (D,) bool."""
        return np.append(self.crowd, False)[self.matches]

    @property
    def missed(self) -> np.ndarray:
        """No detection of the class finds it, (T,) bool."""
        missed = ~self.crowd
        missed[self.matches[self.matches >= 0]] = False
        return missed

    def above(
        self, threshold: float, of_class: Mapping[int, float] | None = None
    ) -> "ImageMatches":
        """Keep the detections of at least a score; the others do not affect their matches.

        Args:
            threshold: the lowest score
            of_class: other ones of some classes, by category id
        """
        limits = of_class or {}
        least = [limits.get(x["category_id"], threshold) for x in self.detections]
        pairs = enumerate(zip(self.detections, least, strict=True))
        kept = np.array([index for index, (x, score) in pairs if x["score"] >= score], dtype=int)
        detections = [self.detections[index] for index in kept]
        return self._replace(detections=detections, iou=self.iou[kept], matches=self.matches[kept])


def match_image(
    image: dict,
    truth: list[dict],
    detections: list[dict],
    max_detections: int,
    shape: str = "bbox",
) -> ImageMatches:
    """Match boxes of the same class as COCO's evaluation does at IoU 0.5.

    In descending order of score, each detection takes the free box that it overlaps most.

    Args:
        image: its record in the annotations
        truth: annotations of the image, with bbox (x, y, width, height) in pixels
        detections: results in the image, with bbox and score, in any order
        max_detections: per class, those of the highest scores; evaluation drops the others, too
        shape: what is compared, "bbox" or "segmentation"; masks of both sides are in RLE
    """
    detections = highest_scoring(detections, max_detections)
    crowd = np.array([bool(x.get("iscrowd")) for x in truth], dtype=bool)
    iou = np.zeros((len(detections), len(truth)))
    if iou.size:
        shapes = ([x[shape] for x in some] for some in (detections, truth))
        iou = mask.iou(*shapes, crowd.astype(int).tolist())
    unmatched = np.full(len(detections), -1)
    matching = ImageMatches(image, truth, detections, iou, crowd, unmatched)
    return matching._replace(matches=matches_at(matching, [MIN_IOU])[0])


def matches_at(matching: ImageMatches, ious: Sequence[float] | np.ndarray) -> np.ndarray:
    """(I, D) index of the box that each detection matches at each of I IoU thresholds, or -1."""
    return assign_boxes(np.where(matching.same_class, matching.iou, 0), matching.crowd, ious)


def highest_scoring(detections: list[dict], count: int) -> list[dict]:
    """At most `count` detections per class, in descending order of score."""
    seen: Counter[int] = Counter()
    kept = []
    for detection in sorted(detections, key=lambda x: -x["score"]):
        seen[detection["category_id"]] += 1
        if seen[detection["category_id"]] <= count:
            kept.append(detection)
    return kept


def assign_boxes(
    iou: np.ndarray, crowd: np.ndarray, ious: Sequence[float] | np.ndarray
) -> np.ndarray:
    """(I, D) index of the box that each detection takes at each of I IoU thresholds, or -1.

    Args:
        iou: (D, T), 0 for pairs that must not be matched
        crowd: (T,) bool, boxes that many detections can take if no other is free
        ious: the IoU thresholds, above 0
    """
    least = np.asarray(ious)[:, None]
    levels, last = np.arange(len(least)), iou.shape[1] - 1
    matches = np.full((len(least), len(iou)), -1)
    free = np.ones((len(least), iou.shape[1]), dtype=bool)
    preference = np.where(crowd, iou - 2, iou)  # any other box before a crowd region
    for index in np.flatnonzero((iou >= least.min()).any(axis=1)):
        options = np.where(free & (iou[index] >= least), preference[index], -np.inf)
        best = last - options[:, ::-1].argmax(axis=1)  # the last of equals, as in COCO
        taken = np.isfinite(options[levels, best])
        matches[taken, index] = best[taken]
        free[taken, best[taken]] = crowd[best[taken]]
    return matches


def confusions(matching: ImageMatches) -> np.ndarray:
    """(D,) index of the box of another class that an unmatched detection overlaps, or -1.

    Only detections and boxes that `match_image` left unmatched take part.
    """
    left = np.outer(matching.matches < 0, matching.missed)
    nowhere = np.zeros_like(matching.crowd)
    return assign_boxes(np.where(left, matching.iou, 0), nowhere, [MIN_IOU])[0]


def detection_kinds(matching: ImageMatches) -> list[str]:
    """The kind of each detection at IoU 0.5: one of `OUTCOMES`, see `outcomes_at`."""
    (outcomes,) = outcomes_at(matching, matching.matches[None], [MIN_IOU])
    return [OUTCOMES[index] for index in outcomes]


def outcomes_at(
    matching: ImageMatches, matches: np.ndarray, ious: Sequence[float] | np.ndarray
) -> np.ndarray:
    """(I, D) index into `OUTCOMES`: what each detection is at each of I IoU thresholds.

    The errors are those of TIDE (arXiv 2008.08115, sec. 2.2): on an object of another class
    (classification), next to one of its class (localisation) or of another (both), on one that a
    detection of a higher score finds (duplicate), or near none (background). If several apply, the
    object of the larger IoU counts, and of equal ones that of the same class.

    Args:
        matching: of an image
        matches: (I, D), of `matches_at`
        ious: the IoU thresholds
    """
    least = np.asarray(ious)[:, None]
    iou = np.where(matching.crowd, 0, matching.iou)
    same = np.where(matching.same_class, iou, 0).max(axis=1, initial=0)
    other = np.where(matching.same_class, 0, iou).max(axis=1, initial=0)
    cases = {
        "ignored": np.append(matching.crowd, False)[matches],
        "correct": matches >= 0,
        "duplicate": (same >= least) & (same >= other),
        "classification": other >= least,
        "localisation": np.broadcast_to((same >= NEAR) & (same >= other), matches.shape),
        "both": np.broadcast_to(other >= NEAR, matches.shape),
    }
    indices = [np.int8(OUTCOMES.index(case)) for case in cases]
    return np.select(list(cases.values()), indices, np.int8(OUTCOMES.index("background")))


def false_positives(matching: ImageMatches) -> list[dict]:
    """The detections that are errors of any kind."""
    pairs = zip(matching.detections, detection_kinds(matching), strict=True)
    return [detection for detection, kind in pairs if kind in ERRORS]


def without_duplicates(results: list[dict], iou: float) -> list[dict]:
    """What class-wise non-maximum suppression leaves of the detections of each image.

    Args:
        results: in COCO's format
        iou: above which a detection is suppressed by one of its class with a higher score
    """
    of_image = defaultdict(list)
    for result in results:
        of_image[result["image_id"]].append(result)
    kept = []
    for found in of_image.values():
        boxes = torch.tensor([x["bbox"] for x in found], dtype=torch.float64)
        boxes[:, 2:] += boxes[:, :2]
        scores = torch.tensor([x["score"] for x in found], dtype=torch.float64)
        classes = torch.tensor([x["category_id"] for x in found])
        kept += [found[index] for index in batched_nms(boxes, scores, classes, iou).tolist()]
    return kept
