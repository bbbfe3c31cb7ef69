"""Checks and repairs the records of datasets that were registered as functions."""

import sys
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin
from detectron2.structures import BoxMode

from ..errors import DatasetError
from .normalise import SIDES, required, to_box, to_flag, to_int, to_side

PLAIN = BoxMode.XYXY_ABS, BoxMode.XYWH_ABS


def is_built_in(name: str) -> bool:
    """Whether a dataset is one of Detectron2's own COCO splits, which need no check."""
    return any(name in splits for splits in builtin._PREDEFINED_SPLITS_COCO.values())


def check_records(name: str) -> None:
    """Load a dataset that is registered as a function, and replace it by its repaired records.

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
    fixed = dict(record)
    for side in SIDES:
        if side in record:
            fixed[side] = required(record, side, to_side, where, "make it a positive integer")
    if "annotations" in record:
        fixed["annotations"] = [
            _annotation(x, f"{where}, annotation {i}", num_classes)
            for i, x in enumerate(record["annotations"])
        ]
    return fixed


def _annotation(entry: dict, where: str, num_classes: int | None) -> dict:
    # NumPy's numbers are as good as Python's.
    entry = {k: x.item() if isinstance(x, np.generic) else x for k, x in entry.items()}

    numbers = range(sys.maxsize if num_classes is None else num_classes)

    def to_class(value: Any) -> int | None:
        index = to_int(value)
        # a range looks at all of its numbers for what is none
        return index if index is not None and index in numbers else None

    last = "the number of classes, less 1" if num_classes is None else num_classes - 1
    category = required(entry, "category_id", to_class, where, f"give a number from 0 to {last}")
    crowd = required(entry, "iscrowd", to_flag, where, "give 1 for a crowd, else 0")
    fixed = {**entry, "category_id": category, "iscrowd": crowd}
    if entry.get("bbox_mode") in PLAIN:
        fixed["bbox"] = required(
            *(entry, "bbox", lambda x: to_box(np.asarray(x).tolist())),
            *(where, "give four finite numbers"),
        )
    elif entry.get("bbox_mode") is None:
        raise DatasetError(f"{where} has no 'bbox_mode': name one of Detectron2's BoxMode")
    return fixed
