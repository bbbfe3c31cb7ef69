"""Data sets of VOC and YOLO, converted: the same boxes, nothing lost in silence, faults by name."""

import json
import sys
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pytest
from PIL import Image

from dino_d2.data import DatasetError, check, from_voc, from_yolo, generate

PROGRAMS = Path(__file__).parents[1] / "projects" / "dino"
sys.path.insert(0, str(PROGRAMS))
import convert_dataset  # noqa: E402

WIDTH, HEIGHT = 64, 48


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """COCO annotations of images, one of them without boxes, and their folder."""
    root = tmp_path_factory.mktemp("shapes")
    generate(root, num_train=6, num_val=1)
    dataset = json.loads((root / "train.json").read_text())
    first = dataset["images"][0]["id"]
    dataset["annotations"] = [x for x in dataset["annotations"] if x["image_id"] != first]
    return dataset, root / "images"


def by_image(dataset):
    """(name of the class, bbox, iscrowd) of all boxes by the name of their image."""
    names = {x["id"]: x["name"] for x in dataset["categories"]}
    boxes = {x["id"]: [] for x in dataset["images"]}
    for x in dataset["annotations"]:
        boxes[x["image_id"]].append((names[x["category_id"]], x["bbox"], x["iscrowd"]))
    return {Path(x["file_name"]).name: boxes[x["id"]] for x in dataset["images"]}


def picture(path, width=WIDTH, height=HEIGHT, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path, **options)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# VOC


def voc_object(name="cat", xmin=1, ymin=1, xmax=10, ymax=20, extra=""):
    corners = {"xmin": xmin, "ymin": ymin, "xmax": xmax, "ymax": ymax}
    box = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
    return f"<object><name>{escape(name)}</name>{extra}<bndbox>{box}</bndbox></object>"


def voc_xml(*objects, name="a.jpg", width=WIDTH, height=HEIGHT):
    size = f"<size><width>{width}</width><height>{height}</height></size>"
    return f"<annotation><filename>{name}</filename>{size}{''.join(objects)}</annotation>"


@pytest.fixture
def voc(tmp_path):
    """A folder with one image; returns a function that writes its XML file."""
    root = tmp_path / "voc"
    picture(root / "JPEGImages" / "a.jpg")

    def make(*objects, text=None, **options):
        text = voc_xml(*objects, **options) if text is None else text
        write(root / "Annotations" / "a.xml", text)
        return root

    return make


def test_voc_comes_back_as_it_was(shapes, tmp_path):
    dataset, images = shapes
    for name, boxes in by_image(dataset).items():
        width, height = Image.open(images / name).size
        objects = [
            voc_object(label, x + 1, y + 1, x + w, y + h) for label, (x, y, w, h), _ in boxes
        ]
        text = voc_xml(*objects, name=name, width=width, height=height)
        write(tmp_path / "Annotations" / f"{Path(name).stem}.xml", text)
    (tmp_path / "JPEGImages").symlink_to(images)
    for split, chosen in (("train", dataset["images"][1:]), ("val", dataset["images"][:3])):
        names = (f"{Path(x['file_name']).stem}\n" for x in chosen)
        write(tmp_path / "ImageSets" / "Main" / f"{split}.txt", "".join(names))
    datasets, notes = from_voc(tmp_path)
    assert list(datasets) == ["train", "val"]
    expected = by_image(dataset)
    assert by_image(datasets["train"]) | by_image(datasets["val"]) == expected
    assert len(datasets["val"]["images"]) == 3
    assert not notes["XML files in no split, left out"]


def test_converted_data_pass_the_checks_of_training_and_evaluation(voc, tmp_path):
    root = voc(voc_object("dog"), voc_object("cat", 5, 5, 9, 9))
    out = tmp_path / "all.json"
    out.write_text(json.dumps(from_voc(root).datasets["all"]))
    assert check([f"{out}@{root}"], [f"{out}@{root}"], None) == 2


def test_a_voc_box_includes_its_last_pixel(voc):
    data = from_voc(voc(voc_object(xmin=1, ymin=1, xmax=WIDTH, ymax=HEIGHT))).datasets["all"]
    (entry,) = data["annotations"]
    assert entry["bbox"] == [0, 0, WIDTH, HEIGHT] and entry["area"] == WIDTH * HEIGHT
    assert entry["id"] == 1


def test_zero_based_coordinates_are_edges(voc):
    root = voc(voc_object(xmin=0, ymin=2, xmax=10, ymax=20))
    data = from_voc(root, zero_based=True).datasets["all"]
    assert data["annotations"][0]["bbox"] == [0, 2, 10, 18]


def test_difficult_objects_become_crowd_regions_and_are_counted(voc):
    hard = voc_object(extra="<difficult>1</difficult>")
    root = voc(hard, voc_object(extra="<difficult>0</difficult>"), voc_object())
    datasets, notes = from_voc(root)
    assert [x["iscrowd"] for x in datasets["all"]["annotations"]] == [1, 0, 0]
    assert notes["objects marked difficult, now crowd regions"] == 1


def test_parts_of_objects_are_no_objects(voc):
    part = "<part><name>head</name><bndbox><xmin>3</xmin></bndbox></part>"
    datasets, _ = from_voc(voc(voc_object(extra=part)))
    assert len(datasets["all"]["annotations"]) == 1


def test_files_of_no_use_are_counted(voc):
    root = voc(voc_object())
    picture(root / "JPEGImages" / "b.jpg")
    picture(root / "JPEGImages" / "c.jpg")
    write(root / "Annotations" / "c.xml", voc_xml(name="c.jpg"))
    write(root / "ImageSets" / "Main" / "train.txt", "a  1\n\n")
    _, notes = from_voc(root)
    assert notes["XML files in no split, left out"] == 1
    assert notes["images without an XML file, left out"] == 1


def test_voc_files_and_images_may_be_in_one_folder(tmp_path):
    picture(tmp_path / "a.png")
    write(tmp_path / "a.xml", voc_xml(voc_object(), name="other.jpg", width=0, height=0))
    (image,) = from_voc(tmp_path).datasets["all"]["images"]
    assert image == {"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}


def test_the_file_says_which_of_two_images_of_a_name_it_means(voc):
    root = voc(voc_object(), name="a.png")
    picture(root / "JPEGImages" / "a.png")
    assert from_voc(root).datasets["all"]["images"][0]["file_name"] == "JPEGImages/a.png"
    voc(voc_object(), name="other.png")
    with pytest.raises(DatasetError, match=r"a\.jpg' and '.*a\.png'.*<filename>"):
        from_voc(root)


def test_boxes_that_leave_their_image_are_clipped_and_counted(voc):
    datasets, notes = from_voc(voc(voc_object(xmax=WIDTH + 5), voc_object()))
    assert datasets["all"]["annotations"][0]["bbox"] == [0, 0, WIDTH, 20]
    assert notes["boxes that left their image, clipped"] == 1


BOMB = (
    '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>'
    "<annotation><filename>&b;</filename></annotation>"
)
EXTERNAL = (
    '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]>'
    "<annotation><filename>&a;</filename></annotation>"
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not valid XML: no element found: line 1"),
        ("<annotation>\n<object>", "line 2"),
        ('<?xml version="1.0" encoding="nonsense"?><annotation/>', "nonsense|encoding"),
        (BOMB, "document type"),
        (EXTERNAL, "document type"),
        ("<labels/>", "its root is <labels>"),
        (voc_xml(voc_object(name=" ")), "object 1 has no <name>"),
        (voc_xml(voc_object(), voc_object(xmax="wide")), r"object 2 \('cat'\) has no <bndbox>"),
        (voc_xml(voc_object(xmax="")), "has no <bndbox> of four numbers"),
        (voc_xml(voc_object(xmax="nan")), "has no <bndbox> of four numbers"),
        (voc_xml(voc_object(xmin=0)), r"begins at \(0, 1\).*--zero-based"),
        (voc_xml(voc_object(xmax=0)), r"no area inside its image of 64 x 48"),
        (voc_xml(voc_object(), width=48, height=64), r"48 x 64, but .* has 64 x 48"),
        (voc_xml(voc_object(), width="wide"), "has width 'wide'"),
        (
            voc_xml(voc_object(extra="<difficult>perhaps</difficult>")),
            "object 1 has <difficult>perhaps</difficult>: give 0 or 1",
        ),
        (voc_xml(), "there are no annotations"),
    ],
)
def test_a_wrong_voc_file_is_named(voc, text, words):
    root = voc(text=text)
    with pytest.raises(DatasetError, match=words) as error:
        from_voc(root)
    assert str(root) in str(error.value)


def test_a_split_of_voc_needs_its_files(voc):
    root = voc(voc_object())
    write(root / "ImageSets" / "Main" / "val.txt", "a\nb\n")
    with pytest.raises(DatasetError, match=r"val\.txt', line 2: there is no XML file of 'b'"):
        from_voc(root)


@pytest.mark.parametrize("line", ["my photo 1", "my photo 1 -1", "my photo 1  1"])
def test_names_in_splits_of_voc_may_have_spaces(voc, line):
    root = voc(voc_object())
    picture(root / "JPEGImages" / "my photo 1.jpg")
    write(root / "Annotations" / "my photo 1.xml", voc_xml(voc_object(), name="my photo 1.jpg"))
    write(root / "ImageSets" / "Main" / "train.txt", f"a 1\n{line}\na\n")
    names = by_image(from_voc(root).datasets["train"])
    assert list(names) == ["a.jpg", "my photo 1.jpg"]


@pytest.mark.parametrize(
    ("text", "crowd"), [("true", 1), ("True ", 1), ("false", 0), ("", 0), ("1", 1)]
)
def test_difficult_may_be_a_word(voc, text, crowd):
    root = voc(voc_object(extra=f"<difficult>{text}</difficult>"))
    assert from_voc(root).datasets["all"]["annotations"][0]["iscrowd"] == crowd


def test_a_split_of_voc_without_images_is_left_out_and_counted(voc):
    root = voc(voc_object())
    write(root / "ImageSets" / "Main" / "train.txt", "a\n")
    write(root / "ImageSets" / "Main" / "val.txt", "\n")
    datasets, notes = from_voc(root)
    assert list(datasets) == ["train"] and notes["splits without images, left out"] == 1


def test_voc_without_images_or_files_is_refused(voc, tmp_path):
    root = voc(voc_object())
    (root / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(DatasetError, match=r"a\.xml' has no image"):
        from_voc(root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="have no XML files"):
        from_voc(tmp_path / "empty")


# YOLO


@pytest.fixture
def yolo(tmp_path):
    """A folder with one image of `cat` and `dog`; returns a function that writes its label file."""
    root = tmp_path / "yolo"
    picture(root / "images" / "a.jpg")
    write(root / "classes.txt", "cat\ndog\n")

    def make(text):
        write(root / "labels" / "a.txt", text)
        return root

    return make


def row(bbox, label, width, height):
    x, y, w, h = bbox
    values = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
    return f"{label} {' '.join(f'{value:.6f}' for value in values)}\n"


def test_yolo_comes_back_as_it_was(shapes, tmp_path):
    dataset, images = shapes
    names = [x["name"] for x in dataset["categories"]]
    for number, (name, boxes) in enumerate(by_image(dataset).items()):
        split = "train" if number < 4 else "val"
        (tmp_path / "images" / split).mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / split / name).symlink_to(images / name)
        size = Image.open(images / name).size
        if boxes:
            rows = [row(bbox, names.index(label), *size) for label, bbox, _ in boxes]
            write(tmp_path / "labels" / split / f"{Path(name).stem}.txt", "".join(rows))
    listed = "".join(f"  {i}: {name}\n" for i, name in enumerate(names))
    write(
        tmp_path / "data.yaml", f"path: .\ntrain: images/train\nval: images/val\nnames:\n{listed}"
    )
    datasets, notes = from_yolo(tmp_path)
    assert [len(x["images"]) for x in datasets.values()] == [4, 2]
    found = by_image(datasets["train"]) | by_image(datasets["val"])
    for name, boxes in by_image(dataset).items():
        assert [x[0] for x in found[name]] == [x[0] for x in boxes]
        for (_, mine, _), (_, theirs, _) in zip(found[name], boxes, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-3)
    empty = sum(not boxes for boxes in by_image(dataset).values())
    assert notes["images without a label file, without boxes"] == empty > 0


def test_an_outline_becomes_its_box_and_is_counted(yolo):
    root = yolo("1 0.25 0.5 0.75 0.25 0.5 1\n\n0 0.5 0.5 1 1\n")
    datasets, notes = from_yolo(root)
    boxes = [(x["category_id"], x["bbox"]) for x in datasets["all"]["annotations"]]
    assert boxes == [(2, [16, 12, 32, 36]), (1, [0, 0, WIDTH, HEIGHT])]
    assert notes["outlines, boxed"] == 1


def test_label_files_without_an_image_are_counted(yolo):
    root = yolo("0 0.5 0.5 1 1")
    write(root / "labels" / "b.txt", "0 0.5 0.5 1 1")
    write(root / "labels" / "classes.txt", "cat\ndog\n")
    assert from_yolo(root).notes["label files without an image, left out"] == 1


def test_turned_images_have_the_size_that_is_seen(yolo):
    root = yolo("0 0.5 0.5 1 1")
    exif = Image.Exif()
    exif[274] = 6
    picture(root / "images" / "a.jpg", exif=exif)
    (image,) = from_yolo(root).datasets["all"]["images"]
    assert (image["width"], image["height"]) == (HEIGHT, WIDTH)


def test_damaged_exif_turns_nothing(yolo):
    root = yolo("0 0.5 0.5 1 1")
    (root / "images" / "a.jpg").unlink()
    picture(root / "images" / "a.png", exif=b"Exif\0\0damaged")
    (image,) = from_yolo(root).datasets["all"]["images"]
    assert (image["width"], image["height"]) == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0 0.5 0.5 1 1\ncat 0.5 0.5 1 1", "line 2: could not convert.*'cat'"),
        ("2 0.5 0.5 1 1", "its class is 2, but there are names for 2 classes"),
        ("0.5 0.5 0.5 1 1", "its class is 0.5"),
        ("0 0.5 0.5 1", "3 numbers after the class"),
        ("0 0.5 0.5 1 1 0.9", "5 numbers after the class"),
        ("0 32 24 64 48", "from 0 to 1"),
        ("0 0.5 0.5 nan 1", "from 0 to 1"),
        ("0 0.5 0.5 0 1", "no area inside"),
    ],
)
def test_a_wrong_line_is_named(yolo, text, words):
    with pytest.raises(DatasetError, match=words) as error:
        from_yolo(yolo(text))
    assert "a.txt', line" in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("names: [cat", "is not YAML"),
        ("train: images", "has no 'names'"),
        ("- 5", "has no 'names'"),
        ("names: {1: cat, 2: dog}\ntrain: images", "number its 'names' from 0"),
        ("names: [cat]\nkpt_shape: [17, 3]\ntrain: images", "keypoints"),
        ("names: [cat]\ntrain: image", "there is no '.*image'; did you mean: .*images"),
        ("names: [cat]\ntrain: list.txt", r"list\.txt', line 2: there is no image"),
        ("names: [cat]", "has no images in its splits"),
        ("names: [cat]\nnc: 3\ntrain: images", "has nc 3 but 1 name:"),
        ("names: [cat, cat]\ntrain: images", "categories 1 and 2 are both 'cat'"),
        ("names: [cat, ' ']\ntrain: images", "category 2 has an empty name"),
        ("names: {0: cat, 1: }\ntrain: images", "category 2 has an empty name"),
    ],
)
def test_a_wrong_yaml_file_is_named(yolo, text, words):
    root = yolo("0 0.5 0.5 1 1")
    write(root / "data.yaml", text)
    write(root / "list.txt", "images/a.jpg\nimages/b.jpg\n")
    with pytest.raises(DatasetError, match=words) as error:
        from_yolo(root)
    assert str(root) in str(error.value)


@pytest.mark.parametrize(
    ("text", "splits"),
    [
        ("path: .\nnames: [cat]\nval: images", ["val"]),
        ("path: ../nowhere\nnames: [cat]\ntrain: [images]\nvalid: ../images", ["train", "val"]),
        ("names: [cat]\ntest: list.txt\ntrain:", ["test"]),
    ],
)
def test_splits_are_found_where_the_yaml_file_says(yolo, text, splits):
    root = yolo("0 0.5 0.5 1 1")
    write(root / "data.yaml", text)
    write(root / "list.txt", "images/a.jpg\n\n")
    for name in (root, root / "data.yaml"):
        assert list(from_yolo(name).datasets) == splits


def test_splits_are_found_without_a_yaml_file(yolo):
    root = yolo("0 0.5 0.5 1 1")
    for folder in ("train", "valid"):
        picture(root / folder / "images" / "b.jpg")
        write(root / folder / "labels" / "b.txt", "1 0.5 0.5 1 1")
    assert list(from_yolo(root).datasets) == ["train", "val"]


def test_images_in_no_split_are_counted(yolo):
    root = yolo("0 0.5 0.5 1 1")
    picture(root / "images" / "train" / "b.jpg")
    write(root / "labels" / "train" / "b.txt", "1 0.5 0.5 1 1")
    picture(root / "images" / "more" / "c.jpg")
    note = "images in no split, left out"
    assert from_yolo(root).notes[note] == 2  # a.jpg and c.jpg
    write(root / "data.yaml", "names: [cat, dog]\ntrain: ../yolo/images/train\nval: images/more/")
    assert from_yolo(root).notes[note] == 1


@pytest.mark.parametrize("folder", ["validation", "val2017", "Test", "testset_2"])
def test_a_folder_that_is_nearly_a_split_is_refused(yolo, folder):
    root = yolo("0 0.5 0.5 1 1")
    picture(root / "images" / "train" / "b.jpg")
    picture(root / "images" / folder / "c.jpg")
    with pytest.raises(DatasetError, match=f"{folder}' looks like a split.*train, val, valid"):
        from_yolo(root)


def test_a_split_has_one_folder_and_one_key(yolo):
    root = yolo("0 0.5 0.5 1 1")
    for folder in ("images/val", "images/valid"):
        picture(root / folder / "b.jpg")
    with pytest.raises(DatasetError, match=r"val' and '.*valid' are both the split 'val'"):
        from_yolo(root)
    write(root / "data.yaml", "names: [cat]\nval: images/val\nvalid: images/valid")
    with pytest.raises(DatasetError, match="has both val and valid"):
        from_yolo(root)


def test_files_that_are_no_pictures_are_left_alone(yolo):
    root = yolo("0 0.5 0.5 1 1")
    for name in ("scan.pcd", "weights.h5", "film.mpg"):
        (root / "images" / name).write_bytes(b"something else")
    assert len(from_yolo(root).datasets["all"]["images"]) == 1


def test_a_split_without_labels_is_left_out_and_counted(yolo):
    root = yolo("0 0.5 0.5 1 1")
    for name in ("b", "c"):
        picture(root / "test" / "images" / f"{name}.jpg")
    write(root / "data.yaml", "names: [cat]\ntrain: images\ntest: test/images")
    datasets, notes = from_yolo(root)
    assert list(datasets) == ["train"]
    assert notes["images of split 'test', which has no box, left out"] == 2
    (root / "labels" / "a.txt").unlink()
    with pytest.raises(DatasetError, match="there are no annotations in train or test"):
        from_yolo(root)


def test_a_folder_without_images_is_counted(yolo):
    root = yolo("0 0.5 0.5 1 1")
    (root / "empty").mkdir()
    write(root / "data.yaml", "names: [cat]\nnc: 1\ntrain: images\nval: empty")
    datasets, notes = from_yolo(root)
    assert list(datasets) == ["train"] and notes["splits without images, left out"] == 1


def test_a_blank_line_among_the_classes_does_not_shift_them(yolo):
    root = yolo("2 0.5 0.5 1 1")
    write(root / "classes.txt", "cat\n\ndog\n\n")
    with pytest.raises(DatasetError, match="category 2 has an empty name"):
        from_yolo(root)


def test_names_are_taken_in_the_order_of_their_numbers(yolo):
    root = yolo("0 0.5 0.5 1 1")
    write(root / "data.yaml", "names: {1: dog, 0: cat}\ntrain: images")
    categories = from_yolo(root).datasets["train"]["categories"]
    assert [x["name"] for x in categories] == ["cat", "dog"]


def test_images_and_labels_may_be_in_one_folder(tmp_path):
    picture(tmp_path / "a.jpg")
    write(tmp_path / "a.txt", "0 0.5 0.5 1 1")
    write(tmp_path / "obj.names", "cat")
    assert len(from_yolo(tmp_path).datasets["all"]["annotations"]) == 1


def test_the_last_folder_called_images_is_that_of_the_images(yolo, tmp_path):
    root = yolo("0 0.5 0.5 1 1").rename(tmp_path / "images")
    assert len(from_yolo(root).datasets["all"]["annotations"]) == 1


def test_classes_have_to_be_named_once(yolo):
    root = yolo("0 0.5 0.5 1 1")
    for name in ("a.yaml", "b.yaml"):
        write(root / name, "names: [cat]\ntrain: images")
    with pytest.raises(DatasetError, match=r"several YAML files.*a\.yaml', '.*b\.yaml"):
        from_yolo(root)
    for name in ("a.yaml", "b.yaml", "classes.txt"):
        (root / name).unlink()
    with pytest.raises(DatasetError, match=r"neither data\.yaml nor classes\.txt"):
        from_yolo(root)


def test_a_file_that_is_no_text_is_named(yolo):
    root = yolo("0 0.5 0.5 1 1")
    (root / "labels" / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match=r"a\.txt' cannot be read as text"):
        from_yolo(root)


# The program


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["convert_dataset.py", *map(str, words)])
    convert_dataset.main()


def test_the_program_writes_a_file_a_split_and_says_what_it_did(
    yolo, tmp_path, monkeypatch, capsys
):
    root = yolo("0 0.5 0.5 1 1\n1 0 0 0.5 0 0.5 0.5")
    picture(root / "images" / "b.jpg")
    run(monkeypatch, "yolo", root, "--output", tmp_path / "new" / "coco")
    dataset = json.loads((tmp_path / "new" / "coco" / "all.json").read_text())
    assert len(dataset["annotations"]) == 2
    said = capsys.readouterr().out
    assert "2 images, 1 of them without boxes, 2 boxes" in said
    assert "outlines, boxed: 1" in said and "2 classes: cat, dog" in said and str(root) in said
    assert [x.name for x in (tmp_path / "new" / "coco").iterdir()] == ["all.json"]


def test_the_program_reads_voc(voc, tmp_path, monkeypatch):
    run(monkeypatch, "voc", voc(voc_object(xmin=0)), "--zero-based", "--output", tmp_path)
    assert json.loads((tmp_path / "all.json").read_text())["annotations"][0]["bbox"][0] == 0


def test_the_program_changes_classes(yolo, tmp_path, monkeypatch, capsys):
    root = yolo("0 0.5 0.5 1 1\n1 0.5 0.5 0.5 0.5")
    run(monkeypatch, "yolo", root, "--ignore", "cat", "--output", tmp_path)
    dataset = json.loads((tmp_path / "all.json").read_text())
    assert [x["name"] for x in dataset["categories"]] == ["dog"]
    assert [x["iscrowd"] for x in dataset["annotations"]] == [0, 1]
    assert "all: ignored cat (1 box), as regions; 1 class left: dog" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has no class 'cet' to drop; did you mean: cat"):
        run(monkeypatch, "yolo", root, "--drop", "cet", "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_program_overwrites_nothing(yolo, tmp_path, monkeypatch):
    write(tmp_path / "all.json", "mine")
    with pytest.raises(SystemExit, match=r"all\.json' exists, and is not overwritten"):
        run(monkeypatch, "yolo", yolo("0 0.5 0.5 1 1"), "--output", tmp_path)
    assert (tmp_path / "all.json").read_text() == "mine"


def test_the_program_ends_with_one_sentence(yolo, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="'nowhere' does not exist"):
        run(monkeypatch, "voc", "nowhere", "--output", tmp_path)
    (tmp_path / "shapes").mkdir()
    with pytest.raises(SystemExit, match="did you mean: '.*shapes'"):
        run(monkeypatch, "voc", tmp_path / "shape", "--output", tmp_path)
    write(tmp_path / "file", "")
    data = yolo("0 0.5 0.5 1 1")
    with pytest.raises(SystemExit, match="it is a file"):
        run(monkeypatch, "yolo", data, "--output", tmp_path / "file")
    with pytest.raises(SystemExit):
        run(monkeypatch, "yolo", tmp_path, "--zero-based", "--output", tmp_path)
    assert "--zero-based is for voc" in capsys.readouterr().err
