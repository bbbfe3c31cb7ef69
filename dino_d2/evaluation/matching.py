"""Matches the D detections and T annotated boxes of an image, and classifies errors."""

from collections import Counter
from typing import NamedTuple

import numpy as np
from pycocotools import mask

MIN_IOU = 0.5  # between a detection and the object that it finds
NEAR = 0.1  # IoU below which a detection is unrelated to an object, as in TIDE

# What a detection can be; all but the first are false positives.
ERRORS = ("classification", "localisation", "both", "duplicate", "background")
KINDS = ("correct", *ERRORS)


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
        """(D, T) bool: whether detection and annotation have the same class."""
        detected, annotated = (
            np.array([x["category_id"] for x in boxes], dtype=int)
            for boxes in (self.detections, self.truth)
        )
        return np.equal.outer(detected, annotated)

    @property
    def ignored(self) -> np.ndarray:
        """(D,) bool: matched to a crowd region, so neither right nor wrong."""
        return np.append(self.crowd, False)[self.matches]

    @property
    def missed(self) -> np.ndarray:
        """(T,) bool: no detection of the class finds it."""
        missed = ~self.crowd
        missed[self.matches[self.matches >= 0]] = False
        return missed

    def above(self, threshold: float) -> "ImageMatches":
        """Keep the detections of at least a score; the others do not affect their matches."""
        count = sum(x["score"] >= threshold for x in self.detections)
        return self._replace(
            detections=self.detections[:count], iou=self.iou[:count], matches=self.matches[:count]
        )


def match_image(
    image: dict, truth: list[dict], detections: list[dict], max_detections: int
) -> ImageMatches:
    """Match boxes of the same class as COCO's evaluation does at IoU 0.5.

    In descending order of score, each detection takes the free box that it overlaps most.

    Args:
        image: its record in the annotations
        truth: annotations of the image, with bbox (x, y, width, height) in pixels
        detections: results in the image, with bbox and score, in any order
        max_detections: per class, those of the highest scores; evaluation drops the others, too
    """
    detections = highest_scoring(detections, max_detections)
    crowd = np.array([bool(x.get("iscrowd")) for x in truth], dtype=bool)
    iou = np.zeros((len(detections), len(truth)))
    if iou.size:
        boxes = ([x["bbox"] for x in some] for some in (detections, truth))
        iou = mask.iou(*boxes, crowd.astype(int).tolist())
    unmatched = np.full(len(detections), -1)
    matching = ImageMatches(image, truth, detections, iou, crowd, unmatched)
    matches = assign_boxes(np.where(matching.same_class, iou, 0), crowd)
    return matching._replace(matches=matches)


def highest_scoring(detections: list[dict], count: int) -> list[dict]:
    """At most `count` detections per class, in descending order of score."""
    seen: Counter[int] = Counter()
    kept = []
    for detection in sorted(detections, key=lambda x: -x["score"]):
        seen[detection["category_id"]] += 1
        if seen[detection["category_id"]] <= count:
            kept.append(detection)
    return kept


def assign_boxes(iou: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(D,) index of the box that each detection takes, or -1.

    Args:
        iou: (D, T), 0 for pairs that must not be matched
        crowd: (T,) bool, boxes that many detections can take if no other is free
    """
    matches = np.full(len(iou), -1)
    free = ~crowd
    for index in np.flatnonzero((iou >= MIN_IOU).any(axis=1)):
        for candidates in (free, crowd):
            overlaps = np.where(candidates, iou[index], 0)
            best = len(overlaps) - 1 - overlaps[::-1].argmax()  # the last of equals, as in COCO
            if overlaps[best] >= MIN_IOU:
                matches[index], free[best] = best, False
                break
    return matches


def confusions(matching: ImageMatches) -> np.ndarray:
    """(D,) index of the box of another class that an unmatched detection overlaps, or -1.

    Only detections and boxes that `match_image` left unmatched take part.
    """
    left = np.outer(matching.matches < 0, matching.missed)
    return assign_boxes(np.where(left, matching.iou, 0), np.zeros_like(matching.crowd))


def detection_kinds(matching: ImageMatches) -> list[str]:
    """The kind of each detection: one of `KINDS`, or "ignored" on a crowd region.

    The errors are those of TIDE (arXiv 2008.08115, sec. 2.2): on an object of another class
    (classification), next to one of its class (localisation) or of another (both), on one that a
    detection of a higher score finds (duplicate), or near none (background). If several apply, the
    object of the larger IoU counts, and of equal ones that of the same class.
    """
    iou = np.where(matching.crowd, 0, matching.iou)
    same = np.where(matching.same_class, iou, 0).max(axis=1, initial=0)
    other = np.where(matching.same_class, 0, iou).max(axis=1, initial=0)
    cases = {
        "ignored": matching.ignored,
        "correct": matching.matches >= 0,
        "duplicate": (same >= MIN_IOU) & (same >= other),
        "classification": other >= MIN_IOU,
        "localisation": (same >= NEAR) & (same >= other),
        "both": other >= NEAR,
    }
    return np.select(list(cases.values()), list(cases), default="background").tolist()


def false_positives(matching: ImageMatches) -> list[dict]:
    """The detections that are errors of any kind."""
    pairs = zip(matching.detections, detection_kinds(matching), strict=True)
    return [detection for detection, kind in pairs if kind in ERRORS]
