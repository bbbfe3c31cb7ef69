"""A page of HTML with the explaining pictures, each with what is seen and how to read it."""

import base64
from collections.abc import Mapping
from html import escape
from typing import NamedTuple


class Text(NamedTuple):
    """What is said about a picture."""

    title: str
    alt: str  # for those who do not see it
    reading: str
    source: str


TEXTS = {
    "proposals": Text(
        "From encoder tokens to queries",
        "The image twice: with a marker on every selected token, and with the proposed boxes.",
        "The encoder scores every token, one for each cell of its feature maps, and the best "
        "become the decoder's queries. On the left are their places, larger for coarser levels: "
        "they should gather on objects. On the right are the boxes that the encoder proposes "
        "there; those in colour became the detections that are named.",
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
    "sampling": Text(
        "Where deformable attention looks",
        "For each query a row of images, one per level, with the sampling points of all heads.",
        "A query looks at a few points of each level only, at places that it chooses itself. "
        "Colours are heads and areas are weights, which sum to one for each head over all levels. "
        "Points of less than 2 % of the weight may lie outside of the part that is shown.",
        "Deformable DETR, section 4.1 and equation 3",
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
        "in orange and noised more, are to be rejected: they should come out faint. In the chart "
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

STYLE = """
:root { color-scheme: light dark; --text: #1c1c1c; --ground: #fff; --soft: #5c5c5c; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --ground: #16181a; --soft: #a9a9a9; }
}
body { margin: 0 auto; max-width: 70rem; padding: 1rem; color: var(--text);
  background: var(--ground); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2 { line-height: 1.25; }
p { max-width: 44rem; }
figure { margin: 1rem 0 3rem; }
.scroll { overflow-x: auto; }
img { display: block; max-width: max(100%, 42rem); border-radius: 6px; background: #fff; }
.soft, footer { color: var(--soft); font-size: 0.9rem; }
"""


def html_page(heading: str, facts: list[str], pictures: Mapping[str, bytes | str]) -> str:
    """An HTML file that needs no other, so that it can be sent as it is.

    Args:
        heading: of the page
        facts: sentences below it
        pictures: by the names of `TEXTS`, in the order of the page: a PNG or, where there is none,
            a sentence that says why
    """
    sections = "".join(_section(TEXTS[name], picture) for name, picture in pictures.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(heading)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(heading)}</h1>
<p>{" ".join(map(escape, facts))}</p>
<main>
{sections}</main>
<footer><p>DINO <a href="https://arxiv.org/abs/2203.03605">2203.03605</a>, DN-DETR
<a href="https://arxiv.org/abs/2203.01305">2203.01305</a>, Deformable DETR
<a href="https://arxiv.org/abs/2010.04159">2010.04159</a>, DETR
<a href="https://arxiv.org/abs/2005.12872">2005.12872</a></p></footer>
</body>
</html>
"""


def _section(text: Text, picture: bytes | str) -> str:
    if isinstance(picture, str):
        body = f'<p class="soft">{escape(picture)}</p>'
    else:
        data = base64.b64encode(picture).decode()
        body = (
            f"<p>{escape(text.reading)}</p>\n"
            f'<figure><div class="scroll" role="region" tabindex="0" aria-label="picture">'
            f'<img alt="{escape(text.alt)}" src="data:image/png;base64,{data}"></div>\n'
            f'<figcaption class="soft">{escape(text.source)}</figcaption></figure>'
        )
    return f"<section>\n<h2>{escape(text.title)}</h2>\n{body}\n</section>\n"
