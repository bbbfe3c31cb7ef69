"""Test-time augmentation: what several views of an image find is merged."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.modeling import DatasetMapperTTA
from detectron2.structures import Boxes, Instances
from torch import nn

from dino_d2.config.keys import add_dino_config
from dino_d2.data import generate, register
from dino_d2.engine import make_plan
from dino_d2.modeling.test_time_augmentation import MaskDINOWithTTA, WithTTA
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
    merged, shares = model.merge(boxes, scores, labels, (20, 25))
    assert shares.shape == (3, 5)
    assert merged.scores.tolist() == pytest.approx([0.9, 0.8, 0.4])
    assert merged.pred_classes.tolist() == [0, 0, 1]
    assert merged.pred_boxes.tensor[1].tolist() == [5, 5, 25, 20]


def test_the_box_that_stays_is_the_mean_of_those_of_its_class_by_score():
    model = WithTTA(Finder(), lambda x: [], iou=0.5, max_detections=3)
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 14], [0, 0, 10, 10], [15, 0, 15, 10]])
    scores, labels = torch.tensor([0.6, 0.2, 0.5, 0.0]), torch.tensor([0, 0, 1, 0])
    merged, shares = model.merge(boxes, scores, labels, (20, 25))
    expected = [[0.75, 0.25, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    torch.testing.assert_close(shares, torch.tensor(expected))
    expected = [[0, 0, 10, 11], [0, 0, 10, 10], [15, 0, 15, 10]]  # 11 = (0.6 * 10 + 0.2 * 14) / 0.8
    torch.testing.assert_close(merged.pred_boxes.tensor, torch.tensor(expected).float())


# ---- masks


def bilinear(logits, x, y):
    """A map (h, w) between the middles of its pixels, and of the nearest one at its border."""
    height, width = logits.shape
    x, y = min(max(x - 0.5, 0), width - 1), min(max(y - 0.5, 0), height - 1)
    left, top = min(int(x), width - 2), min(int(y), height - 2)
    (a, b), (c, d) = logits[top : top + 2, left : left + 2].tolist()
    x, y = x - left, y - top
    return (a * (1 - x) + b * x) * (1 - y) + (c * (1 - x) + d * x) * y


class TwoViews(MaskDINOWithTTA):
    """Finds known masks in an image of 20 x 30 pixels, and in it flipped at 30 x 45."""

    def find(self, views):
        assert [tuple(x["image"].shape[1:]) for x in views] == [(20, 30), (30, 45)]
        return self.known


def test_masks_are_means_where_the_views_have_the_pixels_of_the_image(make_mask_dino):
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    resize = T.ResizeTransform(20, 30, 30, 45)
    transforms = T.TransformList([]), T.TransformList([resize, T.HFlipTransform(45)])
    images = image, torch.zeros(3, 30, 45)
    views = [{"image": x, "transforms": y} for x, y in zip(images, transforms, strict=True)]
    model = TwoViews(make_mask_dino().eval(), lambda x: views, iou=0.5, max_detections=10)
    maps = torch.randn(2, 5, 8), torch.randn(1, 8, 12)  # of 20 x 32 and 32 x 48 pixels, padded
    own = [[3.0, 2, 18, 12], [20, 0, 30, 20]], [[18.0, 3, 40.5, 18]]  # the latter is the first
    model.known = [
        Instances(
            x["image"].shape[1:],
            pred_boxes=Boxes(torch.tensor(boxes)),
            scores=torch.tensor(scores),
            pred_classes=torch.zeros(len(boxes), dtype=torch.int64),
            mask_logits=logits,
        )
        for x, boxes, scores, logits in zip(views, own, ([0.6, 0.5], [0.2]), maps, strict=True)
    ]
    found = model([{"image": image, "height": 20, "width": 30}])[0]["instances"]
    masks, scores = [], []
    for number, score in ((0, 0.6), (1, 0.5)):
        mean = torch.empty(20, 30)
        for y, x in np.ndindex(20, 30):
            mean[y, x] = bilinear(maps[0][number], (x + 0.5) / 4, (y + 0.5) / 4)
            if number == 0:  # seen twice
                other = bilinear(maps[1][0], (45 - 1.5 * (x + 0.5)) / 4, 1.5 * (y + 0.5) / 4)
                mean[y, x] = 0.75 * mean[y, x] + 0.25 * other
        masks.append(mean > 0)
        scores.append(score * mean[mean > 0].sigmoid().mean())
    order = np.argsort(scores)[::-1].copy()
    assert torch.equal(found.pred_masks, torch.stack(masks)[order])
    torch.testing.assert_close(found.scores, torch.stack(scores)[order])
    left = found.pred_boxes.tensor[order.tolist().index(0), 0].item()
    assert left == pytest.approx(0.75 * 3 + 0.25 * 3)


def test_a_single_view_finds_what_a_mask_dino_does(make_mask_dino, make_mask_batch, randomise):
    model = make_mask_dino().eval()
    randomise(model.decoder.mask_head)
    x = make_mask_batch(1, sizes=[(50, 70)])[0]  # is padded
    x |= {"height": 50, "width": 70, "transforms": T.TransformList([])}
    augmented = MaskDINOWithTTA(model, lambda x: [x], iou=1.0, max_detections=20)
    with torch.no_grad():
        expected, found = (y([x])[0]["instances"] for y in (model, augmented))
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert (found.pred_masks == expected.pred_masks).float().mean() > 0.9999
    assert 0.1 < found.pred_masks.float().mean() < 0.9


@pytest.mark.parametrize("key", ["PANOPTIC_ON", "SEMANTIC_ON"])
def test_maps_of_pixels_are_not_merged(key):
    cfg = model_zoo.get_config("quickstart_masks")
    cfg.merge_from_list(["TEST.AUG.ENABLED", True, f"MODEL.DINO.TEST.{key}", True])
    with pytest.raises(ValueError, match=f"not maps of pixels: set .* or MODEL.DINO.TEST.{key} to"):
        make_plan(cfg)


# ---- trainings


def test_the_detector_stays_in_its_mode():
    finder = Finder()
    for mode in (True, False):
        assert WithTTA(finder.train(mode), lambda x: [], iou=0.5, max_detections=3).training == mode
        assert finder.training == mode


@pytest.mark.slow
@pytest.mark.usefixtures("clean_catalogs", "without_plots")
def test_detectron2s_keys_add_results_with_augmentation(tmp_path):
    generate(tmp_path, 1, 2)
    name = f"{tmp_path}/val.json@{tmp_path}/images"  # of 2 images
    register([name])
    cfg = model_zoo.get_config("quickstart_masks")
    add = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (48, 64), "MODEL.DEVICE", "cpu"]
    cfg.merge_from_list([*add, "DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,)])
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    plan = make_plan(cfg)
    results = plan.evaluate(plan.build_model())
    for kind in ("bbox", "segm", "dAP"):
        assert results[kind].keys() == results[f"{kind}_TTA"].keys()
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
