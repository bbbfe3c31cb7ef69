"""Figures of DINO's denoising and matching in training (`dino_d2.trace`)."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image

from ..boxes import cxcywh_to_xyxy, iou
from ..modeling.matcher import instability
from ..names import plural
from ..structures import Predictions, Target
from ..trace import Denoised, StageMatching
from .canvas import draw_box, draw_tag, shape_of, show_image, to_pixels
from .style import BLUE, VERMILION, escape_name

GROUPS = 3  # of denoising queries to draw
NOISED = 8  # boxes to draw per group
BOXES = 20  # to list with their queries
COPIES = ((BLUE, "-", "positive"), (VERMILION, "--", "negative"))


def draw_denoising(image: Image.Image, denoised: Denoised) -> Figure:
    """Draw noised boxes and their denoised results for some groups, and charts for all groups."""
    groups, copies = denoised.scores.shape[:2]
    shown = min(GROUPS, groups)
    rows, columns = (2, shown) if shown > 1 else (1, 2)
    heights = [rows * (10 / columns * shape_of(image) + 0.4), 3.6]
    figure = Figure(figsize=(11, sum(heights) + 0.8), layout="constrained")
    (top,), (bottom,) = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
    grid = top.subplots(rows, columns, squeeze=False).reshape(2, shown)
    _draw_groups(grid, image, denoised)
    _draw_totals(bottom, denoised)
    handles = [Line2D([], [], color=c, ls=s, lw=2, label=n) for c, s, n in COPIES[:copies]]
    handles.append(Line2D([], [], color="black", lw=1, label="ground truth"))
    handles.append(Line2D([], [], color=BLUE, lw=2, alpha=0.2, label="faint: low score"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    title = "Contrastive denoising" if copies > 1 else "Denoising"
    figure.suptitle(f"{title}: noised boxes, and the model's predictions", weight="bold")
    return figure


def _draw_groups(grid: np.ndarray, image: Image.Image, denoised: Denoised) -> None:
    """A column of `grid` for each group."""
    largest, total = _largest(denoised.truth, NOISED), len(denoised.scores)
    truth = to_pixels(denoised.truth.boxes[largest], image)
    for group, (given, answer) in enumerate(grid.T):
        for axes in (given, answer):
            show_image(axes, image, dim=0.45)
            for box in truth:
                draw_box(axes, box, "black", lw=1)
        for copy, (colour, style, _) in zip(denoised.noised[group], COPIES, strict=False):
            for box in to_pixels(copy[largest], image):
                draw_box(given, box, colour, ls=style)
        copies = zip(denoised.boxes[group], denoised.scores[group], COPIES, strict=False)
        for boxes, scores, (colour, style, _) in copies:
            for box, score in zip(to_pixels(boxes[largest], image), scores[largest], strict=True):
                alpha = 0.15 + 0.85 * float(score)
                draw_box(answer, box, colour, ls=style, alpha=alpha)
        which = f", {NOISED} largest boxes" if len(largest) < len(denoised.truth.boxes) else ""
        given.set_title(f"group {group + 1} of {total}{which}: input")
        answer.set_title("output")


def _draw_totals(figure: SubFigure, denoised: Denoised) -> None:
    left, right = figure.subplots(1, 2)
    truth = cxcywh_to_xyxy(denoised.truth.boxes)
    before, after = (
        iou(cxcywh_to_xyxy(x), truth).transpose(0, 1).flatten(1)  # of each copy
        for x in (denoised.noised, denoised.boxes)
    )
    scores = denoised.scores.transpose(0, 1).flatten(1)
    for i, (colour, _, name) in enumerate(COPIES[: len(scores)]):
        left.scatter(before[i], after[i], s=18, color=colour, marker="ox"[i], alpha=0.7, label=name)
    left.plot([0, 1], [0, 1], color="grey", lw=1, ls=":", label="unchanged")
    left.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    left.set(xlabel="IoU with the true box, input", ylabel="IoU with the true box, output")
    left.set_title("boxes of all groups")
    bins = torch.linspace(0, 1, 21)
    for i, (colour, _, name) in enumerate(COPIES[: len(scores)]):
        share = torch.full_like(scores[i], 100 / scores.shape[1])
        right.hist(scores[i], bins, weights=share, color=colour, alpha=0.65, label=name)
    right.set(xlim=(0, 1), xlabel="score for the class of the box, 0 to 1")
    right.set(ylabel="share of the queries, %", title="scores of all groups")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def draw_matching(
    image: Image.Image,
    target: Target,
    matching: StageMatching,
    predictions: Predictions,
    classes: Sequence[str],
) -> Figure:
    """Draw ground-truth boxes with their queries, and a table of queries by box and stage.

    The table also has the share of boxes whose query changed.

    Args:
        target: with at least one box
        matching: of the same boxes
        predictions: of the last layer
        classes: names of all classes
    """
    largest = _largest(target, BOXES)
    height = max(5.4 * shape_of(image), 0.3 * len(largest)) + 1.3
    figure = Figure(figsize=(13, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.2])
    show_image(left, image, dim=0.35)
    truth = to_pixels(target.boxes, image)
    found = to_pixels(predictions.boxes[0], image)
    for number, i in enumerate(largest, 1):
        query = int(matching.queries[-1, i])
        draw_box(left, truth[i], "black", lw=1.5)
        if query >= 0:
            draw_box(left, found[query], BLUE, ls="--")
        draw_tag(left, cxcywh_to_xyxy(truth[i])[:2].tolist(), str(number))
    handles = [
        Line2D([], [], color="black", lw=1.5, label="ground truth"),
        Line2D([], [], color=BLUE, ls="--", lw=2, label="its query in the last layer"),
    ]
    left.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=2)
    left.set_title("boxes and their queries")
    labels = target.labels.tolist()
    names = [f"{n}  {escape_name(classes[labels[i]], 20)}" for n, i in enumerate(largest, 1)]
    _draw_table(right, matching, largest, names)
    figure.suptitle("Matching between queries and ground truth", weight="bold")
    return figure


def _largest(target: Target, count: int) -> list[int]:
    """Indices of at most `count` of the largest boxes, in ascending order."""
    areas = target.boxes[:, 2:].prod(-1)
    return areas.argsort(descending=True)[:count].sort().values.tolist()


def _draw_table(axes: Axes, matching: StageMatching, boxes: list[int], names: list[str]) -> None:
    queries, total = matching.queries[:, boxes], matching.queries.shape[1]
    kept, changed = "#dbe7f3", "#f5b183"
    moved = torch.cat([torch.zeros(1, len(boxes)), (queries[1:] != queries[:-1]).float()])
    axes.imshow(moved.T, ListedColormap([kept, changed]), vmin=0, vmax=1, aspect="auto")
    for (stage, box), query in np.ndenumerate(queries.numpy()):
        axes.text(stage, box, str(query) if query >= 0 else "none", ha="center", va="center")
    shares = [f"{share:.0%}" for share in instability(matching.queries).tolist()]
    ticks = [f"{name}\n{share}" for name, share in zip(matching.stages, ["", *shares], strict=True)]
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.set_xlabel(f"below each stage: share of {plural(total, 'box')} whose query changed")
    which = "" if len(boxes) == total else f", the {len(boxes)} largest boxes"
    axes.set_title(f"the query of each box{which}")
    handles = [Patch(color=kept, label="as before"), Patch(color=changed, label="another query")]
    axes.figure.legend(handles=handles, loc="outside lower right", ncols=2)
