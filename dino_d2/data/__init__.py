"""Datasets and augmentation."""

from .augmentation import ResizeShortestEdge, detr_augmentation
from .coco import check, class_names, num_classes, register
from .coco_faults import DatasetError
from .mapper import Mapper, read_image
from .shapes import generate

__all__ = [
    "DatasetError",
    "Mapper",
    "ResizeShortestEdge",
    "check",
    "class_names",
    "detr_augmentation",
    "generate",
    "num_classes",
    "read_image",
    "register",
]
