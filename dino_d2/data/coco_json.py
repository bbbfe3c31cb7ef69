"""Reads files of COCO annotations, without repairing them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from ..names import path_hint

KEYS = ("images", "annotations", "categories")


def dataset_name(json_file: str | os.PathLike, image_root: str | os.PathLike) -> str:
    """The dataset name of a file and its image folder, see `coco.register`.

    Raises:
        DatasetError: the file name does not end in .json, or file and folder are swapped
    """
    if os.path.isdir(json_file) and os.path.isfile(image_root):
        raise DatasetError(
            f"annotations and images are swapped: '{json_file}', given as the annotations, is a "
            f"folder, and '{image_root}', given as the folder of the images, is a file"
        )
    if not os.fspath(json_file).endswith(".json"):
        raise DatasetError(f"'{json_file}' is not a .json file: give COCO annotations")
    return f"{json_file}@{image_root}"


def parse(json_file: str) -> dict[str, list]:
    """Read a file of COCO annotations; files of test images get an empty list of annotations.

    Raises:
        DatasetError: the file is missing, is not JSON, or contains something else
    """
    if os.path.isdir(json_file):
        raise DatasetError(f"'{json_file}' is a folder: give a file of COCO annotations in it")
    if not os.path.isfile(json_file):
        raise DatasetError(
            f"annotation file '{json_file}' does not exist{path_hint(json_file)}: correct its "
            f"path, relative to '{os.getcwd()}'"
        )
    dataset = read_json(json_file)
    found = ", ".join(dataset) if isinstance(dataset, dict) else f"a {type(dataset).__name__}"
    if isinstance(dataset, dict):
        for key, found_as in misspelt(dataset):
            raise DatasetError(f"'{json_file}' has '{found_as}' in place of '{key}': rename it")
        if {"images", "categories"} <= dataset.keys():
            dataset.setdefault("annotations", [])
    for key in KEYS:
        if not isinstance(dataset, dict) or not isinstance(dataset.get(key), list):
            raise DatasetError(
                f"'{json_file}' has no list '{key}' but {found}: give a file of COCO detection "
                "annotations (not of detection results, captions or a labelling tool's own)"
            )
    return dataset


def misspelt(dataset: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys of COCO that are missing, and lists that are called nearly so."""
    for key, singular in zip(KEYS, ("image", "annotation", "category"), strict=True):
        for other, value in dataset.items():
            alike = other.lower() in (key, singular) and isinstance(value, list)
            if alike and key not in dataset:
                yield key, other


def read_json(path: str | os.PathLike) -> Any:
    """Read JSON in any Unicode encoding; raise a DatasetError if the file is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise DatasetError(
            f"'{path}' is not JSON ({error}): it may be incomplete, write or download it again"
        ) from error
