"""Datasets and augmentation."""

from .augmentation import detr_augmentation
from .coco import check, class_names, num_classes, register
from .coco_faults import DatasetError
from .shapes import generate

__all__ = [
    "DatasetError",
    "check",
    "class_names",
    "detr_augmentation",
    "generate",
    "num_classes",
    "register",
]
