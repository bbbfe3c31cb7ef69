"""Registers your own data by name: ``ANNOTATIONS.json@IMAGE_FOLDER`` or ``FOLDER@train``.

    dino_d2.data.register(["data/train.json@data/images"])

The name then works wherever Detectron2 takes one; it may end in changes of the classes, see
`classes`. Datasets, also those that others registered, are repaired and checked before training.
Evaluation reads the repaired annotations.
"""

import functools
import json
import logging
import os
import pickle
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from multiprocessing.util import Finalize
from operator import itemgetter
from textwrap import shorten
from typing import NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n

from ..errors import DatasetError
from ..names import nearest, path_hint, plural
from ..ranges import require_whole
from . import folder
from .adopt import check_records, is_built_in
from .classes import ClassChanges, change_classes, require_classes, split_changes
from .coco_json import parse
from .faults import clip, faults
from .masks import normalise_masks
from .normalise import Repairs, normalise, place_images
from .segments import NO_CLASS

SEPARATOR = ".json@"
# What metadata calls the places of a data set's files.
FILES = ("json_file", "image_root", "panoptic_json", "panoptic_root", "sem_seg_root", "gt_dir")


class Registered(NamedTuple):
    """A dataset that was read from files."""

    name: str
    records: bytes  # pickled: compact, and new for each user
    metadata: dict


_REGISTERED: dict[str, Registered] = {}


def register(names: Iterable[str]) -> None:
    """Register datasets named by their files, and check those that others registered.

    Entries whose meaning is clear are repaired, see `normalise`, with a warning. In Detectron2's
    records, boxes are clipped to their image and boxes without area are dropped, with a warning.
    Images without annotations and crowd annotations are kept. COCO's evaluation gets the boxes
    before clipping.

    Args:
        names: one name or several, ``ANNOTATIONS.json@IMAGE_FOLDER`` or ``FOLDER@train``, with
            changes of classes if any; other unknown names, and Detectron2's own datasets, are
            skipped

    Raises:
        DatasetError: a file is missing, or a dataset cannot be used, or none of those with the same
            changes has a class that is changed
    """
    names = _as_list(names)
    for name in names:
        _register_name(name)
    _require_changed_classes(names)


def _register_name(name: str) -> None:
    stem, _ = split_changes(name)
    if name in DatasetCatalog:
        _check_registered(name)
    elif SEPARATOR in stem:
        file, image_root = map(os.path.expanduser, stem.split(SEPARATOR, 1))
        _register(name, f"{file}.json", image_root)
    elif place := folder.split_name(stem):
        found = folder.find_folder(place.folder)
        if place.split not in found.splits:
            raise DatasetError(f"'{place.folder}' has no split '{place.split}': {found}")
        split, source = found.splits[place.split], place.folder
        _register_content(name, *split, source, found.class_names, keep_roots=True)


def _require_changed_classes(names: Iterable[str]) -> None:
    """Each changed class has to be in one of the data sets that have the same changes."""
    known: dict[ClassChanges, list[str]] = {}
    places: dict[ClassChanges, str] = {}
    for name in names:
        stem, changes = split_changes(name)
        if changes and name in DatasetCatalog:
            known.setdefault(changes, []).extend(MetadataCatalog.get(name).known_classes)
            places.setdefault(changes, f"'{stem}'")
    for changes, classes in known.items():
        require_classes(changes, [*dict.fromkeys(classes)], places[changes])


def changes_of(names: Iterable[str]) -> list[str]:
    """Sentences on the class changes of registered data sets, with counts."""
    told = ((name, MetadataCatalog.get(name).get("class_changes")) for name in _as_list(names))
    return [f"'{split_changes(name)[0]}': {what}" for name, what in told if what]


def annotations_of(name: str) -> dict[str, list]:
    """The annotations of a registered dataset, as evaluation reads them."""
    return parse(MetadataCatalog.get(name).json_file)


def num_classes(names: Iterable[str]) -> int:
    """The number of classes that the datasets share, see `class_names`."""
    return len(class_names(names))


def class_names(names: Iterable[str]) -> list[str]:
    """The classes that the datasets share; takes one name or several, registered if necessary.

    Raises:
        DatasetError: a name is unknown, a dataset is invalid, or classes are missing or differ
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
                    "second: make 'categories' equal (--drop and --merge change them)"
                )
    return classes


def stuff_classes(names: Iterable[str]) -> list[int]:
    """The indices of classes without instances, such as sky, of panoptic datasets.

    Raises:
        DatasetError: as of `class_names`, or the first dataset does not say which classes are
            things
    """
    names = _as_list(names)
    number = num_classes(names)
    things = MetadataCatalog.get(names[0]).get("thing_dataset_id_to_contiguous_id")
    if things is None:
        raise DatasetError(
            f"dataset '{names[0]}' does not say which classes are things, which panoptic "
            "segmentation needs: set "
            f"MetadataCatalog.get('{names[0]}').thing_dataset_id_to_contiguous_id"
        )
    return [i for i in range(number) if i not in things.values()]


def check(train: Sequence[str], test: Sequence[str], num_classes: int | None) -> int:
    """Check datasets before training for anything that would stop it or its evaluation later.

    Args:
        train, test: dataset names, registered if necessary
        num_classes: of the model's config; None accepts any number

    Returns:
        the number of classes of the data

    Raises:
        DatasetError: a name is unknown, files are missing, a dataset is invalid, classes differ
            between datasets or from ``num_classes``, or a test set cannot be evaluated
        ValueError: ``num_classes`` is not a positive integer
    """
    if num_classes is not None:
        require_whole(num_classes=num_classes)
    names = [*_as_list(train), *_as_list(test)]
    for name in names:
        _require_files(name)
        _check_ignored(name)
    _require_changed_classes(names)
    _check_annotated(_as_list(train), _as_list(test))
    classes = class_names(names)
    if num_classes not in (None, len(classes)):
        raise DatasetError(
            f"the config says {plural(num_classes, 'class')} but '{names[0]}' has {len(classes)}: "
            f"{shorten(', '.join(classes), 200)}; remove the number to take it from the data"
        )
    return len(classes)


def _check_ignored(name: str) -> None:
    """Refuse label maps with another number for pixels without a class."""
    ignored = MetadataCatalog.get(name).get("ignore_label", NO_CLASS)
    if ignored != NO_CLASS:
        raise DatasetError(
            f"'{name}' marks pixels without a class with {ignored}: write {NO_CLASS} into its "
            "label maps, and into ignore_label of its metadata"
        )


def _check_annotated(train: list[str], test: list[str]) -> None:
    """Refuse datasets without annotations, except test sets when nothing is trained."""
    for name in (*train, *test):
        if MetadataCatalog.get(name).get("is_annotated", True):
            continue
        if name in train:
            raise DatasetError(
                f"'{name}' has no annotations, so nothing can be learned from it: name a file with "
                "annotations"
            )
        sentence = f"test set '{name}' has no annotations, so there is nothing to compare with"
        if train:
            raise DatasetError(f"{sentence}: leave it out, or name an annotated one")
        sentence += ": its detections are written, but not evaluated"
        log_first_n(logging.WARNING, sentence, key="message")


def _as_list(names: Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _require_known(name: str) -> None:
    """Register a name of files; raise DatasetError if the name stays unknown."""
    _register_name(name)
    if name in DatasetCatalog:
        return
    near = ", ".join(nearest(name, DatasetCatalog.list())) or "none"
    raise DatasetError(
        f"dataset '{name}' is not registered: use a registered name (similar ones: {near}), "
        "or name files as 'ANNOTATIONS.json@IMAGE_FOLDER' or 'FOLDER@train'"
    )


def _require_files(name: str) -> None:
    _require_known(name)
    metadata = MetadataCatalog.get(name)
    for path in map(metadata.get, FILES):
        if path and not PathManager.exists(path):
            root = os.getenv("DETECTRON2_DATASETS", "datasets")
            raise DatasetError(
                f"dataset '{name}' needs '{path}', which does not exist: put it there, or set "
                f"DETECTRON2_DATASETS (now '{root}') to the folder of Detectron2's own datasets"
            )


def _classes(name: str) -> list[str]:
    _require_known(name)
    metadata = MetadataCatalog.get(name)
    kind = "thing_classes"
    if metadata.get("evaluator_type", "").endswith(("panoptic_seg", "sem_seg")):
        # Stuff is what Detectron2 calls all classes of maps of pixels, if it does not separate it.
        kind = max(("stuff_classes", kind), key=lambda x: len(metadata.get(x) or ()))
    if not metadata.get(kind):  # Detectron2 may learn them only as it loads the file
        _require_files(name)
        DatasetCatalog.get(name)
    if not metadata.get(kind):
        raise DatasetError(
            f"dataset '{name}' does not name its classes: set MetadataCatalog.get('{name}').{kind}"
        )
    return metadata.get(kind)


def _register(name: str, json_file: str, image_root: str) -> None:
    _suggest("annotation file", json_file)
    dataset = parse(json_file)
    _suggest(f"'{json_file}': its image folder", image_root)
    _register_content(name, dataset, image_root, json_file)


def _register_content(
    name: str,
    dataset: dict[str, list],
    image_root: str,
    source: str,
    known_classes: Sequence[str] = (),
    **options: bool,
) -> None:
    """Repair, check, change and register a parsed dataset.

    Args:
        source: its file or name in messages
        known_classes: of all splits; default: its own
        options: of `prepare`
    """
    repairs = prepare(dataset, image_root, source, **options)
    changed = {}
    if changes := split_changes(name)[1]:
        known = [*(known_classes or (x["name"] for x in dataset["categories"]))]
        try:
            dataset, told = change_classes(dataset, changes)
        except DatasetError as error:
            raise DatasetError(f"'{source}': {error}") from error
        changed = {"known_classes": known, "class_changes": told}
    readable = not changes and can_be_read(source, repairs, dataset)
    json_file = source if readable else write_copy(dataset)
    categories = sorted(dataset["categories"], key=itemgetter("id"))
    classes = {category["id"]: index for index, category in enumerate(categories)}
    records = records_of(name, dataset, image_root, classes)
    metadata = {
        "json_file": json_file,
        "image_root": image_root,
        "evaluator_type": "coco",
        "is_annotated": bool(dataset["annotations"]),
        "is_checked": True,
        "thing_classes": [category["name"] for category in categories],
        "thing_dataset_id_to_contiguous_id": classes,
        **changed,
    }
    register_again([Registered(name, pickle.dumps(records), metadata)])


def register_again(datasets: Iterable[Registered]) -> None:
    """Register datasets that another process has read, see `registered`, without their files."""
    for one in datasets:
        _REGISTERED[one.name] = one
        DatasetCatalog.register(one.name, functools.partial(pickle.loads, one.records))
        MetadataCatalog.get(one.name).set(**one.metadata)


def registered() -> list[Registered]:
    """The datasets that `register` has read so far, to be handed to new processes."""
    return list(_REGISTERED.values())


def _check_registered(name: str) -> None:
    """Check a dataset that others registered; evaluation reads a repaired copy if necessary."""
    metadata = MetadataCatalog.get(name)
    is_known = is_built_in(name) or metadata.get("is_checked")
    if is_known or metadata.get("evaluator_type", "coco") != "coco":
        return
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if not json_file:
        check_records(name)
    elif image_root and os.path.isfile(json_file):
        dataset = parse(json_file)
        keep_roots = bool(metadata.get("thing_classes"))
        repairs = prepare(dataset, image_root, json_file, keep_roots=keep_roots)
        if not can_be_read(json_file, repairs, dataset):
            rest = {k: v for k, v in metadata.as_dict().items() if k not in ("name", "json_file")}
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
            register_coco_instances(name, {}, write_copy(dataset), image_root)
            MetadataCatalog.get(name).set(**rest)
        MetadataCatalog.get(name).is_annotated = bool(dataset["annotations"])
    MetadataCatalog.get(name).is_checked = True


def can_be_read(json_file: str, repairs: Repairs, dataset: dict[str, list]) -> bool:
    """Whether evaluators may read the file itself: nothing was repaired, and it is UTF-8."""
    if repairs.changed or not dataset["annotations"] or not os.path.isfile(json_file):
        return False
    with open(json_file, "rb") as file:
        return json.detect_encoding(file.read(4)) == "utf-8"


def prepare(
    dataset: dict[str, list], image_root: str, source: str, *, keep_roots: bool = False
) -> Repairs:
    """Repair a dataset of `parse` in place, log the repairs as warnings, and check it.

    Messages call it `source`; for `keep_roots`, see `normalise`.

    Raises:
        DatasetError: it cannot be used
    """
    repairs = Repairs()
    try:
        normalise(dataset, repairs, keep_roots=keep_roots)
        place_images(dataset["images"], image_root, repairs)
        normalise_masks(dataset, repairs)
    except DatasetError as error:
        raise DatasetError(f"'{source}': {error}") from error
    if fault := next(faults(dataset, image_root), None):
        raise DatasetError(f"'{source}': {fault}")
    repairs.warn(source)
    return repairs


def write_copy(dataset: dict[str, list]) -> str:
    """Write a repaired dataset to a temporary file for evaluators; removed when Python exits.

    Without annotations, the list is left out: Detectron2 then detects without evaluating.
    """
    if not dataset["annotations"]:
        dataset = {key: value for key, value in dataset.items() if key != "annotations"}
    with tempfile.NamedTemporaryFile("w", dir=_copies(), suffix=".json", delete=False) as file:
        json.dump(dataset, file)
    return file.name


@functools.cache
def _copies() -> str:
    folder = tempfile.mkdtemp(prefix="dino_d2_")
    # Unlike `atexit`, this also runs in distributed workers, and not in forked loader processes.
    Finalize(None, shutil.rmtree, (folder, True), exitpriority=0)
    return folder


def _suggest(what: str, path: str) -> None:
    """Raise a DatasetError if a path does not exist but a similar one does."""
    if near := path_hint(path):
        raise DatasetError(f"{what} '{path}' does not exist{near}")


def records_of(
    name: str, dataset: dict[str, list], image_root: str, classes: dict[int, int]
) -> list[dict]:
    """Detectron2's records of a checked dataset, with boxes clipped to their image or dropped.

    Detectron2's own reader would also drop boxes with an invalid segmentation.
    """
    annotations = defaultdict(list)
    for annotation in dataset["annotations"]:
        annotations[annotation["image_id"]].append(annotation)

    notes, records = Repairs(), []
    for image in dataset["images"]:
        kept = []
        for annotation in annotations[image["id"]]:
            where = f"annotation {annotation['id']} of image '{image['file_name']}'"
            box = clip(annotation["bbox"], image["width"], image["height"])
            if min(box[2:]) <= 0:
                notes.note("dropped boxes without area", where)
                continue
            if box != annotation["bbox"]:
                notes.note("clipped boxes that leave their image", where)
            label, crowd = classes[annotation["category_id"]], annotation["iscrowd"]
            mode = BoxMode.XYWH_ABS
            kept.append({"bbox": box, "bbox_mode": mode, "category_id": label, "iscrowd": crowd})
            if annotation.get("segmentation"):
                kept[-1]["segmentation"] = annotation["segmentation"]
        path = os.path.join(image_root, image["file_name"])
        size = {"height": image["height"], "width": image["width"]}
        records.append({"file_name": path, **size, "image_id": image["id"], "annotations": kept})
    notes.warn(name)
    return records
