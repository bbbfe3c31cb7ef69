"""Figures of the decoder's attention; arguments and results are as in `explain`."""

from collections.abc import Sequence

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

from ..boxes import cxcywh_to_xyxy, iou
from ..trace import Trace
from .canvas import COLOURS, MARKERS, draw_box, shape_of, show_image, title_of, to_pixels, zoom_to
from .style import BLUE, ORANGE

ATTENDED = 10  # queries to draw
AREA = 500  # square points of a sampling point that has all the weight
SAME_PLACE = 0.5  # lowest IoU of queries at the same place


def draw_sampling(
    image: Image.Image, trace: Trace, queries: Sequence[int], classes: Sequence[str]
) -> Figure:
    """Draw the sampling points of the last decoder layer's deformable attention.

    One column per level; colours are heads, and areas are weights.
    """
    layer, levels = trace.layers[-1], len(trace.shapes)
    assert layer.locations is not None and layer.weights is not None
    figure = Figure(figsize=(2.7 * levels + 0.3, 2.9 * len(queries) + 1.3), layout="constrained")
    grid = figure.subplots(len(queries), levels, squeeze=False)
    for row, query in zip(grid, queries, strict=True):
        points = to_pixels(layer.locations[0, query], image)  # (H, L, P, 2)
        weights = layer.weights[0, query]
        box = to_pixels(trace.output.result.layers[-1].boxes[0, query], image)
        # Do not zoom out for points with hardly any weight.
        heavy = points[weights > 0.02]
        shown = torch.cat([cxcywh_to_xyxy(box)[None], heavy.tile(2)])
        for level, axes in enumerate(row):
            show_image(axes, image, dim=0.45)
            zoom_to(axes, image, shown)
            draw_box(axes, box, "black", lw=1.2)
            _draw_points(axes, points[:, level], weights[:, level])
            share = 100 * float(weights[:, level].sum() / weights.sum())
            axes.set_xlabel(f"{share:.0f} % of the weight", fontsize=9)
        row[0].set_ylabel(title_of(query, trace.scores[-1], classes))
    for level, (axes, (height, width)) in enumerate(zip(grid[0], trace.shapes, strict=True)):
        axes.set_title(f"level {level + 1}\n{width} × {height} cells")
    heads = range(layer.weights.shape[2])
    handles = [Line2D([], [], **_style(i), ms=9, label=f"head {i + 1}") for i in heads]
    grey = _style(0) | {"color": "grey"}
    handles += [
        Line2D([], [], **grey, ms=(AREA * x) ** 0.5, label=f"weight {x:.0%}")
        for x in (0.05, 0.2, 0.5)
    ]
    # The layout does not reserve space for padding, which would overlap with the captions.
    columns = int(1.7 * levels)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, borderaxespad=0)
    figure.suptitle("Sampling points of deformable attention, last decoder layer", weight="bold")
    return figure


def draw_attention_maps(
    image: Image.Image, trace: Trace, queries: Sequence[int], classes: Sequence[str]
) -> Figure:
    """Draw what queries attend to in the last decoder layer, of a model without deformable
    attention, and beside it what the token at the centre of their box does in the encoder."""
    attention, encoder = trace.layers[-1].attention, trace.encoder_attention
    assert attention is not None and encoder is not None
    size = 10, 4.6 * shape_of(image) * len(queries) + 1
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(queries), 2, squeeze=False)
    ((height, width),) = trace.shapes
    for (left, right), query in zip(grid, queries, strict=True):
        box = trace.output.result.layers[-1].boxes[0, query]
        column, row = (box[:2].clamp(0, 0.999) * torch.tensor([width, height])).int().tolist()
        token = encoder[0, row * width + column]
        for axes, weights in ((left, attention[0, query]), (right, token)):
            show_image(axes, image, dim=0.45)
            _draw_map(axes, image, weights.view(height, width))
            draw_box(axes, to_pixels(box, image), "black", lw=1.5)
        left.set_title(title_of(query, trace.scores[-1], classes))
        centre = torch.tensor([(column + 0.5) / width, (row + 0.5) / height])
        right.plot(*to_pixels(centre, image), "X", color="black", mec="white", ms=10)
        right.set_title("encoder: the token at its centre")
    figure.suptitle("Where attention looks, last layers of decoder and encoder", weight="bold")
    return figure


def _draw_map(axes: Axes, image: Image.Image, weights: Tensor) -> None:
    """Weights (H, W) as colours over the image, clear where there are none."""
    share = (weights / weights.max()).numpy()
    extent = (0, image.width, image.height, 0)
    colours = axes.imshow(share, cmap="plasma", alpha=0.8 * share**0.5, extent=extent)
    colours.set_interpolation("bilinear")


def _style(head: int) -> dict:
    marker, colour = MARKERS[head // len(COLOURS) % len(MARKERS)], COLOURS[head % len(COLOURS)]
    return {"linestyle": "", "marker": marker, "color": colour, "mec": "white", "mew": 0.6}


def _draw_points(axes: Axes, points: Tensor, weights: Tensor) -> None:
    """Points (H, P, 2) in pixels and their weights (H, P)."""
    for head, (places, weight) in enumerate(zip(points, weights, strict=True)):
        (x, y), style = places.T, _style(head)
        dots = axes.scatter(x, y, s=AREA * weight, marker=style["marker"], color=style["color"])
        dots.set(edgecolors="white", linewidths=0.6, alpha=0.85, zorder=3)


def draw_self_attention(
    image: Image.Image, trace: Trace, queries: Sequence[int], classes: Sequence[str]
) -> Figure:
    """Draw which queries each query attends to most in the last decoder layer, and bars per layer.

    Bars divide its attention among itself, queries at the same place, and all others.
    """
    figure = Figure(figsize=(10, 3.4 * len(queries) + 1), layout="constrained")
    grid = figure.subplots(len(queries), 2, squeeze=False, width_ratios=[1.15, 1])
    for (picture, chart), query in zip(grid, queries, strict=True):
        _draw_attended(picture, image, trace, query)
        picture.set_title(title_of(query, trace.scores[-1], classes))
        _draw_shares(chart, trace, query)
    handles, labels = grid[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle("Self-attention between queries", weight="bold")
    return figure


def _places(trace: Trace, layer: int) -> Tensor:
    """The boxes (Q, 4) of a layer's queries: its reference boxes or, with points, its results."""
    reference = trace.layers[layer].reference[0]
    return reference if reference.shape[-1] == 4 else trace.output.result.layers[layer].boxes[0]


def _draw_attended(axes: Axes, image: Image.Image, trace: Trace, query: int) -> None:
    weights = 100 * trace.layers[-1].self_attention[0, query]
    weights[query] = 0  # leave out the query itself
    boxes = to_pixels(_places(trace, -1), image)
    show_image(axes, image, dim=0.45)
    share, colours = Normalize(0, float(weights.max())), colormaps["plasma_r"]
    for other in weights.topk(min(ATTENDED, len(weights) - 1)).indices.flip(0).tolist():
        colour = colours(share(float(weights[other])))
        draw_box(axes, boxes[other], colour, lw=1.5)
        axes.plot(*boxes[[query, other], :2].T, color=colour, linewidth=1.5)
    draw_box(axes, boxes[query], "black", lw=2.5)
    scale = ScalarMappable(share, colours)
    axes.figure.colorbar(scale, ax=axes, shrink=0.8, label="attention, % of all")


def _draw_shares(axes: Axes, trace: Trace, query: int) -> None:
    shares = torch.tensor([_shares(trace, layer, query) for layer in range(len(trace.layers))])
    own, near, far, uniform = (100 * shares).T
    layers = range(1, len(shares) + 1)
    axes.bar(layers, own, color=BLUE, label="itself")
    place = f"queries at its place (IoU ≥ {SAME_PLACE})"
    axes.bar(layers, near, bottom=own, color=ORANGE, label=place)
    axes.bar(layers, far, bottom=own + near, color="#cccccc", label="other queries")
    axes.plot(layers, uniform, "k_", ms=24, mew=2, label="both, were attention even")
    axes.set(ylim=(0, 100), xticks=layers, xlabel="decoder layer", ylabel="share of attention, %")


def _shares(trace: Trace, layer: int, query: int) -> tuple[float, float, float, float]:
    """A query's attention to itself, to others at its place, and to the rest, which sum to 1.

    The last number is the sum of the first two for uniform attention.
    """
    weights = trace.layers[layer].self_attention[0, query]
    corners = cxcywh_to_xyxy(_places(trace, layer))
    near = iou(corners, corners[query]) >= SAME_PLACE
    near[query] = False
    own, others = float(weights[query]), float(weights[near].sum())
    return own, others, 1 - own - others, (1 + int(near.sum())) / len(near)
