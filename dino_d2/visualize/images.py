"""Images with detections or segments, and training curves."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import Instances
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import distance_transform_edt, maximum_filter, minimum_filter
from torch import Tensor

from ..evaluation.costs import COSTS
from .marks import Mark, class_colour, draw_labels, draw_marks, fill_masks, font_for, line_width
from .style import DPI

FAR = 0.9  # from which share of the largest distance on a pixel is in the middle of a mask
BESIDE = ("bbox/", "with_nms/", "without_nms/")  # there is one of the last two


def draw_instances(image: Image.Image, instances: Instances, classes: Sequence[str]) -> Image.Image:
    """Draw boxes, classes, scores and masks into a copy of an image.

    Args:
        image: in any mode
        instances: with pred_boxes in pixels, scores, pred_classes and possibly pred_masks and
            track_ids (-1: of no track), in descending order of score
        classes: names of all classes
    """
    count = len(instances)
    masks = instances.pred_masks.numpy() if instances.has("pred_masks") else [None] * count
    ids = instances.track_ids.tolist() if instances.has("track_ids") else [-1] * count
    names = ["" if x < 0 else f"#{x} " for x in ids]
    parts = instances.pred_boxes, instances.scores, instances.pred_classes, masks, names
    marks = [
        Mark(box.tolist(), f"{name}{classes[label]} {score:.2f}", class_colour(int(label)), mask=x)
        for box, score, label, x, name in zip(*parts, strict=True)
    ]
    return draw_marks(image, marks)


def draw_segments(
    image: Image.Image, ids: Tensor, segments: Sequence[dict[str, Any]], classes: Sequence[str]
) -> Image.Image:
    """Fill segments with the colours of their classes in a copy of an image, and name them.

    Args:
        image: in any mode
        ids: (height, width) of the image, the segment of each pixel, 0 for none
        segments: of each "id" and "category_id", the index of its class
        classes: names of all classes
    """
    owner, font, marks = ids.numpy(), font_for(image), []
    high = sum(font.getmetrics()) / 2
    for segment in segments:
        label, mask = segment["category_id"], owner == segment["id"]
        (x, y), wide = inmost(mask), font.getlength(classes[label]) / 2
        box = x - wide, y + high, x + wide, y + high  # the first place of a label is above it
        marks.append(Mark(box, classes[label], class_colour(label), mask=mask))
    pixels = np.array(fill_masks(image.convert("RGB"), marks))
    width = line_width(image)
    pixels[maximum_filter(owner, width) != minimum_filter(owner, width)] = 255  # between segments
    picture = Image.fromarray(pixels)
    draw_labels(picture, [[mark] for mark in marks])
    return picture


def inmost(mask: np.ndarray) -> tuple[int, int]:
    """A pixel (x, y) of a mask (H, W), not empty, in the middle of those far from other pixels."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    top, left = rows[0], columns[0]
    part = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    step = -(-max(part.shape) // 128)  # of large masks, some pixels tell it
    depth = distance_transform_edt(np.pad(part[::step, ::step], 1))
    deep = np.argwhere(depth >= FAR * depth.max()).clip(min=1) - 1
    y, x = deep[((deep - deep.mean(0)) ** 2).sum(1).argmin()]
    return int(left + step * x), int(top + step * y)


def draw_curves(metrics: Path, output: Path) -> None:
    """Plot loss, AP and the cost of errors from the `metrics.json` of a run, as a PNG."""
    rows = [json.loads(line) for line in Path(metrics).read_text().splitlines()]
    figure = Figure(figsize=(16, 4), layout="constrained")
    loss, precision, costs = figure.subplots(1, 3)
    for axes, keys, label in (
        (loss, ["total_loss"], "total loss"),
        (precision, [f"{x}AP" for x in BESIDE] + ["bbox/AP50"], "AP on the validation set, %"),
        (costs, [f"dAP/{kind}" for kind in COSTS], "cost of each type of error, AP"),
    ):
        for key in keys:
            if there := [row for row in rows if key in row]:
                x, y = ([row[name] for row in there] for name in ("iteration", key))
                axes.plot(x, y, marker="." if len(there) < 50 else "", label=key)
        axes.set(xlabel="iteration", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    for axes in (precision, costs):
        if axes.lines:
            axes.legend()
    figure.savefig(output, dpi=DPI)
