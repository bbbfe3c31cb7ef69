"""Test-time augmentation: what several views of an image find is merged."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import DatasetMapperTTA
from detectron2.structures import Boxes, Instances
from torch import nn

from dino_d2.config.keys import add_dino_config
from dino_d2.data import generate, register
from dino_d2.engine import make_plan
from dino_d2.modeling.test_time_augmentation import WithTTA
from dino_d2.weights import model_zoo

BOX = [20, 10, 50, 30]


class Finder(nn.Module):
    """Finds the bright rectangle of each image, surer in larger ones."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, batch):
        return [{"instances": self.find(x["image"])} for x in batch]

    def find(self, image):
        self.seen.append(tuple(image.shape[1:]))
        rows, columns = (image[0] > 127).nonzero(as_tuple=True)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        boxes = Boxes(torch.tensor([box]).float())
        scores = torch.tensor([image.shape[1] / 1000])
        return Instances(
            image.shape[1:], pred_boxes=boxes, scores=scores, pred_classes=torch.tensor([2])
        )


@pytest.fixture
def views():
    cfg = get_cfg()
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE, cfg.TEST.AUG.FLIP = (40, 80, 120), 1000, True
    return DatasetMapperTTA(cfg)


def an_input(height=60, width=90):
    """An image of another size than the detections are for."""
    image = np.zeros((height, width, 3), np.uint8)
    x0, y0, x1, y1 = BOX
    image[y0:y1, x0:x1] = 255
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    return {"image": tensor, "height": 2 * height, "width": 2 * width, "file_name": "a.png"}


def test_boxes_of_all_views_are_brought_back_and_the_surest_stays(views):
    finder = Finder()
    model = WithTTA(finder, views, iou=0.5, max_detections=10)
    (result,) = model([an_input()])
    assert sorted(finder.seen) == [(40, 60), (40, 60), (80, 120), (80, 120), (120, 180), (120, 180)]
    instances = result["instances"]
    assert instances.image_size == (120, 180)
    assert instances.scores.tolist() == pytest.approx([0.12])
    assert instances.pred_classes.tolist() == [2]
    expected = 2 * torch.tensor([BOX]).float()
    torch.testing.assert_close(instances.pred_boxes.tensor, expected, rtol=0, atol=2)


def test_merging_is_by_class_cut_to_the_image_and_limited():
    model = WithTTA(Finder(), lambda x: [], iou=0.5, max_detections=3)
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [5, 5, 30, 30]])
    boxes = torch.cat([boxes, torch.tensor([[20.0, 0, 25, 5]])])
    scores = torch.tensor([0.5, 0.9, 0.4, 0.8, 0.1])
    labels = torch.tensor([0, 0, 1, 0, 0])
    merged = model.merge(boxes, scores, labels, (20, 25))
    assert merged.scores.tolist() == pytest.approx([0.9, 0.8, 0.4])
    assert merged.pred_classes.tolist() == [0, 0, 1]
    assert merged.pred_boxes.tensor[1].tolist() == [5, 5, 25, 20]


def test_the_box_that_stays_is_the_mean_of_those_of_its_class_by_score():
    model = WithTTA(Finder(), lambda x: [], iou=0.5, max_detections=3)
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 14], [0, 0, 10, 10], [15, 0, 15, 10]])
    scores, labels = torch.tensor([0.6, 0.2, 0.5, 0.0]), torch.tensor([0, 0, 1, 0])
    merged = model.merge(boxes, scores, labels, (20, 25)).pred_boxes.tensor
    expected = [[0, 0, 10, 11], [0, 0, 10, 10], [15, 0, 15, 10]]  # 11 = (0.6 * 10 + 0.2 * 14) / 0.8
    torch.testing.assert_close(merged, torch.tensor(expected).float())


def test_the_detector_stays_in_its_mode():
    finder = Finder()
    for mode in (True, False):
        assert WithTTA(finder.train(mode), lambda x: [], iou=0.5, max_detections=3).training == mode
        assert finder.training == mode


@pytest.mark.slow
@pytest.mark.usefixtures("clean_catalogs")
def test_detectron2s_keys_add_results_with_augmentation(tmp_path):
    generate(tmp_path, 1, 2)
    name = f"{tmp_path}/val.json@{tmp_path}/images"  # of 2 images
    register([name])
    cfg = model_zoo.get_config("quickstart")
    add = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (48, 64), "MODEL.DEVICE", "cpu"]
    cfg.merge_from_list([*add, "DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,)])
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    plan = make_plan(cfg)
    results = plan.evaluate(plan.build_model())
    assert {"bbox", "dAP", "bbox_TTA", "dAP_TTA"} <= results.keys()
    assert results["bbox"].keys() == results["bbox_TTA"].keys()
    inference = tmp_path / "output" / "inference"
    files = [inference / x / "coco_instances_results.json" for x in ("", "tta")]
    assert all(file.is_file() for file in files)


@pytest.mark.parametrize("sizes", [(), (48, 0)])
def test_sizes_of_views_have_to_be_some(sizes):
    cfg = model_zoo.get_config("quickstart")
    cfg.merge_from_list(["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", sizes])
    with pytest.raises(ValueError, match="TEST.AUG.MIN_SIZES"):
        make_plan(cfg)


def test_another_model_has_no_such_key():
    cfg = get_cfg()
    add_dino_config(cfg)
    cfg.TEST.AUG.ENABLED = True
    with pytest.raises(ValueError, match="TEST.AUG.ENABLED"):
        make_plan(cfg)
