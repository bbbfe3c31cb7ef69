"""Figures of how a detection came about, from a trace (`dino_d2.trace`) of an image.

All functions take the image, its trace, the indices of queries to explain and the class names, and
return a Matplotlib figure.
"""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

from ..boxes import cxcywh_to_xyxy, iou
from ..names import plural
from ..structures import Target
from ..trace import Trace, image_masks
from .canvas import (
    COLOURS,
    MARKERS,
    draw_box,
    shape_of,
    show_image,
    shrink,
    title_of,
    to_pixels,
    zoom_to,
)
from .style import BLUE, VERMILION

PROPOSALS = 50  # boxes to draw


def surest_queries(trace: Trace, count: int = 3) -> list[int]:
    """At most `count` queries of the first image, in descending order of score."""
    scores = trace.scores[-1][0].amax(-1)
    return scores.topk(min(count, len(scores))).indices.tolist()


def draw_proposals(
    image: Image.Image,
    trace: Trace,
    queries: Sequence[int],
    classes: Sequence[str],
    target: Target | None = None,
) -> Figure:
    """Draw the tokens that became queries, by level, and the boxes proposed there. With a target,
    its boxes, too.
    """
    selection = trace.selection
    assert selection is not None
    truth = torch.zeros(0, 4) if target is None else to_pixels(target.boxes, image)
    rows = max(len(trace.shapes), len(queries) + 1 + bool(len(truth)))  # of a legend
    size = 11, 5.4 * shape_of(image) + 0.2 * rows + 0.7
    figure = Figure(figsize=size, layout="constrained")
    pictures, legends = figure.subplots(2, 2, height_ratios=[size[1] - 0.2 * rows, 0.2 * rows])
    for axes in legends:
        axes.set_axis_off()
    left, right = pictures
    show_image(left, image, dim=0.5)
    centers = to_pixels(selection.centers[0], image)
    for level, (height, width) in enumerate(trace.shapes):
        there = centers[selection.levels[0] == level]
        left.scatter(
            *there.T,
            s=14 * 1.7**level,
            marker=MARKERS[level % len(MARKERS)],
            **{"color": COLOURS[level % len(COLOURS)], "edgecolors": "white", "linewidths": 0.4},
            **{"alpha": 0.75, "clip_on": False},
            label=f"level {level + 1}: {len(there)} of {plural(height * width, 'token')}",
        )
    left.set_title(f"places of {plural(len(centers), 'selected token')}")
    legends[0].legend(*left.get_legend_handles_labels(), loc="upper center", fontsize=8)

    show_image(right, image, dim=0.3)
    boxes = to_pixels(selection.boxes[0], image)
    best = selection.scores[0].topk(min(PROPOSALS, len(boxes))).indices.tolist()
    for query in best:
        draw_box(right, boxes[query], "#555555", lw=0.8, alpha=0.6)
    for box in truth:
        draw_box(right, box, "black", lw=1.5)
    for i, query in enumerate(queries):
        draw_box(right, boxes[query], COLOURS[i % len(COLOURS)], lw=2.5)
    names = [title_of(query, trace.scores[-1], classes) for query in queries]
    handles = [Line2D([], [], color=COLOURS[i % len(COLOURS)], lw=2.5) for i in range(len(names))]
    handles.append(Line2D([], [], color="#555555", lw=0.8))
    names.append(f"the {len(best)} proposals of the highest scores")
    if len(truth):
        handles.append(Line2D([], [], color="black", lw=1.5))
        names.append("ground truth")
    legends[1].legend(handles, names, loc="upper center", fontsize=8)
    right.set_title("boxes proposed there")
    figure.suptitle("Encoder proposals that became queries", weight="bold")
    return figure


def draw_refinement(
    image: Image.Image, trace: Trace, queries: Sequence[int], classes: Sequence[str]
) -> Figure:
    """Draw each query's boxes through the decoder layers, and curves of their IoU and score."""
    figure = Figure(figsize=(10, 3.1 * len(queries) + 1), layout="constrained")
    grid = figure.subplots(len(queries), 2, squeeze=False, width_ratios=[1, 1.5])
    colours = stage_colours(len(trace.layers) + 1)
    for (picture, chart), query in zip(grid, queries, strict=True):
        start = trace.layers[0].reference[0, query]
        layers = trace.output.result.layers[-len(trace.layers) :]
        boxes = [layer.boxes[0, query] for layer in layers]
        steps = [start, *boxes] if len(start) == 4 else boxes
        places = to_pixels(torch.stack(steps), image)
        show_image(picture, image, dim=0.25)
        zoom_to(picture, image, cxcywh_to_xyxy(places))
        for box, colour in zip(places, colours[-len(places) :], strict=True):
            draw_box(picture, box, colour, lw=2)
        if len(start) == 2:
            picture.plot(*to_pixels(start, image), "X", color=colours[0], mec="white", ms=10)
        picture.set_title(title_of(query, trace.scores[-1], classes))
        _draw_progress(chart, trace, query, places)
    stages = ["start", *(f"layer {i + 1}" for i in range(len(trace.layers)))]
    handles = [Line2D([], [], color=colour, lw=3) for colour in colours]
    figure.legend(handles, stages, loc="outside lower center", ncols=min(len(stages), 7))
    figure.suptitle("A query's box through the layers of the decoder", weight="bold")
    return figure


def draw_masks(
    image: Image.Image, trace: Trace, queries: Sequence[int], classes: Sequence[str]
) -> Figure:
    """Draw each query's mask before the first decoder layer and after each, of Mask DINO.

    The colour is as strong as a pixel's probability, the line is where that is 0.5, and the number
    is the IoU with the mask of the last layer.
    """
    pixels = trace.output.pixels
    layers: Sequence[Any] = trace.output.result.layers
    assert pixels is not None
    width, height = shrink(image).size
    figure = Figure(figsize=(2.3 * len(layers), 2.75 * len(queries) + 0.5), layout="constrained")
    rows = figure.subplots(len(queries), len(layers), squeeze=False)
    for row, query in zip(rows, queries, strict=True):
        embeddings = torch.stack([layer.masks[0, query] for layer in layers])
        maps = image_masks(embeddings, pixels, (height, width))
        found = (maps > 0).flatten(1)
        shared, joint = (found & found[-1]).sum(1), (found | found[-1]).sum(1)
        overlap = (shared / joint.clamp(min=1)).tolist()
        boxes = torch.stack([layer.boxes[0, query] for layer in layers])
        corners = cxcywh_to_xyxy(to_pixels(boxes, image))
        for stage, (axes, logits) in enumerate(zip(row, maps, strict=True)):
            show_image(axes, image, dim=0.6)
            _draw_mask(axes, logits, image)
            zoom_to(axes, image, corners)
            name = f"layer {stage}" if stage else "start"
            axes.set_title(f"{name}: IoU {overlap[stage]:.2f}", fontsize=9)
        row[0].set_ylabel(title_of(query, trace.scores[-1], classes), fontsize=9)
    figure.suptitle("A query's mask through the layers of the decoder", weight="bold")
    return figure


def _draw_mask(axes: Axes, logits: Tensor, image: Image.Image) -> None:
    """Draw probabilities of pixels, of logits (height, width), and the border of the mask."""
    extent = 0, image.width, image.height, 0
    colour = torch.tensor(to_rgb(BLUE)).expand(*logits.shape, 3)
    shade = torch.cat([colour, 0.75 * logits.sigmoid()[..., None]], -1)
    axes.imshow(shade.numpy(), extent=extent, aspect=axes.get_aspect(), interpolation="nearest")
    if (logits > 0).any() and not (logits > 0).all():
        line: dict[str, Any] = {"colors": "black", "linewidths": 1, "origin": "upper"}
        axes.contour(logits.numpy(), [0.0], extent=extent, **line)


def stage_colours(count: int) -> list[tuple[float, float, float, float]]:
    """Colours from dark to bright, which are also distinguishable for the colour-blind."""
    return [colormaps["plasma"](0.9 * i / max(count - 1, 1)) for i in range(count)]


def _draw_progress(axes: Axes, trace: Trace, query: int, places: Tensor) -> None:
    label = trace.scores[-1][0, query].argmax()
    stages = range(len(trace.scores) + 1)
    corners = cxcywh_to_xyxy(places)
    overlap = iou(corners, corners[-1]).tolist()
    axes.plot(stages[-len(overlap) :], overlap, "o-", color=BLUE, label="IoU with the final box")
    scores = [layer[0, query, label].item() for layer in trace.scores]
    axes.plot(stages[1:], scores, "s--", color=VERMILION, label="score for the final class")
    names = ["start", *map(str, stages[1:])]
    axes.set(ylim=(-0.03, 1.03), xticks=stages, xticklabels=names, xlabel="decoder layer")
    axes.set_ylabel("IoU and score, 0 to 1")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
