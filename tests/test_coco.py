import json
import logging
import pickle

import pytest
import torch
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image

from dino_d2.data import (
    DatasetError,
    check,
    coco,
    num_classes,
    register,
    register_again,
    registered,
    shapes,
)
from dino_d2.data.coco_json import parse

pytestmark = pytest.mark.usefixtures("clean_catalogs")


def a_dataset():
    """Two images of 40 x 30, the first with one box; category ids neither sorted nor contiguous."""
    return {
        "images": [
            {"id": 7, "file_name": "a.jpg", "width": 40, "height": 30},
            {"id": 8, "file_name": "sub/b.jpg", "width": 40, "height": 30},
        ],
        "annotations": [annotation()],
        "categories": [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


def annotation(**changes):
    box = {"id": 17, "image_id": 7, "category_id": 9, "bbox": [1.1, 2.3, 10.7, 20.2], "area": 216.1}
    return {**box, "iscrowd": 0, **changes}


def write(root, dataset, name="data.json"):
    """The dataset's name after its files are written; text is written as it is."""
    for file_name in ("a.jpg", "sub/b.jpg"):
        path = root / "images" / file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(path)
    text = dataset if isinstance(dataset, str) else json.dumps(dataset)
    (root / name).write_text(text)
    return f"{root / name}@{root / 'images'}"


def write_boxes(root, *boxes):
    annotations = [annotation(id=number, **box) for number, box in enumerate(boxes, start=1)]
    return write(root, {**a_dataset(), "annotations": annotations})


def assert_refused(name, *parts):
    """``register`` raises one sentence with all of ``parts`` and registers nothing."""
    with pytest.raises(DatasetError) as error:
        register([name])
    message = str(error.value)
    assert [part for part in parts if part not in message] == [], message
    assert "\n" not in message
    assert name not in DatasetCatalog


def records_of(name):
    register([name])
    return DatasetCatalog.get(name)


# What a registered dataset is


def test_a_registered_name_gives_detectron2_records(tmp_path):
    first, second = records_of(write(tmp_path, a_dataset()))
    assert first["file_name"] == str(tmp_path / "images/a.jpg")
    assert (first["image_id"], first["width"], first["height"]) == (7, 40, 30)
    (box,) = first["annotations"]
    assert box["bbox"] == [1.1, 2.3, 10.7, 20.2]  # exactly, although 1.1 + 10.7 - 1.1 is not 10.7
    assert box["category_id"] == 1  # ids 3 and 9 become 0 and 1
    assert second["annotations"] == []


def test_metadata_is_what_evaluator_and_visualizer_read(tmp_path):
    name = write(tmp_path, a_dataset())
    register([name])
    metadata = MetadataCatalog.get(name)
    assert metadata.json_file == str(tmp_path / "data.json")
    assert metadata.image_root == str(tmp_path / "images")
    assert metadata.evaluator_type == "coco"
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 9: 1}


def test_registering_twice_changes_nothing(tmp_path):
    name = write(tmp_path, a_dataset())
    register([name])
    load = DatasetCatalog[name]
    register(name)
    assert DatasetCatalog[name] is load


def test_names_of_another_form_are_left_alone():
    before = set(DatasetCatalog)
    register(["coco_2017_train", "data.json", "unheard@of"])
    assert set(DatasetCatalog) == before


def test_a_home_directory_is_understood_on_both_sides(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, a_dataset())
    assert len(records_of("~/data.json@~/images")) == 2


def test_a_folder_may_have_an_at_sign(tmp_path):
    assert len(records_of(write(tmp_path / "@home", a_dataset()))) == 2


def test_names_need_not_be_ascii(tmp_path):
    dataset = a_dataset()
    dataset["images"][0]["file_name"] = "größe 猫.jpg"
    dataset["categories"][0]["name"] = "köter"
    name = write(tmp_path, dataset)
    (tmp_path / "images/a.jpg").rename(tmp_path / "images/größe 猫.jpg")
    assert records_of(name)[0]["file_name"].endswith("größe 猫.jpg")
    assert MetadataCatalog.get(name).thing_classes == ["cat", "köter"]


def test_file_names_may_be_absolute(tmp_path):
    dataset = a_dataset()
    dataset["images"][0]["file_name"] = str(tmp_path / "images/a.jpg")
    assert records_of(write(tmp_path, dataset))[0]["file_name"] == str(tmp_path / "images/a.jpg")


def test_perfect_predictions_have_an_ap_of_100(tmp_path):
    shapes.generate(tmp_path, num_train=1, num_val=8)
    name = f"{tmp_path / 'val.json'}@{tmp_path / 'images'}"
    check([], [name], None)
    # is_train keeps the annotations in the records
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="RGB")
    loader = build_detection_test_loader(DatasetCatalog.get(name), mapper=mapper)
    evaluator = COCOEvaluator(name, tasks=("bbox",), distributed=False)
    evaluator.reset()
    for (image,) in loader:
        assert image["image"].shape[1:] == (image["height"], image["width"])
        truth = image["instances"]
        scores = torch.ones(len(truth))
        predicted = Instances(truth.image_size, pred_boxes=truth.gt_boxes, scores=scores)
        predicted.pred_classes = truth.gt_classes
        evaluator.process([image], [{"instances": predicted}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_an_annotation_of_id_0_is_found_in_evaluation(tmp_path):
    # which takes a detection that matches the annotation 0 for one that matches none
    name = write(tmp_path, {**a_dataset(), "annotations": [annotation(id=0)]})
    register([name])
    assert ap_of_perfect_boxes(name) == pytest.approx(100)


def ap_of_perfect_boxes(name, box=(1.1, 2.3, 11.8, 22.5)):
    """Of a detection of the first image's box."""
    evaluator = COCOEvaluator(name, tasks=("bbox",), distributed=False, use_fast_impl=False)
    evaluator.reset()
    found = Instances((30, 40), pred_boxes=Boxes(torch.tensor([box])), scores=torch.ones(1))
    found.pred_classes = torch.tensor([1])
    evaluator.process([{"image_id": 7}], [{"instances": found}])
    return evaluator.evaluate()["bbox"]["AP"]


# Boxes are put right, with a warning


@pytest.mark.parametrize(
    ("bbox", "clipped"),
    [
        ([-5, -4, 15, 14], [0, 0, 10, 10]),
        ([30, 20, 15, 14], [30, 20, 10, 10]),
        ([-5, 5, 100, 5], [0, 5, 40, 5]),
    ],
)
def test_a_box_partly_outside_is_clipped(tmp_path, caplog, bbox, clipped):
    records = records_of(write_boxes(tmp_path, {}, {"bbox": bbox}, {"bbox": bbox}))
    assert [a["bbox"] for a in records[0]["annotations"]][1:] == [clipped, clipped]
    (message,) = [r.message for r in caplog.records if "clipped" in r.message]
    assert "image: 2, the first is annotation 2 of image" in message and "a.jpg" in message


@pytest.mark.parametrize(
    "bbox", [[5, 5, 0, 3], [5, 5, 3, -1], [40, 0, 5, 5], [-9, 0, 8, 5], [0, -9, 4, 4]]
)
def test_a_box_without_area_is_dropped(tmp_path, caplog, bbox):
    records = records_of(write_boxes(tmp_path, {}, {"bbox": bbox}))
    assert len(records[0]["annotations"]) == 1
    (message,) = [r.message for r in caplog.records if "dropped" in r.message]
    assert "without area: 1, the first is annotation 2 of image" in message and "a.jpg" in message
    assert not [r for r in caplog.records if "clipped" in r.message]


def test_good_boxes_give_no_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="dino_d2"):
        records_of(write_boxes(tmp_path, {"bbox": [0, 0, 40, 30]}))
    assert not [r for r in caplog.records if r.name.startswith("dino_d2")]


def test_crowd_annotations_are_kept(tmp_path):
    records = records_of(write_boxes(tmp_path, {"iscrowd": 1}))
    assert records[0]["annotations"][0]["iscrowd"] == 1


# Every refusal is one sentence


def test_a_missing_annotation_file_is_refused(tmp_path):
    name = f"{tmp_path}/none.json@{tmp_path}"
    assert_refused(name, f"annotation file '{tmp_path}/none.json' does not exist")


@pytest.mark.parametrize("text", ["", '{"images": ['])
def test_a_file_that_is_not_json_is_refused(tmp_path, text):
    assert_refused(write(tmp_path, text), "data.json' is not JSON", "may be incomplete")


@pytest.mark.parametrize(
    ("key", "wrong"),
    [("annotations", "annotation"), ("images", "image"), ("categories", "category")],
)
def test_a_key_of_another_spelling_is_named(tmp_path, key, wrong):
    dataset = {"images": [], "annotations": [], "categories": []}
    dataset[wrong] = dataset.pop(key)
    assert_refused(write(tmp_path, dataset), f"has '{wrong}' in place of '{key}': rename it")


def test_other_keys_of_a_list_of_images_are_fine(tmp_path):
    dataset = {"images": [], "categories": [], "annotator": "Eve", "captions": [], "annotation": 1}
    write(tmp_path, dataset)
    assert parse(str(tmp_path / "data.json"))["annotations"] == []


def test_a_file_of_detection_results_is_refused(tmp_path):
    assert_refused(write(tmp_path, "[]"), "has no list 'images' but a list", "detection results")


@pytest.mark.parametrize("key", ["images", "categories"])
def test_a_missing_key_is_refused(tmp_path, key):
    dataset = a_dataset()
    del dataset[key]
    assert_refused(write(tmp_path, dataset), f"has no list '{key}' but {', '.join(dataset)}")


@pytest.mark.parametrize("key", ["images", "categories"])
def test_an_empty_list_is_refused(tmp_path, key):
    dataset = {**a_dataset(), key: [], "annotations": []}
    assert_refused(write(tmp_path, dataset), f"there are no {key}")


def test_a_missing_image_folder_is_refused(tmp_path):
    name = write(tmp_path, a_dataset()) + "_old"
    assert_refused(name, f"image folder '{tmp_path}/images_old' does not exist", "data.json")


def test_missing_images_are_counted_and_the_first_is_named(tmp_path):
    name = write(tmp_path, a_dataset())
    (tmp_path / "images/sub/b.jpg").unlink()
    assert_refused(name, "1 of 2 image files are missing", f"'{tmp_path}/images/sub/b.jpg'")
    (tmp_path / "images/sub").rmdir()
    assert_refused(name, "1 of 2 image files are missing")


@pytest.mark.parametrize("key", ["images", "categories"])
def test_a_duplicated_id_is_refused(tmp_path, key):
    dataset = a_dataset()
    id = dataset[key][0]["id"]
    dataset[key].append(dataset[key][0])
    assert_refused(write(tmp_path, dataset), f"of '{key}' has the id {id} of an earlier one")


@pytest.mark.parametrize("key", ["images", "categories"])
@pytest.mark.parametrize("id", ["7a", 7.5, None, True, [7]])
def test_an_id_that_is_not_an_integer_is_refused(tmp_path, key, id):
    dataset = a_dataset()
    dataset[key][0]["id"] = id
    assert_refused(write(tmp_path, dataset), f"entry 0 of '{key}' has id {id!r}", "integer")


def test_an_entry_that_is_not_an_object_is_refused(tmp_path):
    dataset = {**a_dataset(), "categories": ["cat", "dog"]}
    assert_refused(write(tmp_path, dataset), "entry 0 of 'categories' is 'cat': make it an object")


@pytest.mark.parametrize(("key", "text"), [("images", "file_name"), ("categories", "name")])
def test_an_entry_without_its_name_is_refused(tmp_path, key, text):
    dataset = a_dataset()
    del dataset[key][1][text]
    assert_refused(write(tmp_path, dataset), f"entry 1 of '{key}' has {text} None", "string")


def test_an_unknown_category_is_refused(tmp_path):
    name = write_boxes(tmp_path, {}, {"category_id": 4})
    assert_refused(name, "annotation 2 of image 'a.jpg' has category_id 4, not in 'categories'")


def test_an_annotation_of_no_image_is_refused(tmp_path):
    assert_refused(write_boxes(tmp_path, {"image_id": 5}), "annotation 1 has image_id 5")


@pytest.mark.parametrize(
    "bbox",
    [
        None,
        [],
        [1, 2, 3],
        [1, 2, 3, "4 px"],
        [1, 2, 3, True],
        [1, 2, 3, float("nan")],
        [1, 2, float("inf"), 4],
    ],
)
def test_a_bbox_that_is_not_four_finite_numbers_is_refused(tmp_path, bbox):
    name = write_boxes(tmp_path, {"bbox": bbox})
    assert_refused(name, f"annotation 1 of image 'a.jpg' has bbox {bbox!r}", "finite")


def test_an_ignored_annotation_is_refused(tmp_path):
    name = write_boxes(tmp_path, {"ignore": 1})
    assert_refused(name, "annotation 1 of image 'a.jpg' is marked 'ignore'")


# num_classes and check


def test_the_number_of_classes_comes_from_the_data(tmp_path):
    name = write(tmp_path, a_dataset())
    assert num_classes([name]) == num_classes(name) == 2


def test_the_number_of_classes_of_coco_needs_no_files():
    assert num_classes(["coco_2017_train", "coco_2017_val"]) == 80


def test_classes_that_only_the_file_knows_are_read_from_it(tmp_path):
    write(tmp_path, a_dataset())
    register_coco_instances("mine", {}, str(tmp_path / "data.json"), str(tmp_path / "images"))
    assert num_classes("mine") == 2


def test_a_dataset_without_class_names_is_refused():
    DatasetCatalog.register("nameless", list)
    with pytest.raises(DatasetError, match="'nameless' does not name its classes: set Metadata"):
        num_classes("nameless")


def test_no_dataset_at_all_is_refused():
    with pytest.raises(DatasetError, match="no dataset is given"):
        num_classes([])


def test_an_unknown_name_is_refused_with_similar_ones():
    with pytest.raises(DatasetError, match="'coco_2017_trian' is not .*coco_2017_train.*@IMAGE"):
        num_classes("coco_2017_trian")
    with pytest.raises(DatasetError, match="similar ones: none"):
        check(["?"], [], None)


def test_good_datasets_pass_the_check(tmp_path):
    train = write(tmp_path, a_dataset(), "train.json")
    val = write(tmp_path, a_dataset(), "val.json")
    check([train], [val], None)
    check(train, [], 2)


def test_another_number_of_classes_in_the_config_is_refused(tmp_path):
    name = write(tmp_path, a_dataset())
    with pytest.raises(DatasetError, match="config says 5 classes but '.*' has 2: cat, dog; rem"):
        check([name], [], 5)


@pytest.mark.parametrize(
    ("categories", "difference"),
    [
        (["cat", "cow"], "number 1 is dog in the first and cow in the second"),
        (["dog", "cat"], "number 0 is cat in the first and dog in the second"),
        (["cat"], "number 1 is dog in the first and absent in the second"),
        (["cat", "dog", "cow"], "number 2 is absent in the first and cow in the second"),
    ],
)
def test_other_categories_in_the_test_set_are_refused(tmp_path, categories, difference):
    train = write(tmp_path, a_dataset(), "train.json")
    dataset = {**a_dataset(), "annotations": [annotation(category_id=0)]}
    dataset["categories"] = [{"id": id, "name": name} for id, name in enumerate(categories)]
    val = write(tmp_path, dataset, "val.json")
    with pytest.raises(DatasetError, match=difference) as error:
        check([train], [val], None)
    assert train in str(error.value) and val in str(error.value)


def test_missing_files_of_a_builtin_dataset_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", "elsewhere")
    missing = "'coco_2017_val' needs '.*instances_val2017.json'.*DETECTRON2_DATASETS .now 'elsewh"
    with pytest.raises(DatasetError, match=missing):
        check([], ["coco_2017_val"], None)


@pytest.mark.parametrize("segmentation", [[[]], [[1, 2, 3]], [1, 2, 3, 4, 5, 6], "none"])
def test_a_segmentation_costs_no_box(segmentation, tmp_path):
    (first, _) = records_of(write_boxes(tmp_path, {"segmentation": segmentation}))
    assert len(first["annotations"]) == 1


def test_a_file_whose_boxes_are_all_outside_is_refused(tmp_path):
    name = write_boxes(tmp_path, {"bbox": [50, 2, 10, 20]}, {"bbox": [1, 40, 10, 20]})
    assert_refused(name, "data.json", "no box has any area inside its image")


@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_a_list_is_no_id(key, tmp_path):
    assert_refused(write_boxes(tmp_path, {key: [1]}), f"has {key} [1]")


def test_a_number_beyond_all_images_is_refused(tmp_path):
    assert_refused(write_boxes(tmp_path, {"bbox": [0, 0, 10**400, 1]}), "finite")


def test_check_returns_the_number_of_classes(tmp_path):
    name = write(tmp_path, a_dataset())
    assert check([name], [], None) == check([], [name], 2) == 2


def test_files_are_parsed_once_and_handed_to_other_processes(tmp_path, monkeypatch):
    parsed = []
    monkeypatch.setattr(coco, "parse", lambda path: parsed.append(path) or parse(path))
    name = write(tmp_path, a_dataset())
    check([name], [name], None)
    records = DatasetCatalog.get(name)
    records[0]["annotations"].clear()  # a loader's own: the next one gets them as they were
    assert DatasetCatalog.get(name)[0]["annotations"] and len(parsed) == 1

    content = pickle.loads(pickle.dumps(registered()))
    expected, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name).as_dict()
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
    register_again([x for x in content if x.name == name])
    check([name], [name], None)
    assert DatasetCatalog.get(name) == expected and len(parsed) == 1
    assert MetadataCatalog.get(name).as_dict() == metadata
