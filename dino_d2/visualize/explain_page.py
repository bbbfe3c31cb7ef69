"""An HTML page of the figures that explain detections, with texts on how to read them."""

from collections.abc import Mapping
from html import escape
from typing import NamedTuple

from .page import data_uri, html_figure, html_page


class Text(NamedTuple):
    """Texts about a figure."""

    title: str
    alt: str  # alternative text
    reading: str
    source: str


TEXTS = {
    "proposals": Text(
        "From encoder tokens to queries",
        "The image twice: with a marker on every selected token, and with the proposed boxes.",
        "The encoder scores every token, one for each cell of its feature maps, and the best "
        "become the decoder's queries. On the left are their places, larger for coarser levels: "
        "they should gather on objects. On the right are the boxes that the encoder proposes "
        "there; those in colour became the queries that are named, and "
        "those in black are the ground truth, if there is one.",
        "DINO, section 3.4 and figure 5",
    ),
    "refinement": Text(
        "A box through the layers of the decoder",
        "For each query its boxes, from dark to bright, and a chart of IoU and score over layers.",
        "Every layer refines the box of the layer before: dark is the start, bright the last "
        "layer. The chart beside it shows the IoU of each box with the final one, and the score "
        "of the final class.",
        "Deformable DETR, section 4.2; DINO, section 3.5",
    ),
    "masks": Text(
        "A mask through the layers of the decoder",
        "For each query a row of images with its mask, before the first layer and after each.",
        "A query's mask is the product of its embedding with that of every pixel. Stronger "
        "colours are higher probabilities; the black line is the outline of the mask. The "
        "number is the IoU with the mask of the last layer.",
        "Mask DINO, section 3.3",
    ),
    "sampling": Text(
        "Where deformable attention looks",
        "For each query a row of images, one per level, with the sampling points of all heads.",
        "A query attends to a few points of each level only, at places that it predicts itself. "
        "Colours are heads and areas are weights, which sum to one for each head over all levels. "
        "Points with less than 2 % of the weight may lie outside of the part that is shown.",
        "Deformable DETR, section 4.1 and equation 3",
    ),
    "attention": Text(
        "Where attention looks",
        "For each query the image with its attention as a map, and that of a token beside it.",
        "A query attends to all tokens, with different weights (mean over heads, last layer): "
        "often to the extremities of an object, which determine its box. On the right is what the "
        "token at the centre of the box attends to in the encoder's last layer: its own object.",
        "DETR, sections 3.2 and 4.2",
    ),
    "self_attention": Text(
        "Which queries attend to each other",
        "For each query the boxes that it attends to most, and bars with shares of its attention.",
        "Queries attend to each other, so that each object is detected once without non-maximum "
        "suppression. Lines lead from the query, in black, to those that it attends to most in "
        "the last layer (mean over heads). Where blue and orange end above the black line, a "
        "query attends to itself and its competitors more than to the others.",
        "DETR, sections 3.2 and 4.2",
    ),
    "denoising": Text(
        "Denoising",
        "Noised boxes of some groups, the model's predictions for them, and charts of all groups.",
        "In training, noised copies of the true boxes are additional queries. Positives, in "
        "blue, should predict the black boxes; negatives, of contrastive denoising, in red and "
        "with more noise, should predict no object: their output should be faint. In the chart "
        "of boxes, points above the dotted line were improved.",
        "DN-DETR, section 4.3; DINO, section 3.3 and figure 3",
    ),
    "matching": Text(
        "Which query is matched with which box",
        "The image with its true boxes and their queries, and a table of boxes by stages.",
        "Training matches one query with each true box, separately in every stage. Each number is "
        "a query; a cell is orange where the match changes, which gives queries contradictory "
        "targets. The share below each stage is the instability that training logs as "
        "matching/instability_0, _1 and so on.",
        "DETR, section 3.1; DN-DETR, section 3",
    ),
}

LINKS = """<footer><p>DINO <a href="https://arxiv.org/abs/2203.03605">2203.03605</a>, DN-DETR
<a href="https://arxiv.org/abs/2203.01305">2203.01305</a>, Deformable DETR
<a href="https://arxiv.org/abs/2010.04159">2010.04159</a>, Mask DINO
<a href="https://arxiv.org/abs/2206.02777">2206.02777</a>, DETR
<a href="https://arxiv.org/abs/2005.12872">2005.12872</a></p></footer>
"""


def explanation_page(
    heading: str,
    facts: list[str],
    queries: Mapping[int, str],
    pictures: Mapping[str, bytes | str],
) -> str:
    """A self-contained HTML page.

    Args:
        heading: of the page
        facts: sentences below it
        queries: that are explained, each with the reason why
        pictures: by the names of `TEXTS`, a PNG, or a sentence that says why there is none
    """
    sections = "".join(_section(TEXTS[name], picture) for name, picture in pictures.items())
    said = " ".join(map(escape, facts))
    reasons = "".join(f"<li>query {query}: {escape(why)}</li>\n" for query, why in queries.items())
    body = f"<p>{said}</p>\n<ul>\n{reasons}</ul>\n<main>\n{sections}</main>\n{LINKS}"
    return html_page(heading, body)


def _section(text: Text, picture: bytes | str) -> str:
    if isinstance(picture, str):
        body = f'<p class="soft">{escape(picture)}</p>\n'
    else:
        figure = html_figure(data_uri(picture, "image/png"), text.alt, text.source)
        body = f"<p>{escape(text.reading)}</p>\n{figure}"
    return f"<section>\n<h2>{escape(text.title)}</h2>\n{body}</section>\n"
