"""Draws boxes with labels into images, and arranges images in sheets."""

import logging
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import count, pairwise, product
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from detectron2.utils.logger import log_first_n
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageColor, ImageDraw, ImageFont

from .style import PALETTE, one_line

FONT = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
MARGIN = 12  # pixels between the pictures in a sheet
SAME = 0.5  # pixels that the sides of boxes differ by at most which are drawn as one


class Mark(NamedTuple):
    """A box to draw."""

    box: Sequence[float]  # left, top, right and bottom in pixels
    text: str  # label, drawn on one line; "" for none
    colour: str  # of the line and of the label's background
    dash: tuple[int, ...] = ()  # lengths of stroke and gap, in line widths; () is a solid line
    mask: np.ndarray | None = None  # (H, W) bool of the image, filled with the colour


def draw_marks(image: Image.Image, marks: Sequence[Mark]) -> Image.Image:
    """Draw boxes with labels into an RGB copy of an image; the first mark is on top.

    Labels do not overlap; one without a free place at its box is left out. Marks of the same box,
    such as a query that is detected as several classes, are drawn as the first of them, with one
    label of all their texts.
    """
    groups = _group_by_box(marks)
    firsts = [group[0] for group in groups]
    picture = fill_masks(image.convert("RGB"), firsts)
    canvas = ImageDraw.Draw(picture)
    width = line_width(picture)
    for mark in reversed(firsts):
        _outline(canvas, mark, width)
    draw_labels(picture, groups)
    return picture


def draw_labels(picture: Image.Image, groups: Sequence[Sequence[Mark]]) -> None:
    """Draw the label of each group of marks, at the box of its first, into an RGB image.

    Labels do not overlap; one without a free place is left out.
    """
    canvas, font = ImageDraw.Draw(picture), font_for(picture)
    taken: list[tuple] = []
    for group in groups:
        parts = [mark._replace(text=one_line(mark.text)) for mark in group if mark.text]
        _warn_of_gaps(mark.text for mark in parts)
        text = _cut(", ".join(mark.text for mark in parts), font, picture.width)
        place = _free_place(canvas, group[0]._replace(text=text), font, taken)
        if text and place:
            taken.append(place)
            _write(canvas, place, text, parts, font)


def _group_by_box(marks: Sequence[Mark]) -> list[list[Mark]]:
    """Marks of the same box, in their order; groups are in that of their first marks."""
    boxes = np.array([mark.box for mark in marks]).reshape(-1, 4)
    groups = defaultdict(list)
    for mark, box in zip(marks, boxes, strict=True):
        groups[int((np.abs(boxes - box) <= SAME).all(1).argmax())].append(mark)
    return list(groups.values())


def _write(
    canvas: ImageDraw.ImageDraw,
    place: tuple,
    text: str,
    parts: Sequence[Mark],
    font: ImageFont.FreeTypeFont,
) -> None:
    """Write the texts of marks, which `text` has one after another, each in its colour."""
    left, top, right, bottom = place
    for mark in parts:
        length = len(mark.text) + len(", ")
        part, text = text[:length], text[length:]
        if not part:  # it was cut
            return
        canvas.rectangle((left, top, right, bottom), fill=mark.colour)
        canvas.text((left, top), part, ink_on(mark.colour), font, anchor="la")
        left += canvas.textlength(part, font)


def fill_masks(picture: Image.Image, marks: Sequence[Mark]) -> Image.Image:
    """Blend the masks of marks with an RGB image, each half of the colour."""
    masks = [(mark.mask, mark.colour) for mark in reversed(marks) if mark.mask is not None]
    if not masks:
        return picture
    pixels = np.array(picture, dtype=np.float32)
    for mask, colour in masks:
        pixels[mask] = 0.5 * pixels[mask] + 0.5 * np.array(ImageColor.getrgb(colour)[:3])
    return Image.fromarray(pixels.astype(np.uint8))


def line_width(picture: Image.Image) -> int:
    """That of outlines in an image, in pixels."""
    return max(2, round(min(picture.size) / 160))


def font_for(picture: Image.Image) -> ImageFont.FreeTypeFont:
    """The font of labels in an image."""
    return load_font(max(12, round(min(picture.size) / 36)))


@cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's font, which has more letters than PIL's, but no Chinese, Japanese or Korean."""
    return ImageFont.truetype(FONT, size)


@cache
def _letters() -> frozenset[int]:
    """The code points in the font."""
    return frozenset(FT2Font(str(FONT)).get_charmap())


def _warn_of_gaps(texts: Iterable[str]) -> None:
    """Warn once per run, as all pictures have the same classes."""
    for text in texts:
        if not _letters().issuperset(map(ord, text)):
            message = f"the font lacks characters of '{text}', which are drawn as empty boxes"
            log_first_n(logging.WARNING, message, name=__name__)


def class_colour(label: int) -> str:
    """The colour of a class; colours repeat if there are more classes."""
    return PALETTE[label % len(PALETTE)]


def ink_on(colour: str) -> str:
    """Black or white, whichever is legible on a colour."""
    red, green, blue = ImageColor.getrgb(colour)[:3]
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 128 else "white"


def _outline(canvas: ImageDraw.ImageDraw, mark: Mark, width: int) -> None:
    left, top, right, bottom = mark.box
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    # A dark line below makes the colour visible on any background.
    canvas.line(corners, "black", width + 2 if not mark.dash else width, joint="curve")
    for start, end in pairwise(corners):
        for stroke in _strokes(np.array(start), np.array(end), [width * x for x in mark.dash]):
            canvas.line(stroke, mark.colour, width)


def _strokes(start: np.ndarray, end: np.ndarray, dash: list[int]) -> Iterator[list[tuple]]:
    """The strokes of a dashed line."""
    length = np.abs(end - start).sum()  # it is vertical or horizontal
    if not dash or not length:
        yield [tuple(start), tuple(end)]
        return
    stroke, gap = dash
    for at in np.arange(0, length, stroke + gap):
        ends = np.minimum([at, at + stroke], length) / length
        yield [tuple(start + (end - start) * x) for x in ends]


def _free_place(
    canvas: ImageDraw.ImageDraw, mark: Mark, font: ImageFont.FreeTypeFont, taken: list[tuple]
) -> tuple | None:
    """A free place for a label at its box and inside the image: left, top, right and bottom."""
    left, top, right, bottom = mark.box
    width = canvas.textlength(mark.text, font) + 1
    height = sum(font.getmetrics())
    limit = canvas.im.size[0] - width, canvas.im.size[1] - height
    rows = (top - height, top, bottom, bottom - height, (top + bottom - height) / 2)
    for y, x in product(rows, (left, right - width)):
        x, y = min(max(0, x), max(0, limit[0])), min(max(0, y), max(0, limit[1]))
        place = x, y, x + width, y + height
        if not any(_overlap(place, other) for other in taken):
            return place
    return None


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def resize_long_side(image: Image.Image, side: int) -> tuple[Image.Image, float]:
    """Resize the long side of an image to `side` pixels; returns the scale for boxes, too."""
    scale = side / max(image.size)
    size = [max(1, round(scale * x)) for x in image.size]
    return image.convert("RGB").resize(size), scale


def contact_sheet(
    pictures: Sequence[tuple[Image.Image, str]],
    columns: int,
    title: str,
    legend: Sequence[Mark] = (),
) -> Image.Image:
    """Arrange images, of which there is at least one, in rows, each below its caption.

    The legend, below the title of the sheet, explains marks by their texts.
    """
    big, small = load_font(24), load_font(18)
    line, columns = sum(big.getmetrics()) + MARGIN, min(columns, len(pictures))
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heights = [max(picture.height for picture, _ in row) + line for row in rows]
    head = (2 if legend else 1) * line + MARGIN
    widest = max(picture.width for picture, _ in pictures)
    named = max(round(big.getlength(title)), _legend_width(legend, small))
    column = max(widest + MARGIN, named // columns)
    width = MARGIN + max(named, columns * column)
    sheet = Image.new("RGB", (width, head + sum(heights)), "white")
    canvas = ImageDraw.Draw(sheet)
    canvas.text((MARGIN, MARGIN), title, "black", big)
    _draw_legend(canvas, legend, line + MARGIN, small)
    for y, row in zip(np.cumsum([head, *heights[:-1]]).tolist(), rows, strict=True):
        for x, (picture, caption) in zip(count(MARGIN, column), row, strict=False):
            canvas.text((x, y), _cut(caption, small, column - MARGIN), "black", small)
            sheet.paste(picture, (x, y + line - MARGIN))
    return sheet


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Cut text to one line of `width` pixels; "" if not even an ellipsis fits."""
    text = one_line(text)
    if font.getlength(text) <= width:
        return text
    starts = [f"{text[:length].rstrip()}…" for length in range(len(text))]
    fitting = bisect_right(starts, float(width), key=font.getlength)
    return starts[fitting - 1] if fitting else ""


def _draw_legend(
    canvas: ImageDraw.ImageDraw, legend: Sequence[Mark], y: int, font: ImageFont.FreeTypeFont
) -> None:
    x = MARGIN
    for mark in legend:
        _outline(canvas, mark._replace(box=(x, y, x + 36, y + 20)), 3)
        canvas.text((x + 44, y - 1), mark.text, "black", font)
        x += _legend_width([mark], font)


def _legend_width(legend: Sequence[Mark], font: ImageFont.FreeTypeFont) -> int:
    return sum(round(font.getlength(mark.text)) + 44 + 3 * MARGIN for mark in legend)
