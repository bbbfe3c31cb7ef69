"""Datasets and augmentation."""

from .augmentation import ResizeShortestEdge, detr_augmentation
from .coco import check, class_names, num_classes, register
from .coco_faults import DatasetError
from .coco_results import read_results
from .mapper import Mapper, read_image
from .shapes import generate
from .voc import from_voc
from .yolo import from_yolo

__all__ = [
    "DatasetError",
    "Mapper",
    "ResizeShortestEdge",
    "check",
    "class_names",
    "detr_augmentation",
    "from_voc",
    "from_yolo",
    "generate",
    "num_classes",
    "read_image",
    "read_results",
    "register",
]
