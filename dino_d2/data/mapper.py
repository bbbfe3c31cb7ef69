"""Turns a dataset record into an input of the model, and refuses unusable images."""

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from torch import Tensor

from ..errors import DatasetError
from ..images import check_header, read_image
from ..ranges import require_share
from .augmentation import ResizeShortestEdge, visible
from .segments import MAPS, from_labels, from_segments, read_label_map, segment_ids


class Mapper(DatasetMapper):
    """Detectron2's mapper, with a clear error for an image that cannot be used.

    Takes the same arguments, or a config. With masks, objects of which only the box is known take
    part, marked by "has_mask" of the instances. Records without annotations, but with a
    panoptic PNG or else a label map, get one instance per segment or class, see `segments.py`.

    From a config for evaluation, it resizes with our `ResizeShortestEdge`; for training,
    INPUT.RANDOM_FLIP may be "both", too. Pixels equal Detectron2's. Unlike Detectron2, integer
    boxes are not rounded on resize. Errors that the image did not cause are passed on.

    Args:
        is_train: whether annotations become "instances"
        min_visible: boxes of which augmentation leaves a smaller share of the area in the image
            are dropped; 0 keeps all that are not empty, as Detectron2
        arguments: of Detectron2's `DatasetMapper`
    """

    @configurable
    def __init__(self, is_train: bool, *, min_visible: float = 0.0, **arguments: Any):
        super().__init__(is_train, **arguments)
        require_share(min_visible=min_visible)
        self.min_visible = min_visible

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        both = cfg.INPUT.RANDOM_FLIP == "both"
        if both:  # Detectron2 makes one kind of flip
            cfg = cfg.clone()
            cfg.defrost()
            cfg.INPUT.RANDOM_FLIP = "horizontal"
        arguments = super().from_config(cfg, is_train)
        if not is_train:
            resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
            arguments["augmentations"] = [resize]
        elif both:
            arguments["augmentations"].append(T.RandomFlip(horizontal=False, vertical=True))
        if is_train and cfg.INPUT.get("SCALE_JITTER"):  # which crops
            arguments["recompute_boxes"] = cfg.MODEL.MASK_ON
        return arguments

    def __call__(self, dataset_dict: dict) -> dict:
        """Read and augment the image of a record.

        Args:
            dataset_dict: a record in Detectron2's format; it is not changed

        Returns:
            the record with "image" (C, H, W) of uint8 and, in training, "instances"

        Raises:
            DatasetError: the image cannot be read, has more than 8 bits per channel or another
                size than its annotations say, or a box is not finite
        """
        check_header(dataset_dict["file_name"])
        record = dataset_dict
        if self.is_train and "annotations" not in dataset_dict and any(map(dataset_dict.get, MAPS)):
            if not self.use_instance_mask:
                raise DatasetError(
                    f"image '{dataset_dict['file_name']}' has a map of its pixels and no boxes, "
                    "which only a Mask DINO learns: start from a config of configs/MaskDINO/"
                )
            # Detectron2 transforms annotations, and would read a label map with a palette as grey.
            maps = {"annotations": None, "label_map": record.get("sem_seg_file_name")}
            dataset_dict = {k: x for k, x in record.items() if k != "sem_seg_file_name"} | maps
        try:
            return super().__call__(dataset_dict)
        except Exception:
            # If the image itself can be read, an augmentation or a subclass caused the error.
            check_pixels(record)
            raise

    def _transform_annotations(
        self, dataset_dict: dict, transforms: T.TransformList, image_shape: tuple[int, int]
    ) -> None:
        if dataset_dict["annotations"] is None:
            del dataset_dict["annotations"]
            dataset_dict["instances"] = instances_of_map(dataset_dict, transforms, image_shape)
            return
        for annotation in dataset_dict["annotations"]:
            # Detectron2 would silently round resized integers down, drop NaN, and clip infinite
            # boxes to the image.
            annotation["bbox"] = [float(value) for value in annotation["bbox"]]
            if not np.isfinite(annotation["bbox"]).all():
                raise DatasetError(
                    f"image '{dataset_dict['file_name']}' has a box {annotation['bbox']}: "
                    "give finite numbers, in pixels"
                )
        if self.min_visible:
            dataset_dict["annotations"] = [
                annotation
                for annotation in dataset_dict["annotations"]
                if self._is_visible(annotation, transforms, image_shape)
            ]
        if not self.use_instance_mask:
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            return
        objects = [x for x in dataset_dict.pop("annotations") if not x.get("iscrowd")]
        known = torch.tensor(["segmentation" in x for x in objects], dtype=torch.bool)
        for annotation in objects:
            if not self.use_keypoint:
                annotation.pop("keypoints", None)
            # A box without a mask goes through augmentation as a mask does.
            mask = annotation.pop("segmentation", [rectangle(annotation)])
            if isinstance(mask, list) and self.instance_mask_format == "bitmask":
                # Not cut by a crop, for which Detectron2 needs another package; pixels will be.
                points = [np.asarray(part, dtype=np.float64).reshape(-1, 2) for part in mask]
                moved = {"segmentation": [transforms.apply_coords(x).ravel() for x in points]}
            else:
                annotation["segmentation"], moved = mask, {}
            detection_utils.transform_instance_annotations(
                annotation,
                transforms,
                image_shape,
                keypoint_hflip_indices=self.keypoint_hflip_indices,
            )
            annotation |= moved
        instances = detection_utils.annotations_to_instances(
            objects, image_shape, mask_format=self.instance_mask_format
        )
        instances.has_mask = known
        if self.recompute_boxes and objects:
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        dataset_dict["instances"] = detection_utils.filter_empty_instances(instances)

    def _is_visible(
        self, annotation: dict, transforms: T.TransformList, image_shape: tuple[int, int]
    ) -> bool:
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        moved = torch.as_tensor(transforms.apply_box(np.array([box])))
        return bool(visible(Boxes(moved), image_shape, self.min_visible))


def instances_of_map(
    dataset_dict: dict, transforms: T.TransformList, image_shape: tuple[int, int]
) -> Instances:
    """The segments of the panoptic PNG of a record, or the classes of its label map.

    Args:
        dataset_dict: the maps are taken out of it
        image_shape: height and width of the transformed image
    """
    label_map = dataset_dict.pop("label_map")
    if "pan_seg_file_name" in dataset_dict:
        png = read_image(dataset_dict.pop("pan_seg_file_name"), "RGB")
        # as colours, so that what a crop adds is of no segment
        labels = segment_ids(transforms.apply_segmentation(png))
        found = from_segments(labels, dataset_dict.pop("segments_info"))
    else:
        labels = transforms.apply_segmentation(read_label_map(label_map, np.uint8))
        found = from_labels(labels)
    if tuple(labels.shape) != tuple(image_shape):
        raise DatasetError(
            f"the map of '{dataset_dict['file_name']}' has another size than the image: replace it"
        )
    return found


def rectangle(annotation: dict) -> list[float]:
    """The box of an annotation as a polygon."""
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    left, top, right, bottom = map(float, box)
    return [left, top, right, top, right, bottom, left, bottom]


def to_picture(image: np.ndarray | Tensor, image_format: str) -> Image.Image:
    """Convert an image (H, W, C) from a model's input format to RGB."""
    pixels = detection_utils.convert_image_to_rgb(image, image_format)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def check_pixels(record: dict) -> None:
    """Decode an image and its maps, and compare its size with theirs and that of its record."""
    path = record["file_name"]
    height, width = read_image(path, "RGB").shape[:2]
    said = record.get("width", width), record.get("height", height)
    if said != (width, height):
        raise DatasetError(
            f"image '{path}' is {width} x {height} pixels after EXIF rotation, but its annotations "
            f"say {said[0]} x {said[1]}: correct them and the boxes"
        )
    for file in (record[name] for name in MAPS if record.get(name)):
        other = read_image(file, "RGB").shape[:2]
        if other != (height, width):
            raise DatasetError(
                f"'{file}' is {other[1]} x {other[0]} pixels, but its image '{path}' is {width} x "
                f"{height}: a map has the size of its image"
            )
