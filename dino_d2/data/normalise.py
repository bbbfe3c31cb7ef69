"""Repairs COCO annotations in memory where their meaning is clear.

Training, evaluation and prediction all use the repaired annotations.
"""

import logging
import math
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import islice, product
from pathlib import Path, PurePosixPath
from typing import Any

from pycocotools import mask

from ..errors import DatasetError
from ..images import SUFFIXES, image_size
from .coco_json import parse
from .faults import is_finite, missing_images

logger = logging.getLogger(__name__)

FLAGS = {"0": 0, "false": 0, "no": 0, "1": 1, "true": 1, "yes": 1}
NO_PARENT = (None, "", "none")  # how exporters write that a category has no supercategory
SIDES = "width", "height"
MAX_SIDE = 100_000  # of a mask, in pixels
MAX_FILES = 100_000  # searched for missing images, in case the folder is a whole disk


class Repairs:
    """Records what was repaired in a dataset, for one warning per kind of repair."""

    def __init__(self) -> None:
        self.changed = False
        self.counts: dict[str, int] = {}
        self.first: dict[str, str] = {}

    def put(self, entry: dict, key: str, value: Any) -> None:
        """Set a value, and remember if that changed the dataset."""
        old = entry.get(key)
        if type(old) is not type(value) or old != value:
            entry[key] = value
            self.changed = True

    def note(self, what: str, where: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        self.first.setdefault(what, where)

    def warn(self, source: str) -> None:
        """Log one warning for each kind of repair, with its count and the first place."""
        for what, count in self.counts.items():
            logger.warning(f"'{source}': {what}: {count}, the first is {self.first[what]}")


def read_annotations(json_file: str | os.PathLike) -> dict[str, list]:
    """Read and repair a file of COCO annotations; repairs are logged as warnings.

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
    """Give every entry the type and range of COCO's format, in place.

    Numbers and flags may be strings. A missing `iscrowd` becomes 0; a missing or invalid `area` is
    computed from the mask or the box, a missing box from the mask. Annotations are renumbered if
    an id is repeated or 0 (COCO's evaluation ignores matches with id 0). Roboflow's root category
    is removed.

    Args:
        dataset: with the lists "images", "annotations" and "categories"
        repairs: records what was done
        keep_roots: do not remove root categories

    Raises:
        DatasetError: an entry cannot be understood; the message does not name the file
    """
    for key in ("images", "categories"):
        _entries(key, dataset[key], repairs)
    for image, side in product(dataset["images"], SIDES):
        if length := to_side(image.get(side)):  # `place_images` reads the others from the file
            repairs.put(image, side, length)
    names = {image["id"]: image["file_name"] for image in dataset["images"]}
    for number, annotation in enumerate(dataset["annotations"]):
        _annotation(annotation, number, names, repairs)
    _number_annotations(dataset["annotations"], repairs)
    if not keep_roots:
        leave_out_roots([dataset], repairs)


def to_int(value: Any) -> int | None:
    """Convert 7, 7.0 or "7" to an integer; None for anything else.

    >>> to_int("7"), to_int(7.0), to_int("7.5")
    (7, 7, None)
    """
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
    """Convert 7.5 or "7.5" to a finite number; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if is_finite(value) and not isinstance(value, bool) else None


def to_flag(value: Any) -> int | None:
    """Convert a number, a boolean or its name to 0 or 1, and None to 0; None for anything else."""
    if value is None:
        return 0
    if isinstance(value, str):
        return FLAGS.get(value.strip().lower())
    return int(value) if isinstance(value, int | float) and value in (0, 1) else None


def to_text(value: Any) -> str | None:
    """Convert a string or a number to a string; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def to_side(value: Any) -> int | None:
    """Convert a length in pixels to a positive integer; None for anything else."""
    length = to_int(value)
    return length if length and length > 0 else None


def to_box(value: Any) -> list[float] | None:
    """Convert a list to four finite numbers; None for anything else."""
    numbers = [to_number(x) for x in value] if isinstance(value, list) else []
    valid = [x for x in numbers if x is not None]
    return valid if len(valid) == len(numbers) == 4 else None


def required(entry: dict, key: str, convert: Callable[[Any], Any], where: str, remedy: str) -> Any:
    """The converted value of a key; a DatasetError with the remedy if it is invalid."""
    value = convert(entry.get(key))
    if value is None:
        raise DatasetError(f"{where} has {key} {entry.get(key)!r}: {remedy}")
    return value


def _entries(key: str, entries: list, repairs: Repairs) -> None:
    """Every entry needs a unique id and a name."""
    label, seen = {"images": "file_name", "categories": "name"}[key], set()
    for place, entry in enumerate(entries):
        where = f"entry {place} of '{key}'"
        if not isinstance(entry, dict):
            raise DatasetError(f"{where} is {entry!r}: make it an object")
        id = required(entry, "id", to_int, where, "make it an integer")
        if id in seen:
            raise DatasetError(f"{where} has the id {id} of an earlier one: give each its own")
        seen.add(id)
        repairs.put(entry, "id", id)
        repairs.put(entry, label, required(entry, label, to_text, where, "make it a string"))


def _annotation(entry: Any, place: int, names: dict[int, str], repairs: Repairs) -> None:
    if not isinstance(entry, dict):
        raise DatasetError(f"entry {place} of 'annotations' is {entry!r}: make it an object")
    called = f"annotation {entry['id']}" if "id" in entry else f"entry {place} of 'annotations'"
    given = entry.get("image_id")
    if (image := to_int(given)) not in names:
        raise DatasetError(f"{called} has image_id {given!r}, not in 'images': fix it")
    where = f"{called} of image '{names[image]}'"
    repairs.put(entry, "image_id", image)
    category = required(entry, "category_id", to_int, where, "make it an integer")
    repairs.put(entry, "category_id", category)
    crowd = required(entry, "iscrowd", to_flag, where, "give 1 for a crowd, else 0")
    repairs.put(entry, "iscrowd", crowd)
    if entry.get("ignore") is not None:
        repairs.put(entry, "ignore", required(entry, "ignore", to_flag, where, "give 0"))
    if entry.get("ignore"):
        raise DatasetError(f"{where} is marked 'ignore', which Detectron2 refuses: delete it")
    _box(entry, where, repairs)
    _area(entry, where, repairs)
    attributes = entry.get("attributes")
    if isinstance(attributes, dict) and to_number(attributes.get("rotation")):
        repairs.note("rotated boxes, used without their rotation", where)


def _box(entry: dict, where: str, repairs: Repairs) -> None:
    if entry.get("bbox") is None and (box := _of_mask(entry, mask.toBbox)) is not None:
        repairs.note("missing boxes, computed from their masks", where)
        repairs.put(entry, "bbox", box.tolist())
        return
    wanted = "give [x, y, width, height], finite, in pixels"
    repairs.put(entry, "bbox", required(entry, "bbox", to_box, where, wanted))


def _area(entry: dict, where: str, repairs: Repairs) -> None:
    """COCO's evaluation needs the area to separate small objects from large ones."""
    given = to_number(entry.get("area"))
    if given is not None and given > 0:
        repairs.put(entry, "area", given)
        return
    width, height = (max(x, 0) for x in entry["bbox"][2:])
    area = _of_mask(entry, mask.area)
    # Boxes without extent may get any area: training and evaluation drop them.
    repairs.put(entry, "area", float(area) if area else float(width * height))
    if entry["area"] > 0:
        what = "masks" if area else "boxes"
        repairs.note(f"missing or invalid areas, computed from the {what}", where)


def _of_mask(entry: dict, compute: Callable) -> Any:
    """What pycocotools computes from an annotation's mask; None if it has no valid mask."""
    shape = entry.get("segmentation")
    if not shape:
        return None
    try:
        if isinstance(shape, dict):
            size = shape["size"]
            rle = mask.frPyObjects(shape, *size) if isinstance(shape["counts"], list) else shape
        else:
            # The smallest canvas that holds the outline; the image's size is not known here.
            sides = [math.ceil(max(max(part[start::2]) for part in shape)) + 1 for start in (1, 0)]
            if max(sides) > MAX_SIDE:
                return None
            rle = mask.merge(mask.frPyObjects(shape, *sides))
        return compute(rle)
    except Exception:  # pycocotools raises anything; what it cannot read is no mask
        return None


def _number_annotations(annotations: list[dict], repairs: Repairs) -> None:
    """Renumber annotations unless ids are unique and not 0, as COCO's evaluation needs them."""
    ids = [to_int(x.get("id")) for x in annotations]
    good = None not in ids and 0 not in ids and len(set(ids)) == len(ids)
    for id, annotation in zip(ids if good else range(1, len(ids) + 1), annotations, strict=True):
        repairs.put(annotation, "id", id)


def leave_out_roots(datasets: Sequence[dict[str, list]], repairs: Repairs) -> None:
    """Remove categories that only group others, in place.

    Roboflow's first category is the project's name and the parent of all classes. It has no
    annotations in any split.
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
    """Find image files under similar names, and read missing sizes from them, in place.

    A missing file is searched for below `image_root`, ignoring Unicode normal form, case, kind of
    slash and suffix. A match counts only if it is unique and no other image's. `faults` reports
    what stays missing. The images are as `normalise` leaves them.

    Raises:
        DatasetError: a size is missing, and the file cannot be read
    """
    if missing := missing_images(images, image_root):
        known = _files_by_key(image_root, {x["file_name"] for x in images})
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
        if not all(to_side(image.get(side)) for side in SIDES):
            path = Path(image_root, image["file_name"])
            if path.is_file():
                for side, value in zip(SIDES, image_size(path), strict=True):
                    repairs.put(image, side, value)
                repairs.note("missing image sizes, read from the image", f"'{path}'")


def _files_by_key(root: str, taken: set[str]) -> dict[str, list[str]]:
    """Image files below a folder, relative to it, by what they may be found by."""
    known = defaultdict(list)
    paths = (os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names)
    for path in islice(paths, MAX_FILES + 2 * len(taken)):
        file = os.path.relpath(path, root)
        if file not in taken and Path(file).suffix.lower() in SUFFIXES:
            for key in set(_keys(file)):
                known[key].append(file)
    return known


def fold_name(name: str) -> str:
    """Make names equal that differ only in Unicode normal form, case or kind of slash."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()


def _keys(name: str) -> tuple[str, ...]:
    """What a file may be found by, from its whole path to its name without suffix."""
    path = PurePosixPath(fold_name(name))
    return f"/{path}", f"/{path.with_suffix('')}", path.name, path.stem
