"""Data sets that Detectron2 evaluates in their own way."""

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.evaluation import LVISEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from dino_d2.engine import make_plan, plan
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
        return Instances(
            (x["height"], x["width"]),
            pred_boxes=Boxes(torch.tensor([x["bbox"] for x in found])),
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
def test_lvis_is_evaluated_by_its_own_code(tmp_path, monkeypatch):
    DatasetCatalog.register("lvis_tiny", list)
    MetadataCatalog.get("lvis_tiny").set(evaluator_type="lvis", thing_classes=CLASSES)
    cfg = model_zoo.get_config("quickstart")
    cfg.merge_from_list(["DATASETS.TEST", ("lvis_tiny",), "OUTPUT_DIR", str(tmp_path)])
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'lvis_tiny' is evaluated .*: pip install lvis$"):
        make_plan(cfg)
    monkeypatch.setattr(plan, "find_spec", lambda name: name)
    told = []
    monkeypatch.setattr(LVISEvaluator, "__init__", lambda self, *a, **k: told.append((a, k)))
    assert isinstance(plan.yaml_evaluator(cfg, "lvis_tiny"), LVISEvaluator)
    assert "bbox/APr" in plan.metrics_of(["lvis_tiny"])
    assert told == [(("lvis_tiny",), {"output_dir": str(tmp_path / "inference")})]
