"""Converts labelled images, as read from VOC and YOLO folders, to COCO annotations.

Whatever is left out is counted, and errors name file and place. `data.check` accepts the result
as a test set.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..atomic import replacing
from ..errors import DatasetError
from ..images import SUFFIXES
from ..progress import progress
from .faults import faults


class LabelledBox(NamedTuple):
    """A box of a labelled image."""

    corners: tuple[float, float, float, float]  # left, top, right and bottom in pixels
    label: int
    crowd: bool  # a region that evaluation ignores
    where: str  # file and place, for messages


class LabelledImage(NamedTuple):
    path: Path
    width: int  # in pixels, turned as its EXIF orientation says
    height: int
    boxes: list[LabelledBox]


class Conversion(NamedTuple):
    """The result of a conversion; image paths are relative to the converted folder."""

    datasets: dict[str, dict]  # COCO annotations by split
    notes: Counter[str]  # how often something was decided or left out


def to_coco(
    splits: Mapping[str, Iterable[LabelledImage]], root: Path, classes: Sequence[str]
) -> Conversion:
    """Convert labelled images to COCO annotations.

    Args:
        splits: images by split
        root: folder that image paths become relative to
        classes: names in the order of the category ids, which start at 1

    Raises:
        DatasetError: a box has no area inside its image, the result would be invalid for training,
            or no split has a box
    """
    categories = [{"id": id, "name": name} for id, name in enumerate(classes, start=1)]
    datasets, notes = conversion = Conversion({}, Counter())
    for split, labelled in splits.items():
        dataset = {"images": [], "annotations": [], "categories": categories}
        for id, image in enumerate(progress(labelled, "image", what=split), start=1):
            name = Path(os.path.relpath(image.path, root)).as_posix()
            size = {"width": image.width, "height": image.height}
            dataset["images"].append({"id": id, "file_name": name, **size})
            for box in image.boxes:
                number = len(dataset["annotations"]) + 1  # COCO's evaluation never finds id 0
                annotation = _annotation(box, image, notes)
                dataset["annotations"].append({"id": number, "image_id": id, **annotation})
        if not dataset["images"]:
            notes["splits without images, left out"] += 1
        elif not dataset["annotations"]:
            notes[f"images of split '{split}', which has no box, left out"] = len(dataset["images"])
        elif fault := next(faults(dataset, os.fspath(root)), None):
            raise DatasetError(f"split '{split}' of '{root}': {fault}")
        else:
            datasets[split] = dataset
    if not datasets:
        names = " or ".join(splits)
        raise DatasetError(f"'{root}': there are no annotations in {names}: add boxes")
    return conversion


def _annotation(box: LabelledBox, image: LabelledImage, notes: Counter[str]) -> dict:
    limits = (image.width, image.height) * 2
    # Rounded to thousandths of a pixel, the precision of YOLO's relative coordinates.
    inside = [round(min(max(x, 0), limit), 3) for x, limit in zip(box.corners, limits, strict=True)]
    left, top, right, bottom = inside
    if right <= left or bottom <= top:
        raise DatasetError(
            f"{box.where}: the box from {box.corners[:2]} to {box.corners[2:]} has no area inside "
            f"its image of {image.width} x {image.height} pixels: correct it, or delete it"
        )
    if max(abs(a - b) for a, b in zip(inside, box.corners, strict=True)) > 0.5:
        notes["boxes that left their image, clipped"] += 1
    width, height = round(right - left, 3), round(bottom - top, 3)
    return {
        "category_id": box.label + 1,
        "bbox": [left, top, width, height],
        "area": round(width * height, 3),
        "iscrowd": int(box.crowd),
    }


def find_images(folder: Path) -> list[Path]:
    """All images below a folder, sorted by path."""
    return sorted(x for x in folder.rglob("*") if x.suffix.lower() in SUFFIXES and x.is_file())


def read_text(path: Path) -> str:
    """Read UTF-8; raise a DatasetError if the file cannot be read, or is not text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"'{path}' cannot be read as text: {error}") from error


def write_json(dataset: dict, path: Path) -> None:
    """Write a dataset atomically: if writing fails, an existing file stays as it is."""
    with replacing(str(path)) as file:
        file.write(json.dumps(dataset).encode())
