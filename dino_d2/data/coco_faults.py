"""What can be wrong with a file of COCO annotations, one sentence each."""

import json
import os
from collections.abc import Iterator
from typing import Any

from ..names import path_hint

KEYS = ("images", "annotations", "categories")


class DatasetError(ValueError):
    """A dataset cannot be used; the message says what is wrong, where, and what to do."""

    def __init__(self, message: str):
        # From a worker of a data loader, PyTorch raises this again with its traceback as text.
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].rstrip())


def dataset_name(json_file: str | os.PathLike, image_root: str | os.PathLike) -> str:
    """The name of a dataset of a file of COCO annotations, see `coco.register`.

    Raises:
        DatasetError: the file is not called .json, as such a name has to say
    """
    if not os.fspath(json_file).endswith(".json"):
        raise DatasetError(f"'{json_file}' is no .json file: give COCO annotations")
    return f"{json_file}@{image_root}"


def read(json_file: str) -> dict[str, list]:
    """The content of a file of COCO annotations.

    Raises:
        DatasetError: the file is missing, is not JSON, or holds something else
    """
    if os.path.isdir(json_file):
        raise DatasetError(f"'{json_file}' is a folder: give a file of COCO annotations in it")
    if not os.path.isfile(json_file):
        raise DatasetError(
            f"annotation file '{json_file}' does not exist{path_hint(json_file)}: correct its "
            f"path, seen from '{os.getcwd()}'"
        )
    dataset = read_json(json_file)
    found = ", ".join(dataset) if isinstance(dataset, dict) else f"a {type(dataset).__name__}"
    for key in KEYS:
        if not isinstance(dataset, dict) or not isinstance(dataset.get(key), list):
            raise DatasetError(
                f"'{json_file}' has no list '{key}' but {found}: give a file of COCO detection "
                "annotations (not of detection results, captions or a labelling tool's own)"
            )
    return dataset


def read_json(path: str | os.PathLike) -> Any:
    """
    Raises:
        DatasetError: the file is not JSON
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except ValueError as error:
        raise DatasetError(
            f"'{path}' is not JSON ({error}): it may be cut off, write or fetch it again"
        ) from error


def faults(dataset: dict[str, list], image_root: str) -> Iterator[str]:
    """What is wrong, in the order in which one part relies on another: the first is of use."""
    for key in KEYS:
        yield from entry_faults(key, dataset[key])
    yield from _image_faults(dataset["images"], image_root)
    yield from _annotation_faults(*(dataset[key] for key in KEYS))
    sizes = {image["id"]: (image["width"], image["height"]) for image in dataset["images"]}
    boxes = ((a["bbox"], sizes[a["image_id"]]) for a in dataset["annotations"])
    if not any(min(clip(bbox, *size)[2:]) > 0 for bbox, size in boxes):
        yield "no box has any area inside its image: give [x, y, width, height] in pixels"


def entry_faults(key: str, entries: list) -> Iterator[str]:
    """What is wrong with the entries of one of the KEYS, without a look at the others."""
    if not entries:
        yield f"there are no {key}: fill the list"
    seen = set()
    for number, entry in enumerate(entries):
        id = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(id, int):
            yield f"entry {number} of '{key}' has id {id!r}: make it an integer"
        if id in seen:
            yield f"entry {number} of '{key}' has id {id} as an earlier one: give each its own"
        seen.add(id)
        text = {"images": "file_name", "categories": "name"}.get(key)
        if text and not isinstance(entry.get(text), str):
            yield f"entry {number} of '{key}' has {text} {entry.get(text)!r}: make it a string"
    if key == "categories":
        yield from _name_faults(entries)


def _name_faults(categories: list[dict]) -> Iterator[str]:
    ids = {}
    for id, name in ((category["id"], category["name"]) for category in categories):
        if not name.strip():
            yield f"category {id} has an empty name: say what it is"
        if name in ids:
            yield f"categories {ids[name]} and {id} are both '{name}': give each its own name"
        ids[name] = id


def _image_faults(images: list[dict], image_root: str) -> Iterator[str]:
    if not os.path.isdir(image_root):
        yield f"its image folder '{image_root}' does not exist: correct its path"
    for image in images:
        size = image.get("width"), image.get("height")
        if not all(isinstance(side, int) and side > 0 for side in size):
            yield (
                f"image '{image['file_name']}' has width and height {size}: make them positive "
                "integers"
            )
    paths = [os.path.join(image_root, image["file_name"]) for image in images]
    # One listing a folder: to ask for 118,000 files one by one takes minutes on a network disk.
    folders = {os.path.dirname(path) for path in paths}
    present = {f: set(os.listdir(f)) if os.path.isdir(f) else set() for f in folders}
    missing = [p for p in paths if os.path.basename(p) not in present[os.path.dirname(p)]]
    if missing:
        yield (
            f"{len(missing)} of {len(images)} image files are missing, the first is "
            f"'{missing[0]}': correct the image folder or 'file_name'"
        )


def _annotation_faults(
    images: list[dict], annotations: list[dict], categories: list[dict]
) -> Iterator[str]:
    file_names = {image["id"]: image["file_name"] for image in images}
    category_ids = {category["id"] for category in categories}
    for annotation in annotations:
        image, category, bbox = map(annotation.get, ("image_id", "category_id", "bbox"))
        if not isinstance(image, int) or image not in file_names:
            yield f"annotation {annotation['id']} has image_id {image!r}, not in 'images': fix it"
        where = f"annotation {annotation['id']} of image '{file_names[image]}'"
        if not isinstance(category, int) or category not in category_ids:
            yield f"{where} has category_id {category!r}, not in 'categories': correct either"
        if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(is_finite, bbox))):
            yield f"{where} has bbox {bbox!r}: give [x, y, width, height], finite, in pixels"
        if annotation.get("ignore"):
            yield f"{where} is marked 'ignore', which Detectron2 refuses: delete it"


def evaluation_faults(annotations: list[dict]) -> Iterator[str]:
    """What training never meets and COCO's evaluation fails on, or gets wrong silently."""
    for annotation in annotations:
        for key in ("area", "iscrowd"):
            if key not in annotation:
                yield f"annotation {annotation['id']} has no '{key}', which evaluation needs"
        if annotation["id"] == 0:
            yield "annotation id 0 is never counted as found in evaluation: count from 1"


def is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e9  # false for NaN as well


def clip(bbox: list[float], width: int, height: int) -> list[float]:
    """The part of an (x, y, width, height) box inside the image; sides <= 0 where there is none."""
    x, y, w, h = bbox
    if x >= 0 and y >= 0 and x + w <= width and y + h <= height:
        return bbox  # exactly as annotated: (x + w) - x is not always w
    left, top = max(x, 0), max(y, 0)
    return [left, top, min(x + w, width) - left, min(y + h, height) - top]
