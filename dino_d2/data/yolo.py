"""Reads YOLO: a folder of text files, one per image, in the layout of Ultralytics."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import yaml

from ..errors import DatasetError
from ..images import image_size
from ..names import path_hint, plural
from .convert import Conversion, LabelledBox, LabelledImage, find_images, read_text, to_coco
from .normalise import to_int

SPLITS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}
LIKE_A_SPLIT = re.compile(r"(train(ing)?|val(id|idation)?|test(ing)?)(set)?[-_]?\d*", re.IGNORECASE)
NAME_FILES = ("classes.txt", "obj.names", "labels/classes.txt")
TOLERANCE = 0.01  # by which coordinates may leave the image, as in Ultralytics


class YoloFolder(NamedTuple):
    root: Path
    base: Path  # folder with the images somewhere below it
    classes: list[str]
    images: dict[str, list[Path]]  # by split
    lacks_test: bool = False  # the YAML file names a test split that is missing, as Roboflow's may


def from_yolo(root: Path) -> Conversion:
    """Convert a folder with `images` and `labels` to COCO annotations.

    `data.yaml` (or the only other YAML file) has the splits and class names. Without it, names are
    in `classes.txt`, one per line, and splits are folders such as `images/train` or
    `train/images`, or one split "all" if there are none. Splits without boxes are left out.

    A line of a label file is `class cx cy w h`, relative to the image, or an outline
    `class x1 y1 x2 y2 x3 y3 ...`, which is replaced by its box. An image without a label file has
    no boxes.

    Args:
        root: the folder, or its YAML file

    Raises:
        DatasetError: a file is missing or invalid; the message says which, where and how
    """
    folder = read_folder(root)
    notes = dict.fromkeys(("images without a label file, without boxes", "outlines, boxed"), 0)
    splits = {
        split: (label_image(path, folder.classes, notes) for path in paths)
        for split, paths in folder.images.items()
    }
    conversion = to_coco(splits, folder.root, folder.classes)
    notes["label files without an image, left out"] = len(left_over(folder))
    used = {os.path.abspath(path) for paths in folder.images.values() for path in paths}
    there = set(map(os.path.abspath, find_images(folder.base)))
    notes["images in no split, left out"] = len(there - used)
    notes["test splits that are named but missing"] = int(folder.lacks_test)
    conversion.notes.update(notes)
    return conversion


def left_over(folder: YoloFolder) -> set[Path]:
    """Label files without an image, in the folders that were read."""
    read = {label_file(path) for paths in folder.images.values() for path in paths}
    folders = {path.parent for path in read}
    there = {path for folder in folders for path in folder.glob("*.txt")}
    names = {name.rpartition("/")[2] for name in NAME_FILES}
    return {path for path in there - read if path.name not in names}


def read_folder(root: Path) -> YoloFolder:
    if root.is_file():
        return read_yaml(root)
    candidates = [root / "data.yaml"] if (root / "data.yaml").is_file() else []
    candidates = candidates or sorted([*root.glob("*.yaml"), *root.glob("*.yml")])
    if len(candidates) > 1:
        names = ", ".join(f"'{path}'" for path in candidates)
        raise DatasetError(f"'{root}' has several YAML files: give one of {names}")
    if candidates:
        return read_yaml(candidates[0])
    files = [root / name for name in NAME_FILES if (root / name).is_file()]
    if not files:
        raise DatasetError(
            f"'{root}' has neither data.yaml nor classes.txt: add one that names the classes"
        )
    # Keep blank lines in between: they count in the numbers of the classes.
    classes = [line.strip() for line in read_text(files[0]).rstrip().splitlines()]
    images = root / "images" if (root / "images").is_dir() else root
    splits = find_splits(root) or {"all": find_images(images)}
    return _checked(YoloFolder(root, root, classes, splits))


def find_splits(root: Path) -> dict[str, list[Path]]:
    """Images of folders named after splits; a DatasetError for repeated or misspelt names."""
    splits = {name: split for split, names in SPLITS.items() for name in names}
    named = [(path.name, path) for path in sorted(root.glob("images/*"))]
    named += [(path.parent.name, path) for path in sorted(root.glob("*/images"))]
    found: dict[str, tuple[Path, list[Path]]] = {}
    for name, folder in named:
        paths = find_images(folder)
        if not paths or not LIKE_A_SPLIT.fullmatch(name):
            continue
        if name not in splits:
            raise DatasetError(
                f"'{folder}' looks like a split, but those are named {', '.join(splits)}: rename "
                "it, or list it in data.yaml"
            )
        split = splits[name]
        if split in found:
            raise DatasetError(
                f"'{found[split][0]}' and '{folder}' are both the split '{split}': put them into "
                "one folder, or list them in data.yaml"
            )
        found[split] = folder, paths
    return {split: found[split][1] for split in SPLITS if split in found}


def read_yaml(path: Path) -> YoloFolder:
    try:
        config = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise DatasetError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from error
    names = config.get("names") if isinstance(config, dict) else None
    if not isinstance(names, list | dict) or not names:
        raise DatasetError(f"'{path}' has no 'names': list the class names")
    if "kpt_shape" in config:
        raise DatasetError(f"'{path}' has 'kpt_shape': keypoints are not supported, only boxes")
    if isinstance(names, dict):
        if names.keys() != set(range(len(names))):
            raise DatasetError(f"'{path}': number its 'names' from 0, without gaps")
        names = [names[number] for number in range(len(names))]
    if to_int(config.get("nc", len(names))) != len(names):
        raise DatasetError(
            f"'{path}' has nc {config['nc']} but {plural(len(names), 'name')}: correct either"
        )
    base = path.parent / str(config.get("path") or "")
    bases = [base, path.parent] if base.is_dir() else [path.parent]
    entries = {split: read_entries(config, keys, path) for split, keys in SPLITS.items()}
    test = entries["test"]
    if lacks_test := bool(test) and not any(existing_paths(x, bases) for x in test):
        entries["test"] = []
    images = {
        split: list(dict.fromkeys(x for entry in named for x in read_entry(entry, bases, path)))
        for split, named in entries.items()
        if named
    }
    classes = ["" if name is None else str(name) for name in names]
    return _checked(YoloFolder(path.parent, bases[0], classes, images, lacks_test))


def _checked(folder: YoloFolder) -> YoloFolder:
    if not any(folder.images.values()):
        raise DatasetError(
            f"'{folder.root}' has no images in its splits: give a folder of images and labels, or "
            "correct the paths in its YAML file"
        )
    return folder


def read_entries(config: dict, keys: tuple[str, ...], path: Path) -> list[str]:
    """The paths that a YAML file lists for one split."""
    given = [config[key] for key in keys if config.get(key)]
    if len(given) > 1:
        raise DatasetError(f"'{path}' has both {' and '.join(keys)}: put them into one list")
    return list(map(str, given[0] if given and isinstance(given[0], list) else given))


def read_entry(entry: str, bases: list[Path], path: Path) -> list[Path]:
    """The images in a folder of a split, or listed in its text file."""
    place = next(iter(existing_paths(entry, bases)), None)
    if place is None:
        named = bases[0] / entry
        raise DatasetError(f"'{path}': there is no '{named}'{path_hint(named)}")
    if place.is_dir():
        return find_images(place)
    images = []
    for number, line in enumerate(read_text(place).splitlines(), start=1):
        if line.strip():
            images.append(place.parent / line.strip())
            if not images[-1].is_file():
                raise DatasetError(f"'{place}', line {number}: there is no image '{images[-1]}'")
    return images


def existing_paths(entry: str, bases: list[Path]) -> list[Path]:
    """Where an entry of the YAML file may be; some tools write `../` for the file's own folder."""
    named = (base / name for base in bases for name in (entry, entry.removeprefix("../")))
    return [x for x in named if x.exists()]


def label_file(image: Path) -> Path:
    """The label file of an image: the last folder named `images` becomes `labels`.

    >>> print(label_file(Path("data/images/train/1.jpg")))
    data/labels/train/1.txt
    """
    parts = list(image.with_suffix(".txt").parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts)


def label_image(image: Path, classes: list[str], notes: dict[str, int]) -> LabelledImage:
    width, height = image_size(image)
    path = label_file(image)
    boxes: list[LabelledBox] = []
    if not path.is_file():
        notes["images without a label file, without boxes"] += 1
        return LabelledImage(image, width, height, boxes)
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        where = f"'{path}', line {number}"
        if line.strip():
            index, values = read_row(line.split(), len(classes), where)
            notes["outlines, boxed"] += len(values) > 4
            left, top, right, bottom = to_corners(values)
            corners = (left * width, top * height, right * width, bottom * height)
            boxes.append(LabelledBox(corners, index, False, where))
    return LabelledImage(image, width, height, boxes)


def read_row(words: list[str], num_classes: int, where: str) -> tuple[int, list[float]]:
    """The class and the coordinates of a line."""
    try:
        index, *values = map(float, words)
    except ValueError as error:
        raise DatasetError(f"{where}: {error}: give only numbers") from error
    if index not in range(num_classes):
        raise DatasetError(
            f"{where}: its class is {words[0]}, but there are names for "
            f"{plural(num_classes, 'class')}, numbered from 0: correct it, or name all classes"
        )
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise DatasetError(
            f"{where}: {plural(len(values), 'number')} after the class: give 4 for a box (cx cy w "
            "h), or pairs for an outline"
        )
    if not all(-TOLERANCE <= value <= 1 + TOLERANCE for value in values):
        raise DatasetError(
            f"{where}: {' '.join(words[1:])}: give coordinates relative to width and height, from "
            "0 to 1"
        )
    return int(index), values


def to_corners(values: list[float]) -> tuple[float, float, float, float]:
    if len(values) == 4:
        cx, cy, width, height = values
        return cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2
    return min(values[0::2]), min(values[1::2]), max(values[0::2]), max(values[1::2])
