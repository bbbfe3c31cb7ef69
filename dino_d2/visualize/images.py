"""Images with detections, and training curves."""

import json
from collections.abc import Sequence
from pathlib import Path

from detectron2.structures import Instances
from matplotlib.figure import Figure
from PIL import Image

from ..evaluation.costs import COSTS
from .marks import Mark, class_colour, draw_marks
from .style import DPI

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
