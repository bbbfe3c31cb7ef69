"""Folders as tools export them: `--data FOLDER` finds what they are, and says so."""

import json
import logging
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from dino_d2.data import DatasetError, annotations_of, check, class_names, find_folder, register
from dino_d2.data.folder import split_of

SIZE = 40, 30
CLASSES = ["cat", "dog"]


pytestmark = pytest.mark.usefixtures("clean_catalogs")


def draw(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE).save(path)


def coco(file, images, names, root_category=False, **changes):
    """A file of annotations with a box an image, and the images in their folder."""
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    if root_category:
        categories = [x | {"supercategory": "pets"} for x in categories]
        categories.insert(0, {"id": 0, "name": "pets", "supercategory": "none"})
    content = {"images": [], "annotations": [], "categories": categories}
    for id, name in enumerate(names, start=1):
        draw(images / Path(name).name)
        content["images"].append({"id": id, "file_name": name, "width": 40, "height": 30})
        box = {"id": id, "image_id": id, "category_id": 1 + id % 2, "bbox": [4, 3, 20, 10]}
        content["annotations"].append(box | {"area": 200, "iscrowd": 0} | changes)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def voc(folder, images, names):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        draw(images / name)
        box = "<xmin>4</xmin><ymin>3</ymin><xmax>24</xmax><ymax>13</ymax>"
        thing = f"<object><name>{CLASSES[number % 2]}</name><bndbox>{box}</bndbox></object>"
        text = f"<annotation><filename>{name}</filename>{thing}</annotation>"
        (folder / name).with_suffix(".xml").write_text(text)


def yolo(labels, images, names):
    labels.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        draw(images / name)
        (labels / name).with_suffix(".txt").write_text(f"{number % 2} 0.5 0.5 0.4 0.4\n")


def numbered(prefix, count):
    return [f"{prefix}_{number}.jpg" for number in range(count)]


def roboflow_coco(root):
    for split in ("train", "valid", "test"):
        folder = root / split
        coco(folder / "_annotations.coco.json", folder, numbered(split, 3), root_category=True)


def coco_itself(root):
    for split in ("train", "val"):
        file = root / "annotations" / f"instances_{split}2017.json"
        coco(file, root / f"{split}2017", numbered(split, 3))
        (root / "annotations" / f"captions_{split}2017.json").write_bytes(file.read_bytes())


def the_same_names_in_every_split(root):
    for split in ("train", "val"):
        coco(root / "annotations" / f"{split}.json", root / "images" / split, numbered("a", 3))


def this_project(root):
    for split in ("train", "val"):
        coco(root / f"{split}.json", root / "images", numbered(split, 3))


def train_and_val_together_besides(root):
    this_project(root)
    coco(root / "trainval.json", root / "images", [*numbered("train", 3), *numbered("val", 3)])


def fiftyone_coco(root):
    for split in ("train", "val"):
        coco(root / split / "labels.json", root / split / "data", numbered(split, 3))


def ultralytics(root):
    for split in ("train", "val"):
        yolo(root / "labels" / split, root / "images" / split, numbered(split, 3))
    (root / "data.yaml").write_text(
        "path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n"
    )


def roboflow_yolo(root):
    for split in ("train", "valid"):
        yolo(root / split / "labels", root / split / "images", numbered(split, 3))
    text = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n"
    text += "nc: 2\nnames: ['cat', 'dog']\n"
    (root / "data.yaml").write_text(text)


def voc_itself(root):
    voc(root / "Annotations", root / "JPEGImages", [*numbered("train", 3), *numbered("val", 3)])
    sets = root / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    for split in ("train", "val"):
        (sets / f"{split}.txt").write_text("\n".join(f"{split}_{i}" for i in range(3)))


def roboflow_voc(root):
    for split in ("train", "valid"):
        voc(root / split, root / split, numbered(split, 3))


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        *((x, "COCO") for x in (roboflow_coco, coco_itself, this_project, fiftyone_coco)),
        *((x, "COCO") for x in (the_same_names_in_every_split, train_and_val_together_besides)),
        *((x, "YOLO") for x in (ultralytics, roboflow_yolo)),
        *((x, "VOC") for x in (voc_itself, roboflow_voc)),
    ],
)
def test_a_folder_with_splits_is_found_as_it_is(write, kind, tmp_path):
    write(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = find_folder(str(tmp_path))
    assert found.kind == kind and list(found.splits)[:2] == ["train", "val"] and not found.held_out
    assert str(found).startswith(
        f"'{tmp_path}' is {kind}: train 3 images with 3 boxes; val 3 images with 3 boxes"
    )
    assert str(found).endswith("; 2 classes: cat, dog")
    train, val = (f"{tmp_path}@{split}" for split in ("train", "val"))
    assert check([train], [val], None) == 2
    assert len(DatasetCatalog.get(train)) == len(annotations_of(val)["images"]) == 3
    for name, split in ((train, "train"), (val, "val")):
        paths = [x["file_name"] for x in DatasetCatalog.get(name)]
        assert all(Path(x).is_file() and split in x.removeprefix(str(tmp_path)) for x in paths)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written


def cvat_coco(root):
    file = root / "annotations" / "instances_default.json"
    coco(file, root / "images" / "default", numbered("a", 10))


def label_studio(root):
    coco(root / "result.json", root / "images", [f"images\\{x}" for x in numbered("a", 10)])


def one_file_beside_its_images(root):
    coco(root / "labels.json", root, numbered("a", 10), id=0)


def names_of_another_case(root):
    coco(root / "annotations.json", root / "photos", numbered("a", 10))
    for path in (root / "photos").iterdir():
        path.rename(path.with_suffix(".JPG"))


def yolo_without_splits(root):
    yolo(root / "labels", root / "images", numbered("a", 10))
    (root / "classes.txt").write_text("cat\ndog\n")


def voc_without_splits(root):
    voc(root, root, numbered("a", 10))


@pytest.mark.parametrize(
    "write",
    [
        *(cvat_coco, label_studio, one_file_beside_its_images, names_of_another_case),
        *(yolo_without_splits, voc_without_splits),
    ],
)
def test_without_a_val_split_a_share_is_held_out(write, tmp_path):
    write(tmp_path)
    found = find_folder(str(tmp_path))
    assert found.held_out
    assert "val 1 image with 1 box (held out: 10% of the images, seed 0)" in str(found)
    names = [f"{tmp_path}@{split}" for split in ("train", "val")]
    register(names)
    train, val = ({x["file_name"] for x in DatasetCatalog.get(name)} for name in names)
    assert (len(train), len(val)) == (9, 1) and not train & val
    find_folder.cache_clear()
    again = find_folder(str(tmp_path)).splits["val"].dataset["images"]
    assert {x["file_name"] for x in again} == {
        x["file_name"] for x in annotations_of(names[1])["images"]
    }


def test_what_is_held_out_has_boxes(tmp_path):
    coco(tmp_path / "a.json", tmp_path / "images", numbered("a", 40))
    content = json.loads((tmp_path / "a.json").read_text())
    content["annotations"] = content["annotations"][:2]
    (tmp_path / "a.json").write_text(json.dumps(content))
    splits = find_folder(str(tmp_path)).splits
    assert [len(x.dataset["annotations"]) for x in splits.values()] == [1, 1]
    assert len(splits["val"].dataset["images"]) == 1 + 4


def test_a_category_that_only_groups_others_is_none_in_all_splits_or_in_none(tmp_path, caplog):
    """One that is annotated in training is a class, although the val split has none of it."""
    roboflow_coco(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert class_names([f"{tmp_path}@train"]) == CLASSES
    assert [
        x for x in caplog.messages if "only group others, left out: 3, the first is 'pets'" in x
    ]
    file = tmp_path / "train" / "_annotations.coco.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = 0
    file.write_text(json.dumps(content))
    find_folder.cache_clear()
    MetadataCatalog.remove(f"{tmp_path}@train")
    DatasetCatalog.remove(f"{tmp_path}@train")
    names = [f"{tmp_path}@train", f"{tmp_path}@val"]
    assert class_names(names) == ["pets", *CLASSES]


def test_voc_that_counts_from_0_is_taken_as_such_and_said(tmp_path, caplog):
    voc(tmp_path, tmp_path, numbered("a", 2))
    path = tmp_path / "a_0.xml"
    path.write_text(path.read_text().replace("<xmin>4<", "<xmin>0<"))
    register([f"{tmp_path}@train"])
    assert "boxes with coordinates below 1, so all are read as 0-based: 1" in caplog.text
    boxes = [x["bbox"] for x in find_folder(str(tmp_path)).splits["train"].dataset["annotations"]]
    assert boxes in ([[0, 3, 24, 10]], [[4, 3, 20, 10]])


def test_only_a_val_split_is_enough_to_evaluate(tmp_path):
    coco(tmp_path / "val" / "a.json", tmp_path / "val", numbered("a", 3))
    assert list(find_folder(str(tmp_path)).splits) == ["val"]
    with pytest.raises(DatasetError, match="has no split 'train'.*val 3 images"):
        register([f"{tmp_path}@train"])


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("instances_train2017", "train"),
        ("valid/_annotations.coco", "val"),
        ("validation", "val"),
        ("test-dev2017", "test"),
        ("val2/labels", "val"),
        ("trainset", "train"),
        ("dev", "val"),
        ("constrain", "all"),
        ("latest", "all"),
        ("value", "all"),
        ("train/val", "val"),
    ],
)
def test_a_split_is_told_by_the_words_of_a_name(name, split):
    assert split_of(Path("/data", name), Path("/data")) == split


# ---- what cannot be told


def refused(folder):
    with pytest.raises(DatasetError) as error:
        find_folder(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_of_something_else_says_what_was_seen(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "more.json").write_text("[]")
    message = refused(tmp_path)
    assert "it has more.json, notes.txt, pictures/, but no COCO JSON" in message
    assert "give files by --train-json and --train-images" in message


def test_files_of_labelme_are_recognised(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"shapes": [], "imagePath": "a.jpg"}))
    assert "convert it with labelme2coco" in refused(tmp_path)


def test_two_kinds_in_one_folder_are_named(tmp_path):
    ultralytics(tmp_path)
    coco(tmp_path / "train.json", tmp_path / "images" / "train", numbered("train", 3))
    assert "could be COCO or YOLO: give YOLO's data.yaml, or COCO" in refused(tmp_path)
    assert find_folder(str(tmp_path / "data.yaml")).kind == "YOLO"


def test_two_files_that_could_be_one_split_are_named(tmp_path):
    for name in ("a.json", "b.json"):
        coco(tmp_path / name, tmp_path / "images", numbered("a", 3))
    message = refused(tmp_path)
    assert "has 'a.json' and 'b.json', and their names do not say which split each is" in message


def test_a_missing_folder_is_said_with_the_nearest(tmp_path):
    (tmp_path / "cells").mkdir()
    assert f"; did you mean: '{tmp_path}/cells'" in refused(tmp_path / "cell")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "a.json").touch()
    assert "is a file: give its folder" in refused(tmp_path / "a.json")


def test_a_yaml_file_without_names_is_said(tmp_path):
    (tmp_path / "data.yaml").write_text("train: images\n")
    assert "it has no class names" in refused(tmp_path / "data.yaml")


def test_an_entry_that_has_no_meaning_is_said_with_its_split(tmp_path):
    this_project(tmp_path)
    content = json.loads((tmp_path / "val.json").read_text())
    content["annotations"][1]["iscrowd"] = "who knows"
    (tmp_path / "val.json").write_text(json.dumps(content))
    assert f"split 'val' of '{tmp_path}': annotation 2 of image 'val_1.jpg' has iscr" in refused(
        tmp_path
    )


def test_names_of_another_form_are_no_folder():
    before = set(DatasetCatalog)
    register(["coco_2017_train", "somebody@home", "@train", "train", "me@trainer"])
    assert set(DatasetCatalog) == before
