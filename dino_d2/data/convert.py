"""What VOC's and YOLO's folders have in common on their way to COCO annotations.

Nothing is left out without being counted, and a fault is said with its file and place. What comes
out is what `data.check` accepts as a test set.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..atomic import replacing
from ..progress import progress
from .coco_json import DatasetError
from .faults import faults
from .mapper import SUFFIXES


class LabelledBox(NamedTuple):
    """A box: left, top, right and bottom in pixels, the number of its class, and its file and
    place there. A crowd region is neither to be found nor missed."""

    corners: tuple[float, float, float, float]
    label: int
    crowd: bool
    where: str


class LabelledImage(NamedTuple):
    path: Path
    width: int  # in pixels, turned as its EXIF orientation says
    height: int
    boxes: list[LabelledBox]


class Conversion(NamedTuple):
    """COCO annotations by the name of the split, and what there is to say about them: how often
    something had to be decided. Paths of images are relative to the folder that was converted."""

    datasets: dict[str, dict]
    notes: Counter[str]


def to_coco(
    splits: Mapping[str, Iterable[LabelledImage]], root: Path, classes: Sequence[str]
) -> Conversion:
    """
    Args:
        splits: images by the name of their split
        root: folder that paths become relative to
        classes: their names; ids of categories count from 1 in this order

    Raises:
        DatasetError: a box has no area inside its image, training would refuse the result, or no
            split has a box
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
            continue
        if not dataset["annotations"]:
            notes[f"images of split '{split}', which has no box, left out"] = len(dataset["images"])
            continue
        if fault := next(faults(dataset, os.fspath(root)), None):
            raise DatasetError(f"split '{split}' of '{root}': {fault}")
        datasets[split] = dataset
    if not datasets:
        raise DatasetError(
            f"'{root}': there are no annotations in {' or '.join(splits)}: add boxes"
        )
    return conversion


def _annotation(box: LabelledBox, image: LabelledImage, notes: Counter[str]) -> dict:
    limits = (image.width, image.height) * 2
    # Thousandths of a pixel: what shares of a side are written with.
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
    """All images of a folder and its folders, by name."""
    return sorted(x for x in folder.rglob("*") if x.suffix.lower() in SUFFIXES and x.is_file())


def read_text(path: Path) -> str:
    """
    Raises:
        DatasetError: the file cannot be read, or is not text
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"'{path}' cannot be read as text: {error}") from error


def write_json(dataset: dict, path: Path) -> None:
    """Either the whole file is there or, if writing fails, what was there before."""
    with replacing(str(path)) as file:
        file.write(json.dumps(dataset).encode())
