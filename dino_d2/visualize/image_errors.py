"""Draws true positives, false positives and missed boxes into an image."""

import numpy as np
from PIL import Image

from ..data.masks import decode_mask
from ..evaluation.matching import ERRORS, ImageMatches, detection_kinds
from .marks import MARGIN, Mark, draw_marks, resize_long_side
from .style import GREY, SKY, VERMILION, YELLOW, short_name

CROWD = (GREY, (5, 1))
STYLES = {"correct": (SKY, ()), "wrong": (VERMILION, (6, 3)), "missed": (YELLOW, (2, 2))}
LEGEND = [
    Mark((), "found (true positive)", *STYLES["correct"]),
    Mark((), "false positive", *STYLES["wrong"]),
    Mark((), "missed", *STYLES["missed"]),
    Mark((), "crowd region, ignored", *CROWD),
]


def draw_image_errors(
    image: Image.Image, matching: ImageMatches, names: dict[int, str], side: int = 760
) -> Image.Image:
    """Draw the annotated boxes of an image and, to the right, its detections; see `LEGEND`.

    Detections are labelled with class, score, and the IoU or the type of error. If they have masks,
    these are drawn, and those of annotations.

    Args:
        image: in the size that annotations refer to
        matching: with the detections to draw
        names: of the categories by their ids
        side: the long side of either half, in pixels
    """
    if any("segmentation" in detection for detection in matching.detections):
        size = image.height, image.width
    else:
        size = None
    image, scale = resize_long_side(image, side)
    annotated, detected = (
        draw_marks(
            image,
            [
                mark._replace(
                    box=[scale * x for x in mark.box], mask=_resize(mark.mask, image.size)
                )
                for mark in marks
            ],
        )
        for marks in (_truth_marks(matching, names, size), _detection_marks(matching, names, size))
    )
    pair = Image.new("RGB", (2 * image.width + MARGIN, image.height), "white")
    pair.paste(annotated, (0, 0))
    pair.paste(detected, (image.width + MARGIN, 0))
    return pair


def _truth_marks(
    matching: ImageMatches, names: dict[int, str], size: tuple[int, int] | None
) -> list[Mark]:
    """Missed boxes come first, so that they are drawn on top."""
    marks = []
    rows = zip(matching.truth, matching.missed, matching.crowd, strict=True)
    for annotation, missed, crowd in rows:
        name = short_name(names[annotation["category_id"]])
        style = CROWD if crowd else STYLES["missed" if missed else "correct"]
        mask = _mask(annotation, size)
        marks.append((not missed, Mark(_corners(annotation), name, *style, mask=mask)))
    return [mark for _, mark in sorted(marks, key=lambda pair: pair[0])]


def _detection_marks(
    matching: ImageMatches, names: dict[int, str], size: tuple[int, int] | None
) -> list[Mark]:
    """True positives come first, so that they are drawn on top, in descending order of score."""
    marks = []
    for index, kind in enumerate(detection_kinds(matching)):
        detection = matching.detections[index]
        iou = matching.iou[index, matching.matches[index]] if kind == "correct" else None
        style = CROWD if kind == "ignored" else STYLES["wrong" if kind in ERRORS else "correct"]
        name, score = short_name(names[detection["category_id"]]), f"{detection['score']:.2f}"
        text = f"{name} {score} {kind if iou is None else f'IoU {iou:.2f}'}"
        mask = _mask(detection, size)
        marks.append((kind != "correct", Mark(_corners(detection), text, *style, mask=mask)))
    return [mark for _, mark in sorted(marks, key=lambda pair: pair[0])]


def _mask(entry: dict, size: tuple[int, int] | None) -> np.ndarray | None:
    """The mask in an image of a height and width; None without masks, or if it has none."""
    return decode_mask(entry.get("segmentation"), size) if size else None


def _resize(mask: np.ndarray | None, size: tuple[int, int]) -> np.ndarray | None:
    """To a width and height."""
    return None if mask is None else np.array(Image.fromarray(mask).resize(size))


def _corners(box: dict) -> list[float]:
    x, y, width, height = box["bbox"]
    return [x, y, x + width, y + height]
