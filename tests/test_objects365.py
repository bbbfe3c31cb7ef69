"""Objects365 v2, from a made-up copy in its published layout."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from dino_d2.data import DatasetError, check, class_names
from dino_d2.data.objects365 import ABSENT, OBJECTS365, register_splits
from dino_d2.engine.evaluator import ErrorAnalysisEvaluator

NAMES = "objects365_v2_train", "objects365_v2_val"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The folder of a copy with two images a split, and the splits registered there."""

    def register_anew():
        for name in NAMES:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_splits()

    for split in ("train", "val"):
        write(tmp_path / "objects365", split)
    with monkeypatch.context() as context:
        context.setenv("DETECTRON2_DATASETS", str(tmp_path))
        register_anew()
    yield tmp_path / "objects365"
    register_anew()


def write(root, split, categories=OBJECTS365):
    files = ["images/v1/patch8/a.jpg", "images/v2/patch40/b.jpg"]
    for file in files:
        path = root / split / file.removeprefix("images/")[3:]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(path)
    lost = [f"images/v1/{file}" for file in ABSENT if split == "train"]
    images = [
        {"id": i, "file_name": file, "height": 30, "width": 40, "license": 5, "url": ""}
        for i, file in enumerate(files + lost, 7)
    ]
    annotation = {"id": 1, "iscrowd": 0, "isfake": 0, "isreflected": 0, "area": 400.0}
    annotation |= {"image_id": 7, "category_id": 57, "bbox": [10.0, 5.0, 20.0, 20.0]}
    dataset = {
        "images": images,
        "annotations": [annotation],
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories, 1)],
    }
    path = root / "annotations" / f"zhiyuan_objv2_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dataset))


def test_there_are_365_classes_of_different_names():
    assert len({name.casefold() for name in OBJECTS365}) == 365
    assert [OBJECTS365[i - 1] for i in (1, 57, 205, 365)] == [
        *("Person", "Wild Bird", "Tennis Racket", "Table Tennis")
    ]


def test_images_are_found_in_their_patch_and_those_that_were_never_published_are_left_out(root):
    assert check([NAMES[0]], [NAMES[1]], None) == 365
    assert class_names(NAMES) == list(OBJECTS365)
    for name, split in zip(NAMES, ("train", "val"), strict=True):
        first, second = DatasetCatalog.get(name)
        assert first["file_name"] == str(root / split / "patch8" / "a.jpg")
        assert second["file_name"] == str(root / split / "patch40" / "b.jpg")
        (annotation,) = first["annotations"]
        assert annotation["category_id"] == 56 and annotation["bbox"] == [10, 5, 20, 20]
        assert (first["image_id"], second["annotations"]) == (7, [])


@pytest.mark.usefixtures("without_plots")
def test_it_is_evaluated_by_the_ids_of_its_annotations(root, tmp_path):
    evaluator = ErrorAnalysisEvaluator(NAMES[1], output_dir=str(tmp_path))
    found = Instances((30, 40), pred_boxes=Boxes(torch.tensor([[10.0, 5, 30, 25]])))
    found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([56])
    evaluator.reset()
    evaluator.process([{"image_id": 7}], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_an_image_that_is_missing_is_named(root):
    (root / "val" / "patch40" / "b.jpg").unlink()
    with pytest.raises(DatasetError, match="1 of 2 image files are missing, .*/patch40/b.jpg'"):
        DatasetCatalog.get(NAMES[1])


def test_another_version_is_refused_and_mended_spelling_is_not(root):
    mended = [name.replace("Moniter", "Monitor") for name in OBJECTS365]
    write(root, "val", mended)
    assert len(DatasetCatalog.get(NAMES[1])) == 2
    write(root, "val", mended[::-1])
    with pytest.raises(DatasetError, match="does not have the 365 categories of Objects365 v2"):
        DatasetCatalog.get(NAMES[1])
