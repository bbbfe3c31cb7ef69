"""Classes dropped, merged and ignored by name: in files, folders and evaluation."""

import copy
import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dino_d2.data import (
    DatasetError,
    annotations_of,
    changes_of,
    check,
    class_changes,
    class_names,
    from_yolo,
    register,
)
from dino_d2.data.classes import change_classes, split_changes
from dino_d2.data.mapper import Mapper
from dino_d2.evaluation.analysis import analyse, evaluate_boxes

pytestmark = pytest.mark.usefixtures("clean_catalogs")
SIZE = 200, 100
CLASSES = ["car", "truck", "traffic light", "cup, glass", "DontCare"]


def box(left, width, label, id, image=1, **changes):
    entry = {"id": id, "image_id": image, "category_id": label, "bbox": [left, 10, width, 40]}
    return {**entry, "area": 40 * width, "iscrowd": 0, **changes}


def a_dataset(classes=CLASSES, images=2):
    """In every image a box of each class, side by side."""
    sizes = dict(zip(("width", "height"), SIZE, strict=True))
    numbers = range(1, images + 1)
    pairs = [(image, label) for image in numbers for label in range(1, len(classes) + 1)]
    return {
        "images": [{"id": x, "file_name": f"{x}.png", **sizes} for x in numbers],
        "annotations": [
            box(30 * label, 20, label, id, image) for id, (image, label) in enumerate(pairs, 1)
        ],
        "categories": [{"id": x, "name": name} for x, name in enumerate(classes, start=1)],
    }


def change(*arguments, dataset=None, **options):
    return change_classes(dataset or a_dataset(), class_changes(*arguments, **options))


def found_in(dataset):
    """(class, left side, iscrowd) of the boxes of the first image."""
    names = {x["id"]: x["name"] for x in dataset["categories"]}
    boxes = [x for x in dataset["annotations"] if x["image_id"] == 1]
    return [(names[x["category_id"]], x["bbox"][0], x["iscrowd"]) for x in boxes]


def write_coco(folder, dataset):
    folder.mkdir(parents=True)
    for image in dataset["images"]:
        Image.new("RGB", SIZE).save(folder / image["file_name"])
    (folder / "_annotations.coco.json").write_text(json.dumps(dataset))


def test_a_dropped_class_is_gone_with_its_boxes_but_no_image():
    before = a_dataset()
    given = copy.deepcopy(before)
    changed, told = change(["car", "DontCare"], dataset=given)
    assert given == before
    assert changed["images"] == before["images"]
    assert found_in(changed) == [("truck", 60, 0), ("traffic light", 90, 0), ("cup, glass", 120, 0)]
    assert told == (
        "dropped car (2 boxes), DontCare (2 boxes); 3 classes left: truck, traffic light, cup, "
        "glass"
    )


@pytest.mark.parametrize(
    ("merge", "names"),
    [
        # in the place of the first, or of the class of this name, which takes part by itself
        ({"vehicle": ["truck", "car"]}, ["vehicle", "traffic light", "cup, glass", "DontCare"]),
        ({"truck": "car"}, ["truck", "traffic light", "cup, glass", "DontCare"]),
        ({"truck": ["car", "truck"]}, ["truck", "traffic light", "cup, glass", "DontCare"]),
        ({"automobile": "car"}, ["automobile", *CLASSES[1:]]),
    ],
)
def test_classes_become_one(merge, names):
    changed, told = change(merge=merge)
    ((new, _),) = merge.items()
    assert [x["name"] for x in changed["categories"]] == names
    count = 1 if new == "automobile" else 2
    assert [x[0] for x in found_in(changed)].count(new) == count
    assert f" into {new};" in told and told.count("(2 boxes)") == count


def test_several_merges_are_made_at_once_and_one_name_may_come_twice():
    pairs = [("a", ["car"]), ("b", ["traffic light"]), ("a", ["truck"])]
    changed, _ = change(merge=pairs)
    assert [x[0] for x in found_in(changed)] == ["a", "a", "b", "cup, glass", "DontCare"]


def evaluate(dataset, results):
    """COCO's own evaluation; returns it."""
    truth = COCO()
    truth.dataset = copy.deepcopy(dataset)
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def test_a_detection_of_any_class_in_an_ignored_region_is_not_wrong():
    """By COCO's evaluation: without the region, half of the detections of each class are wrong."""
    dataset = a_dataset()
    for x in dataset["annotations"]:
        x["bbox"][2:] = [60, 80] if x["category_id"] == 5 else [20, 40]
    ignored, told = change(ignore="DontCare", dataset=dataset)
    dropped, _ = change("DontCare", dataset=dataset)
    assert "ignored DontCare (2 boxes), as regions; 4 classes left" in told
    ids = [x["id"] for x in ignored["annotations"]]
    assert len(set(ids)) == len(ids) and min(ids) > 0
    right = [x for x in dataset["annotations"] if x["category_id"] != 5]
    keys = "image_id", "category_id", "bbox"
    results = [{key: x[key] for key in keys} | {"score": 0.5} for x in right]
    # half the size of the region, whose IoU with it is low, and all inside
    results += [x | {"bbox": [155, 15, 40, 30], "score": 0.9} for x in results]
    assert evaluate(ignored, results).stats[0] == pytest.approx(1)
    assert evaluate(dropped, results).stats[0] == pytest.approx(0.5, abs=0.01)
    ours = analyse(evaluate_boxes(ignored, results))
    assert ours.confusion[-1].sum() == 0  # nothing is detected where nothing is
    assert analyse(evaluate_boxes(dropped, results)).confusion[-1].sum() == 8


def test_a_detection_is_ignored_at_the_ious_up_to_its_share_in_the_region():
    changed, _ = change(ignore="DontCare")  # from 150 to 170
    result = {"image_id": 1, "category_id": 1, "bbox": [156.5, 10, 20, 40], "score": 0.9}
    one = next(x for x in evaluate(changed, [result]).evalImgs if x and x["image_id"] == 1)
    # 67.5 % of its area: ignored at 0.5, 0.55, 0.6 and 0.65
    assert one["dtIgnore"][:, 0].tolist() == [True] * 4 + [False] * 6


def test_regions_are_no_targets_of_a_training(tmp_path):
    write_coco(tmp_path / "train", a_dataset())
    register([name := f"{tmp_path}@train?ignore=DontCare"])
    record = DatasetCatalog.get(name)[0]
    sample = Mapper(is_train=True, augmentations=[], image_format="RGB")(record)
    assert sorted(sample["instances"].gt_classes.tolist()) == [0, 1, 2, 3]


def test_no_class_is_left():
    with pytest.raises(DatasetError, match="no class is left of car, truck, .*: keep at least one"):
        change(CLASSES[:2], ignore=CLASSES[2:])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"drop": "car", "ignore": "car"}, "'car' is to be dropped and ignored: name it once"),
        ({"drop": "car", "merge": {"a": ["car"]}}, "dropped and merged into 'a'"),
        ({"merge": {"a": ["car"], "b": ["car"]}}, "merged into 'a' and merged into 'b'"),
        ({"drop": "a", "merge": {"a": ["car"]}}, "to be dropped, but others are merged into 'a'"),
        ({"merge": {"a": ["car"], "b": ["a"]}}, "merged into 'b', but others are merged into 'a'"),
        ({"merge": {"a": []}}, "'a' is to be made of the classes []: name both"),
        ({"merge": {"": ["car"]}}, "'' is to be made of the classes ['car']: name both"),
        ({"drop": ["car", " "]}, "dropped has an empty name"),
    ],
)
def test_contradictions_are_one_sentence(changes, sentence):
    with pytest.raises(DatasetError) as caught:
        class_changes(**changes)
    assert sentence in str(caught.value)


def test_changes_are_part_of_a_name_whatever_the_names():
    odd = ["a, b", "c=d", "e&f", "100 %", "${g}", "h?drop=i", "ä"]
    changes = class_changes(odd[:2], {odd[2]: odd[3:5]}, odd[5:])
    name = changes.add_to("my/cells@train")
    assert split_changes(name) == ("my/cells@train", changes) and "$" not in name
    assert split_changes(class_changes().add_to("a?b@val")) == ("a?b@val", class_changes())


@pytest.mark.parametrize("end", ["drop=a&add=b", "drop=a=b", "merge=a", "merge=a&drop=b"])
def test_changes_that_are_written_wrong_are_one_sentence(end):
    with pytest.raises(DatasetError, match=r"write drop=CLASS,CLASS, merge=NEW=CLASS"):
        split_changes(f"my/cells@train?{end}")


def test_a_class_of_the_training_images_alone_may_go(tmp_path):
    write_coco(tmp_path / "train", a_dataset([*CLASSES, "rare"]))
    write_coco(tmp_path / "valid", a_dataset())
    plain = [f"{tmp_path}@{split}" for split in ("train", "val")]
    with pytest.raises(DatasetError, match=r"rare in the first and absent .*--drop and --merge"):
        check(plain[:1], plain[1:], None)
    changes = class_changes(["rare"], {"vehicle": ["car", "truck"]})
    names = [changes.add_to(x) for x in plain]
    assert check(names[:1], names[1:], None) == 4
    assert check((), names[1:], 4) == 4  # evaluated alone, by the same name
    assert [x.split("'")[2][:29] for x in changes_of(names)] == [
        ": dropped rare (2 boxes); mer",
        ": dropped rare (0 boxes); mer",
    ]
    # and the folder as it is, in the same process
    assert class_names(plain[1:]) == CLASSES
    assert len(annotations_of(plain[1])["annotations"]) == 10


def test_the_same_of_files(tmp_path):
    write_coco(tmp_path / "a", a_dataset([*CLASSES, "rare"]))
    write_coco(tmp_path / "b", a_dataset())
    plain = [f"{tmp_path / x}/_annotations.coco.json@{tmp_path / x}" for x in ("a", "b")]
    names = [class_changes("rare").add_to(x) for x in plain]
    assert check(names[:1], names[1:], None) == 5
    names = [class_changes(["rare", "truk"]).add_to(x) for x in plain]
    with pytest.raises(DatasetError, match="has no class 'truk' to drop; did you mean: truck"):
        check(names[:1], names[1:], None)


def test_an_unknown_class_is_refused_with_the_nearest(tmp_path):
    write_coco(tmp_path / "train", a_dataset())
    for changes, verb in (("ignore=Dontcare", "ignore"), ("merge=a=car,Dontcare", "merge")):
        for _ in range(2):  # also where it is asked for again
            with pytest.raises(DatasetError) as caught:
                register([f"{tmp_path}@train?{changes}"])
            assert str(caught.value) == (
                f"'{tmp_path}@train' has no class 'Dontcare' to {verb}; did you mean: DontCare"
            )


def test_what_changes_leave_without_boxes_cannot_be_trained_on(tmp_path):
    dataset = a_dataset()
    dataset["annotations"] = [x for x in dataset["annotations"] if x["category_id"] == 1]
    write_coco(tmp_path / "train", dataset)
    with pytest.raises(DatasetError, match=r"drop=car' has no annotations"):
        check([f"{tmp_path}@train?drop=car"], (), None)


def test_other_formats_are_changed_as_coco_is(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "images").mkdir()
    Image.new("RGB", SIZE).save(tmp_path / "images" / "1.png")
    lines = [f"{label} 0.5 0.5 0.2 0.2" for label in range(5)]
    (tmp_path / "labels" / "1.txt").write_text("\n".join(lines))
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    changes = class_changes("traffic light", {"vehicle": ["car", "truck"]}, "DontCare")
    register([name := changes.add_to(f"{tmp_path}@train")])
    (converted,) = from_yolo(tmp_path).datasets.values()
    expected, _ = change_classes(converted, changes)
    assert MetadataCatalog.get(name).thing_classes == ["vehicle", "cup, glass"]
    boxes = annotations_of(name)["annotations"]
    assert [(x["category_id"], x["bbox"], x["iscrowd"]) for x in boxes] == [
        (x["category_id"], x["bbox"], x["iscrowd"]) for x in expected["annotations"]
    ]
    assert [x["iscrowd"] for x in boxes] == [0, 0, 0, 1, 1]
