"""Masks of COCO annotations, polygons or RLE, compressed or not: checked, encoded, decoded."""

from typing import Any

import numpy as np
from pycocotools import mask

from .faults import place_of
from .normalise import Repairs, to_number

NO_POLYGON = (
    "parts of masks that are no polygon (fewer than three points, an odd number of coordinates, or "
    "one that is no number), left out"
)
NO_MASK = "annotations without a usable mask, of which the box alone is used"


def normalise_masks(dataset: dict[str, list], repairs: Repairs) -> None:
    """Leave in every annotation a mask that Detectron2 and COCO's evaluation can read, or none.

    A dataset without any mask is one of boxes, and is left as it is.

    Args:
        dataset: as `normalise` and `place_images` leave it, with sizes of all images
        repairs: records what was done
    """
    annotations = dataset["annotations"]
    if not any(annotation.get("segmentation") for annotation in annotations):
        return
    sizes = {image["id"]: (image["height"], image["width"]) for image in dataset["images"]}
    names = {image["id"]: image["file_name"] for image in dataset["images"]}
    for annotation in annotations:
        given, where = annotation.get("segmentation"), place_of(annotation, names)
        found: Any = None
        if isinstance(given, dict):
            found = to_rle(given, sizes[annotation["image_id"]])
            if found is None:
                what = "masks in RLE that is damaged or of another size than the image"
                repairs.note(f"{what}, left out", where)
        elif isinstance(given, list) and given:
            parts = parts_of(given)
            found = [polygon for part in parts if (polygon := to_polygon(part))]
            if len(found) < len(parts):
                repairs.note(NO_POLYGON, where)
        if found:
            repairs.put(annotation, "segmentation", found)
            continue
        repairs.note(NO_MASK, where)
        if "segmentation" in annotation:
            del annotation["segmentation"]
            repairs.changed = True


def parts_of(given: list) -> list:
    """The polygons of a mask, which may be one without a list around it."""
    return given if isinstance(given[0], list) else [given]


def to_polygon(value: Any) -> list[float] | None:
    """Convert coordinates x, y, x, y, ... of three points or more; None for anything else.

    >>> to_polygon([0, 0, 4, 0, "4", 4]), to_polygon([0, 0, 4, 4])
    ([0, 0, 4, 0, 4.0, 4], None)
    """
    if not isinstance(value, list) or len(value) < 6 or len(value) % 2:
        return None
    numbers = [to_number(x) for x in value]
    return None if None in numbers else numbers  # type: ignore[return-value]


def to_rle(value: dict, size: tuple[int, int]) -> dict | None:
    """Convert RLE of an image (height, width) to compressed RLE of text; None if it is no such.

    >>> to_rle({"size": [2, 3], "counts": [1, 2, 3]}, (2, 3))
    {'size': [2, 3], 'counts': '123'}
    """
    counts = value.get("counts")
    if value.get("size") not in (list(size), size):
        return None
    if not isinstance(counts, list | str | bytes):
        return None
    try:
        if isinstance(counts, list):
            if sum(counts) != size[0] * size[1] or min(counts) < 0:
                return None
            counts = mask.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"]
        if isinstance(counts, bytes):
            counts = counts.decode("ascii")
        mask.toBbox({"size": list(size), "counts": counts.encode("ascii")})
    except Exception:  # pycocotools raises anything
        return None
    return {"size": list(size), "counts": counts}


def encode_mask(pixels: np.ndarray) -> dict:
    """A mask (H, W) as compressed RLE of text."""
    rle = mask.encode(np.asfortranarray(pixels, dtype=np.uint8))
    return {"size": list(pixels.shape), "counts": rle["counts"].decode("ascii")}


def decode_mask(segmentation: Any, size: tuple[int, int]) -> np.ndarray | None:
    """The mask (H, W) bool of an annotation or a detection; None if it is no mask.

    Args:
        size: height and width of the image
    """
    rle = None
    if isinstance(segmentation, dict):
        rle = to_rle(segmentation, size)
    elif isinstance(segmentation, list) and segmentation:
        polygons = [polygon for part in parts_of(segmentation) if (polygon := to_polygon(part))]
        rle = mask.merge(mask.frPyObjects(polygons, *size)) if polygons else None
    return None if rle is None else mask.decode(rle).astype(bool)
