"""Data of one's own in one line: ``ANNOTATIONS.json@IMAGE_FOLDER`` is the name of a dataset.

    dino_d2.data.register(["data/train.json@data/images"])

and the name works wherever Detectron2 takes one. A file is validated when it is registered, so
that what is wrong with it is said before training, in one sentence, not after the first epoch.
"""

import functools
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from operator import itemgetter
from textwrap import shorten

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..names import nearest, path_hint
from .coco_faults import DatasetError, clip, evaluation_faults, faults, read

logger = logging.getLogger(__name__)

SEPARATOR = ".json@"


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
    """The number of classes of datasets that have the same ones; see `class_names`."""
    return len(class_names(names))


def class_names(names: Iterable[str]) -> list[str]:
    """The classes of datasets that have the same ones.

    Args:
        names: dataset names (a single string is one name), registered if they are not yet.

    Raises:
        DatasetError: a name is unknown, a dataset is invalid, or classes are absent or differ.
    """
    names = _as_list(names)
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


def check(train: Sequence[str], test: Sequence[str], num_classes: int | None) -> int:
    """Find before training what would stop it, or its evaluation, later.

    Args:
        train: names of the datasets to train on, registered if they are not yet.
        test: names of the datasets to evaluate on, registered if they are not yet.
        num_classes: what the model is configured for, or None to accept what the data has.

    Returns:
        the number of classes of the data.

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
    classes = class_names(names)
    if num_classes not in (None, len(classes)):
        raise DatasetError(
            f"the config says {num_classes} classes but '{names[0]}' has {len(classes)}: "
            f"{shorten(', '.join(classes), 200)}; remove the number to take it from the data"
        )
    return len(classes)


def _as_list(names: Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _require_known(name: str) -> None:
    """Register ``name`` if it is of the path form; raise DatasetError if it stays unknown."""
    register([name])
    if name in DatasetCatalog:
        return
    near = ", ".join(nearest(name, DatasetCatalog.list())) or "none"
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


def _register(name: str, json_file: str, image_root: str) -> None:
    _suggest("annotation file", json_file)
    dataset = read(json_file)
    _suggest(f"'{json_file}': its image folder", image_root)
    if fault := next(faults(dataset, image_root), None):
        raise DatasetError(f"'{json_file}': {fault}")
    categories = sorted(dataset["categories"], key=itemgetter("id"))
    DatasetCatalog.register(name, functools.partial(_load, json_file, image_root))
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
        evaluation_fault=next(evaluation_faults(dataset["annotations"]), None),
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id={c["id"]: index for index, c in enumerate(categories)},
    )


def _suggest(what: str, path: str) -> None:
    """
    Raises:
        DatasetError: the path does not exist, but one like it does
    """
    if near := path_hint(path):
        raise DatasetError(f"{what} '{path}' does not exist{near}")


def _load(json_file: str, image_root: str) -> list[dict]:
    """Detectron2's records of the file, with boxes clipped to their image or dropped.

    Detectron2's own reader would drop boxes whose segmentation it dislikes; none is needed here.
    """
    dataset = read(json_file)
    category_ids = sorted(category["id"] for category in dataset["categories"])
    classes = {category_id: index for index, category_id in enumerate(category_ids)}
    annotations = defaultdict(list)
    for annotation in dataset["annotations"]:
        annotations[annotation["image_id"]].append(annotation)

    clipped, dropped, records = [], [], []
    for image in dataset["images"]:
        kept = []
        for annotation in annotations[image["id"]]:
            where = f"annotation {annotation['id']} of image '{image['file_name']}'"
            box = clip(annotation["bbox"], image["width"], image["height"])
            if min(box[2:]) <= 0:
                dropped.append(where)
                continue
            if box != annotation["bbox"]:
                clipped.append(where)
            kept.append(
                {
                    "bbox": box,
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": classes[annotation["category_id"]],
                    "iscrowd": annotation.get("iscrowd", 0),
                }
            )
        records.append(
            {
                "file_name": os.path.join(image_root, image["file_name"]),
                "height": image["height"],
                "width": image["width"],
                "image_id": image["id"],
                "annotations": kept,
            }
        )
    _report(json_file, "clipped boxes that leave their image", clipped)
    _report(json_file, "dropped boxes without area", dropped)
    return records


def _report(json_file: str, what: str, boxes: list[str]) -> None:
    if boxes:
        logger.warning(f"'{json_file}': {what}: {len(boxes)}, the first is {boxes[0]}")
