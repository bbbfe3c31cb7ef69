"""Data as it is found in the world: it trains, or one sentence says why not.

A case is a function that writes images and their annotations. `trains` says that a step on them is
finite and that the model is given what `Data.expected` holds; `refused` names words of the
sentence. The table of the cases in README.md is compared with what is here.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from outputs import run_detector
from PIL import Image
from test_mapper import png

from dino_d2.boxes import cxcywh_to_xyxy
from dino_d2.data import DatasetError, Mapper, check, detr_augmentation

WIDTH, HEIGHT = 64, 48
BOX = (8, 6, 32, 24)  # left, top, width and height in pixels
HUGE = 2**40
README = Path(__file__).with_name("README.md")


class Case(NamedTuple):
    write: Callable
    words: tuple[str, ...]  # of the sentence that refuses it; none if it trains


CASES: dict[str, Case] = {}


def trains(write):
    CASES[write.__name__] = Case(write, ())
    return write


def refused(*words):
    def note(write):
        CASES[write.__name__] = Case(write, words)
        return write

    return note


class Data:
    """A dataset that is being written, and what the model is to get of it."""

    def __init__(self, root):
        self.root = root
        self.images, self.annotations = [], []
        self.categories = [{"id": i, "name": name} for i, name in enumerate("abc", start=1)]
        self.expected = {}  # of an image's id: (label, x0, y0, x1, y1), in parts of the image

    def add(self, picture=None, boxes=(BOX,), name=None, expected=None, size=None, **changes):
        """An image with annotations of category 1; `expected` boxes are in pixels of `size`."""
        id = changes.pop("image_id", len(self.images) + 1)
        name = name or f"{id}.png"
        picture = picture or noise(size or (WIDTH, HEIGHT))
        width, height = size or picture.size
        self.save(picture, name)
        self.images.append({"id": id, "file_name": name, "width": width, "height": height})
        for box in boxes:
            entry = {"id": len(self.annotations) + 1, "image_id": id, "category_id": 1}
            self.annotations.append({**entry, "bbox": list(box), **changes})
        corners = [(x, y, x + w, y + h) for x, y, w, h in (boxes if expected is None else expected)]
        sides = width, height, width, height
        self.expected[id] = [
            (0, *(value / side for value, side in zip(box, sides, strict=True))) for box in corners
        ]

    def path(self, name):
        path = self.root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def save(self, picture, name):
        """Bytes are written as they are."""
        path = self.path(name)
        path.write_bytes(picture) if isinstance(picture, bytes) else picture.save(path)

    def name(self):
        """That of the dataset, once it is written."""
        keys = "images", "annotations", "categories"
        text = json.dumps({key: getattr(self, key) for key in keys})
        (self.root / "data.json").write_text(text)
        return f"{self.root / 'data.json'}@{self.root / 'images'}"


def noise(size=(WIDTH, HEIGHT), mode="RGB"):
    width, height = size
    pixels = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def random_boxes(count):
    corner = np.random.default_rng(0).uniform(0, 30, size=(count, 2))
    size = np.random.default_rng(1).uniform(1, 15, size=(count, 2))
    return np.concatenate([corner, size], 1).tolist()


def damage(data, change, name="1.jpg"):
    """One image of which the bytes of the file are changed."""
    data.add(name=name)
    content = data.path(name).read_bytes()
    data.save(change(content), name)


# ---- files


@refused("1.jpg", "truncated", "replace the file")
def truncated_jpeg(data):
    damage(data, lambda content: content[: len(content) // 2])


@refused("1.png", "truncated", "replace the file")
def truncated_png(data):
    damage(data, lambda content: content[: len(content) // 2], "1.png")


@refused("1.jpg", "cannot be read", "replace the file")
def corrupt_header(data):
    damage(data, lambda content: b"\0\0" + content[2:])


@trains
def corrupt_pixels(data):
    def change(content):
        middle = 3 * len(content) // 4  # behind the tables: decoders go on with other pixels
        return content[:middle] + b"\x55" * 20 + content[middle + 20 :]

    damage(data, change)


@refused("1.jpg", "empty", "replace the file")
def empty_file(data):
    damage(data, lambda content: b"")


@refused("1.jpg", "no known format", "replace the file")
def text_file(data):
    damage(data, lambda content: b"<html>404</html>")


@refused("1 of 2 image files are missing", "2.png")
def missing_file(data):
    data.add()
    data.add()
    data.path("2.png").unlink()


@refused("1.png", "Is a directory")
def folder_for_a_file(data):
    data.add()
    data.path("1.png").unlink()
    data.path("1.png").mkdir()


@trains
def another_suffix(data):
    data.add(name="1.png")
    noise().save(data.path("1.png"), format="JPEG")


# ---- pixels


@trains
def gray(data):
    data.add(noise(mode="L"))


@trains
def gray_and_alpha(data):
    data.add(noise(mode="LA"))


@trains
def rgba(data):
    data.add(noise(mode="RGBA"))


@trains
def palette(data):
    data.add(noise(mode="P"))


@trains
def palette_with_transparency(data):
    picture = noise(mode="P")
    picture.info["transparency"] = 3
    data.add(picture)


@trains
def cmyk(data):
    data.add(noise(mode="CMYK"), name="1.jpg")


@trains
def one_bit(data):
    data.add(noise(mode="1"))


@refused("1.png", "more than 8 bits", "save it with 8 bits")
def gray_of_16_bits(data):
    data.add(Image.fromarray(np.full((HEIGHT, WIDTH), 500, np.uint16)))


@refused("1.tiff", "more than 8 bits", "save it with 8 bits")
def integers_of_32_bits(data):
    data.add(Image.fromarray(np.full((HEIGHT, WIDTH), 500, np.int32)), name="1.tiff")


@refused("1.tiff", "more than 8 bits", "save it with 8 bits")
def floats(data):
    data.add(Image.fromarray(np.full((HEIGHT, WIDTH), 0.5, np.float32)), name="1.tiff")


@trains
def rgb_of_16_bits(data):
    data.add()
    samples = np.random.default_rng(0).integers(2**16, size=(HEIGHT, WIDTH, 3), dtype=np.uint16)
    data.save(png(samples), "1.png")


# ---- sizes


def turned(data, size):
    """An image that is stored lying and shown standing."""
    exif = Image.Exif()
    exif[274] = 6
    noise().save(data.path("1.jpg"), exif=exif)
    stored = data.path("1.jpg").read_bytes()
    data.add(name="1.jpg", size=size)
    data.save(stored, "1.jpg")


@trains
def exif_annotated_as_shown(data):
    turned(data, (HEIGHT, WIDTH))


@refused("1.jpg", "is 48 x 64 pixels", "EXIF", "annotations say 64 x 48")
def exif_annotated_as_stored(data):
    turned(data, (WIDTH, HEIGHT))


@refused("1.png", "is 64 x 48 pixels", "annotations say 32 x 24")
def another_size_than_annotated(data):
    data.add(noise(), size=(32, 24), boxes=[(1, 2, 3, 4)])


@trains
def one_pixel(data):
    data.add(noise((1, 1)), boxes=[(0, 0, 1, 1)])


@trains
def ten_thousand_pixels_wide(data):
    data.add(noise((10_000, 60)), boxes=[(100, 6, 5000, 40)])


@trains
def a_strip_ten_thousand_pixels_wide(data):
    data.add(noise((10_000, 1)), boxes=[(100, 0, 5000, 1)])


@trains
def a_strip_ten_thousand_pixels_high(data):
    data.add(noise((1, 10_000)), boxes=[(0, 100, 1, 5000)])


@trains
def strips_of_both_kinds_in_a_batch(data):
    data.add(noise((500, 2)), boxes=[(10, 0, 300, 2)])
    data.add(noise((2, 500)), boxes=[(0, 10, 2, 300)])


# ---- numbers of boxes


@trains
def some_images_without_boxes(data):
    data.add()
    data.add(boxes=[])


@refused("has no annotations")
def all_images_without_boxes(data):
    data.add(boxes=[])
    data.add(boxes=[])


@trains
def one_image(data):
    data.add()


@trains
def as_many_boxes_as_queries_of_a_model(data):
    data.add(boxes=random_boxes(900))


@trains
def more_boxes_than_queries_of_a_model(data):
    data.add(boxes=random_boxes(3000))
    data.add()


@trains
def crowds_only(data):
    data.add(iscrowd=1, expected=[], segmentation={"counts": [0, 9], "size": [HEIGHT, WIDTH]})


@trains
def crowds_among_others(data):
    data.add(boxes=[BOX, (1, 2, 3, 4)], expected=[BOX])
    data.annotations[1]["iscrowd"] = 1


# ---- boxes


@trains
def some_boxes_without_area(data):
    data.add(boxes=[(5, 5, 0, 9), BOX, (5, 5, 9, -3)], expected=[BOX])


@refused("no box has any area inside its image")
def all_boxes_without_area(data):
    data.add(boxes=[(5, 5, 0, 9), (5, 5, 9, 0)])


@trains
def tiny_boxes(data):
    # 1e-9 of a pixel is nothing in single precision
    data.add(boxes=[(10, 10, 0.01, 0.01), (20, 20, 1e-9, 1e-9)], expected=[(10, 10, 0.01, 0.01)])


@trains
def boxes_partly_outside(data):
    data.add(
        boxes=[(-5, -4, 15, 14), (50, 40, 30, 30), (-9, -9, 999, 999)],
        expected=[(0, 0, 10, 10), (50, 40, 14, 8), (0, 0, WIDTH, HEIGHT)],
    )


@trains
def some_boxes_outside(data):
    data.add(boxes=[(100, 10, 5, 5), BOX, (10, -50, 5, 5)], expected=[BOX])


@refused("no box has any area inside its image")
def all_boxes_outside(data):
    data.add(boxes=[(100, 10, 5, 5)])


@trains
def large_coordinates(data):
    data.add(boxes=[(-1e8, -1e8, 5e8, 5e8)], expected=[(0, 0, WIDTH, HEIGHT)])


@refused("annotation 1 of image '1.png'", "1000000000000.0", "finite")
def huge_coordinates(data):
    data.add(boxes=[(0, 0, 1e12, 5)])


@refused("annotation 2 of image '1.png'", "nan", "finite")
def nan_coordinates(data):
    data.add(boxes=[BOX, (1, 2, float("nan"), 4)])


@refused("annotation 2 of image '1.png'", "inf", "finite")
def infinite_coordinates(data):
    data.add(boxes=[BOX, (1, 2, 3, float("inf"))])


@trains
def boxes_annotated_twice(data):
    data.add(boxes=[BOX, BOX])


@trains
def annotations_with_the_id_of_another(data):
    data.add(boxes=[BOX, BOX])
    data.annotations[1]["id"] = 1


# ---- names, ids and classes


@trains
def names_with_spaces_and_of_all_alphabets(data):
    data.root = data.root / "my data größe 数据"
    data.add(name="ein Bild, größer 猫 🐈 #1%.png")


@trains
def folders_in_names_of_files(data):
    data.add(name="2024/summer days/1.png")
    data.add(name="2024/ünter/1.png")


@trains
def the_same_image_twice(data):
    data.add(name="a.png")
    data.add(name="a.png", boxes=[(1, 2, 30, 40)])


@refused("entry 1 of 'images' has the id 1", "give each its own")
def images_with_the_id_of_another(data):
    data.add()
    data.add(image_id=1)


@trains
def huge_ids(data):
    data.add(image_id=HUGE, name="a.png")
    data.annotations[0]["id"] = HUGE
    data.categories[0]["id"] = data.annotations[0]["category_id"] = HUGE
    data.expected[HUGE] = [(2, *data.expected[HUGE][0][1:])]  # the last of three


@trains
def gaps_between_categories(data):
    for number, category in enumerate(data.categories):
        category["id"] = 7 + 1000 * number
    data.add(category_id=1007)
    data.expected[1] = [(1, *data.expected[1][0][1:])]


@trains
def categories_in_odd_order(data):
    for category, id in zip(data.categories, (9, 3, 5), strict=True):
        category["id"] = id
    data.add(boxes=[BOX] * 3)
    for annotation, id in zip(data.annotations, (9, 3, 5), strict=True):
        annotation["category_id"] = id
    box = data.expected[1][0][1:]
    data.expected[1] = [(2, *box), (0, *box), (1, *box)]


@trains
def a_class_without_boxes(data):
    data.add(category_id=3)
    data.expected[1] = [(2, *data.expected[1][0][1:])]


@refused("category_id 4", "not in 'categories'", "annotation 1 of image '1.png'")
def a_category_that_is_not_there(data):
    data.add(category_id=4)


# ---- the tests


@pytest.fixture(autouse=True)
def clean_catalogs():
    catalogs = DatasetCatalog, MetadataCatalog
    before = [set(catalog) for catalog in catalogs]
    yield
    for catalog, names in zip(catalogs, before, strict=True):
        for name in set(catalog) - names:
            catalog.remove(name)


def first_batch(data, **augmentation):
    """Of the loader of a training: every image once, one alone twice."""
    name = data.name()
    check([name], [], None)
    loader = build_detection_train_loader(
        dataset=get_detection_dataset_dicts([name], filter_empty=False),
        mapper=Mapper(
            is_train=True,
            augmentations=detr_augmentation(min_sizes=(64,), max_size=96, **augmentation),
            image_format="RGB",
        ),
        total_batch_size=max(2, len(data.images)),
        aspect_ratio_grouping=False,
        num_workers=0,
    )
    return next(iter(loader))


def assert_a_finite_step(model, batch):
    model.zero_grad()
    losses = model(batch)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.words])
def test_it_trains_a_finite_step_on_the_right_boxes(name, tmp_path, make_dino):
    data, model = Data(tmp_path), make_dino(num_queries=20)
    CASES[name].write(data)
    batch = first_batch(data, crop_size=None, flip="none")
    assert {x["image_id"] for x in batch} == set(data.expected)
    for x, target in zip(batch, model.prepare_targets(batch), strict=True):
        expected = torch.tensor(data.expected[x["image_id"]], dtype=torch.float64).view(-1, 5)
        assert target.labels.tolist() == expected[:, 0].tolist()
        corners = cxcywh_to_xyxy(target.boxes).double()
        torch.testing.assert_close(corners, expected[:, 1:], rtol=0, atol=1e-5)
    assert_a_finite_step(model, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.words])
def test_it_trains_a_finite_step_on_what_flips_and_crops_leave(name, tmp_path, make_dino):
    data, model = Data(tmp_path), make_dino(num_queries=20)
    CASES[name].write(data)
    np.random.seed(0)
    batch = first_batch(data, crop_min_sizes=(50, 80), crop_size=(20, 60), crop_prob=1.0)
    for x, target in zip(batch, model.prepare_targets(batch), strict=True):
        assert len(target.labels) <= len(data.expected[x["image_id"]])
        corners = cxcywh_to_xyxy(target.boxes)
        assert corners.numel() == 0 or (-1e-6 <= corners.min() and corners.max() <= 1 + 1e-6)
        assert (target.boxes[:, 2:] > 0).all()
    assert_a_finite_step(model, batch)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.words])
def test_it_is_refused_in_one_sentence(name, tmp_path):
    data = Data(tmp_path)
    CASES[name].write(data)
    with pytest.raises(DatasetError) as error:
        first_batch(data)
    message = str(error.value)
    assert [word for word in CASES[name].words if word not in message] == [], message
    assert "\n" not in message and ": " in message  # what is wrong, and what to do


def test_denoising_of_three_thousand_boxes_stays_within_its_budget(tmp_path, make_dino):
    data, model = Data(tmp_path), make_dino(budget=100)
    more_boxes_than_queries_of_a_model(data)
    batch = first_batch(data, crop_size=None, flip="none")
    targets = model.prepare_targets(batch)
    assert max(len(target.labels) for target in targets) == 3000
    seen = []
    for _ in range(2):
        output = run_detector(model, model.preprocess_images(batch), targets)
        noised = output.named("dn")
        assert [len(x.boxes[0]) for x in noised.layers] == [2 * 100] * 2
        seen.append(set(noised.match.targets.tolist()))
    # a hundred of three thousand are three of a hundred, drawn anew in the next step
    assert len(seen[0]) == len(seen[1]) == 100 + 1 and len(seen[0] & seen[1]) < 30


def test_the_table_in_the_readme_is_that_of_the_cases():
    page = README.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|]+\| (\w+)", page, flags=re.MULTILINE)
    behaviours = {name: "refused" if case.words else "trains" for name, case in CASES.items()}
    assert len(rows) == len(dict(rows)) and dict(rows) == behaviours


def test_the_tests_that_the_readme_names_exist():
    page = README.read_text(encoding="utf-8")
    files = set(re.findall(r"`(test_\w+\.py)`", page))
    assert [name for name in files if not (README.parent / name).is_file()] == []
    sources = "".join((README.parent / name).read_text(encoding="utf-8") for name in files)
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) > 15 and [x for x in named if f"def {x}(" not in sources] == []
