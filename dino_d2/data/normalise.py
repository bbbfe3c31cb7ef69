"""COCO annotations as tools really write them, put right in memory where their meaning is clear.

What evaluation reads is what comes out here, too: one reading for training, evaluation, prediction.
"""

import logging
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from pycocotools import mask

from .coco_json import DatasetError, parse
from .faults import is_finite, missing_images
from .mapper import SUFFIXES, image_size

logger = logging.getLogger(__name__)

FLAGS = {"0": 0, "false": 0, "no": 0, "1": 1, "true": 1, "yes": 1}
NO_PARENT = (None, "", "none")  # how exporters write that a category has no supercategory
SIDES = "width", "height"
MAX_SIDE = 100_000  # of a mask, in pixels
MAX_FILES = 100_000  # that are looked at besides, if the folder that was named is a whole disk


class Repairs:
    """What was put right in a dataset: whether anything was, and what is to be said of it."""

    def __init__(self) -> None:
        self.changed = False
        self.counts: dict[str, int] = {}
        self.first: dict[str, str] = {}

    def put(self, entry: dict, key: str, value: Any) -> None:
        """Set a value, and know whether it is another one."""
        old = entry.get(key)
        if type(old) is not type(value) or old != value:
            entry[key] = value
            self.changed = True

    def note(self, what: str, where: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        self.first.setdefault(what, where)

    def warn(self, source: str) -> None:
        """One warning for each kind of thing, with its count and the first place."""
        for what, count in self.counts.items():
            logger.warning(f"'{source}': {what}: {count}, the first is {self.first[what]}")


def read_annotations(json_file: str | os.PathLike) -> dict[str, list]:
    """The content of a file of COCO annotations, put right; what was is said in warnings.

    Raises:
        DatasetError: the file is missing, is something else, or an entry cannot be understood
    """
    dataset, repairs = parse(os.fspath(json_file)), Repairs()
    try:
        normalise(dataset, repairs)
    except DatasetError as error:
        raise DatasetError(f"'{json_file}': {error}") from error
    repairs.warn(os.fspath(json_file))
    return dataset


def normalise(dataset: dict[str, list], repairs: Repairs, *, keep_roots: bool = False) -> None:
    """Give every entry the type and the range that COCO's format says, in place.

    Numbers and flags are read from their spellings, `iscrowd` is 0 where it is missing, `area` is
    computed where it is missing or none (of the mask where there is one), a missing box is that of
    the mask, annotations are numbered anew where their ids are not unique or 0, which COCO's
    evaluation never finds, and a root category of Roboflow is left out.

    Args:
        dataset: with the lists "images", "annotations" and "categories"
        repairs: takes down what was done
        keep_roots: leave every category in

    Raises:
        DatasetError: an entry cannot be understood: the sentence has no file yet
    """
    for key in ("images", "categories"):
        _entries(key, dataset[key], repairs)
    _images(dataset["images"], repairs)
    names = {image["id"]: image["file_name"] for image in dataset["images"]}
    for number, annotation in enumerate(dataset["annotations"]):
        _annotation(annotation, number, names, repairs)
    _number_annotations(dataset["annotations"], repairs)
    if not keep_roots:
        leave_out_roots([dataset], repairs)


def to_int(value: Any) -> int | None:
    """An integer, also written as 7.0 or "7"; None for what is none."""
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    value = to_number(value)
    return int(value) if value is not None and value == int(value) else None


def to_number(value: Any) -> float | None:
    """A finite number, also written as "7.5"; None for what is none."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if is_finite(value) and not isinstance(value, bool) else None


def to_flag(value: Any) -> int | None:
    """0 or 1 from a number, a truth value or its name; None for what is neither."""
    if isinstance(value, str):
        return FLAGS.get(value.strip().lower())
    return int(value) if isinstance(value, int | float) and value in (0, 1) else None


def to_text(value: Any) -> str | None:
    """A name, also one that is a number; None for what is none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def _entries(key: str, entries: list, repairs: Repairs) -> None:
    """Ids, each once; and names, which are the rest of what an entry needs."""
    seen: set[int] = set()
    label = {"images": "file_name", "categories": "name"}[key]
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DatasetError(f"entry {place} of '{key}' is {entry!r}: make it an object")
        id = to_int(entry.get("id"))
        if id is None:
            raise DatasetError(
                f"entry {place} of '{key}' has id {entry.get('id')!r}: make it an integer"
            )
        if id in seen:
            raise DatasetError(
                f"entry {place} of '{key}' has id {id} as an earlier one: give each its own"
            )
        seen.add(id)
        name = to_text(entry.get(label))
        if name is None:
            raise DatasetError(
                f"entry {place} of '{key}' has {label} {entry.get(label)!r}: make it a string"
            )
        repairs.put(entry, "id", id)
        repairs.put(entry, label, name)


def _images(images: list[dict], repairs: Repairs) -> None:
    """Sizes, where they are there; `place_images` looks for the others."""
    for image in images:
        for side in SIDES:
            value = to_int(image.get(side))
            if value is not None and value > 0:
                repairs.put(image, side, value)


def _annotation(entry: Any, place: int, names: dict[int, str], repairs: Repairs) -> None:
    if not isinstance(entry, dict):
        raise DatasetError(f"entry {place} of 'annotations' is {entry!r}: make it an object")
    called = f"annotation {entry['id']}" if "id" in entry else f"entry {place} of 'annotations'"
    image = to_int(entry.get("image_id"))
    if image not in names:
        raise DatasetError(
            f"{called} has image_id {entry.get('image_id')!r}, not in 'images': fix it"
        )
    where = f"{called} of image '{names[image]}'"
    repairs.put(entry, "image_id", image)
    category = to_int(entry.get("category_id"))
    if category is None:
        raise DatasetError(
            f"{where} has category_id {entry.get('category_id')!r}, not in 'categories': correct "
            "either"
        )
    repairs.put(entry, "category_id", category)
    for key, meaning in (("iscrowd", "1 for a crowd, else 0"), ("ignore", "0")):
        given = entry.get(key)
        value = 0 if given is None else to_flag(given)
        if value is None:
            raise DatasetError(f"{where} has {key} {given!r}: give {meaning}")
        if key == "iscrowd" or given is not None:
            repairs.put(entry, key, value)
    if entry.get("ignore"):
        raise DatasetError(f"{where} is marked 'ignore', which Detectron2 refuses: delete it")
    _box(entry, where, repairs)
    _area(entry, where, repairs)
    attributes = entry.get("attributes")
    if isinstance(attributes, dict) and to_number(attributes.get("rotation")):
        repairs.note("rotated boxes, of which the box before its rotation is used", where)


def _box(entry: dict, where: str, repairs: Repairs) -> None:
    given = entry.get("bbox")
    if given is None and (box := _of_mask(entry, mask.toBbox)) is not None:
        repairs.note("boxes that are missing, now those of their masks", where)
        repairs.put(entry, "bbox", box.tolist())
        return
    values = [to_number(x) for x in given] if isinstance(given, list) else []
    if len(values) != 4 or None in values:
        raise DatasetError(
            f"{where} has bbox {given!r}: give [x, y, width, height], finite, in pixels"
        )
    if any(isinstance(x, str) for x in entry["bbox"]):
        repairs.put(entry, "bbox", values)


def _area(entry: dict, where: str, repairs: Repairs) -> None:
    """COCO's evaluation counts an object as small or large by its area, and none without one."""
    given = to_number(entry.get("area"))
    if given is not None and given > 0:
        repairs.put(entry, "area", given)
        return
    width, height = (max(x, 0) for x in entry["bbox"][2:])
    area = _of_mask(entry, mask.area)
    # Of what has no extent, any area will do: training drops it, and so does evaluation.
    repairs.put(entry, "area", float(area) if area else float(width * height))
    if entry["area"] > 0:
        what = "of their masks" if area else "of their boxes"
        repairs.note(f"areas that are missing or no number above 0, now those {what}", where)


def _of_mask(entry: dict, compute: Callable) -> Any:
    """What pycocotools computes of the mask of an annotation; None where there is none that it can
    read."""
    shape = entry.get("segmentation")
    if not shape:
        return None
    try:
        if isinstance(shape, dict):
            size = shape["size"]
            rle = mask.frPyObjects(shape, *size) if isinstance(shape["counts"], list) else shape
        else:
            # Only to hold the outline: the image may be of any size.
            sides = [math.ceil(max(max(part[start::2]) for part in shape)) + 1 for start in (1, 0)]
            if max(sides) > MAX_SIDE:
                return None
            rle = mask.merge(mask.frPyObjects(shape, *sides))
        return compute(rle)
    except Exception:  # pycocotools raises anything; what it cannot read is no mask
        return None


def _number_annotations(annotations: list[dict], repairs: Repairs) -> None:
    """Nothing refers to the ids of annotations but COCO's evaluation, which needs them all to
    differ and never finds 0."""
    ids = [to_int(x.get("id")) for x in annotations]
    good = None not in ids and 0 not in ids and len(set(ids)) == len(ids)
    for id, annotation in zip(ids if good else range(1, len(ids) + 1), annotations, strict=True):
        repairs.put(annotation, "id", id)


def leave_out_roots(datasets: Sequence[dict[str, list]], repairs: Repairs) -> None:
    """Take out, in place, what only groups the other categories.

    Roboflow's first category is the name of the project and parent of the classes; of all splits
    none has annotations of it.
    """
    used = {x["category_id"] for dataset in datasets for x in dataset["annotations"]}
    for dataset in datasets:
        categories = dataset["categories"]
        roots = [
            x
            for x in categories
            if x["id"] not in used
            and x.get("supercategory") in NO_PARENT
            and any(y is not x and y.get("supercategory") == x["name"] for y in categories)
        ]
        for root in roots:
            repairs.changed = True
            repairs.note("categories that only group others, left out", f"'{root['name']}'")
        dataset["categories"] = [x for x in categories if x not in roots]


# ---- images on the disk


def place_images(images: list[dict], image_root: str, repairs: Repairs) -> None:
    """Find the files of images, and read the sizes that are not given, in place.

    A file that is not there is looked for under a name of another Unicode normal form, case, kind
    of slash or suffix, and in the other folders below `image_root`; one is taken if it is the only
    one that fits, and no other image's. What stays missing is left to `faults`.

    Args:
        images: as `normalise` leaves them
        image_root: their folder
        repairs: takes down what was done

    Raises:
        DatasetError: a size is not given, and the file cannot be read
    """
    if missing := missing_images(images, image_root):
        taken = {x["file_name"] for x in images}
        files = islice(_files_below(image_root), MAX_FILES + 2 * len(images))
        known = _by_keys(x for x in files if x not in taken and Path(x).suffix.lower() in SUFFIXES)
        found = [
            next((known[key][0] for key in _keys(name) if len(known.get(key, ())) == 1), None)
            for name in (image["file_name"] for image in missing)
        ]
        claims = Counter(found)
        for image, file in zip(missing, found, strict=True):
            if file and claims[file] == 1:
                name = image["file_name"]
                repairs.note("images found under another name", f"'{file}' for '{name}'")
                repairs.put(image, "file_name", file)
    for image in images:
        if not all(isinstance(image.get(side), int) and image[side] > 0 for side in SIDES):
            path = Path(image_root, image["file_name"])
            if path.is_file():
                for side, value in zip(SIDES, image_size(path), strict=True):
                    repairs.put(image, side, value)
                repairs.note("sizes that are missing, read from the image", f"'{path}'")


def _files_below(root: str) -> Iterator[str]:
    """Their paths, seen from the folder."""
    for folder, _, names in os.walk(root):
        for name in names:
            yield os.path.relpath(os.path.join(folder, name), root)


def fold_name(name: str) -> str:
    """What is the same in names that differ in Unicode normal form, case or kind of slash."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()


def _keys(name: str) -> tuple[str, ...]:
    """What a file may be found by, from all of its path to its name without suffix."""
    path = PurePosixPath(fold_name(name))
    return f"/{path}", f"/{path.with_suffix('')}", path.name, path.stem


def _by_keys(names: Iterable[str]) -> dict[str, list[str]]:
    known: dict[str, list[str]] = {}
    for name in names:
        for key in set(_keys(name)):
            known.setdefault(key, []).append(name)
    return known
