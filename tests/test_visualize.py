"""Pictures: boxes with labels, sheets, what training sees, and what a detector gets wrong."""

import base64
import io
import json
import sys
from collections import Counter, defaultdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image, ImageColor, ImageDraw

from dino_d2.data import generate
from dino_d2.engine.run import train
from dino_d2.visualize import (
    Mark,
    class_colour,
    contact_sheet,
    draw_instances,
    draw_marks,
    draw_segments,
    resize_long_side,
)
from dino_d2.visualize.images import inmost
from dino_d2.visualize.marks import ink_on, load_font
from dino_d2.visualize.style import escape_name
from dino_d2.weights.model_zoo import get_config_file

PROGRAMS = Path(__file__).parents[1] / "projects" / "dino"
sys.path.insert(0, str(PROGRAMS))
import visualize_data  # noqa: E402
import visualize_results  # noqa: E402

BLACK = Image.new("RGB", (200, 150))


def count(picture, colour):
    """Pixels of a colour."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.asarray(picture) == rgb).all(axis=-1).sum())


def arguments(program, *words):
    return program.argument_parser().parse_args([str(word) for word in words])


def run(monkeypatch, program, *words):
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, words)])
    program.main()


def complaint(monkeypatch, program, *words):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, program, *words)
    said = str(end.value)
    assert said == "2" or said.startswith(f"{program.__name__}.py: ") and "\n" not in said
    return said


# Boxes, labels and sheets


def test_a_box_is_drawn_where_it_is():
    pixels = np.asarray(draw_marks(BLACK, [Mark((50, 60, 120, 130), "", "#ff0000")]))
    rows, columns = np.nonzero(pixels[..., 0])
    found = columns.min(), rows.min(), columns.max(), rows.max()
    np.testing.assert_allclose(found, (50, 60, 120, 130), atol=1)
    assert not pixels[70:120, 60:110].any()


def test_the_image_that_is_drawn_into_stays():
    grey = Image.new("L", (60, 60))
    assert draw_marks(grey, [Mark((5, 5, 50, 50), "a", "#ff0000")]).mode == "RGB"
    assert grey.getextrema() == (0, 0)


def test_the_first_mark_is_on_top():
    boxes = (50, 60, 120, 130), (50, 60, 120, 100)
    colours = "#ff0000", "#00ff00"
    marks = [Mark(box, "", colour) for box, colour in zip(boxes, colours, strict=True)]
    picture = draw_marks(BLACK, marks)
    assert picture.getpixel((50, 80)) == (255, 0, 0)  # on the left side of both
    assert picture.getpixel((80, 100)) == (0, 255, 0)


def test_labels_cover_no_other_label_and_are_left_out_without_room():
    colours = [f"#0000{i:02x}" for i in range(100, 140)]
    marks = [Mark((50 + i, 60, 120, 130), "label", x) for i, x in enumerate(colours)]
    picture = draw_marks(BLACK, marks)
    whole = count(draw_marks(BLACK, marks[:1]), colours[0]) - count(
        draw_marks(BLACK, [marks[0]._replace(text="")]), colours[0]
    )
    drawn = [count(picture, colour) for colour in colours[1:]]  # the first has the line, too
    labels = [number for number in drawn if number]
    assert 3 < len(labels) < len(drawn)
    assert min(labels) > 0.9 * whole


def test_marks_of_one_box_are_the_first_with_a_label_of_them_all(monkeypatch):
    written = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *args, **_: written.append(args[1:3]))
    box, mask = (50, 60, 120, 130), np.ones((150, 200), bool)
    marks = [
        Mark(box, "cat 0.81", "#ff0000", mask=mask),
        Mark((10, 60, 40, 130), "bird 0.50", "#0000ff"),
        Mark((50.2, 60, 119.7, 130), "dog 0.40", "#00ff00", mask=mask),  # up to rounding
        Mark(box, "", "#ffff00"),
        Mark((52, 60, 120, 130), "fox 0.30", "#00ffff"),  # another box
    ]
    picture = draw_marks(BLACK, marks)
    texts = [text for _, text in written]
    assert texts == ["cat 0.81, ", "dog 0.40", "bird 0.50", "fox 0.30"]
    (left, top), (right, below) = (place for place, _ in written[:2])
    assert top == below and right == pytest.approx(left + load_font(12).getlength("cat 0.81, "))
    assert picture.getpixel((100, 100)) == (127, 0, 0)  # of one mask
    assert count(picture, "#ff0000") and count(picture, "#00ff00")  # each text has its colour
    assert not count(picture, "#ffff00")


def test_a_label_of_many_classes_ends_at_the_image(monkeypatch):
    written = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *args, **_: written.append(args[2]))
    draw_marks(BLACK, [Mark((50, 60, 120, 130), f"class {i} 0.50", "#ff0000") for i in range(80)])
    text = "".join(written)
    assert text.startswith("class 0 0.50, class 1 0.50") and text.endswith("…")
    assert BLACK.width - 20 < load_font(12).getlength(text) <= BLACK.width


def test_labels_stay_inside_the_image():
    box = (150, -5, 210, 160)
    plain = np.asarray(draw_marks(BLACK, [Mark(box, "", "#ff0000")])).astype(int)
    labelled = np.asarray(draw_marks(BLACK, [Mark(box, "some label", "#ff0000")])).astype(int)
    rows, columns = np.nonzero((plain != labelled).any(axis=-1))
    font_height = rows.max() - rows.min()
    assert font_height > 9 and columns.max() - columns.min() > 50


def test_dashes_leave_gaps():
    solid, dashed = (
        count(draw_marks(BLACK, [Mark((20, 30, 180, 130), "", "#ff0000", dash)]), "#ff0000")
        for dash in ((), (2, 2))
    )
    assert 0.4 < dashed / solid < 0.7


def test_a_box_without_any_side_is_drawn():
    assert count(draw_marks(BLACK, [Mark((20, 30, 20, 30), "", "#ff0000", (2, 2))]), "#ff0000")


@pytest.mark.parametrize(("colour", "ink"), [("#f0e442", "black"), ("#0072b2", "white")])
def test_ink_is_legible(colour, ink):
    assert ink_on(colour) == ink


def test_every_class_has_its_colour_in_a_picture():
    found = Instances((150, 200), pred_boxes=Boxes(torch.tensor([[10.0, 60, 60, 120]] * 2)))
    found.pred_boxes.tensor[1] += 70
    found.scores, found.pred_classes = torch.tensor([0.9, 0.8]), torch.tensor([1, 9])
    picture = draw_instances(BLACK, found, [f"class {i}" for i in range(10)])
    assert count(picture, class_colour(1)) and count(picture, class_colour(9))
    assert class_colour(2) == class_colour(9)


def test_segments_are_filled_bordered_and_named_at_their_middle():
    ids = torch.zeros(150, 200, dtype=torch.int32)
    ids[:, :100], ids[60:120, 120:180] = 1, 7
    segments = [{"id": 1, "category_id": 0}, {"id": 7, "category_id": 1}]
    plain, named = (
        np.asarray(draw_segments(BLACK, ids, segments, names)).astype(int)
        for names in (["", ""], ["sky", "cat"])
    )
    half = [[x // 2 for x in ImageColor.getrgb(class_colour(label))] for label in range(2)]
    assert (plain[10, 50] == half[0]).all() and (plain[90, 150] == half[1]).all()
    assert (plain[20, 150] == 0).all()
    assert (plain[20, 99:101] == 255).any() and (plain[90, 118:122] == 255).any()
    for label, (x, y), area in ((0, (50, 75), slice(0, 100)), (1, (150, 90), slice(100, None))):
        colour = ImageColor.getrgb(class_colour(label))
        rows, columns = (named[:, area] == colour).all(2).nonzero()
        middle = (columns.min() + columns.max()) / 2 + area.start, (rows.min() + rows.max()) / 2
        assert np.abs(np.subtract(middle, (x, y))).max() <= 3


@pytest.mark.parametrize(("shape", "off"), [((9, 13), 0), ((140, 20), 3)])
def test_the_inmost_pixel_is_far_from_others(shape, off):
    mask = np.zeros(shape, bool)
    for y, x in np.random.default_rng(0).integers(shape, size=(6, 2)):
        mask[y : y + shape[0] // 3, x : x + shape[1] // 3] = True
    pixels, others = np.argwhere(mask), np.argwhere(~np.pad(mask, 1)) - 1
    depths = np.linalg.norm(pixels[:, None] - others, axis=2).min(1)
    x, y = inmost(mask)
    (own,) = depths[(pixels == [y, x]).all(1)]
    assert own >= 0.9 * depths.max() - off  # of large masks, not every pixel is looked at


def test_fitting_keeps_the_shape_and_says_the_scale():
    picture, scale = resize_long_side(Image.new("L", (400, 1)), 100)
    assert picture.size == (100, 1) and scale == 0.25 and picture.mode == "RGB"


def test_a_sheet_holds_every_picture_whole():
    colours = ["#ff0000", "#00ff00", "#0000ff"]
    sizes = [(90, 60), (50, 80), (20, 20)]
    pictures = [
        (Image.new("RGB", size, colour), "caption " * 20)
        for size, colour in zip(sizes, colours, strict=True)
    ]
    sheet = contact_sheet(pictures, 2, "title", [Mark((), "text", "#ff00ff")])
    assert [count(sheet, colour) for colour in colours] == [w * h for w, h in sizes]
    assert count(sheet, "#ff00ff")


@pytest.mark.parametrize("width", [1, 12, 30])
def test_a_caption_without_room_is_left_out(width):
    pictures = [(Image.new("RGB", (width, 90), "#ff0000"), "caption")] * 9
    assert count(contact_sheet(pictures, 9, ""), "#ff0000") == 9 * 90 * width


def test_a_caption_has_the_room_that_the_title_makes():
    picture = Image.new("RGB", (20, 20), "#ff0000")
    title = "a title that is much wider than the picture"
    narrow, wide = (
        np.asarray(contact_sheet([(picture, "train_00017.jpg")], 1, text)) for text in ("", title)
    )
    lines = slice(50, 70)  # below the title
    assert (wide[lines, 100:] == 0).any() and narrow.shape[1] < 100


def test_letters_that_the_font_lacks_are_said_once(caplog, monkeypatch):
    monkeypatch.setattr("detectron2.utils.logger._LOG_COUNTER", Counter())
    box = (50, 60, 120, 130)
    draw_marks(BLACK, [Mark(box, "Käfer žluťoučký", "#ff0000")])
    assert not caplog.records
    for _ in range(2):
        draw_marks(BLACK, [Mark(box, "猫", "#ff0000")])
    (record,) = caplog.records
    assert "lacks characters of '猫'" in record.message


@pytest.mark.parametrize("break_", ["\n", "\r\n", "\t"])
def test_names_of_several_lines_are_drawn_on_one(break_):
    mark = Mark((50, 60, 120, 130), "two words", "#ff0000")
    broken = mark._replace(text=f"two{break_}words")
    pictures = [draw_marks(BLACK, [x]) for x in (mark, broken)]
    sheets = [contact_sheet([(BLACK, x.text)], 1, "title") for x in (mark, broken)]
    for one, other in (pictures, sheets):
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "length", "expected"),
    [
        ("cat", 3, "cat"),
        ("a name\nof lines", 99, "a name of lines"),
        ("withoutspaces", 8, "without…"),
        ("with spaces", 6, "with…"),
        ("$x$", 3, r"\$x\$"),
    ],
)
def test_names_are_cut_off_and_are_no_formulas(name, length, expected):
    assert escape_name(name, length) == expected


def test_a_long_title_fits_on_its_sheet():
    picture = [(Image.new("RGB", (20, 20)), "")]
    sheet = np.asarray(contact_sheet(picture, 4, "a long title " * 9))
    assert sheet.shape[1] > 1000 and (sheet[:, -8:] == 255).all()


# What training sees


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    generate(root, num_train=12, num_val=6)
    return root


def look(shapes, output, *words, style=".yaml"):
    return [
        *("--config-file", get_config_file(f"quickstart{style}"), "--output", output),
        *("--train-json", shapes / "train.json", "--train-images", shapes / "images", *words),
    ]


def source_of(shapes, *words, style=".yaml"):
    return visualize_data.load(
        arguments(visualize_data, *look(shapes, "unused", *words, style=style))
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("style", "words"),
    [
        (".yaml", ("MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "2")),
        (".py", ("train.device=cpu", "dataloader.train.total_batch_size=2")),
    ],
)
def test_what_is_shown_is_what_the_training_gets(shapes, tmp_path, style, words):
    source = source_of(shapes, *words, style=style)
    batches = []

    def build_model():
        model = source.plan.build_model()
        model.register_forward_pre_hook(lambda _, args: batches.append(args[0]))
        return model

    short = {"max_iter": 2, "ema_decay": None, "test_sets": (), "evaluate": lambda *_: {}}
    train(source.plan._replace(build_model=build_model, output_dir=str(tmp_path), **short))
    assert [len(batch) for batch in batches] == [2, 2]
    for iteration, batch in enumerate(batches):
        for sample, mine in zip(batch, visualize_data.samples(source, iteration), strict=False):
            boxes, shown = (x["instances"].gt_boxes.tensor for x in (sample, mine))
            assert mine["file_name"] == sample["file_name"]
            assert torch.equal(mine["image"], sample["image"]) and torch.equal(boxes, shown)


def test_where_the_config_has_no_seed_it_is_said(shapes, capsys):
    assert source_of(shapes).seed == 1 and not capsys.readouterr().out
    assert source_of(shapes, "SEED", "-1").seed == 0
    assert "no seed in the config" in capsys.readouterr().out


def test_an_iteration_has_as_many_batches_as_are_accumulated(shapes):
    whole = visualize_data.samples(source_of(shapes, "SOLVER.IMS_PER_BATCH", "4"), 1)
    words = ("SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATE", "2")
    parts = visualize_data.samples(source_of(shapes, *words), 1)
    for _ in range(4):
        assert torch.equal(next(whole)["image"], next(parts)["image"])


def test_boxes_are_around_the_shapes(shapes):
    source = source_of(shapes)
    for sample, _ in zip(visualize_data.samples(source, 0), range(6), strict=False):
        if len(sample["instances"]):
            break
    picture, caption = visualize_data.draw(sample, source, 480)
    plain = visualize_data.to_picture(sample["image"].permute(1, 2, 0), "RGB")
    plain = resize_long_side(plain, 480)[0]
    assert max(picture.size) == 480 and f"{len(sample['instances'])} boxes" in caption
    changed = (np.asarray(picture) != np.asarray(plain)).any(axis=-1)
    scale = 480 / max(sample["image"].shape[1:])
    for box in (scale * sample["instances"].gt_boxes.tensor).round().int().tolist():
        middle = (box[1] + box[3]) // 2
        assert changed[middle, max(box[0] - 3, 0) : box[0] + 4].any()
        assert changed[middle, box[2] - 4 : box[2] + 4].any()


def test_the_order_of_colours_is_undone(shapes):
    pictures = []
    for image_format in ("RGB", "BGR"):
        source = source_of(shapes, "INPUT.FORMAT", image_format)
        sample = next(visualize_data.samples(source, 0))
        image = sample["image"].permute(1, 2, 0)
        pictures.append(visualize_data.to_picture(image, source.image_format))
    assert np.array_equal(*map(np.asarray, pictures))


@pytest.mark.parametrize("image_format", ["L", "YUV-BT.601"])
def test_images_of_other_channels_are_shown(shapes, image_format):
    words = ("MODEL.PIXEL_MEAN", [0.4], "MODEL.PIXEL_STD", [0.2], "INPUT.RANDOM_FLIP", "none")
    colours = next(visualize_data.samples(source_of(shapes, *words[-2:]), 0))["image"]
    source = source_of(shapes, *words, "INPUT.FORMAT", image_format)
    picture, _ = visualize_data.draw(next(visualize_data.samples(source, 0)), source, None)
    grey = np.asarray(picture.convert("L")).astype(int)
    expected = Image.fromarray(colours.permute(1, 2, 0).numpy()).convert("L")
    assert np.median(abs(grey - np.asarray(expected))) <= 2  # beside the boxes


@pytest.mark.parametrize(
    ("style", "words"),
    [
        (".yaml", ("INPUT.MIXING.MOSAIC", "1", "INPUT.MIXING.SPAN", "(0.5,0.6)")),
        (".py", ("dataloader.mixing.mosaic=1", "dataloader.mixing.span=[0.5,0.6]")),
    ],
)
def test_mosaics_are_shown_where_training_has_them(shapes, style, words):
    source = source_of(shapes, *words, style=style)
    for iteration, others in ((1199, ""), (1200, " + 3"), (1439, " + 3"), (1440, "")):  # of 2400
        sample = next(visualize_data.samples(source, iteration))
        _, caption = visualize_data.draw(sample, source, None)
        assert caption.startswith(f"{Path(sample['file_name']).name}{others}  ")


def test_an_unknown_strength_of_an_augmentation_is_one_sentence(shapes, tmp_path, monkeypatch):
    words = look(shapes, tmp_path, "INPUT.PHOTOMETRIC", "20")
    assert "photometric augmentation is 20" in complaint(monkeypatch, visualize_data, *words)


def test_an_unknown_format_of_images_is_one_sentence(shapes, tmp_path, monkeypatch):
    words = look(shapes, tmp_path, "INPUT.FORMAT", "BRG")
    said = complaint(monkeypatch, visualize_data, *words)
    assert "image format is 'BRG'" in said and "did you mean: " in said


@pytest.mark.parametrize(
    ("style", "changes"),
    [
        (".yaml", ("INPUT.MIN_SIZE_TRAIN", "(32,)", "MODEL.DINO.NUM_QUERIES", 1)),
        (
            ".py",
            (
                "dataloader.train.mapper.augmentations.min_sizes=[32]",
                "model.query_selection.num_queries=1",
            ),
        ),
    ],
)
def test_small_boxes_and_more_boxes_than_queries_are_said(
    style, changes, shapes, tmp_path, monkeypatch, capsys
):
    run(monkeypatch, visualize_data, *look(shapes, tmp_path, *changes, style=style))
    said = capsys.readouterr().out
    assert "A tenth of the boxes is below 16 pixels" in said
    assert "than the model has queries (1)" in said


def test_the_program_shows_the_same_images_again(shapes, tmp_path, monkeypatch, capsys):
    for name, iteration in (("a", 3), ("b", 3), ("c", 4)):
        words = ("--iteration", iteration, "--num-images", 3, "--per-sheet", 1)
        run(monkeypatch, visualize_data, *look(shapes, tmp_path / name, *words))
    sheets = {x: sorted((tmp_path / x).iterdir()) for x in "abc"}
    assert [x.name for x in sheets["a"]] == [f"sheet_00{i}.png" for i in range(3)]
    a, b, c = ([x.read_bytes() for x in sheets[x]] for x in "abc")
    assert a == b != c
    said = capsys.readouterr().out
    assert "3 images" in said and "Boxes as trained: " in said


def test_a_sheet_has_as_many_images_as_are_asked_for(shapes, tmp_path, monkeypatch):
    run(monkeypatch, visualize_data, *look(shapes, tmp_path, "--num-images", 3, "--per-sheet", 2))
    widths = [Image.open(path).width for path in sorted(tmp_path.iterdir())]
    assert len(widths) == 2 and widths[0] > 1.5 * widths[1]


def test_one_picture_a_sheet_has_the_size_that_training_sees(shapes, tmp_path, monkeypatch):
    words = ("--num-images", 1, "--per-sheet", 1)
    run(monkeypatch, visualize_data, *look(shapes, tmp_path, *words))
    height, width = next(visualize_data.samples(source_of(shapes), 0))["image"].shape[1:]
    shown = np.asarray(Image.open(tmp_path / "sheet_000.png"))
    right, bottom = 12 + width, shown.shape[0] - 12
    assert (shown[bottom - height : bottom, 12:right] != 255).any(axis=-1).mean() > 0.95
    assert (shown[bottom:] == 255).all() and (shown[bottom - height : bottom, right:] == 255).all()


def test_data_that_cannot_be_shown_are_refused_in_one_sentence(
    shapes, tmp_path, monkeypatch, capsys
):
    def says(*words):
        return complaint(monkeypatch, visualize_data, *words)

    base = look(shapes, tmp_path)
    assert "trian.json" in says(*base[:4], "--train-json", "trian.json", "--train-images", shapes)
    assert "did you mean" in says(*base, "INPUT.RANDOM_FLOP", "none")
    assert "quickstart" in says("--config-file", "quickstat", *base[2:])
    assert says(*base, "--num-images", "0") == "2" and "1 or more" in capsys.readouterr().err
    assert says(*base[:6]) == "2" and "go together" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert "(it is a file)" in says(*base, "--output", tmp_path / "file")
    assert "there is no data" in says(*base[:4], "DATASETS.TRAIN", "()")


def test_a_damaged_image_is_named(shapes, tmp_path, monkeypatch):
    images = tmp_path / "images"
    images.mkdir()
    for path in (shapes / "images").iterdir():
        (images / path.name).write_bytes(path.read_bytes()[:300])
    words = look(shapes, tmp_path / "out", "--train-images", images)
    assert "cannot be read" in complaint(monkeypatch, visualize_data, *words)


# What a detector gets wrong


@pytest.fixture
def results(shapes, tmp_path):
    """Everything of the first images is found, nothing of the last, and one thing is invented."""
    dataset = json.loads((shapes / "val.json").read_text())
    last = dataset["images"][-1]["id"]
    found = [
        {key: x[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for x in dataset["annotations"]
        if x["image_id"] != last
    ]
    found.append({"image_id": last, "category_id": 1, "bbox": [1, 1, 9, 9], "score": 0.8})
    (tmp_path / "results.json").write_text(json.dumps(found))
    return [
        *("--annotations", shapes / "val.json", "--images", shapes / "images"),
        *("--results", tmp_path / "results.json", "--output", tmp_path / "out"),
    ]


@pytest.fixture
def perfect(shapes, tmp_path):
    """Everything is found, and nothing else; returns the file."""
    keys = "image_id", "category_id", "bbox"
    truth = json.loads((shapes / "val.json").read_text())["annotations"]
    path = tmp_path / "perfect.json"
    path.write_text(json.dumps([{key: x[key] for key in keys} | {"score": 0.9} for x in truth]))
    return path


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.contents, self.alts = defaultdict(list), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("img", "a"):
            kind, data = (attrs.get("src") or attrs["href"]).split(";base64,")
            self.contents[kind.removeprefix("data:")].append(base64.b64decode(data))
        if tag == "img":
            self.alts.append(attrs["alt"])


@pytest.mark.slow
def test_the_page_shows_all_that_was_written(results, tmp_path, monkeypatch, capsys):
    run(monkeypatch, visualize_results, *results)
    page = Page(tmp_path / "out" / "index.html")
    written = sorted((tmp_path / "out").iterdir())
    assert len(written) == 12
    for suffix, kind in ((".png", "image/png"), (".csv", "text/csv")):
        files = [x.read_bytes() for x in written if x.suffix == suffix and "worst" not in x.name]
        assert len(files) == 5 and set(page.contents[kind]) == set(files)
    (sheet,) = page.contents["image/jpeg"]
    seen, drawn = (Image.open(x) for x in (io.BytesIO(sheet), tmp_path / "out" / "worst_000.png"))
    assert seen.size == drawn.size and all(page.alts)
    said = capsys.readouterr().out
    assert (
        "index.html', 0." in said
        and "MB that need no other file" in said
        and "AP50" in said
        and "\nall " in said
    )


@pytest.mark.slow
def test_images_without_a_mistake_are_not_among_the_worst(
    results, tmp_path, monkeypatch, without_plots, capsys
):
    captions = []

    def sheet(pictures, *rest):
        captions.extend(caption for _, caption in pictures)
        return contact_sheet(pictures, *rest)

    monkeypatch.setattr(visualize_results, "contact_sheet", sheet)
    run(monkeypatch, visualize_results, *results, "--confidence-threshold", 0.8)
    (caption,) = captions
    assert caption.startswith("1. val_00005.jpg") and "false positives 1" in caption
    assert "detections with scores ≥ 0.8 are" in capsys.readouterr().out
    run(monkeypatch, visualize_results, *results)  # F1 is best without what is invented
    assert "false positives 0" in captions[1]
    said = "best F1 at IoU 0.5: square 0.9, triangle 0.9, star 0.9. For all"
    assert said in capsys.readouterr().out and said in (tmp_path / "out/index.html").read_text()


@pytest.mark.slow
def test_without_mistakes_there_is_no_sheet(results, perfect, tmp_path, monkeypatch, without_plots):
    run(monkeypatch, visualize_results, *results)
    assert list((tmp_path / "out").glob("worst*"))
    run(monkeypatch, visualize_results, *results, "--results", perfect)
    assert not list((tmp_path / "out").glob("worst*"))  # nor that of the run before
    assert "There is no image with a mistake" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.slow
def test_where_no_image_was_asked_for_nothing_is_said_of_the_worst(
    results, tmp_path, monkeypatch, without_plots
):
    run(monkeypatch, visualize_results, *results, "--num-images", "0")
    assert not list((tmp_path / "out").glob("worst*"))
    page = (tmp_path / "out" / "index.html").read_text()
    assert "No image" not in page and "worst images" not in page


def test_the_summary_has_the_worst_classes_first(results):
    analysis = visualize_results.load(arguments(visualize_results, *results))
    lines = visualize_results.summary(analysis).splitlines()
    assert lines[0].split() == ["class", "boxes", "AP", "AP50", "AP75", "AR"]
    values = [float(line.split()[2]) for line in lines[2:]]
    assert lines[1].startswith("all") and values == sorted(values)
    assert "better classes" in visualize_results.summary(analysis, 1).splitlines()[-1]


def test_results_that_do_not_belong_together_are_refused_in_one_sentence(
    shapes, results, tmp_path, monkeypatch, capsys
):
    def says(*words):
        return complaint(monkeypatch, visualize_results, *results, *words)

    assert "did you mean" in says("--results", tmp_path / "result.json")
    assert "val.json" in says("--annotations", shapes / "vall.json")
    assert "nothing' does not exist" in says("--images", shapes / "nothing")
    assert "@" not in says("--images", "/nope")
    (tmp_path / "folder.json").mkdir()
    assert "folder.json' is a folder" in says("--annotations", tmp_path / "folder.json")
    assert "are a folder" in says("--results", tmp_path)
    assert "(it is a file)" in says("--output", tmp_path / "results.json")
    said = says("--annotations", shapes / "images")
    assert "images' is not a .json file" in said and "@" not in said
    assert says("--confidence-threshold", "50") == "2" and "'50'" in capsys.readouterr().err
    (tmp_path / "results.json").write_text('[{"image_id": 99}]')
    assert "detection 0" in says()
    assert says("--num-images", "-1") == "2" and "0 or more" in capsys.readouterr().err


@pytest.mark.slow
def test_an_image_that_cannot_be_drawn_is_named_and_left_out(
    shapes, results, tmp_path, monkeypatch, capsys, without_plots
):
    images = tmp_path / "images"
    images.mkdir()
    for path in (shapes / "images").iterdir():
        Image.new("RGB", (9, 9)).save(images / path.name)
    run(monkeypatch, visualize_results, *results, "--images", images)
    said = capsys.readouterr().err
    assert "val_00005.jpg" in said and "9 x 9 pixels" in said
    assert {"index.html", "per_class.csv"} <= {x.name for x in (tmp_path / "out").iterdir()}


def test_an_interruption_is_one_sentence(shapes, results, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    for program, words in (
        (visualize_results, results),
        (visualize_data, look(shapes, tmp_path)),
    ):
        monkeypatch.setattr(program, "load", interrupt)
        assert "interrupted" in complaint(monkeypatch, program, *words)
