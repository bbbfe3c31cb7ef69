import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dino_d2.data import shapes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    shapes.generate(root, num_train=100, num_val=3, seed=1)
    return root


def load(root, split="train"):
    return json.loads((root / f"{split}.json").read_text())


def pixels(path):
    return np.asarray(Image.open(path))


def test_the_same_seed_gives_the_same_files(root, tmp_path):
    shapes.generate(tmp_path, num_train=100, num_val=3, seed=1)
    for split in ("train", "val"):
        assert (tmp_path / f"{split}.json").read_bytes() == (root / f"{split}.json").read_bytes()
    images = sorted(path.name for path in (root / "images").iterdir())
    assert len(images) == 103
    for name in images:
        assert (pixels(tmp_path / "images" / name) == pixels(root / "images" / name)).all()


def test_another_seed_gives_other_images(root, tmp_path):
    shapes.generate(tmp_path, num_train=1, num_val=1, seed=2)
    first = "images/train_00000.jpg"
    assert not np.array_equal(pixels(tmp_path / first), pixels(root / first))


def test_an_image_does_not_depend_on_how_many_there_are(root, tmp_path):
    shapes.generate(tmp_path, num_train=2, num_val=3, seed=1)
    for name in ("train_00001.jpg", "val_00002.jpg"):
        assert (pixels(tmp_path / "images" / name) == pixels(root / "images" / name)).all()


def test_training_and_validation_images_differ(root):
    images = [pixels(root / f"images/{split}_00000.jpg") for split in ("train", "val")]
    assert not np.array_equal(*images)


def test_the_recorded_sizes_are_those_of_the_images(root):
    sizes = set()
    for image in load(root)["images"]:
        size = image["width"], image["height"]
        assert Image.open(root / "images" / image["file_name"]).size == size
        assert all(shapes.IMAGE_SIDE[0] <= side <= shapes.IMAGE_SIDE[1] for side in size)
        sizes.add(size)
    assert any(w > h for w, h in sizes) and any(w < h for w, h in sizes)


def test_a_few_images_are_empty_and_none_has_too_many_shapes(root):
    dataset = load(root)
    counts = Counter(annotation["image_id"] for annotation in dataset["annotations"])
    assert max(counts.values()) <= shapes.MAX_SHAPES
    assert 0 < len(dataset["images"]) - len(counts) < 15


def test_annotations_are_valid_coco(root):
    dataset = load(root)
    ids = [annotation["id"] for annotation in dataset["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    categories = {category["id"]: category["name"] for category in dataset["categories"]}
    assert sorted(categories) == [1, 2, 3, 4]
    assert {a["category_id"] for a in dataset["annotations"]} == set(categories)
    sizes = {image["id"]: (image["width"], image["height"]) for image in dataset["images"]}
    for annotation in dataset["annotations"]:
        (x, y, w, h), (width, height) = annotation["bbox"], sizes[annotation["image_id"]]
        assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= width and y + h <= height
        assert 0 < annotation["area"] <= w * h and annotation["iscrowd"] == 0


def test_boxes_are_tight_around_the_visible_pixels():
    mask = np.zeros((7, 9), dtype=bool)
    mask[2:5, 3] = mask[4, 3:8] = True
    assert shapes._tight_box(mask) == [3, 2, 5, 3]


def test_an_unturned_square_is_drawn_where_its_corners_are():
    class Fixed:
        """Diameter 40 (log-uniform), centre (60, 50), turned by 45 degrees."""

        values = iter([np.log(40), 60, 50, np.pi / 4])

        def uniform(self, low, high):
            return next(self.values)

    coverage = shapes._coverage(Fixed(), shapes.OUTLINES["square"], 100, 120)
    # half a side is 20 / sqrt(2) = 14.14: columns 45.86 to 74.14, rows 35.86 to 64.14
    assert shapes._tight_box(coverage >= 0.5) == [46, 36, 28, 28]
    assert coverage.sum() == pytest.approx(800, rel=0.04)  # 28.28 squared


def test_boxes_and_areas_are_those_of_the_picture(monkeypatch):
    # one white shape on black
    monkeypatch.setattr(shapes, "MAX_SHAPES", 1)
    monkeypatch.setattr(shapes, "SENSOR_NOISE", 0)
    monkeypatch.setattr(shapes, "_draw_background", lambda rng, h, w: np.zeros((h, w, 3)))
    monkeypatch.setattr(shapes, "_contrasting_colour", lambda rng, background: 255)
    for seed in range(20):
        image, drawn = shapes._draw_image(np.random.default_rng(seed))
        for _, visible in drawn:
            rows, columns = np.nonzero(image[..., 0] >= 127)
            x, y, w, h = shapes._tight_box(visible)
            assert (x, y) == (columns.min(), rows.min())
            assert (x + w, y + h) == (columns.max() + 1, rows.max() + 1)
            assert visible.sum() == len(rows) > 20


def test_a_shape_that_would_hide_most_of_an_earlier_one_is_left_out(monkeypatch):
    columns = [
        (0, 10),
        (3, 13),  # would leave 30 % of the first: left out
        (5, 15),  # leaves 50 % of the first
        (4, 5),  # leaves 40 % of the first
        (3, 4),  # would leave 30 % of the first, with the others: left out
        (20, 30),
        (20, 30),  # would leave nothing of the one before: left out
    ]
    remaining = iter(columns)

    def draw_shape(rng, outline, height, width):
        coverage = np.zeros((height, width))
        coverage[:10, slice(*next(remaining))] = 1
        return coverage

    monkeypatch.setattr(shapes, "_coverage", draw_shape)
    monkeypatch.setattr(shapes, "MIN_VISIBLE", 0.4)
    monkeypatch.setattr(shapes, "MAX_SHAPES", 7)
    _, drawn = shapes._draw_image(np.random.default_rng(3))  # a seed that asks for seven shapes
    assert next(remaining, None) is None
    boxes = [shapes._tight_box(visible) for _, visible in drawn]
    assert boxes == [[0, 0, 4, 10], [5, 0, 10, 10], [4, 0, 1, 10], [20, 0, 10, 10]]


def test_a_shape_stands_out_from_what_is_under_it():
    rng = np.random.default_rng(0)
    for background in ((0, 0, 0), (128, 128, 128), (255, 200, 0)):
        colours = [shapes._contrasting_colour(rng, np.array(background)) for _ in range(50)]
        distances = np.linalg.norm(colours - np.array(background), axis=1)
        assert distances.min() >= shapes.MIN_CONTRAST and distances.std() > 10


def test_a_complete_dataset_is_left_alone(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    shapes.generate(root, num_train=100, num_val=3, seed=1)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.parametrize("lost", ["val.json", "images/train_00001.jpg"])
def test_an_incomplete_dataset_is_completed(tmp_path, lost):
    shapes.generate(tmp_path, num_train=2, num_val=1)
    expected = (tmp_path / lost).read_bytes()
    (tmp_path / lost).unlink()
    shapes.generate(tmp_path, num_train=2, num_val=1)
    assert (tmp_path / lost).read_bytes() == expected


def test_other_arguments_replace_the_dataset(tmp_path):
    shapes.generate(tmp_path, num_train=1, num_val=1)
    shapes.generate(tmp_path, num_train=2, num_val=1)
    assert len(load(tmp_path)["images"]) == 2


def test_an_interrupted_run_leaves_no_annotations(tmp_path, monkeypatch):
    shapes.generate(tmp_path, num_train=1, num_val=1, seed=0)
    monkeypatch.setattr(shapes, "_draw_image", lambda rng: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shapes.generate(tmp_path, num_train=1, num_val=1, seed=1)
    assert not list(tmp_path.glob("*.json"))


def test_annotations_of_something_else_are_not_lost(tmp_path):
    (tmp_path / "val.json").write_text('{"info": {"description": "years of work"}}')
    with pytest.raises(FileExistsError, match="val.json.*choose another folder"):
        shapes.generate(tmp_path, 1, 1)
    assert "years of work" in (tmp_path / "val.json").read_text()
