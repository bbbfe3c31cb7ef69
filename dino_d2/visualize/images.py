"""Images with boxes drawn into them, and the curves of a training."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from detectron2.structures import Instances
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from .marks import PALETTE, Mark, class_colour, draw_marks


def draw_detections(
    annotations: Path,
    images: Path,
    results: Path,
    output: Path,
    *,
    num_images: int = 12,
    threshold: float = 0.4,
) -> None:
    """A sheet of images, each with its ground truth and, to the right, what was detected.

    Args:
        annotations: COCO-format file
        images: folder of its images
        results: detections in COCO's results format, as Detectron2's evaluator leaves them
        output: PNG to write
        num_images: the first so many of the file
        threshold: least score that is drawn
    """
    dataset = json.loads(Path(annotations).read_text())
    names = {category["id"]: category["name"] for category in dataset["categories"]}
    colours = {c: PALETTE[i % len(PALETTE)] for i, c in enumerate(names)}
    truth, detections = defaultdict(list), defaultdict(list)
    for box in dataset["annotations"]:
        truth[box["image_id"]].append(box)
    for box in json.loads(Path(results).read_text()):
        if box["score"] >= threshold:
            detections[box["image_id"]].append(box)

    shown = dataset["images"][:num_images]
    columns = 4  # pairs of ground truth and detections
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(16, 2.3 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, 2 * columns, squeeze=False).flatten()
    for axes in grid:
        axes.set_axis_off()
    for i, record in enumerate(shown):
        picture = Image.open(Path(images) / record["file_name"]).convert("RGB")
        for axes, boxes, title in (
            (grid[2 * i], truth[record["id"]], "ground truth"),
            (grid[2 * i + 1], detections[record["id"]], f"detected, score ≥ {threshold}"),
        ):
            axes.imshow(picture)
            axes.set_title(title, fontsize=8)
            _draw_boxes(axes, boxes, colours)
    legend = [Patch(color=colours[c], label=name) for c, name in names.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 8))
    figure.savefig(output, dpi=110)


def draw_instances(image: Image.Image, instances: Instances, classes: Sequence[str]) -> Image.Image:
    """A copy of the image with boxes, classes and scores.

    Args:
        image: of any mode
        instances: with pred_boxes in pixels, scores and pred_classes, the surest first
        classes: names of all classes
    """
    found = zip(instances.pred_boxes, instances.scores, instances.pred_classes, strict=True)
    marks = [
        Mark(box.tolist(), f"{classes[label]} {score:.2f}", class_colour(int(label)))
        for box, score, label in found
    ]
    return draw_marks(image, marks)


def _draw_boxes(axes: Axes, boxes: list[dict], colours: dict[int, str]) -> None:
    for box in boxes:
        x, y, width, height = box["bbox"]
        colour = colours[box["category_id"]]
        axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=2))
        if "score" in box:
            style = {"facecolor": colour, "edgecolor": "none", "pad": 0.5}
            axes.text(x, y, f"{box['score']:.2f}", color="white", fontsize=6, bbox=style)


def draw_curves(metrics: Path, output: Path) -> None:
    """Loss and AP over the iterations of a training.

    Args:
        metrics: `metrics.json` of the training, one JSON object a line
        output: PNG to write
    """
    rows = [json.loads(line) for line in Path(metrics).read_text().splitlines()]
    figure = Figure(figsize=(11, 4), layout="constrained")
    loss, precision = figure.subplots(1, 2)
    for axes, keys, label in (
        (loss, ["total_loss"], "total loss"),
        (precision, ["bbox/AP50", "bbox/AP"], "AP on the validation set, %"),
    ):
        for key in keys:
            there = [row for row in rows if key in row]
            x, y = ([row[name] for row in there] for name in ("iteration", key))
            axes.plot(x, y, marker="." if len(there) < 50 else "", label=key)
        axes.set(xlabel="iteration", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    precision.legend()
    figure.savefig(output, dpi=110)
