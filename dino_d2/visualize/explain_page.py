"""An HTML page of the explaining pictures, with texts on how to read them."""

from collections.abc import Mapping
from html import escape
from typing import NamedTuple

from .page import data_uri, html_figure, html_page


class Text(NamedTuple):
    """Texts about a picture."""

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
        "Every layer corrects the box of the layer before: dark is the start, bright the last "
        "layer. The chart beside it shows how much each box has in common with the final one, and "
        "how sure the query is of its class.",
        "Deformable DETR, section 4.2; DINO, section 3.5",
    ),
    "masks": Text(
        "A mask through the layers of the decoder",
        "For each query a row of images with its mask, before the first layer and after each.",
        "A query's mask is its embedding, multiplied with that of every pixel. The stronger the "
        "colour, the surer the pixel is of the mask; inside the black line it belongs to it. The "
        "number is the IoU with the mask of the last layer.",
        "Mask DINO, section 3.3",
    ),
    "sampling": Text(
        "Where deformable attention looks",
        "For each query a row of images, one per level, with the sampling points of all heads.",
        "A query looks at a few points of each level only, at places that it chooses itself. "
        "Colours are heads and areas are weights, which sum to one for each head over all levels. "
        "Points of less than 2 % of the weight may lie outside of the part that is shown.",
        "Deformable DETR, section 4.1 and equation 3",
    ),
    "attention": Text(
        "Where attention looks",
        "For each query the image with its attention as a map, and that of a token beside it.",
        "A query looks at all tokens, at some more than at others (mean over heads, last layer): "
        "often at the ends of an object, which tell its box. On the right is what the token at "
        "the centre of the box looks at in the encoder's last layer: the object that it is a part "
        "of.",
        "DETR, sections 3.2 and 4.2",
    ),
    "self_attention": Text(
        "Which queries look at each other",
        "For each query the boxes that it attends to most, and bars that share out its attention.",
        "Queries see each other, so that one object is found once without non-maximum "
        "suppression. Lines lead from the query, in black, to those that it attends to most in "
        "the last layer (mean over heads). Where blue and orange end above the black line, a "
        "query watches itself and its competitors more than the others.",
        "DETR, sections 3.2 and 4.2",
    ),
    "denoising": Text(
        "The way back from noise",
        "Noised boxes of some groups, what the model made of them, and charts of all groups.",
        "In training, noised copies of the true boxes are queries of their own. Positives, in "
        "blue, are to find the way back to the black boxes; negatives, of contrastive denoising, "
        "in red and noised more, are to be rejected: they should come out faint. In the chart "
        "of boxes, points above the dotted line were improved.",
        "DN-DETR, section 4.3; DINO, section 3.3 and figure 3",
    ),
    "matching": Text(
        "Which query stands for which box",
        "The image with its true boxes and their queries, and a table of boxes by stages.",
        "Training assigns one query to each true box, anew in every stage. Each number is a "
        "query; a cell is orange where another one has taken over, which teaches queries contrary "
        "things. The share below each stage is the instability that training logs as "
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
