"""Annotations as tools write them: what is meant is read, alike in training and in evaluation."""

import json
import logging
import unicodedata

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from dino_d2.data import DatasetError, check, register
from dino_d2.data.coco import annotations_of
from dino_d2.engine.evaluator import ErrorAnalysisEvaluator

BOX = [4, 3, 20, 10]


pytestmark = pytest.mark.usefixtures("clean_catalogs")


@pytest.fixture
def make(tmp_path):
    """Writes a dataset of one image and one box, changed; its name, and its records."""

    def make(
        box=(), image=(), categories=None, annotations=None, files=("a.jpg",), encoding="utf-8"
    ):
        for name in files:
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30)).save(path)
        entry = {"id": 1, "image_id": 7, "category_id": 3, "bbox": BOX, "area": 200, "iscrowd": 0}
        entry = {k: v for k, v in (entry | dict(box)).items() if v is not REMOVED}
        picture = {"id": 7, "file_name": "a.jpg", "width": 40, "height": 30} | dict(image)
        dataset = {
            "images": [{k: v for k, v in picture.items() if v is not REMOVED}],
            "annotations": [entry] if annotations is None else annotations,
            "categories": categories or [{"id": 3, "name": "cat"}],
        }
        (tmp_path / "data.json").write_text(json.dumps(dataset), encoding=encoding)
        return f"{tmp_path}/data.json@{tmp_path}/images"

    return make


REMOVED = object()


def the_box(name):
    """Of the only record, and of what evaluation reads."""
    register([name])
    ((record,), (annotation,)) = DatasetCatalog.get(name), annotations_of(name)["annotations"]
    return record["annotations"][0], annotation


def evaluated(name, evaluator=ErrorAnalysisEvaluator, image_id=7):
    """AP of a perfect detection."""
    evaluator = evaluator(name, tasks=("bbox",), distributed=False, use_fast_impl=False)
    evaluator.reset()
    x, y, width, height = BOX
    corners = torch.tensor([[x, y, x + width, y + height]], dtype=torch.float32)
    found = Instances((30, 40), pred_boxes=Boxes(corners), scores=torch.ones(1))
    found.pred_classes = torch.tensor([0])
    evaluator.process([{"image_id": image_id}], [{"instances": found}])
    return evaluator.evaluate()["bbox"]["AP"]


def said(caplog):
    return [x.message for x in caplog.records if x.name.startswith("dino_d2")]


# ---- entries


@pytest.mark.parametrize(
    ("written", "meant"),
    [("0", 0), ("False", 0), (False, 0), (None, 0), (REMOVED, 0), (0.0, 0), ("no", 0)]
    + [("1", 1), ("true", 1), (True, 1), (" Yes ", 1)],
)
def test_a_crowd_is_read_from_its_plain_spellings(written, meant, make, caplog):
    record, annotation = the_box(make({"iscrowd": written}))
    assert record["iscrowd"] == annotation["iscrowd"] == meant
    assert type(record["iscrowd"]) is int and not said(caplog)


@pytest.mark.parametrize("written", ["maybe", 2, -1, [0], "", 0.5])
def test_another_crowd_is_one_sentence(written, make):
    with pytest.raises(DatasetError, match="annotation 1 of image 'a.jpg' has iscrowd .*1 for a c"):
        register([make({"iscrowd": written})])


@pytest.mark.parametrize(
    "change", [{"iscrowd": "0"}, {"area": REMOVED}, {"area": "200"}, {"id": 0}]
)
@pytest.mark.parametrize("evaluator", [COCOEvaluator, ErrorAnalysisEvaluator])
def test_any_evaluator_reads_what_was_checked(change, evaluator, make):
    name = make(change)
    check([], [name], None)
    assert evaluated(name, evaluator) == pytest.approx(100)


@pytest.mark.parametrize("written", [REMOVED, None, "many", -200, 0, float("nan"), True])
def test_an_area_that_is_none_is_that_of_the_box_and_is_said_once(written, make, caplog):
    _, annotation = the_box(make({"area": written}))
    assert annotation["area"] == 200
    (sentence,) = said(caplog)
    assert "missing or invalid areas, computed from the boxes: 1" in sentence


@pytest.mark.parametrize(
    "segmentation",
    [
        [[4, 3, 24, 3, 24, 13]],
        {"size": [30, 40], "counts": [4 * 30 + 3, 100, 30 * 40 - 4 * 30 - 3 - 100]},
    ],
)
def test_an_area_is_that_of_the_mask_where_there_is_one(segmentation, make):
    _, annotation = the_box(make({"area": None, "segmentation": segmentation}))
    assert annotation["area"] == pytest.approx(100, abs=12)


@pytest.mark.parametrize("segmentation", [[[]], [[1, 2, 3]], "none", [[1e9, 0, 0, 0, 5, 5]], {}])
def test_a_mask_that_cannot_be_read_is_none(segmentation, make):
    _, annotation = the_box(make({"area": None, "segmentation": segmentation}))
    assert annotation["area"] == 200


def test_a_missing_box_is_that_of_its_mask(make, caplog):
    shape = [[4, 3, 24, 3, 24, 13, 4, 13]]
    record, _ = the_box(make({"bbox": REMOVED, "segmentation": shape}))
    assert record["bbox"] == BOX and "missing boxes, computed from their masks" in said(caplog)[0]


@pytest.mark.parametrize("key", ["image_id", "category_id"])
@pytest.mark.parametrize("kind", [str, float, "{}.0".format])
def test_ids_are_read_as_strings_and_as_whole_floats(key, kind, make):
    value = {"image_id": 7, "category_id": 3}[key]
    name = make({key: kind(value)})
    record, annotation = the_box(name)
    assert annotation[key] == value and type(annotation[key]) is int
    assert record["category_id"] == 0


def test_ids_of_images_and_categories_are_read_as_they_are_meant(make):
    name = make({}, image={"id": "7"}, categories=[{"id": 3.0, "name": "cat"}])
    the_box(name)
    (image,), (category,) = (annotations_of(name)[key] for key in ("images", "categories"))
    assert (image["id"], category["id"]) == (7, 3)
    assert evaluated(name) == pytest.approx(100)


def test_a_name_may_be_a_number(make):
    name = make({}, categories=[{"id": 3, "name": 12}])
    register([name])
    assert MetadataCatalog.get(name).thing_classes == ["12"]


def test_a_box_may_be_of_strings(make):
    record, annotation = the_box(make({"bbox": ["4", "3", "20.0", 10]}))
    assert record["bbox"] == annotation["bbox"] == BOX


@pytest.mark.parametrize("width", ["40", 40.0, "40.0", REMOVED, None, 0, -3])
def test_sizes_are_read_as_they_are_meant_or_from_the_image(width, make):
    name = make({}, image={"width": width})
    register([name])
    (record,) = DatasetCatalog.get(name)
    assert (record["width"], record["height"]) == (40, 30) and type(record["width"]) is int


@pytest.mark.parametrize("ids", [(0, 1), (5, 5), (None, 3), ("a", "b")])
def test_annotations_are_numbered_anew_where_their_ids_do_not_tell_them_apart(ids, make, caplog):
    entries = [
        {"id": id, "image_id": 7, "category_id": 3, "bbox": BOX, "area": 200, "iscrowd": 0}
        for id in ids
    ]
    name = make(annotations=entries)
    register([name])
    assert [x["id"] for x in annotations_of(name)["annotations"]] == [1, 2]
    assert len(DatasetCatalog.get(name)[0]["annotations"]) == 2 and not said(caplog)


def test_rotated_boxes_are_counted(make, caplog):
    the_box(make({"attributes": {"rotation": 30.0, "occluded": False}}))
    (sentence,) = said(caplog)
    assert "rotated boxes, used without their rotation: 1, the first" in sentence


def test_what_is_as_it_should_be_is_evaluated_from_the_file_itself(make, tmp_path):
    name = make()
    register([name])
    assert MetadataCatalog.get(name).json_file == f"{tmp_path}/data.json"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_read_everywhere(encoding, make):
    name = make(encoding=encoding)
    the_box(name)
    assert evaluated(name) == pytest.approx(100)


# ---- classes


def category(id, name, parent="none"):
    return {"id": id, "name": name, "supercategory": parent}


@pytest.mark.parametrize(
    ("categories", "classes"),
    [
        (
            [category(0, "cells"), category(3, "cat", "cells"), category(4, "x", "cells")],
            ["cat", "x"],
        ),
        ([category(0, "cat"), category(3, "cat", "cat")], ["cat"]),
        ([category(0, "cow"), category(3, "cat")], ["cow", "cat"]),  # rare, but no root
        ([category(3, "cat"), category(4, "kitten", "cat")], ["cat", "kitten"]),  # annotated
        ([category(3, "cat", "cat"), category(4, "cow", "animal")], ["cat", "cow"]),  # as COCO's
    ],
)
def test_a_category_that_only_groups_others_is_no_class(categories, classes, make, caplog):
    name = make(categories=categories)
    register([name])
    assert MetadataCatalog.get(name).thing_classes == classes
    assert bool(said(caplog)) == (len(classes) < len(categories))


# ---- boxes


def boxes(*values):
    return [
        {"id": id, "image_id": 7, "category_id": 3, "bbox": box, "area": 1, "iscrowd": 0}
        for id, box in enumerate(values, start=1)
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (([0.1, 0.2, 0.5, 0.4], [0, 0, 1, 1]), "shares of the image"),
        (([10, 20, 35, 29], [4, 3, 38, 28], [1, 1, 3, 3]), "2 of 3 boxes leave .*like corners"),
        ([[30, 20, 35, 25]] * 6 + [[1, 1, 3, 3]] * 5, "6 of 11 boxes leave their image, the first"),
    ],
)
def test_boxes_that_are_something_else_are_one_sentence(values, words, make):
    with pytest.raises(DatasetError, match=f"{words}.*in pixels"):
        register([make(annotations=boxes(*values))])


# ---- without annotations


@pytest.mark.parametrize("annotations", [[], REMOVED])
def test_images_without_annotations_are_detected_in_and_nothing_else(
    annotations, make, caplog, tmp_path
):
    name = make(annotations=[])
    if annotations is REMOVED:
        dataset = json.loads((tmp_path / "data.json").read_text())
        del dataset["annotations"]
        (tmp_path / "data.json").write_text(json.dumps(dataset))
    assert check([], [name], None) == 1
    assert "no annotations, so there is nothing to compare with" in said(caplog)[0]
    evaluator = ErrorAnalysisEvaluator(name, tasks=("bbox",), distributed=False)
    evaluator.reset()
    evaluator.process([], [])
    assert evaluator.evaluate() == {}
    with pytest.raises(DatasetError, match="nothing can be learned"):
        check([name], [], None)


def test_a_training_is_not_evaluated_on_images_without_annotations(make, tmp_path):
    train, test = make(), f"{tmp_path}/test.json@{tmp_path}/images"
    dataset = json.loads((tmp_path / "data.json").read_text())
    (tmp_path / "test.json").write_text(json.dumps(dataset | {"annotations": []}))
    with pytest.raises(DatasetError, match="test set .*nothing to compare with: leave it out"):
        check([train], [test], None)


# ---- names of files


@pytest.mark.parametrize(
    ("written", "there"),
    [
        ("a.JPG", "a.jpg"),
        ("A.jpg", "a.jpg"),
        ("sub\\a.jpg", "sub/a.jpg"),
        (unicodedata.normalize("NFD", "größe.jpg"), unicodedata.normalize("NFC", "größe.jpg")),
        (unicodedata.normalize("NFC", "größe.jpg"), unicodedata.normalize("NFD", "größe.jpg")),
        ("a.jpeg", "a.png"),
        ("upload/1/a.jpg", "a.jpg"),
        ("a.jpg", "sub/a.jpg"),
        ("C:\\data\\a.jpg", "a.jpg"),
    ],
)
def test_a_file_of_another_name_is_found_where_only_one_fits(
    written, there, make, tmp_path, caplog
):
    name = make(image={"file_name": written}, files=(there, "b.jpg"))
    register([name])
    assert DatasetCatalog.get(name)[0]["file_name"] == f"{tmp_path}/images/{there}"
    assert "images found under another name: 1, the first is" in said(caplog)[0]


@pytest.mark.parametrize("there", [("x/a.jpg", "y/a.jpg"), ("b.jpg",), ("a.txt.png",)])
def test_a_file_of_which_two_fit_or_none_stays_missing(there, make):
    with pytest.raises(DatasetError, match="1 of 1 image files are missing"):
        register([make(image={"file_name": "A.JPG"}, files=there)])


def test_a_file_that_would_be_two_images_is_neither(make, tmp_path):
    name = make(files=("a.jpg",))
    dataset = json.loads((tmp_path / "data.json").read_text())
    first = dataset["images"][0]
    dataset["images"] = [first | {"id": id, "file_name": f"{id}/a.jpg"} for id in (7, 8)]
    (tmp_path / "data.json").write_text(json.dumps(dataset))
    with pytest.raises(DatasetError, match="2 of 2 image files are missing"):
        register([name])


# ---- however the dataset came


def test_a_file_that_detectron2_registered_is_checked_as_any(make, tmp_path):
    make({"iscrowd": "False", "area": REMOVED})
    register_coco_instances("mine", {"more": 5}, f"{tmp_path}/data.json", f"{tmp_path}/images")
    check(["mine"], ["mine"], None)
    assert DatasetCatalog.get("mine")[0]["annotations"][0]["iscrowd"] == 0
    assert evaluated("mine") == pytest.approx(100)
    assert MetadataCatalog.get("mine").more == 5 and evaluated("mine", COCOEvaluator) > 99
    make({"iscrowd": "perhaps"})
    register_coco_instances("other", {}, f"{tmp_path}/data.json", f"{tmp_path}/images")
    with pytest.raises(DatasetError, match="has iscrowd 'perhaps'"):
        check(["other"], [], None)


def test_a_good_file_that_detectron2_registered_stays_as_it_is(make, tmp_path):
    make({"segmentation": [[4, 3, 24, 3, 24, 13]]})
    register_coco_instances("mine", {}, f"{tmp_path}/data.json", f"{tmp_path}/images")
    check(["mine"], ["mine"], None)
    assert MetadataCatalog.get("mine").json_file == f"{tmp_path}/data.json"
    assert DatasetCatalog.get("mine")[0]["annotations"][0]["segmentation"]


@pytest.fixture
def register_function(make, tmp_path):
    make()

    def set_up(**changes):
        annotation = {"bbox": BOX, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0} | changes
        record = {"file_name": f"{tmp_path}/images/a.jpg", "image_id": "seven", "width": 40.0}
        record |= {"height": 30, "annotations": [annotation]}
        DatasetCatalog.register("function", lambda: [record])
        MetadataCatalog.get("function").thing_classes = ["cat"]

    return set_up


@pytest.mark.parametrize(
    "changes",
    [{}, {"iscrowd": "0"}, {"iscrowd": False}, {"category_id": "0"}, {"category_id": np.int64(0)}]
    + [{"bbox": [str(x) for x in BOX]}, {"bbox": np.array(BOX, np.float32)}],
)
def test_a_registered_function_is_checked_as_any(changes, register_function, tmp_path):
    register_function(**changes)
    check(["function"], ["function"], None)
    (record,) = DatasetCatalog.get("function")
    (annotation,) = record["annotations"]
    assert (annotation["iscrowd"], annotation["category_id"]) == (0, 0)
    assert annotation["bbox"] == BOX and record["width"] == 40 and record["image_id"] == "seven"


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_a_function_is_evaluated_with_what_it_gives_now(register_function, tmp_path):
    def evaluator(name, **options):
        return ErrorAnalysisEvaluator(name, output_dir=str(tmp_path), **options)

    register_function(bbox=[0, 0, 3, 3])
    assert evaluated("function", evaluator, image_id="seven") == 0
    for catalog in (DatasetCatalog, MetadataCatalog):  # as in the next process
        catalog.remove("function")
    register_function(iscrowd="no")
    check([], ["function"], None)
    assert evaluated("function", evaluator, image_id="seven") == pytest.approx(100)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"iscrowd": "x"}, "record 0, annotation 0 has iscrowd 'x'"),
        ({"category_id": 1}, "has category_id 1: give a number from 0 to 0"),
        ({"bbox": [1, 2, 3]}, r"has bbox \[1, 2, 3\]"),
        ({"bbox": [1, 2, 3, float("nan")]}, "has bbox .*nan"),
        ({"bbox_mode": None}, "has no 'bbox_mode'"),
    ],
)
def test_what_a_function_gives_that_has_no_meaning_is_one_sentence(
    changes, words, register_function
):
    register_function(**changes)
    with pytest.raises(DatasetError, match=words):
        check(["function"], [], None)


@pytest.mark.parametrize("value", [None, "cat", -1])
def test_classes_without_names_are_numbers_still(value, register_function):
    register_function(category_id=value)
    MetadataCatalog.remove("function")
    with pytest.raises(DatasetError, match="has category_id .*: give a number from 0 to the"):
        check(["function"], [], None)


def test_records_without_a_size_that_makes_sense_are_one_sentence(make, tmp_path):
    DatasetCatalog.register("function", lambda: [{"file_name": "a.jpg", "width": "wide"}])
    with pytest.raises(DatasetError, match="record 0 has width 'wide'"):
        check(["function"], [], None)
    DatasetCatalog.register("pictures", lambda: [{"file": "a.jpg"}])
    with pytest.raises(DatasetError, match="record 0 has no 'file_name'"):
        check(["pictures"], [], None)


def test_a_dataset_is_put_right_once(make, caplog):
    name = make({"area": None})
    with caplog.at_level(logging.WARNING):
        register([name])
        register([name])
        check([name], [name], None)
    assert len(said(caplog)) == 1
