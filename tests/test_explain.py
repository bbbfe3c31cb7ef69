"""The explaining pictures, the page that holds them, and the program explain.py."""

import base64
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from outputs import detector_output
from PIL import Image
from test_predecessors import DETR, DN_DETR, make_small
from torch.nn import functional as F

from dino_d2 import modeling, visualize
from dino_d2.boxes import cxcywh_to_xyxy, iou
from dino_d2.data import ResizeShortestEdge
from dino_d2.layers import ConditionalCrossAttention, ConditionalSelfAttention, DenseAttention
from dino_d2.modeling.masks import mask_logits
from dino_d2.modeling.matcher import instability
from dino_d2.modeling.positions import LearnedPosition
from dino_d2.modeling.query_selection import PointQueries
from dino_d2.predictor import Predictor
from dino_d2.resizing import resize_maps
from dino_d2.structures import FeaturePyramid, Predictions, Target
from dino_d2.trace import LayerTrace, StageMatching, denoised_boxes, image_masks, trace
from dino_d2.visualize import (
    draw_attention_maps,
    draw_denoising,
    draw_masks,
    draw_matching,
    draw_proposals,
    draw_refinement,
    draw_sampling,
    draw_self_attention,
    explanation_page,
    surest_queries,
)
from dino_d2.visualize.canvas import show_image, title_of, zoom_to
from dino_d2.visualize.explain_attention import ATTENDED
from dino_d2.visualize.explain_page import TEXTS

sys.path.insert(0, str(Path(__file__).parents[1] / "projects" / "dino"))
import explain  # noqa: E402

CLASSES = ["circle", "square", "star"]
SIZE = 80, 60  # width and height, of the images to draw on
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


class Points(PointQueries):
    def __init__(self, num_classes, **sizes):
        super().__init__(**sizes)


@pytest.fixture
def image():
    return Image.fromarray(np.full((SIZE[1], SIZE[0], 3), 127, dtype=np.uint8))


@pytest.fixture
def make_traced(make_dino, make_batch, randomise):
    """A model, its trace of an image with so many boxes, and these."""

    def make(count=2, size=(60, 80), **options):
        model = randomise(make_dino(**options), std=0.1).eval()
        batch = make_batch(count, sizes=[size])
        (target,) = model.prepare_targets(batch)
        denoised = [target] if model.denoising else None
        return model, trace(model, model.preprocess_images(batch), denoised), target

    return make


def in_pixels(boxes):
    return cxcywh_to_xyxy(boxes) * torch.tensor(SIZE).tile(2)


def drawn(axes, colour=None):
    """Corners (n, 4) of the boxes that are drawn, of a colour if one is given."""
    boxes = [
        x
        for x in axes.patches
        if isinstance(x, Rectangle)
        and (colour is None or same_color(x.get_edgecolor()[:3], colour))
    ]
    return torch.tensor(
        [[*x.get_xy(), x.get_x() + x.get_width(), x.get_y() + x.get_height()] for x in boxes]
    )


# ---- inference


def test_the_surest_queries_come_first():
    scores = torch.tensor([[[0.0, 0.7], [0.9, 0.1], [0.2, 0.1], [0.7, 0.8]]])
    traced = explain.Trace(None, (), None, [], [scores])
    assert surest_queries(traced) == [1, 3, 0]
    assert surest_queries(traced, 9) == [1, 3, 0, 2]


def test_every_selected_token_has_a_marker_and_every_explained_query_its_proposal(
    make_traced, image
):
    _, traced, target = make_traced()
    figure = draw_proposals(image, traced, [4, 7], CLASSES)
    left, right = figure.axes[:2]
    markers = [torch.as_tensor(x.get_offsets().data) for x in left.collections]
    for level, places in enumerate(markers):
        centers = traced.selection.centers[0, traced.selection.levels[0] == level]
        torch.testing.assert_close(places.float(), centers * torch.tensor(SIZE))
    assert sum(map(len, markers)) == 20
    boxes = drawn(right)
    assert len(boxes) == 20 + 2
    torch.testing.assert_close(boxes[-2:], in_pixels(traced.selection.boxes[0, [4, 7]]))
    figure = draw_proposals(image, traced, [4, 7], CLASSES, target)
    torch.testing.assert_close(drawn(figure.axes[1], "black"), in_pixels(target.boxes))
    legend = figure.axes[3].get_legend()
    assert [x.get_text() for x in legend.get_texts()][-1] == "ground truth"


def test_a_box_is_drawn_as_it_starts_and_after_every_layer(make_traced, image):
    _, traced, _ = make_traced()
    layers = traced.output.result.layers
    figure = draw_refinement(image, traced, [4, 7], CLASSES)
    for query, (picture, chart) in zip((4, 7), np.reshape(figure.axes, (2, 2)), strict=True):
        boxes = torch.stack([x.boxes[0, query] for x in (traced.output.result.proposals, *layers)])
        torch.testing.assert_close(drawn(picture), in_pixels(boxes))
        overlap, score = (torch.tensor(np.array(x.get_ydata())).float() for x in chart.lines)
        corners = cxcywh_to_xyxy(boxes)
        torch.testing.assert_close(overlap, iou(corners, corners[-1]))
        label = layers[-1].logits[0, query].argmax()
        expected = torch.stack([x.logits[0, query, label].sigmoid() for x in layers])
        torch.testing.assert_close(score, expected)


@pytest.fixture
def traced_masks(make_mask_dino, make_mask_batch, randomise):
    """A Mask DINO's trace of an image that is padded, from 58 x 78 to 60 x 80."""
    model = randomise(make_mask_dino(), std=0.1).eval()
    return trace(model, model.preprocess_images(make_mask_batch(2, sizes=[(58, 78)])))


def test_masks_are_those_of_the_image_without_its_padding(traced_masks):
    masks, pixels = traced_masks.output.result.layers[-1].masks[0, :3], traced_masks.output.pixels
    maps = resize_maps(mask_logits(masks, pixels.maps[0]), 4, (58, 78), (58, 78))
    torch.testing.assert_close(image_masks(masks, pixels, (58, 78)), maps, atol=1e-4, rtol=1e-4)


def test_a_mask_is_drawn_as_it_starts_and_after_every_layer(traced_masks, image):
    figure = draw_masks(image, traced_masks, [4, 7], CLASSES)
    layers = traced_masks.output.result.layers
    assert len(layers) == 3 and len(figure.axes) == 2 * 3
    for i, axes in enumerate(figure.axes):
        query, stage = (4, 7)[i // 3], i % 3
        masks = torch.stack([x.masks[0, query] for x in layers])
        maps = image_masks(masks, traced_masks.output.pixels, SIZE[::-1])
        shade = torch.as_tensor(np.asarray(axes.images[-1].get_array()))[..., 3]
        torch.testing.assert_close(shade, 0.75 * maps[stage].sigmoid())
        for line in axes.collections:  # passes between pixels of either sign
            for x, y in line.get_paths()[0].vertices.round().astype(int).tolist():
                near = maps[stage, max(y - 1, 0) : y + 1, max(x - 1, 0) : x + 1] > 0
                assert near.any() and not near.all()
        found = maps > 0
        shared, joint = (found[stage] & found[-1]).sum(), (found[stage] | found[-1]).sum()
        assert axes.get_title().endswith(f"IoU {shared / joint.clamp(min=1):.2f}")


def test_a_point_has_no_box_to_start_with(make_traced, image):
    _, traced, _ = make_traced(
        query_selection=Points, denoising=None, position_head=LearnedPosition()
    )
    picture, chart = draw_refinement(image, traced, [3], CLASSES).axes
    assert len(drawn(picture)) == 2  # of two layers
    (point,) = picture.lines
    expected = traced.layers[0].reference[0, 3] * torch.tensor(SIZE)
    assert np.ravel(point.get_xydata()).tolist() == pytest.approx(expected.tolist())
    assert chart.lines[0].get_xdata().tolist() == [1, 2]


def test_sampling_points_are_where_they_are_and_as_large_as_they_weigh(make_traced, image):
    _, traced, _ = make_traced()
    figure = draw_sampling(image, traced, [4, 7], CLASSES)
    layer = traced.layers[-1]
    grid = np.reshape(figure.axes, (2, len(traced.shapes)))
    for query, row in zip((4, 7), grid, strict=True):
        for level, axes in enumerate(row):
            for head, points in enumerate(axes.collections):
                places = layer.locations[0, query, head, level] * torch.tensor(SIZE)
                assert np.allclose(points.get_offsets(), places, atol=1e-3)
                weights = layer.weights[0, query, head, level]
                sizes = points.get_sizes()
                assert np.allclose(sizes / sizes.sum(), weights / weights.sum())
        shares = [int(re.match(r"\d+", axes.get_xlabel())[0]) for axes in row]
        assert sum(shares) == pytest.approx(100, abs=2)


@pytest.mark.parametrize("name", [DETR, DN_DETR])
def test_maps_show_what_queries_and_the_token_at_their_centre_attend_to(
    name, make_batch, image, randomise
):
    model = randomise(make_small(name), std=0.2).eval()
    batch = make_batch(1, sizes=[(64, 96)])
    traced = trace(model, model.preprocess_images(batch))
    with torch.no_grad():
        (result,) = model(batch)
    torch.testing.assert_close(result["instances"].scores[0], traced.scores[-1].max())
    assert traced.shapes == ((2, 3),) and len(traced.layers) == 3
    assert all(x.locations is None and x.weights is None for x in traced.layers)
    maps = [traced.encoder_attention, *(x.attention for x in traced.layers)]
    maps += [x.self_attention for x in traced.layers]
    assert [x.shape[1:] for x in maps] == [(6, 6), *[(10, 6)] * 3, *[(10, 10)] * 3]
    assert all(torch.allclose(x.sum(-1), torch.tensor(1.0)) for x in maps)
    figure = draw_attention_maps(image, traced, [4, 7], CLASSES)
    for query, (left, right) in zip((4, 7), np.reshape(figure.axes, (2, 2)), strict=True):
        x, y = traced.output.result.layers[-1].boxes[0, query, :2].tolist()
        token = int(y * 2) * 3 + int(x * 3)
        seen = traced.layers[-1].attention[0, query], traced.encoder_attention[0, token]
        for axes, weights in zip((left, right), seen, strict=True):
            colours = torch.as_tensor(np.asarray(axes.images[1].get_array()))
            torch.testing.assert_close(colours, (weights / weights.max()).view(2, 3))
    figure.draw_without_rendering()


def test_weights_of_attention_are_those_that_it_uses(randomise):
    """With a single head, values are averaged by them."""
    x, position, sine = torch.randn(3, 2, 5, 8)
    padding = torch.zeros(2, 3, dtype=torch.bool)
    padding[1, 2:] = True
    memory = FeaturePyramid(*torch.randn(2, 2, 3, 8), padding, torch.ones(2, 1, 2), ((1, 3),))
    dense = randomise(DenseAttention(embed_dim=8, num_heads=1))
    value = F.linear(memory.tokens, dense.in_proj_weight[16:], dense.in_proj_bias[16:])
    expected = dense.out_proj(dense.weights(x, memory) @ value)
    torch.testing.assert_close(dense(x, memory), expected)
    cross = randomise(ConditionalCrossAttention(embed_dim=8, num_heads=1, first=True))
    args = x, position, sine, memory
    expected = cross.output(cross.weights(*args) @ cross.value(memory.tokens))
    torch.testing.assert_close(cross(*args), expected)
    itself = randomise(ConditionalSelfAttention(embed_dim=8, num_heads=1))
    for mask in (None, torch.eye(5, dtype=torch.bool), torch.randn(5, 5)):
        expected = itself.output(itself.weights(x, position, mask) @ itself.value(x))
        torch.testing.assert_close(itself(x, position, mask), expected)


def attention_of(weights, boxes):
    """A trace of one layer whose queries have the given attention (Q, Q) and boxes (Q, 4)."""
    count = len(boxes)
    layer = LayerTrace(boxes[None], weights[None], torch.zeros(0), torch.zeros(0))
    predictions = Predictions(torch.zeros(1, count, 3), boxes[None])
    output = explain.Trace(None, (), None, [layer], [torch.full((1, count, 3), 0.5)])
    return output._replace(output=detector_output([predictions]))


def bars(axes):
    """Heights of the bars, of one layer, and the line of even attention."""
    return [x[0].get_height() for x in axes.containers], axes.lines[0].get_ydata()[0]


def test_attention_is_shared_out_among_oneself_competitors_and_others(image):
    boxes = torch.tensor([[0.3, 0.3, 0.2, 0.2]]).repeat(4, 1)
    boxes[2:, 0] = 0.8  # two queries are elsewhere
    weights = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).repeat(4, 1)
    figure = draw_self_attention(image, attention_of(weights, boxes), [0], CLASSES)
    heights, even = bars(figure.axes[1])
    assert heights == pytest.approx([40, 30, 30])
    assert even == pytest.approx(50)


def test_lines_lead_to_the_queries_that_are_attended_to_most(image):
    boxes = torch.rand(30, 4) * 0.2 + 0.4
    weights = torch.rand(30, 30)
    weights[5, 5] = 2  # most of all to itself, which is no line
    figure = draw_self_attention(image, attention_of(weights, boxes), [5], CLASSES)
    picture = figure.axes[0]
    weights[5, 5] = 0
    best = weights[5].topk(ATTENDED).indices.flip(0)
    torch.testing.assert_close(drawn(picture), in_pixels(boxes[[*best.tolist(), 5]]))
    ends = torch.stack([torch.tensor(x.get_xydata()[1]) for x in picture.lines]).float()
    torch.testing.assert_close(ends, boxes[best, :2] * torch.tensor(SIZE))


def test_a_query_may_be_alone(image):
    traced = attention_of(torch.ones(1, 1), torch.full((1, 4), 0.5))
    figure = draw_self_attention(image, traced, [0], CLASSES)
    assert bars(figure.axes[1])[0] == [100, 0, 0]


def test_the_picture_of_points_goes_by_the_boxes_that_they_become(make_traced, image):
    _, traced, _ = make_traced(
        query_selection=Points, denoising=None, position_head=LearnedPosition(), look_forward=0
    )
    picture = draw_self_attention(image, traced, [3], CLASSES).axes[0]
    expected = in_pixels(traced.output.result.layers[-1].boxes[0, 3])
    torch.testing.assert_close(drawn(picture, "black")[0], expected)


# ---- what they share


@pytest.mark.parametrize(
    "corners",
    [
        [10, 20, 30, 40],
        [-500, -10, 20, 20],  # leaves the image
        [0, 0, 80, 60],
        [79, 59, 79, 59],
        [-5000, -5000, 5000, 5000],
    ],
    ids=str,
)
def test_a_square_around_boxes_is_shown(image, corners):
    axes = Figure().subplots()
    show_image(axes, image)
    zoom_to(axes, image, torch.tensor([corners], dtype=torch.float32))
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert right - left == pytest.approx(bottom - top)
    assert 0.2 * 80 <= right - left <= 1.3 * 80 + 0.01
    margin = 0.15 * 80
    assert left <= max(corners[0], -margin) + 0.01
    assert top <= max(corners[1], -margin) + 0.01
    assert right >= min(corners[2], 80 + margin) - 0.01
    assert bottom >= min(corners[3], 60 + margin) - 0.01


def test_boxes_are_in_the_middle_where_there_is_room(image):
    axes = Figure().subplots()
    show_image(axes, image)
    zoom_to(axes, image, torch.tensor([[30.0, 20.0, 40.0, 40.0], [35.0, 25.0, 50.0, 30.0]]))
    assert axes.get_xlim() == (25, 55) and axes.get_ylim() == (45, 15)


def test_the_ground_beside_the_image_is_not_shown_without_need(image):
    axes = Figure().subplots()
    show_image(axes, image)
    zoom_to(axes, image, torch.tensor([[0.0, 0.0, 20.0, 20.0]]))
    assert axes.get_xlim() == (0, 30) and axes.get_ylim() == (30, 0)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_images_of_every_mode_are_shown(image, mode):
    axes = Figure().subplots()
    show_image(axes, image.convert(mode), dim=0.5)
    shown = axes.images[0]
    assert shown.get_extent() == [0, 80, 60, 0] and shown.get_array().shape == (60, 80, 3)


def test_huge_images_are_made_smaller_and_keep_their_coordinates():
    axes = Figure().subplots()
    show_image(axes, Image.new("L", (10, 6000)))
    assert axes.images[0].get_extent() == [0, 10, 6000, 0]
    assert max(axes.images[0].get_array().shape) <= 1600


@pytest.mark.parametrize("size", [(1, 500), (500, 1)])
def test_an_image_that_would_be_a_line_is_stretched(size):
    axes = Figure((4, 4)).subplots()
    show_image(axes, Image.new("RGB", size))
    axes.apply_aspect()
    shown = axes.get_position()
    assert 0.5 < shown.width / shown.height < 2


def test_the_legend_of_sampling_points_covers_no_caption(make_traced, image):
    figure = draw_sampling(image, make_traced()[1], [3], CLASSES)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    captions = [axes.xaxis.label.get_window_extent() for axes in figure.axes]
    box = legend.get_window_extent()  # in pixels
    assert box.y0 < 1  # at the very edge: the layout keeps no room for more
    assert box.y1 + 3 < min(caption.y0 for caption in captions)


def test_names_of_classes_are_no_formulas():
    scores = torch.zeros(1, 1, 1)
    assert title_of(0, scores, ["$1 and $5 " + "x" * 50]).startswith(r"query 0: \$1 and \$5")
    assert len(title_of(0, scores, ["long " * 50])) < 60


# ---- training


@pytest.mark.parametrize("kind, copies", [("Denoising", 1), ("ContrastiveDenoising", 2)])
@pytest.mark.parametrize("budget, shown", [(2, 1), (8, 3)])
def test_noised_boxes_go_in_and_denoised_ones_come_out(
    make_traced, image, kind, copies, budget, shown
):
    _, traced, target = make_traced(denoising=getattr(modeling, kind), budget=budget)
    denoised = denoised_boxes(traced.output, target)
    figure = draw_denoising(image, denoised)
    *pictures, chart, histogram = [axes for part in figure.subfigs for axes in part.axes]
    assert len(pictures) == 2 * shown
    for group in range(shown):
        given, answer = pictures[group], pictures[shown + group]
        truth = in_pixels(target.boxes)
        for axes, boxes in ((given, denoised.noised), (answer, denoised.boxes)):
            expected = torch.cat([truth, in_pixels(boxes[group].flatten(0, 1))])
            torch.testing.assert_close(drawn(axes), expected)
        faint = [x.get_alpha() for x in answer.patches[2:]]
        assert np.array_equal(np.argsort(faint), denoised.scores[group].flatten().argsort())
        assert 0 < min(faint) and max(faint) <= 1
    truth = cxcywh_to_xyxy(target.boxes)
    for copy, points in enumerate(chart.collections):
        before, after = (
            iou(cxcywh_to_xyxy(x[:, copy]), truth).flatten()
            for x in (denoised.noised, denoised.boxes)
        )
        assert np.allclose(points.get_offsets(), torch.stack([before, after], 1), atol=1e-6)
    assert len(chart.collections) == len(histogram.containers) == copies
    for container in histogram.containers:
        assert sum(bar.get_height() for bar in container) == pytest.approx(100)


def test_of_many_noised_boxes_the_largest_are_drawn(make_traced, image):
    _, traced, target = make_traced(count=12, budget=12)
    denoised = denoised_boxes(traced.output, target)
    given = draw_denoising(image, denoised).subfigs[0].axes[0]
    largest = denoised.truth.boxes[:, 2:].prod(-1).topk(8).indices.sort().values
    torch.testing.assert_close(drawn(given, "black"), in_pixels(denoised.truth.boxes[largest]))
    assert len(drawn(given)) == 3 * 8 and "8 largest" in given.get_title()


def test_the_table_says_which_query_a_box_has_and_where_it_is_another(image):
    queries = torch.tensor([[4, 1, -1], [4, 2, -1], [3, 2, 1]])
    target = Target(torch.tensor([0, 1, 2]), torch.full((3, 4), 0.5))
    predictions = Predictions(torch.zeros(1, 5, 3), torch.rand(1, 5, 4))
    matching = StageMatching(["proposals", "layer 1", "layer 2"], queries)
    figure = draw_matching(image, target, matching, predictions, CLASSES)
    picture, table = figure.axes
    cells = {
        tuple(map(int, x.get_position())): x.get_text().replace("none", "-1") for x in table.texts
    }
    assert cells == {(i, j): str(int(queries[i, j])) for i in range(3) for j in range(3)}
    marked = torch.as_tensor(np.array(table.images[0].get_array()))
    assert marked.tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 1]]  # of each box
    ticks = [x.get_text() for x in table.get_xticklabels()]
    assert ticks == ["proposals\n", "layer 1\n33%", "layer 2\n67%"]
    assert instability(queries).tolist() == pytest.approx([1 / 3, 2 / 3])
    torch.testing.assert_close(
        drawn(picture, "#0072b2"), in_pixels(predictions.boxes[0, [3, 2, 1]])
    )


def test_a_box_without_a_query_is_drawn_alone(image):
    matching = StageMatching(["layer 1"], torch.tensor([[0, -1]]))
    target = Target(torch.tensor([0, 1]), torch.full((2, 4), 0.5))
    predictions = Predictions(torch.zeros(1, 1, 3), torch.rand(1, 1, 4))
    picture, table = draw_matching(image, target, matching, predictions, CLASSES).axes
    assert len(drawn(picture, "black")) == 2 and len(drawn(picture, "#0072b2")) == 1
    assert [x.get_text() for x in table.texts] == ["0", "none"]


def test_of_many_boxes_the_largest_are_listed(image, make_targets, make_predictions):
    (target,), predictions = make_targets(25), make_predictions(1, num_queries=50)
    order = target.boxes[:, 2:].prod(-1).argsort(descending=True)
    queries = torch.arange(25).tile(2, 1)
    queries[1, order[20:]] += 25  # of none that is listed
    matching = StageMatching(["layer 1", "layer 2"], queries)
    picture, table = draw_matching(image, target, matching, predictions, CLASSES).axes
    expected = in_pixels(target.boxes[order[:20].sort().values])
    torch.testing.assert_close(drawn(picture, "black"), expected)
    assert len(table.get_yticklabels()) == 20 and not table.images[0].get_array().any()
    assert "20 largest" in table.get_title() and "25 boxes" in table.get_xlabel()
    assert table.get_xticklabels()[1].get_text() == "layer 2\n20%"


# ---- the page


class Page(HTMLParser):
    """Its images and text; fails where tags are not closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.sources, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.images += [attrs] if tag == "img" else []
        self.sources += [attrs[name] for name in ("src", "href") if name in attrs]
        assert tag not in ("script", "link")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_no_other_file():
    png = BytesIO()
    Image.new("RGB", (3, 2)).save(png, "PNG")
    pictures = dict.fromkeys(TEXTS, png.getvalue()) | {"matching": "There is <none>."}
    page = Page(explanation_page("About <a & b>", ["One.", "Two < three."], {7: "a < b"}, pictures))
    assert "query 7: a < b" in page.text
    assert "About <a & b>" in page.text and "Two < three." in page.text
    assert "There is <none>." in page.text and TEXTS["matching"].reading not in page.text
    assert len(page.images) == len(TEXTS) - 1 and all(len(x["alt"]) > 20 for x in page.images)
    assert {base64.b64decode(x["src"].split(",")[1]) for x in page.images} == {png.getvalue()}
    links = [x for x in page.sources if not x.startswith("data:image/png;base64,")]
    assert all(x.startswith("https://arxiv.org/abs/") for x in links)
    for name, text in TEXTS.items():
        assert text.title in page.text
        assert (text.source in page.text) == (name != "matching")


# ---- the program


@pytest.fixture
def dataset(tmp_path):
    """Two images of which the second has boxes, in a folder of their own."""
    folder = tmp_path / "images"
    folder.mkdir()
    names = ["empty.png", "full.png"]
    for name in names:
        Image.effect_noise(SIZE, 60).save(folder / name)  # grey
    images = [
        {"id": i, "file_name": name, "width": SIZE[0], "height": SIZE[1]}
        for i, name in enumerate(names)
    ]
    boxes = [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [8, 6, 40, 30]},
        {"id": 2, "image_id": 1, "category_id": 7, "bbox": [60, 30, 40, 20]},  # leaves the image
        {"id": 3, "image_id": 1, "category_id": 7, "bbox": [0, 0, 80, 60], "iscrowd": 1},
    ]
    for box in boxes:
        box["area"] = box["bbox"][2] * box["bbox"][3]
    # Neither all classes of the model, nor in its order.
    categories = [{"id": 3, "name": "star"}, {"id": 7, "name": "circle"}]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (tmp_path / "all.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def run(monkeypatch, make_dino, randomise, dataset):
    """The program on a small model; what it complains about, if it does."""
    monkeypatch.chdir(dataset)

    def run(*words, classes=CLASSES, image_format="RGB", make=make_dino, **options):
        model = randomise(make(**options), std=0.1).eval()
        resize = [ResizeShortestEdge(64, 100)]
        predictor = Predictor(
            model, classes=classes, augmentations=resize, image_format=image_format
        )
        monkeypatch.setattr(explain.dino_d2, "load", lambda *_: predictor)
        words = ["explain.py", "--config-file", "tiny", "--output", "out", *map(str, words)]
        monkeypatch.setattr(sys, "argv", words)
        try:
            explain.main()
        except SystemExit as end:
            return str(end.code)
        return None

    return run


@pytest.fixture
def sketch(monkeypatch):
    """Empty pictures, in no time; what they were to be drawn of, by name."""
    calls = defaultdict(list)
    for name in [x for x in vars(visualize) if x.startswith("draw_") and hasattr(explain, x)]:
        monkeypatch.setattr(
            explain, name, lambda *args, name=name: calls[name].append(args) or Figure((1, 1))
        )
    return calls


TRUTH = "--annotations", "all.json", "--images", "images"


def test_ground_truth_is_that_of_the_model_s_classes_relative_to_the_image(dataset, monkeypatch):
    monkeypatch.chdir(dataset)
    record, classes = explain.find_record("all.json@images", None)
    target = explain.to_target(record, classes, CLASSES)
    assert target.labels.tolist() == [2, 0]  # star and circle; no crowd
    expected = torch.tensor([[28 / 80, 21 / 60, 0.5, 0.5], [70 / 80, 40 / 60, 0.25, 20 / 60]])
    torch.testing.assert_close(target.boxes, expected)


BOXES = torch.tensor(
    [
        *([0.25, 0.25, 0.3, 0.3], [0.75, 0.75, 0.4, 0.4], [0.25, 0.75, 0.1, 0.1]),
        *([0.25, 0.26, 0.3, 0.3], [0.75, 0.80, 0.4, 0.4], [0.85, 0.25, 0.2, 0.2]),
    ]
)
LOW = [0.1, 0.1, 0.1]


@pytest.fixture
def explained(make_dino):
    """What is explained of a prediction of `BOXES` with scores, and of which detections."""

    def explain_scores(scores, truth, thresholds=None, asked=(), nms=None):
        model = make_dino().eval()
        model.nms = nms
        predictor = Predictor(model, classes=CLASSES, augmentations=[], image_format="RGB")
        predictor.thresholds = thresholds or {}
        scores = torch.tensor(scores)[None]
        predictions = Predictions(scores.logit(), BOXES[None])
        traced = explain.Trace(detector_output([predictions]), (), None, [], [scores])
        corners = in_pixels(BOXES[[i for i, *_ in truth]]).tolist()
        annotations = [
            {
                "bbox": [x, y, x_end - x, y_end - y],
                "category_id": label,
                "iscrowd": int(bool(crowd)),
            }
            for (x, y, x_end, y_end), (_, label, *crowd) in zip(corners, truth, strict=True)
        ]
        objects = [(i, label) for i, label, *crowd in truth if not crowd]
        target = Target(
            torch.tensor([label for _, label in objects], dtype=torch.int64),
            BOXES[[i for i, _ in objects]].view(-1, 4),
        )
        subject = explain.Subject("", Image.new("RGB", SIZE), target, annotations)
        return explain.choose(list(asked), subject, traced, predictor)

    return explain_scores


def test_a_right_a_wrong_and_a_missed_detection_are_explained(explained):
    """Query 0 is right, 3 its duplicate, 4 is on the missed square, and 5 on a crowd region."""
    scores = [[0.8, *LOW[1:]], LOW, LOW, [0.7, *LOW[1:]], [0.1, 0.4, 0.1], [0.1, 0.1, 0.95]]
    truth = [(0, 0), (1, 1), (2, 2), (5, 2, "crowd")]
    assert explained(scores, truth) == {
        0: "the most confident correct detection, circle 0.80",
        3: "the most confident false positive, circle 0.70 (duplicate)",
        4: "matched with the largest missed object, square: its IoU is 0.78, its score for this "
        "class 0.40",
    }
    found = explained(scores, truth, thresholds={"square": 0.3})
    assert list(found) == [0, 3, 2]  # the next missed one is the star
    assert list(explained(scores, truth, asked=[5, 1])) == [5, 1]


def test_a_query_may_be_explained_for_two_reasons_and_the_surest_fill_up(explained):
    scores = [[0.1, 0.9, 0.1], LOW, [0.2, 0.1, 0.1], LOW, LOW, [0.3, 0.1, 0.1]]
    wrong = (
        "the most confident false positive, square 0.90 (classification); matched with the largest"
    )
    found = explained(scores, [(0, 0)])
    assert list(found) == [0, 5, 2] and found[0].startswith(wrong)
    assert found[5] == found[2] == "one of the highest scores"


def test_what_nms_suppresses_is_no_false_positive(explained):
    scores = [[0.8, *LOW[1:]], LOW, LOW, [0.7, *LOW[1:]], LOW, LOW]
    assert "duplicate" in explained(scores, [(0, 0)])[3]
    assert explained(scores, [(0, 0)], nms=0.8)[3] == "one of the highest scores"


def test_an_image_of_nothing_but_crowds_is_not_the_first_with_boxes(dataset, monkeypatch):
    monkeypatch.chdir(dataset)
    content = json.loads((dataset / "all.json").read_text())
    crowd = {"id": 4, "image_id": 0, "category_id": 3, "bbox": [0, 0, 9, 9], "area": 81}
    content["annotations"].append(crowd | {"iscrowd": 1})
    (dataset / "all.json").write_text(json.dumps(content))
    record, _ = explain.find_record("all.json@images", None)
    assert record["file_name"].endswith("full.png")


def test_a_model_of_one_channel_is_explained_on_the_image_in_colours(run, sketch):
    assert run(*TRUTH, image_format="L", colours=1) is None
    assert {call[0].mode for calls in sketch.values() for call in calls} == {"RGB"}


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--annotations", "nothing.json", "--images", "images"], "'nothing.json' does not exist"),
        (["--annotations", "al.json", "--images", "images"], "did you mean: 'all.json'"),
        (["--annotations", "all.json", "--images", "image"], "folder 'image' does not exist"),
        (["--annotations", "all.txt", "--images", "images"], "'all.txt' is not a .json file"),
        ([*TRUTH, "--image", "ful.png"], "no image 'ful.png'; did you mean: full.png"),
        ([*TRUTH, "--query", "3", "20"], "no query 20 for this image: choose 0 to 19"),
        (["--input", "nothing.png"], "--input 'nothing.png' is not a file"),
        (["--input", "images/ful.png"], "is not a file; did you mean: 'images/full.png'"),
        (
            [*TRUTH, "--output", "all.json"],
            "--output 'all.json' is not writable (it is a file)",
        ),
        (["--input", "all.json"], "'all.json' cannot be read"),
        (["--input", "images"], "--input 'images' is not a file"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_be_explained_is_said_in_one_sentence(run, words, complaint):
    said = run(*words)
    assert said.startswith("explain.py: ") and complaint in said and "\n" not in said


def test_a_class_that_the_model_does_not_know_is_named_with_its_nearest(run):
    said = run(*TRUTH, classes=["cirkle", "square", "star"])
    assert "class 'circle'" in said and "did you mean: cirkle" in said


def test_an_image_of_another_size_than_annotated_is_refused(run, dataset):
    Image.new("RGB", (60, 80)).save(dataset / "images" / "full.png")
    assert "is 60 x 80 pixels" in run(*TRUTH)


@pytest.mark.parametrize(
    "words, complaint",
    [
        ([], "one of the arguments --input --annotations --data is required"),
        (["--annotations", "all.json"], "--annotations and --images go together"),
        (
            ["--input", "images/full.png", "--image", "full.png"],
            "--image names one of the annotated",
        ),
        (["--input", "images/full.png", *TRUTH], "not allowed with"),
        (["--input", "images/full.png", "--query", *range(9)], "at most 8 queries, not 9"),
        ([*TRUTH, "--seed", 10**20], "--seed is a number from 0 to"),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "",
)
def test_options_that_do_not_fit_are_refused(run, words, complaint, capsys):
    assert run(*words) == "2"
    assert complaint in capsys.readouterr().err


PICTURES = [x for x in TEXTS if x not in ("attention", "masks")]  # of deformable attention
REASONS = {
    "selection": "The queries of this model are learned",
    "denoising": "This model is trained without denoising",
    "truth": "This needs an image with ground truth",
    "boxes": "The image has no boxes",
}


@pytest.mark.parametrize(
    "words, options, missing",
    [
        (TRUTH, {}, {}),
        (TRUTH, {"denoising": None}, {"denoising": "denoising"}),
        (
            ["--input", "images/empty.png"],
            {"query_selection": modeling.StaticQueries},
            {"proposals": "selection", "denoising": "truth", "matching": "truth"},
        ),
        (
            [*TRUTH, "--image", "empty.png"],
            {},
            {"denoising": "boxes", "matching": "boxes"},
        ),
    ],
    ids=["all", "no denoising", "learned queries", "no boxes"],
)
def test_what_a_model_or_an_image_has_not_is_said_instead(
    run, sketch, monkeypatch, words, options, missing
):
    written = []
    monkeypatch.setattr(explain, "write", lambda pictures, *_: written.append(pictures))
    assert run(*words, **options) is None
    (pictures,) = written
    assert list(pictures) == PICTURES
    said = {name: x for name, x in pictures.items() if isinstance(x, str)}
    assert said.keys() == missing.keys()
    assert all(said[name].startswith(REASONS[why]) for name, why in missing.items())


def test_masks_are_explained_and_matched(run, sketch, monkeypatch, make_mask_dino, dataset):
    content = json.loads((dataset / "all.json").read_text())
    content["annotations"][0]["segmentation"] = [[8, 6, 48, 6, 48, 36]]  # one has none
    (dataset / "masks.json").write_text(json.dumps(content))
    written = []
    monkeypatch.setattr(explain, "write", lambda pictures, *_: written.append(pictures))
    truth = "--annotations", "masks.json", "--images", "images"
    assert run(*truth, make=make_mask_dino) is None
    (pictures,) = written
    assert list(pictures) == [x for x in TEXTS if x != "attention"]
    ((_, target, matching, *_),) = sketch["draw_matching"]
    assert target.known.tolist() == [True, False] and target.masks[0].sum() == 600
    assert matching.stages == ["proposals", "start", "layer 1", "layer 2"]
    assert matching.queries.shape == (4, 2) and (matching.queries >= 0).all()


def test_an_interruption_is_one_sentence(run, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(explain, "trace", interrupt)
    assert run(*TRUTH).startswith("explain.py: interrupted")


def test_the_seed_draws_the_noise(run, sketch):
    for seed in (1, 2, 1):
        run(*TRUTH, "--seed", seed)
    noise = [denoised.noised for _, denoised in sketch["draw_denoising"]]
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])


@pytest.mark.slow
def test_the_page_and_its_pictures_are_written(run, dataset, capsys):
    assert run(*TRUTH, "--query", 3, 1, 3) is None
    assert "explain.html and its 6 figures are in 'out'" in capsys.readouterr().out
    page = Page((dataset / "out" / "explain.html").read_text(encoding="utf-8"))
    assert "How DINO sees full.png" in page.text and "resized to 85 × 64" in page.text
    assert "20 queries and 3 classes" in page.text and "query 3: chosen by --query" in page.text
    embedded = [base64.b64decode(x["src"].split(",")[1]) for x in page.images]
    assert embedded == [(dataset / "out" / f"{name}.png").read_bytes() for name in PICTURES]
    for data in embedded:
        assert len(np.unique(np.asarray(Image.open(BytesIO(data)).convert("L")))) > 50


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome")
def test_a_browser_shows_every_picture(run, sketch, dataset):
    assert run(*TRUTH) is None
    page = dataset / "out" / "explain.html"
    # What the page itself has not, and must not have: a script that writes down what was loaded.
    script = """<script>addEventListener("load", () => { document.title = "loaded " +
        [...document.images].filter(x => x.naturalWidth > 0).length + " of " +
        document.images.length + ", wide " +
        (document.documentElement.scrollWidth > innerWidth) })</script>"""
    page.write_text(page.read_text().replace("</head>", f"{script}</head>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900"]
    profile = f"--user-data-dir={dataset / 'profile'}"
    shown = subprocess.run(
        [*command, profile, "--virtual-time-budget=5000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=600,
    ).stdout
    assert re.search("<title>(.*?)</title>", shown)[1] == "loaded 6 of 6, wide false"
