"""Reads and checks files of detections in COCO's results format."""

import os
from collections.abc import Iterator

from ..errors import DatasetError
from ..names import path_hint
from .coco_json import read_json
from .faults import is_finite

KEYS = ("image_id", "category_id", "bbox", "score")


def read_results(path: str | os.PathLike, dataset: dict[str, list]) -> list[dict]:
    """Read the detections in images of a dataset.

    Args:
        path: a list of {"image_id", "category_id", "bbox": [x, y, width, height], "score"}, as
            Detectron2's evaluator and `demo.py --json` write it; other keys are ignored
        dataset: parsed COCO annotations

    Raises:
        DatasetError: the file is missing, invalid, or does not belong to the dataset
    """
    if os.path.isdir(path):
        raise DatasetError(f"results '{path}' are a folder: give the JSON file in it")
    if not os.path.isfile(path):
        raise DatasetError(f"results '{path}' do not exist{path_hint(path)}")
    results = read_json(path)
    if not isinstance(results, list):
        raise DatasetError(
            f"'{path}' is a {type(results).__name__}, not a list of detections: give results "
            "as evaluation writes them to inference/coco_instances_results.json"
        )
    if fault := next(_faults(results, dataset), None):
        raise DatasetError(f"'{path}': {fault}")
    return results


def _faults(results: list, dataset: dict[str, list]) -> Iterator[str]:
    file_names = {image["id"]: image["file_name"] for image in dataset["images"]}
    category_ids = {category["id"] for category in dataset["categories"]}
    for number, result in enumerate(results):
        where = f"detection {number}"
        missing = [k for k in KEYS if k not in result] if isinstance(result, dict) else KEYS
        if missing:
            yield f"{where} has no {', '.join(missing)}: give results in COCO's format"
        image, category, bbox, score = (result[key] for key in KEYS)
        if not isinstance(image, int) or image not in file_names:
            yield (
                f"{where} is of image_id {image!r}, which the annotations do not have: give "
                "annotations and results of the same images"
            )
        # Without annotations, demo.py numbers the images itself.
        name = result.get("file_name", file_names[image])
        if not isinstance(name, str):
            yield f"{where} has file_name {name!r}: make it a string, or leave it out"
        if os.path.basename(name) != os.path.basename(file_names[image]):
            yield (
                f"{where} is of '{os.path.basename(name)}', but image_id {image} is "
                f"'{file_names[image]}' in the annotations: detect with demo.py --annotations"
            )
        if not isinstance(category, int) or category not in category_ids:
            yield (
                f"{where} has category_id {category!r}, which the annotations do not have: give "
                "results of a model with the same classes"
            )
        if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(is_finite, bbox))):
            yield f"{where} has bbox {bbox!r}: give [x, y, width, height], finite, in pixels"
        if min(bbox[2:]) < 0:
            yield f"{where} has bbox {bbox}: make its width and height 0 or more"
        if not (is_finite(score) and 0 <= score <= 1):
            yield f"{where} has score {score!r}: give a number from 0 to 1"
