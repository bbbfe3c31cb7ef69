"""Datasets and augmentation."""

from ..errors import DatasetError
from ..images import read_image
from .adopt import is_built_in
from .augmentation import (
    AUGMENTATION_REGISTRY,
    ResizeShortestEdge,
    detr_augmentation,
    named_augmentations,
)
from .classes import class_changes
from .coco import (
    annotations_of,
    changes_of,
    check,
    class_names,
    num_classes,
    register,
    register_again,
    registered,
    stuff_classes,
)
from .coco_results import read_results
from .folder import find_folder
from .mapper import Mapper
from .mixing import Mixing
from .objects365 import OBJECTS365
from .segments import read_label_map, with_label_maps
from .shapes import generate
from .stream import build_train_loader
from .voc import from_voc
from .yolo import from_yolo
