"""Data of one's own in one line: ``ANNOTATIONS.json@IMAGE_FOLDER`` is the name of a dataset.

    dino_d2.data.register(["data/train.json@data/images"])

and the name works wherever Detectron2 takes one. A file is validated when it is registered, so
that what is wrong with it is said before training, in one sentence, not after the first epoch.
"""

import difflib
import functools
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from operator import itemgetter
from textwrap import shorten

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

logger = logging.getLogger(__name__)

SEPARATOR = ".json@"
KEYS = ("images", "annotations", "categories")


class DatasetError(ValueError):
    """A dataset cannot be used; the message says what is wrong, where, and what to do."""


def register(names: Iterable[str]) -> None:
    """Make Detectron2 know every name of the form ``ANNOTATIONS.json@IMAGE_FOLDER``.

    Names of another form and names registered before are left alone. In the records that
    Detectron2 gets, boxes are clipped to their image and boxes without area are dropped, both with
    a warning; images without annotations and crowd annotations are kept. COCO's evaluation reads
    the file itself, without these corrections.

    Args:
        names: dataset names (a single string is one name).

    Raises:
        DatasetError: a file is missing, or does not hold valid COCO detection annotations.
    """
    for name in _as_list(names):
        if SEPARATOR in name and name not in DatasetCatalog:
            annotations, image_root = map(os.path.expanduser, name.split(SEPARATOR, 1))
            _register(name, f"{annotations}.json", image_root)


def num_classes(names: Iterable[str]) -> int:
    """The number of classes of datasets that have the same ones.

    Args:
        names: dataset names (a single string is one name), registered if they are not yet.

    Raises:
        DatasetError: a name is unknown, a dataset is invalid, or classes are absent or differ.
    """
    return len(_common_classes(_as_list(names)))


def check(train: Sequence[str], test: Sequence[str], num_classes: int | None) -> None:
    """Find before training what would stop it, or its evaluation, later.

    Args:
        train: names of the datasets to train on, registered if they are not yet.
        test: names of the datasets to evaluate on, registered if they are not yet.
        num_classes: what the model is configured for, or None to accept what the data has.

    Raises:
        DatasetError: a name is unknown, files are missing, a dataset is invalid, classes differ
            between datasets or from ``num_classes``, or a test set cannot be evaluated.
    """
    names = [*_as_list(train), *_as_list(test)]
    for name in names:
        _require_files(name)
    for name in _as_list(test):
        if fault := MetadataCatalog.get(name).get("evaluation_fault"):
            raise DatasetError(f"test set '{name}': {fault}")
    classes = _common_classes(names)
    if num_classes not in (None, len(classes)):
        raise DatasetError(
            f"the config says {num_classes} classes but '{names[0]}' has {len(classes)}: "
            f"{shorten(', '.join(classes), 200)}; remove the number to take it from the data"
        )


def _as_list(names: Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _require_known(name: str) -> None:
    """Register ``name`` if it is of the path form; raise DatasetError if it stays unknown."""
    register([name])
    if name in DatasetCatalog:
        return
    near = ", ".join(difflib.get_close_matches(name, DatasetCatalog.list())) or "none"
    raise DatasetError(
        f"dataset '{name}' is not registered: use a registered name (similar ones: {near}), "
        "or name files as 'ANNOTATIONS.json@IMAGE_FOLDER'"
    )


def _require_files(name: str) -> None:
    _require_known(name)
    metadata = MetadataCatalog.get(name)
    for path in (metadata.get("json_file"), metadata.get("image_root")):
        if path and not PathManager.exists(path):
            root = os.getenv("DETECTRON2_DATASETS", "datasets")
            raise DatasetError(
                f"dataset '{name}' needs '{path}', which does not exist: put it there, or set "
                f"DETECTRON2_DATASETS (now '{root}') to the folder of Detectron2's own datasets"
            )


def _classes(name: str) -> list[str]:
    _require_known(name)
    metadata = MetadataCatalog.get(name)
    if not metadata.get("thing_classes"):  # Detectron2 may learn them only as it loads the file
        _require_files(name)
        DatasetCatalog.get(name)
    if not metadata.get("thing_classes"):
        raise DatasetError(
            f"dataset '{name}' does not name its classes: set "
            f"MetadataCatalog.get('{name}').thing_classes"
        )
    return metadata.thing_classes


def _common_classes(names: list[str]) -> list[str]:
    if not names:
        raise DatasetError("no dataset is given: name at least one")
    classes = _classes(names[0])
    for other in names[1:]:
        pairs = zip_longest(classes, _classes(other), fillvalue="absent")
        for index, (expected, found) in enumerate(pairs):
            if expected != found:
                raise DatasetError(
                    f"'{names[0]}' and '{other}' must have the same categories in the same order, "
                    f"but category number {index} is {expected} in the first and {found} in the "
                    "second: make 'categories' equal"
                )
    return classes


def _register(name: str, json_file: str, image_root: str) -> None:
    dataset = _read(json_file)
    if fault := next(_faults(dataset, image_root), None):
        raise DatasetError(f"'{json_file}': {fault}")
    categories = sorted(dataset["categories"], key=itemgetter("id"))
    DatasetCatalog.register(name, functools.partial(_load, name, json_file, image_root))
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
        evaluation_fault=next(_evaluation_faults(dataset["annotations"]), None),
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id={c["id"]: index for index, c in enumerate(categories)},
    )


def _read(json_file: str) -> dict[str, list]:
    if not os.path.isfile(json_file):
        raise DatasetError(
            f"annotation file '{json_file}' does not exist: correct its path, seen from "
            f"'{os.getcwd()}'"
        )
    try:
        with open(json_file, encoding="utf-8") as file:
            dataset = json.load(file)
    except ValueError as error:
        raise DatasetError(
            f"'{json_file}' is not JSON ({error}): it may be cut off, write or fetch it again"
        ) from error
    found = ", ".join(dataset) if isinstance(dataset, dict) else f"a {type(dataset).__name__}"
    for key in KEYS:
        if not isinstance(dataset, dict) or not isinstance(dataset.get(key), list):
            raise DatasetError(
                f"'{json_file}' has no list '{key}' but {found}: give a file of COCO detection "
                "annotations (not of detection results, captions or a labelling tool's own)"
            )
    return dataset


# What is wrong, in the order in which one part relies on another: only the first is of use.


def _faults(dataset: dict[str, list], image_root: str) -> Iterator[str]:
    for key in KEYS:
        yield from _entry_faults(key, dataset[key])
    yield from _image_faults(dataset["images"], image_root)
    yield from _annotation_faults(*(dataset[key] for key in KEYS))


def _entry_faults(key: str, entries: list) -> Iterator[str]:
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


def _image_faults(images: list[dict], image_root: str) -> Iterator[str]:
    if not os.path.isdir(image_root):
        yield f"its image folder '{image_root}' does not exist: correct the path after the '@'"
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
        where = f"annotation {annotation['id']} of image '{file_names.get(image)}'"
        if image not in file_names:
            yield f"annotation {annotation['id']} has image_id {image!r}, not in 'images': fix it"
        if category not in category_ids:
            yield f"{where} has category_id {category!r}, not in 'categories': correct either"
        if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(_is_finite, bbox))):
            yield f"{where} has bbox {bbox!r}: give [x, y, width, height], finite, in pixels"
        if annotation.get("ignore"):
            yield f"{where} is marked 'ignore', which Detectron2 refuses: delete it"


def _evaluation_faults(annotations: list[dict]) -> Iterator[str]:
    """What training never meets and COCO's evaluation fails on, or gets wrong silently."""
    for annotation in annotations:
        for key in ("area", "iscrowd"):
            if key not in annotation:
                yield f"annotation {annotation['id']} has no '{key}', which evaluation needs"
        if annotation["id"] == 0:
            yield "annotation id 0 is never counted as found in evaluation: count from 1"


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _load(name: str, json_file: str, image_root: str) -> list[dict]:
    """Detectron2's records of the file, with boxes clipped to their image or dropped."""
    records = load_coco_json(json_file, image_root, name, extra_annotation_keys=["id"])
    clipped, dropped = [], []
    for record in records:
        kept = []
        for annotation in record["annotations"]:
            where = f"annotation {annotation['id']} of image '{record['file_name']}'"
            box = _clip(annotation["bbox"], record["width"], record["height"])
            if min(box[2:]) <= 0:
                dropped.append(where)
                continue
            if box != annotation["bbox"]:
                clipped.append(where)
            kept.append({**annotation, "bbox": box})
        record["annotations"] = kept
    corrections = {
        "clipped boxes that leave their image": clipped,
        "dropped boxes without area": dropped,
    }
    for what, boxes in corrections.items():
        if boxes:
            logger.warning(f"'{json_file}': {what}: {len(boxes)}, the first is {boxes[0]}")
    return records


def _clip(bbox: list[float], width: int, height: int) -> list[float]:
    """The part of an (x, y, width, height) box inside the image; sides <= 0 where there is none."""
    x, y, w, h = bbox
    if x >= 0 and y >= 0 and x + w <= width and y + h <= height:
        return bbox  # exactly as annotated: (x + w) - x is not always w
    left, top = max(x, 0), max(y, 0)
    return [left, top, min(x + w, width) - left, min(y + h, height) - top]
