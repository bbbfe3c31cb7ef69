"""Datasets that others registered as functions: their records, put right as files are."""

from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin
from detectron2.structures import BoxMode

from .coco_json import DatasetError
from .normalise import to_flag, to_int, to_number

PLAIN = BoxMode.XYXY_ABS, BoxMode.XYWH_ABS


def is_built_in(name: str) -> bool:
    """Whether Detectron2 brings the dataset: those of COCO are as they should be."""
    return any(name in splits for splits in builtin._PREDEFINED_SPLITS_COCO.values())


def check_records(name: str) -> None:
    """Load a registered dataset and keep it, with values of the types that Detectron2 wants.

    Args:
        name: of a function in the `DatasetCatalog` that gives Detectron2's records

    Raises:
        DatasetError: a record cannot be understood
    """
    classes = MetadataCatalog.get(name).get("thing_classes")
    records = [
        _record(record, f"'{name}', record {place}", len(classes) if classes else None)
        for place, record in enumerate(DatasetCatalog.get(name))
    ]
    DatasetCatalog.remove(name)
    DatasetCatalog.register(name, lambda: records)


def _record(record: Any, where: str, num_classes: int | None) -> dict:
    if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
        raise DatasetError(f"{where} has no 'file_name': give records of Detectron2's format")
    sides = {}
    for side in ("width", "height"):
        if side in record:
            sides[side] = to_int(record[side])
            if sides[side] is None or sides[side] < 1:
                raise DatasetError(
                    f"{where} has {side} {record[side]!r}: make it a positive integer"
                )
    if "annotations" not in record:
        return {**record, **sides}
    annotations = [
        _annotation(x, f"{where}, annotation {i}", num_classes)
        for i, x in enumerate(record["annotations"])
    ]
    return {**record, **sides, "annotations": annotations}


def _annotation(annotation: dict, where: str, num_classes: int | None) -> dict:
    # NumPy's numbers are as good as Python's.
    annotation = {k: x.item() if isinstance(x, np.generic) else x for k, x in annotation.items()}
    category = to_int(annotation.get("category_id"))
    if category is None or category < 0 or (num_classes is not None and category >= num_classes):
        raise DatasetError(
            f"{where} has category_id {annotation.get('category_id')!r}: give a number from 0 to "
            + ("that of classes, less 1" if num_classes is None else str(num_classes - 1))
        )
    given = annotation.get("iscrowd")
    crowd = 0 if given is None else to_flag(given)
    if crowd is None:
        raise DatasetError(f"{where} has iscrowd {given!r}: give 1 for a crowd, else 0")
    fixed = {**annotation, "category_id": category, "iscrowd": crowd}
    if annotation.get("bbox_mode") in PLAIN:
        box = [to_number(x) for x in np.asarray(annotation.get("bbox", ())).tolist()]
        if len(box) != 4 or None in box:
            raise DatasetError(f"{where} has bbox {annotation.get('bbox')!r}: give four numbers")
        fixed["bbox"] = box
    elif annotation.get("bbox_mode") is None:
        raise DatasetError(f"{where} has no 'bbox_mode': say what its numbers are")
    return fixed
