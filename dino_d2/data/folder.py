"""Recognises a folder of data as tools export it, and finds its splits.

Supported are COCO's files next to their images (of Roboflow, CVAT, Label Studio, FiftyOne and COCO
itself), YOLO (Ultralytics) and VOC. Nothing is written into the folder.
"""

import json
import logging
import os
import random
import re
from functools import cache
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

from ..errors import DatasetError
from ..names import path_hint, plural
from .coco_json import parse
from .convert import Conversion
from .normalise import Repairs, fold_name, leave_out_roots, normalise, place_images, to_text
from .voc import from_voc
from .yolo import from_yolo

logger = logging.getLogger(__name__)

# How folders and files of a split are named.
SPLITS = {
    "train": re.compile(r"(^|[^a-z])train(ing|val)?(set)?[0-9]*([^a-z]|$)"),
    "val": re.compile(r"(^|[^a-z])(val(id|idation)?|dev)(set)?[0-9]*([^a-z]|$)"),
    "test": re.compile(r"(^|[^a-z])test(ing)?(set)?[0-9]*([^a-z]|$)"),
}
ALL = "all"  # the split of a folder without splits
HELD_OUT = 0.1  # share of the training images that becomes the val split if there is none
SEED = 0  # of the random choice of held-out images
DEPTH = 2  # levels of folders that are searched for annotations
SAMPLE = 100  # images of a file that are looked up to find their folder


class Split(NamedTuple):
    """Repaired COCO annotations and the folder of their images."""

    dataset: dict[str, list]
    image_root: str


class Found(NamedTuple):
    """The data set in a folder."""

    folder: str
    kind: str  # "COCO", "YOLO", "VOC"
    splits: dict[str, Split]  # by "train", "val", "test"
    held_out: bool  # whether val was taken from train

    @property
    def class_names(self) -> list[str]:
        """Those of all splits."""
        datasets = (split.dataset for split in self.splits.values())
        return [*dict.fromkeys(x["name"] for one in datasets for x in one["categories"])]

    def __str__(self) -> str:
        """One line with the kind, and the images, boxes and classes of the splits."""
        held = {"val": f" (held out: {HELD_OUT:.0%} of the images, seed {SEED})" * self.held_out}
        parts = [
            f"{name} {plural(len(split.dataset['images']), 'image')} with "
            f"{plural(len(split.dataset['annotations']), 'box')}{held.get(name, '')}"
            for name, split in self.splits.items()
        ]
        classes = [x["name"] for x in next(iter(self.splits.values())).dataset["categories"]]
        names = shorten(", ".join(classes), 200)
        return (
            f"'{self.folder}' is {self.kind}: {'; '.join(parts)}; "
            f"{plural(len(classes), 'class')}: {names}"
        )


class Name(NamedTuple):
    """The parts of a dataset name such as "FOLDER@train"."""

    folder: str
    split: str


def split_name(name: str) -> Name | None:
    """Split a name of the form FOLDER@SPLIT; None for any other name.

    >>> split_name("data/shapes@train")
    Name(folder='data/shapes', split='train')
    """
    folder, _, split = name.rpartition("@")
    return Name(os.path.expanduser(folder), split) if folder and split in SPLITS else None


@cache
def find_folder(folder: str) -> Found:
    """Recognise the data set in a folder; the result is cached.

    Without a val split, a share of the training data is held out.

    Args:
        folder: the folder, or YOLO's YAML file

    Raises:
        DatasetError: it is not a data set, or could be several; says what is there
    """
    path = Path(folder)
    if not path.exists():
        raise DatasetError(f"there is no folder '{folder}'{path_hint(folder)}")
    if path.is_file() and path.suffix not in (".yaml", ".yml"):
        raise DatasetError(
            f"'{folder}' is a file: give its folder, or COCO annotations by --train-json and "
            "--train-images"
        )
    readers = {"COCO": find_coco, "YOLO": find_yolo, "VOC": find_voc}
    found = {kind: splits for kind, reader in readers.items() if (splits := reader(path))}
    if len(found) > 1:
        raise DatasetError(
            f"'{folder}' could be {' or '.join(found)}: give YOLO's data.yaml, or COCO's files by "
            "--train-json and --train-images"
        )
    if not found:
        raise DatasetError(
            f"'{folder}' is not a known kind of data set: it has {describe_content(path)}, but no "
            "COCO JSON with its images, data.yaml of YOLO, or XML files of VOC; give files by "
            "--train-json and --train-images, or convert them"
        )
    ((kind, splits),) = found.items()
    splits = {"train" if name == ALL else name: split for name, split in splits.items()}
    _put_right(splits, folder)
    held_out = "train" in splits and "val" not in splits
    if held_out:
        splits["train"], splits["val"] = hold_out(splits["train"])
    return Found(folder, kind, {x: splits[x] for x in SPLITS if x in splits}, held_out)


def _put_right(splits: dict[str, Split], folder: str) -> None:
    """Repair all splits together: a root category must be unused in every split."""
    repairs = Repairs()
    for name, split in splits.items():
        try:
            normalise(split.dataset, repairs, keep_roots=True)
            place_images(split.dataset["images"], split.image_root, repairs)
        except DatasetError as error:
            raise DatasetError(f"split '{name}' of '{folder}': {error}") from error
    leave_out_roots([split.dataset for split in splits.values()], repairs)
    repairs.warn(folder)


def hold_out(split: Split) -> tuple[Split, Split]:
    """Split off a share of the images; returns the rest, and that share.

    It has the same share of the images with and without boxes, and at least one image with boxes
    if there are two.
    """
    images, annotations = split.dataset["images"], split.dataset["annotations"]
    boxed = {x["image_id"] for x in annotations}
    draw, taken = random.Random(SEED), set()
    for with_boxes in (True, False):
        ids = [x["id"] for x in images if (x["id"] in boxed) == with_boxes]
        least = int(with_boxes and len(ids) > 1)
        taken.update(draw.sample(sorted(ids), max(round(HELD_OUT * len(ids)), least)))

    def part(held: bool) -> Split:
        dataset = {
            "images": [x for x in images if (x["id"] in taken) == held],
            "annotations": [x for x in annotations if (x["image_id"] in taken) == held],
        }
        return split._replace(dataset=split.dataset | dataset)

    return part(False), part(True)


def describe_content(path: Path) -> str:
    """Some of the file names in a folder, for a message."""
    if path.is_file():
        return "no class names"
    names = sorted(x.name + "/" * x.is_dir() for x in path.iterdir())
    listed = ", ".join(names[:8]) + f" and {len(names) - 8} more" * (len(names) > 8)
    labelme = any(map(is_labelme, islice(path.rglob("*.json"), 3)))
    return (listed or "no files") + " (JSON of labelme: convert it with labelme2coco)" * labelme


def is_labelme(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError):
        return False
    return isinstance(content, dict) and "shapes" in content and "imagePath" in content


def split_of(path: Path, root: Path) -> str:
    """The split named in a file's name or in its folders, the nearest first.

    >>> split_of(Path("data/valid/_annotations.coco.json"), root=Path("data"))
    'val'
    """
    for name in (path.stem, *reversed(path.relative_to(root).parent.parts)):
        matches = {split: pattern.search(name.lower()) for split, pattern in SPLITS.items()}
        starts = {split: match.start() for split, match in matches.items() if match}
        if starts:
            return min(starts, key=starts.__getitem__)
    return ALL


# ---- COCO


def find_coco(root: Path) -> dict[str, Split]:
    """The splits of a folder with COCO files; a DatasetError if two could be the same split."""
    if root.is_file():
        return {}
    paths = [x for depth in range(DEPTH + 1) for x in sorted(root.glob("*/" * depth + "*.json"))]
    contents = {x: y for x in paths if (y := content_of(x))}
    # COCO's own folder also has captions and keypoints of the same images.
    files = [x for x in contents if x.name.startswith("instances_")] or list(contents)
    parts = [x for x in files if "trainval" not in x.stem.lower()]
    if any(split_of(x, root) == "train" for x in parts):
        files = parts
    splits: dict[str, Path] = {}
    for path in files:
        split = split_of(path, root)
        other = splits.setdefault(split, path)
        if other != path or (ALL in splits and len(splits) > 1):
            names = " and ".join(f"'{x.relative_to(root)}'" for x in files[:4])
            raise DatasetError(
                f"'{root}' has {names}, and their names do not say which split each is: give them "
                "by --train-json and --val-json, with their image folders"
            )
    return {
        split: Split(contents[path], image_root(contents[path]["images"], path, root))
        for split, path in splits.items()
    }


def content_of(path: Path) -> dict[str, list] | None:
    """The content of a file of COCO annotations; None for any other file."""
    try:
        return parse(str(path))
    except DatasetError:
        return None


def image_root(images: list, json_file: Path, root: Path) -> str:
    """The folder with most of a file's images; ties go to the split's name, then the nearest."""
    near, split = json_file.parent, split_of(json_file, root)
    names = [x["file_name"] for x in images if isinstance(x, dict) and to_text(x.get("file_name"))]
    names = [str(name).replace("\\", "/") for name in names[:SAMPLE]]
    below = [x for depth in (1, 2) for x in sorted(root.glob("*/" * depth)) if x.is_dir()]
    folders = list(dict.fromkeys([near, *(x for x in below if near in x.parents), root, *below]))

    def rank(folder: Path) -> tuple[int, bool]:
        there = {fold_name(x.name) for x in folder.iterdir()}
        has = sum((folder / x).is_file() or fold_name(Path(x).name) in there for x in names)
        return -has, split != ALL and split_of(folder / "x", root) != split

    return str(min(folders, key=rank))  # the first of equals


# ---- YOLO and VOC


def find_yolo(root: Path) -> dict[str, Split]:
    """The splits of a folder with a YAML file of names, or with classes.txt."""
    files = [root] if root.is_file() else [*root.glob("*.yaml"), *root.glob("*.yml")]
    named = any("names" in x.read_text("utf-8", "replace") for x in files)
    if not named and not (root / "classes.txt").is_file():
        return {}
    base = root if root.is_dir() else root.parent
    return merge({"": from_yolo(root)}, {"": base})


def find_voc(root: Path) -> dict[str, Split]:
    """The splits of a VOC folder, or of one VOC folder per split, as Roboflow exports them."""
    if root.is_file():
        return {}
    if has_xml(root):
        return merge({"": from_voc(root, zero_based=None)}, {"": root})
    inside = [x for x in sorted(root.iterdir()) if x.is_dir() and has_xml(x)]
    folders = {split_of(x / "x", root): x for x in inside}
    conversions = {split: from_voc(x, zero_based=None) for split, x in folders.items()}
    return merge(conversions, folders)


def has_xml(root: Path) -> bool:
    folders = root / "Annotations", root / "annotations", root
    return any(next(x.glob("*.xml"), None) for x in folders)


def merge(conversions: dict[str, Conversion], roots: dict[str, Path]) -> dict[str, Split]:
    """All converted splits; a conversion under a name other than "" is one split."""
    splits: dict[str, Split] = {}
    for outer, conversion in conversions.items():
        for what, count in conversion.notes.items():
            if count:
                logger.warning(f"'{roots[outer]}': {what}: {count}")
        for inner, dataset in conversion.datasets.items():
            name = outer or {"trainval": "train"}.get(inner, inner)
            splits.setdefault(name, Split(dataset, str(roots[outer])))
    return splits
