"""Which detection belongs to which annotated box, and what is wrong with the others.

D detections and T annotated boxes of one image.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np
from pycocotools import mask

MIN_IOU = 0.5  # of a detection and the object that it finds
NEAR = 0.1  # IoU below which a detection has nothing to do with an object, as in TIDE

# What a detection can be; all but the first are false positives.
ERRORS = ("classification", "localisation", "both", "duplicate", "background")
KINDS = ("correct", *ERRORS)


class ImageMatches(NamedTuple):
    """The boxes of one image, and how they belong together.

    Attributes:
        image: its record in the file of annotations
        truth: T annotations, crowd regions among them
        detections: D results of COCO's format, the surest first
        iou: (D, T); with a crowd region, the share of the detection that is inside of it
        crowd: (T,) bool
        matches: (D,) the box of the same class that a detection finds, or -1; a crowd region, of
            which neither finding nor missing counts, can be found many times
    """

    image: dict
    truth: list[dict]
    detections: list[dict]
    iou: np.ndarray
    crowd: np.ndarray
    matches: np.ndarray

    @property
    def same_class(self) -> np.ndarray:
        """(D, T) bool"""
        detected, annotated = (
            np.array([x["category_id"] for x in boxes], dtype=int)
            for boxes in (self.detections, self.truth)
        )
        return np.equal.outer(detected, annotated)

    @property
    def ignored(self) -> np.ndarray:
        """(D,) bool: on a crowd region, so neither right nor wrong."""
        return np.append(self.crowd, False)[self.matches]

    @property
    def missed(self) -> np.ndarray:
        """(T,) bool: no detection of the class finds it."""
        missed = ~self.crowd
        missed[self.matches[self.matches >= 0]] = False
        return missed

    def above(self, threshold: float) -> "ImageMatches":
        """Of the detections of at least a score; others would not have changed their matches."""
        count = sum(x["score"] >= threshold for x in self.detections)
        return self._replace(
            detections=self.detections[:count], iou=self.iou[:count], matches=self.matches[:count]
        )


def match_image(
    image: dict, truth: list[dict], detections: list[dict], max_detections: int
) -> ImageMatches:
    """As COCO's evaluation does at IoU 0.5, over all sizes: the surest detection first, each takes
    the free box of its class that it overlaps most.

    Args:
        image: record in the file of annotations
        truth: all annotations of the image, with bbox (x, y, width, height) in pixels
        detections: all results of the image, with bbox and score, in any order
        max_detections: of a class, the surest ones; the evaluation leaves out the others, too
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
    """By falling score, at most `count` of a class."""
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
        iou: (D, T), 0 where two must not be matched
        crowd: (T,) bool, boxes that are never used up and come after all others
    """
    matches = np.full(len(iou), -1)
    free = ~crowd
    for index in np.flatnonzero((iou >= MIN_IOU).any(axis=1)):
        for candidates in (free, crowd):
            overlaps = np.where(candidates, iou[index], 0)
            best = len(overlaps) - 1 - overlaps[::-1].argmax()  # the last of equal ones, as COCO
            if overlaps[best] >= MIN_IOU:
                matches[index], free[best] = best, False
                break
    return matches


def confusions(matching: ImageMatches) -> np.ndarray:
    """(D,) the box of another class, found by no other detection, that a detection is on, or -1.

    Only what is left over by `match_image` takes part, so what is right stays right.
    """
    left = np.outer(matching.matches < 0, matching.missed)
    return assign_boxes(np.where(left, matching.iou, 0), np.zeros_like(matching.crowd))


def detection_kinds(matching: ImageMatches) -> list[str]:
    """What each detection is: one of `KINDS`, or "ignored" on a crowd region.

    The errors are those of TIDE (arXiv 2008.08115, sec. 2.2): on an object of another class
    (classification), beside one of its class (localisation) or of another (both), on one of its
    class that a surer one finds (duplicate), or near none (background). Where several are true,
    here the greater overlap decides, and at equal ones the class.
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
    """The detections that are some kind of error."""
    pairs = zip(matching.detections, detection_kinds(matching), strict=True)
    return [detection for detection, kind in pairs if kind in ERRORS]
