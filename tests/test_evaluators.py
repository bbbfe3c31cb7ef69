"""Data sets that Detectron2 evaluates in their own way."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_lvis_instances, register_pascal_voc
from detectron2.data.datasets.lvis import get_lvis_instances_meta
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES
from detectron2.evaluation import LVISEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.structures.masks import polygons_to_bitmask
from PIL import Image
from torch import nn

from dino_d2.engine import evaluation, make_plan
from dino_d2.weights import model_zoo

CLASSES = ["cat", "dog"]
BOXES = {  # of images, corners counted from 1
    "first": [("cat", (11, 21, 60, 70)), ("dog", (5, 5, 20, 30))],
    "second": [("dog", (1, 1, 80, 60))],
}
XML = """<annotation><size><width>100</width><height>80</height></size>{}</annotation>"""
OBJECT = """<object><name>{}</name><pose>x</pose><truncated>0</truncated><difficult>0</difficult>
<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""


class Perfect(nn.Module):
    """Finds what the data set says."""

    def __init__(self, name):
        super().__init__()
        self.known = {x["file_name"]: x["annotations"] for x in DatasetCatalog.get(name)}

    def forward(self, batch):
        return [{"instances": self.find(x)} for x in batch]

    def find(self, x):
        found = self.known[x["file_name"]]
        boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in found]
        return Instances(
            (x["height"], x["width"]),
            pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)),
            scores=torch.full((len(found),), 0.9),
            pred_classes=torch.tensor([x["category_id"] for x in found]),
        )


def plan_of(name, tmp_path):
    cfg = model_zoo.get_config("quickstart")
    cfg.merge_from_list(["DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,)])
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    return make_plan(cfg)


@pytest.mark.usefixtures("clean_catalogs")
def test_pascal_voc_is_evaluated_by_its_own_metric(tmp_path):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    for image, boxes in BOXES.items():
        objects = "".join(OBJECT.format(label, *box) for label, box in boxes)
        (tmp_path / "Annotations" / f"{image}.xml").write_text(XML.format(objects))
        Image.new("RGB", (100, 80)).save(tmp_path / "JPEGImages" / f"{image}.jpg")
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("\n".join(BOXES))
    register_pascal_voc("voc_tiny_test", str(tmp_path), "test", 2012, CLASSES)
    MetadataCatalog.get("voc_tiny_test").evaluator_type = "pascal_voc"
    told = plan_of("voc_tiny_test", tmp_path)
    assert told.metrics == ["bbox/AP", "bbox/AP50", "bbox/AP75"]
    results = told.evaluate(Perfect("voc_tiny_test"))
    assert results == {"bbox": pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})}


@pytest.mark.usefixtures("clean_catalogs")
@pytest.mark.parametrize(
    ("kind", "package"), [("lvis", "lvis"), ("cityscapes_instance", "cityscapesscripts")]
)
def test_the_package_that_a_data_set_needs_is_named(tmp_path, monkeypatch, kind, package):
    DatasetCatalog.register("tiny", list)
    MetadataCatalog.get("tiny").set(evaluator_type=kind, thing_classes=CLASSES)
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"'tiny' needs .*: pip install {package}$"):
        plan_of("tiny", tmp_path)


@pytest.mark.usefixtures("clean_catalogs")
def test_lvis_is_evaluated_by_its_own_code(tmp_path, monkeypatch):
    DatasetCatalog.register("lvis_tiny", list)
    MetadataCatalog.get("lvis_tiny").set(evaluator_type="lvis", thing_classes=CLASSES)
    told = []
    monkeypatch.setattr(LVISEvaluator, "__init__", lambda self, *a, **k: told.append((a, k)))
    cfg = model_zoo.get_config("quickstart")
    cfg.merge_from_list(["DATASETS.TEST", ("lvis_tiny",), "OUTPUT_DIR", str(tmp_path)])
    assert isinstance(evaluation.yaml_evaluator(cfg, "lvis_tiny"), LVISEvaluator)
    assert "bbox/APr" in evaluation.metrics_of(["lvis_tiny"])
    assert told == [(("lvis_tiny",), {"output_dir": str(tmp_path / "inference")})]


@pytest.mark.usefixtures("clean_catalogs")
def test_lvis_own_code_runs_with_this_numpy(tmp_path):
    pytest.importorskip("lvis")
    annotation = {"area": 1200, "segmentation": [[10, 20, 50, 20, 50, 50, 10, 50]]}
    annotation |= {"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 20, 40, 30]}
    url = {"coco_url": "http://images.cocodataset.org/val2017/1.jpg"}
    image = {"id": 1, "width": 100, "height": 80, "neg_category_ids": [1], **url}
    dataset = {"images": [image | {"not_exhaustive_category_ids": []}], "annotations": [annotation]}
    (tmp_path / "lvis.json").write_text(json.dumps(dataset | {"categories": LVIS_CATEGORIES}))
    name = "lvis_v1_tiny"
    classes = get_lvis_instances_meta(name)
    register_lvis_instances(name, classes, str(tmp_path / "lvis.json"), f"{tmp_path}/")
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (100, 80)).save(tmp_path / "val2017" / "1.jpg")
    assert len(LVIS_CATEGORIES) == 1203
    results = plan_of(name, tmp_path).evaluate(Perfect(name))
    assert results["bbox"]["AP"] == results["bbox"]["APf"] == pytest.approx(100)
    assert not hasattr(np, "float") or np.lib.NumpyVersion(np.__version__) < "1.24.0"


class PerfectMasks(Perfect):
    def find(self, x):
        found = super().find(x)
        polygons = [np.array(a["segmentation"], float) for a in self.known[x["file_name"]]]
        masks = [polygons_to_bitmask(list(a), 80, 100) for a in polygons]
        found.pred_masks = torch.from_numpy(np.stack(masks))
        return found


@pytest.mark.usefixtures("clean_catalogs")
def test_masks_of_cityscapes_are_evaluated_by_its_own_code(tmp_path, monkeypatch):
    pytest.importorskip("cityscapesscripts")
    monkeypatch.chdir(tmp_path)
    ids, names = np.zeros((80, 100), np.uint16), ["car", "person"]
    ids[20:60, 10:50], ids[10:70, 60:90] = 26001, 24001
    (tmp_path / "gt" / "ulm").mkdir(parents=True)
    Image.fromarray(ids).save(tmp_path / "gt" / "ulm" / "ulm_1_2_gtFine_instanceIds.png")
    path = str(tmp_path / "ulm_1_2_leftImg8bit.png")
    Image.new("RGB", (100, 80)).save(path)
    corners = [(10, 20, 50, 60), (60, 10, 90, 70)]
    annotations = [
        {
            **{"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": i, "iscrowd": 0},
            "segmentation": [[a, b, c, b, c, d, a, d]],
        }
        for i, box in enumerate(corners)
        for a, b, c, d in [box]
    ]
    record = {"file_name": path, "image_id": 1, "height": 80, "width": 100}
    DatasetCatalog.register("city_tiny", lambda: [record | {"annotations": annotations}])
    metadata = {"thing_classes": names, "gt_dir": str(tmp_path / "gt")}
    MetadataCatalog.get("city_tiny").set(**metadata, evaluator_type="cityscapes_instance")
    cfg = model_zoo.get_config("quickstart_masks")
    cfg.merge_from_list(["DATASETS.TRAIN", ("city_tiny",), "DATASETS.TEST", ("city_tiny",)])
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    told = make_plan(cfg)
    assert {"segm/AP", "segm/AP50", "bbox/AP-car"} < {*told.metrics}
    assert "segm/AP75" not in told.metrics
    results = told.evaluate(PerfectMasks("city_tiny"))
    assert results["segm"] == pytest.approx({"AP": 100, "AP50": 100})
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert not (tmp_path / "matches.json").exists()
