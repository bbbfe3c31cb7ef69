"""Ground truth of every pixel: segments of panoptic PNGs, and label maps.

Both become instances with masks, so that a model learns them as it learns objects.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import filter_empty_instances, read_image
from detectron2.structures import BitMasks, Instances
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..errors import DatasetError

NO_CLASS = 255  # of pixels in label maps, as in all of Detectron2's data sets
MAPS = "pan_seg_file_name", "sem_seg_file_name"  # what records call their files


def segment_ids(png: np.ndarray) -> np.ndarray:
    """The segment of each pixel (H, W), of a panoptic PNG (H, W, 3) of uint8 in RGB."""
    return png.astype(np.int64) @ np.array([1, 256, 256**2])


def from_segments(ids: np.ndarray, segments: Sequence[dict[str, Any]]) -> Instances:
    """The segments of an image; crowds, and what has no pixels, are left out.

    Boxes of stuff have no losses: "has_box" is False.

    Args:
        ids: (H, W), the segment of each pixel
        segments: Detectron2's "segments_info", with "id", "category_id" and "isthing"
    """
    segments = [x for x in segments if not x.get("iscrowd")]
    return from_masks(
        ids.shape,
        [ids == x["id"] for x in segments],
        [x["category_id"] for x in segments],
        [x["isthing"] for x in segments],
    )


def from_labels(labels: np.ndarray) -> Instances:
    """One instance for each class of a label map (H, W); `NO_CLASS` is none."""
    classes = [x for x in np.unique(labels).tolist() if x != NO_CLASS]
    masks = [labels == x for x in classes]
    return from_masks(labels.shape, masks, classes, [True] * len(classes))


def from_masks(
    size: tuple[int, ...], masks: Sequence[np.ndarray], classes: list[int], has_box: list[bool]
) -> Instances:
    """Instances of masks (H, W) bool with tight boxes, for training."""
    instances = Instances((size[0], size[1]))
    stacked = np.stack(masks) if masks else np.zeros((0, *size), bool)
    instances.gt_masks = BitMasks(torch.from_numpy(stacked))
    instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    instances.has_mask = torch.ones(len(classes), dtype=torch.bool)
    instances.has_box = torch.tensor(has_box, dtype=torch.bool)
    return filter_empty_instances(instances)


def _read_indices(file: str) -> np.ndarray:
    with PathManager.open(file, "rb") as opened, Image.open(opened) as image:
        if image.mode == "P":
            return np.asarray(image)
    return read_image(file, "L")[:, :, 0]


def with_label_maps(name: str) -> str:
    """The name of a data set whose panoptic segments can be read as label maps, see `as_label_map`.

    It is registered for Detectron2's `SemSegEvaluator`, and is `name` itself if it has label maps.
    """
    if "sem_seg_file_name" in next(iter(DatasetCatalog.get(name)), {}):
        return name
    own = f"{name}, pixels"
    if own in DatasetCatalog:  # the data may have changed
        DatasetCatalog.remove(own)
        MetadataCatalog.remove(own)
    DatasetCatalog.register(own, lambda: [as_label_map(x) for x in DatasetCatalog.get(name)])
    metadata = {k: x for k, x in MetadataCatalog.get(name).as_dict().items() if k != "name"}
    stuff = "stuff_dataset_id_to_contiguous_id"  # of all classes, for maps
    every = metadata.get("thing_dataset_id_to_contiguous_id", {}) | metadata.get(stuff, {})
    MetadataCatalog.get(own).set(**metadata | ({stuff: every} if every else {}))
    return own


def as_label_map(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose label map is its panoptic PNG and its segments."""
    return record | {
        "sem_seg_file_name": (record["pan_seg_file_name"], tuple(record["segments_info"]))
    }


def read_label_map(
    file: str | tuple[str, Iterable[dict[str, Any]]],
    dtype: Any = np.int64,
    num_classes: int | None = None,
) -> np.ndarray:
    """The class of each pixel (H, W), of a file or of a panoptic PNG and its segments.

    Of a file with a palette they are the indices of its colours.

    Raises:
        DatasetError: a file has a class that is not below `num_classes`, and not `NO_CLASS`
    """
    if isinstance(file, str):
        labels = _read_indices(file)
        unknown = labels[(labels >= (num_classes or NO_CLASS)) & (labels != NO_CLASS)]
        if len(unknown):
            raise DatasetError(
                f"'{file}' has pixels of class {unknown[0]}, but there are {num_classes} classes, "
                f"counted from 0, and {NO_CLASS} for none: correct it"
            )
        return labels.astype(dtype)
    path, segments = file
    ids = segment_ids(read_image(path, "RGB"))
    labels = np.full(ids.shape, NO_CLASS, dtype)
    for segment in segments:
        labels[ids == segment["id"]] = segment["category_id"]
    return labels
