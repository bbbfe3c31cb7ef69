"""Mosaic and mixup: boxes stay on their objects, and nothing else is touched."""

import copy

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from dino_d2.data import Mixing, mixing
from dino_d2.data.mixing import BACKGROUND, mixup, mosaic


@pytest.fixture(autouse=True)
def seed():
    np.random.seed(0)


def sample(height, width, *boxes, label=0, value=0, channels=3):
    """An image of one value, with white objects in boxes of whole numbers."""
    image = torch.full((channels, height, width), value, dtype=torch.uint8)
    for x0, y0, x1, y1 in boxes:
        image[:, y0:y1, x0:x1] = 255
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    classes = torch.full((len(boxes),), label)
    instances = Instances((height, width), gt_boxes=Boxes(tensor), gt_classes=classes)
    name = f"{label}.jpg"
    return {"image": image, "instances": instances, "file_name": name, "image_id": label}


def boxes_of(result):
    return result["instances"].gt_boxes.tensor


def fixed(monkeypatch, scale=1.0, shift=0.0, weight=0.5):
    monkeypatch.setattr(mixing, "SCALES", (scale, scale))
    monkeypatch.setattr(mixing, "SHIFT", shift)
    monkeypatch.setattr(mixing, "WEIGHTS", (weight, weight))


def test_a_mosaic_has_an_image_in_each_quarter(monkeypatch):
    fixed(monkeypatch)
    # halves of 40 x 60 are 20 x 30; the third, 20 x 20, fits as it is, beside the middle
    sizes = ((40, 60), (80, 120), (20, 20), (40, 60))
    samples = [sample(*size, (0, 0, 10, 10), label=i, value=50 * i) for i, size in enumerate(sizes)]
    result = mosaic(samples)
    # 10 x 10 pixels are halved (0, 3), quartered (1) or kept (2)
    expected = [[0, 0, 5, 5], [30, 0, 32.5, 2.5], [10, 20, 20, 30], [30, 20, 35, 25]]
    assert boxes_of(result).tolist() == expected
    assert result["instances"].gt_classes.tolist() == [0, 1, 2, 3]
    centres = result["image"][0, [15, 15, 35, 35], [15, 45, 25, 45]]
    assert centres.tolist() == [0, 50, 100, 150]
    assert (result["image"][:, 20:, :10] == BACKGROUND).all()
    assert result["file_name"] == "0.jpg" and result["mixed_with"] == ["1.jpg", "2.jpg", "3.jpg"]


@pytest.mark.parametrize("channels", [1, 3])
def test_boxes_of_a_mosaic_are_where_their_objects_are(channels):
    seen = 0
    for _ in range(40):
        number = np.random.randint(4)  # of the image with an object
        samples = [
            sample(*np.random.randint(100, 300, 2), *([(20, 40, 70, 95)] if i == number else []))
            for i in range(4)
        ]
        for x in samples:
            x["image"] = x["image"][:channels]
        result = mosaic(samples)
        assert result["image"].shape == samples[0]["image"].shape
        rows, columns = np.nonzero((result["image"] > 180).any(0).numpy())
        if len(boxes_of(result)):
            seen += 1
            drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(boxes_of(result)[0], drawn, atol=1.1)
        else:
            assert not len(rows) or min(np.ptp(rows), np.ptp(columns)) <= 1
    assert seen > 30


@pytest.mark.parametrize("kind", [BitMasks, PolygonMasks])
@pytest.mark.parametrize("mix", [mosaic, lambda samples: mixup(*samples[:2])])
def test_masks_are_where_their_objects_are(kind, mix):
    corner = [[20.0, 40, 70, 40, 70, 60, 45, 60, 45, 95, 20, 95]]  # an L
    agree = []
    for _ in range(20):
        samples = [sample(*np.random.randint(100, 300, 2)) for _ in range(4)]
        first, second, third, _ = samples
        for x in (first, second):
            x["image"][:, 40:60, 20:70] = x["image"][:, 40:95, 20:45] = 255
            size, label = x["image"].shape[1:], int(x is second)
            one = sample(*size, (20, 40, 70, 95), label=label)["instances"]
            one.gt_masks = PolygonMasks([corner])
            if kind is BitMasks:
                one.gt_masks = BitMasks(x["image"][:1] > 0)
            one.has_mask = torch.tensor([x is second])
            x["instances"] = one
        order = [third, second, first, third] if len(agree) % 2 else [first, second, third, third]
        result = mix(order)
        drawn, found = (result["image"] > 50).all(0), result["instances"]
        if mix is mosaic:
            drawn &= (result["image"] > 180).all(0)
        if len(found):
            masks = found.gt_masks
            if kind is PolygonMasks:
                masks = BitMasks.from_polygon_masks(masks, *found.image_size)
            union = masks.tensor.any(0)
            agree.append((drawn & union).sum() / (drawn | union).sum())
            assert found.has_mask.tolist() == found.gt_classes.bool().tolist()
            assert len(found.has_box) == len(found)
    assert len(agree) > 15 and np.mean(agree) > 0.9


def test_a_box_of_which_a_mosaic_leaves_too_little_is_dropped(monkeypatch):
    fixed(monkeypatch, scale=2.0)  # each image in full size around the middle: a quarter is left
    empty = sample(40, 40)
    # the first image is moved by (-20, -20): of 20 x 20 pixels 20 x 10, 5 x 20 and 10 x 20 are left
    first = sample(40, 40, (20, 10, 40, 30), (5, 20, 25, 40), (10, 20, 30, 40))
    kept = {
        share: boxes_of(mosaic([first, empty, empty, empty], share)).tolist()
        for share in (0.0, 0.5, 0.6)
    }
    half = [[0, 0, 20, 10], [0, 0, 10, 20]]
    assert kept == {0.0: [half[0], [0, 0, 5, 20], half[1]], 0.5: half, 0.6: []}


def test_a_box_of_less_than_a_pixel_is_dropped(monkeypatch):
    fixed(monkeypatch)
    first, empty = sample(40, 40, (0, 0, 1, 9), (4, 4, 6, 6)), sample(40, 40)
    assert boxes_of(mosaic([first, empty, empty, empty])).tolist() == [[2, 2, 3, 3]]


def test_mixup_blends_pixels_and_keeps_the_boxes_of_both(monkeypatch):
    fixed(monkeypatch, weight=0.25)
    first = sample(40, 60, (5, 5, 6, 5 + 1), label=1, value=100)
    second = sample(80, 80, (20, 20, 40, 60), label=2, value=20)
    result = mixup(first, second)  # the second is halved: 40 x 40
    assert boxes_of(result).tolist() == [[5, 5, 6, 6], [10, 10, 20, 30]]
    assert result["instances"].gt_classes.tolist() == [1, 2]
    assert (result["image"][:, 35, :40] == 40).all()  # 100 / 4 + 20 * 3 / 4
    assert (result["image"][:, :, 40:] == 100).all()
    assert (result["image"][:, 15, 15] == 216).all()  # 25 + 191.25
    assert result["file_name"] == "1.jpg" and result["mixed_with"] == ["2.jpg"]


def test_all_weights_and_sizes_are_in_their_ranges():
    white, black = sample(10, 10, value=200), sample(10, 10)
    values = {mixup(white, black)["image"].max().item() for _ in range(200)}
    assert min(values) >= 90 and max(values) <= 110 and len(values) > 15


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (3, 7)])
def test_strips_and_images_without_boxes_can_be_mixed(size):
    dataset = [sample(*size), sample(30, 40, (1, 2, 30, 29)), sample(40, 5)]
    for _ in range(5):
        result = Mixing(mosaic=1.0, mixup=1.0)(dataset, 0)
        assert result["image"].shape == (3, *size) and len(result["mixed_with"]) == 7
        boxes = boxes_of(result)
        assert (boxes[:, 2:] - boxes[:, :2] >= 1).all() and (boxes >= 0).all()
        assert (boxes <= torch.tensor([size[1], size[0]] * 2)).all()
        assert len(result["instances"]) == len(result["instances"].gt_classes)


def test_each_happens_as_often_as_is_asked_for_and_changes_no_sample():
    dataset = [sample(8, 8, (0, 0, 8, 8), label=i) for i in range(5)]
    before = copy.deepcopy([x["image"] for x in dataset])
    mixer = Mixing(mosaic=0.5, mixup=0.25)
    others = [len(mixer(dataset, 2).get("mixed_with", ())) for _ in range(400)]
    # none: 3/8; a mosaic alone: 3/8; two images: 1/16; a mosaic and an image: 1/8; two: 1/16
    shares = [others.count(number) / 400 for number in (0, 3, 1, 4, 7)]
    np.testing.assert_allclose(shares, [3 / 8, 3 / 8, 1 / 16, 1 / 8, 1 / 16], atol=0.07)
    assert all(torch.equal(x["image"], y) for x, y in zip(dataset, before, strict=True))
    assert Mixing(mosaic=0.0, mixup=0.0)(dataset, 2) is dataset[2]


def test_the_span_is_a_part_of_the_training():
    # 100 iterations of 16 images: the iterations from 25 to 49
    assert Mixing(span=(0.25, 0.5)).places(100, 16) == range(400, 800)
    assert Mixing(span=(0, 1)).places(3, 4) == range(12)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"mosaic": 2}, "mosaic is 2; it has to be a number from 0 to 1"),
        ({"mixup": -1}, "mixup is -1"),
        ({"min_visible": 40}, "min_visible is 40"),
        ({"span": (0.5,)}, r"is \[0.5\]; give two fractions of the run, from 0 to 1"),
        ({"span": (0.5, 0.2)}, r"is \[0.5, 0.2\]; give two fractions"),
    ],
)
def test_what_cannot_be_is_one_sentence(options, part):
    with pytest.raises(ValueError, match=part):
        Mixing(**options)
