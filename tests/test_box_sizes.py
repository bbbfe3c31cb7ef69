"""Sizes of boxes as a training sees them, and what is said of them at its start."""

import logging

import numpy as np
import pytest
from detectron2.data import build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from dino_d2.data import Mapper, ResizeShortestEdge, box_sizes, detr_augmentation
from dino_d2.data.box_sizes import (
    BoxSizes,
    log_box_sizes,
    resized_boxes,
    sizes_line,
    warnings_of,
)
from dino_d2.engine.plan import queries_of
from dino_d2.weights.model_zoo import get_config


def record(*boxes, height=100, width=200, mode=BoxMode.XYWH_ABS, **changes):
    annotations = [
        {"bbox": box, "bbox_mode": mode, "category_id": 0, "iscrowd": 0} | changes for box in boxes
    ]
    size = {"height": height, "width": width}
    return {"file_name": "a.jpg", "image_id": 1, "annotations": annotations, **size}


@pytest.mark.parametrize(
    ("augmentations", "factor"),
    [
        ([], 1),
        ([ResizeShortestEdge(300, 2000)], 3),
        ([T.ResizeShortestEdge((100, 300), 2000, "range")], 2),
        ([ResizeShortestEdge((100, 200, 900), 2000, "choice")], 2),
        ([ResizeShortestEdge(300, 400)], 2),  # its limit of the long side
        ([T.ResizeShortestEdge(0, 400)], 1),
        ([T.ResizeScale(0.5, 1.5, 400, 400)], 2),
        ([T.Resize((200, 800))], np.sqrt(2 * 4)),
        (detr_augmentation([150, 200, 250], 1000), 2),  # whatever its crops
        (detr_augmentation([150], 400, scale_jitter=(1.0, 2.0)), 3),
        ([T.Resize((7, 7)), ResizeShortestEdge(300, 2000), T.RandomFlip()], 3),  # the last
    ],
)
def test_boxes_are_as_large_as_the_middle_of_the_last_resize_makes_them(augmentations, factor):
    found = resized_boxes([record([50, 10, 20, 5], [0, 0, 40, 40])], augmentations)
    assert found.sides == pytest.approx([10 * factor, 40 * factor])


def test_it_is_what_a_resize_makes_of_them():
    resize = ResizeShortestEdge(480, 700)
    tall = record([50, 10, 20, 5], height=333, width=101)
    transform = resize.get_transform(np.zeros((333, 101, 3), np.uint8))
    (moved,) = transform.apply_box(np.array([[50.0, 10, 70, 15]]))
    expected = np.sqrt((moved[2] - moved[0]) * (moved[3] - moved[1]))
    assert resized_boxes([tall], [resize]).sides == pytest.approx([expected])


def test_boxes_of_every_mode_count_and_crowds_do_not():
    records = [
        record([10, 10, 30, 20], mode=BoxMode.XYXY_ABS),
        record([20, 20, 20, 5, 30], mode=BoxMode.XYWHA_ABS),
        record([0, 0, 9, 9], iscrowd=1),
        record([0, 0, -9, 9]),
        {"file_name": "b.jpg"},
    ]
    found = resized_boxes(records, [])
    assert found.counts == [1, 1, 0, 1, 0]
    assert found.sides == pytest.approx([np.sqrt(200), 10, 0])


def test_of_many_images_some_are_looked_at(monkeypatch):
    monkeypatch.setattr(box_sizes, "MAX_IMAGES", 4)
    records = [record([0, 0, side, side]) for side in range(9)]
    some = resized_boxes(records, []).sides
    assert len({*some} & {*range(9)}) == 4 and some == sorted(some)
    assert some == resized_boxes(records, []).sides
    assert resized_boxes(records[:4], []).sides == [0, 1, 2, 3]
    assert resized_boxes([], []) == BoxSizes([], [])


def test_small_boxes_and_more_boxes_than_queries_are_said():
    large = BoxSizes([20.0, 30.0, 40.0], [2, 1])
    assert sizes_line(large) == "Boxes as trained: 21, 30 and 39 pixels (5 %, median, 95 %)"
    assert not [*warnings_of(large, 2), *warnings_of(BoxSizes([], [0]), 30)]
    small = BoxSizes([9.0] * 8 + [90.0] * 60, [31, 5, 31])
    of_size, of_queries = warnings_of(small, 30)
    assert "A tenth of the boxes is below 16 pixels" in of_size
    assert "INPUT.MIN_SIZE_TRAIN" in of_size and "min_sizes" in of_size
    assert of_queries == (
        "2 of 3 images checked: more boxes (up to 31) than the model has queries (30), so it "
        "cannot detect all; raise MODEL.DINO.NUM_QUERIES (model.query_selection.num_queries)"
    )
    assert len([*warnings_of(small, None)]) == 1


def test_the_queries_are_those_of_the_config_if_its_model_has_any():
    for name in ("dino_R_50_4scale_12ep.yaml", "dino_R_50_4scale_12ep.py"):
        assert queries_of(get_config(name)) == 900
    cfg = get_config("dino_R_50_4scale_12ep.yaml")
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    assert queries_of(cfg) is None
    cfg = get_config("dino_R_50_4scale_12ep.py")
    cfg.model = {"backbone": {}}
    assert queries_of(cfg) is None


@pytest.mark.parametrize("grouped", [False, True])
def test_a_loader_is_enough_to_know_them(grouped, caplog):
    mapper = Mapper(True, augmentations=detr_augmentation([200], 1000), image_format="RGB")
    loader = build_detection_train_loader(
        [record([0, 0, 4, 9], [0, 0, 9, 4])] * 5,
        mapper=mapper,
        total_batch_size=1,
        aspect_ratio_grouping=grouped,
    )
    with caplog.at_level(logging.INFO, "dino_d2"):
        log_box_sizes(loader, 1)
    said, of_size, of_queries = [x.getMessage() for x in caplog.records if "dino_d2" in x.name]
    assert said == "Boxes as trained: 12, 12 and 12 pixels (5 %, median, 95 %)"
    assert "below 16" in of_size and of_queries.startswith("5 of 5 images checked: more boxes")
    caplog.clear()
    log_box_sizes([record([0, 0, 4, 9])], 1)  # a loader of another kind: nothing is known
    assert not caplog.records
