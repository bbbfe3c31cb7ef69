"""Shared drawing functions of the figures that explain detections."""

from collections.abc import Sequence
from typing import Literal

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.typing import ColorType
from PIL import Image
from torch import Tensor

from ..boxes import cxcywh_to_xyxy
from .style import BLACK, BLUE, GREEN, ORANGE, PINK, SKY, VERMILION, YELLOW, escape_name

# Strong colours first, as images are dimmed towards white.
COLOURS = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, YELLOW, BLACK)
MARKERS = "o^sDv"
MIN_SHAPE = 0.04  # short side relative to the long one
LONG_SIDE = 1600  # of an image in a picture, in pixels


def shrink(image: Image.Image) -> Image.Image:
    """A copy in RGB, with a long side of at most `LONG_SIDE`."""
    picture = image.convert("RGB")
    picture.thumbnail((LONG_SIDE, LONG_SIDE))
    return picture


def show_image(axes: Axes, image: Image.Image, dim: float = 0.0) -> None:
    """Show an image in pixel coordinates, blended with white by `dim` (0 to 1).

    Very narrow images are stretched.
    """
    width, height = image.size
    picture = shrink(image)
    picture = Image.blend(picture, Image.new("RGB", picture.size, "white"), dim)
    is_line = min(image.size) <= MIN_SHAPE * max(image.size)
    aspect: Literal["auto", "equal"] = "auto" if is_line else "equal"
    axes.imshow(picture, aspect=aspect, extent=(0, width, height, 0), interpolation="bilinear")
    axes.set(xticks=[], yticks=[], facecolor="#dddddd", autoscale_on=False)
    axes.spines[:].set_visible(False)


def shape_of(image: Image.Image) -> float:
    """Height relative to width, limited to what fits into a figure."""
    return min(max(image.height / image.width, 0.4), 1.6)


def to_pixels(places: Tensor, image: Image.Image) -> Tensor:
    """Convert relative points (..., 2) or boxes (..., 4) to pixels of the image."""
    return places * torch.tensor(image.size).tile(places.shape[-1] // 2)


def draw_box(
    axes: Axes, box: Tensor, colour: ColorType, *, lw: float = 2, ls: str = "-", alpha: float = 1
) -> None:
    """Draw a box (cx, cy, w, h) in pixels, with a white seam that makes it visible anywhere."""
    x, y, x_end, y_end = cxcywh_to_xyxy(box).tolist()
    seam = [withStroke(linewidth=lw + 1.5, foreground="white", alpha=0.7 * alpha)]
    frame = Rectangle((x, y), x_end - x, y_end - y, fill=False, ec=colour, lw=lw, ls=ls)
    frame.set(alpha=alpha, path_effects=seam)
    axes.add_patch(frame)


def zoom_to(axes: Axes, image: Image.Image, corners: Tensor) -> None:
    """Zoom to a square around corner boxes (n, 4) in pixels, not much larger than the image."""
    size, margin = torch.tensor(image.size), 0.15 * max(image.size)
    low = corners[:, :2].amin(0).clamp(min=-margin)
    high = torch.minimum(corners[:, 2:].amax(0), size + margin)
    side = 1.5 * float((high - low).max())
    side = min(max(side, 0.2 * max(image.size)), max(image.size) + 2 * margin)
    # Move the square so that it shows as much of the image as possible.
    first, last = low.clamp(max=0), torch.maximum(high, size)
    start = ((low + high - side) / 2).clamp(first, last - side)
    start = torch.where(last - first < side, (first + last - side) / 2, start)
    (left, top), (right, bottom) = start.tolist(), (start + side).tolist()
    axes.set(xlim=(left, right), ylim=(bottom, top))


def draw_tag(axes: Axes, place: Sequence[float], text: str, colour: str = "black") -> None:
    """Write text on a white background."""
    style = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
    x, y = place
    axes.text(x, y, text, color=colour, fontsize=10, bbox=style, va="bottom", clip_on=True)


def title_of(query: int, scores: Tensor, classes: Sequence[str]) -> str:
    """A title with a query's class and score in the first image, of scores (B, Q, K)."""
    score, label = scores[0, query].max(0)
    return f"query {query}: {escape_name(classes[int(label)], 30)}, {score:.2f}"
