"""The names of COCO's classes."""

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from ..layouts.adapt import ClassNames

# What the class indices of the published weights stand for: Detectron2's 80 contiguous ones, or
# the category ids of COCO, of which 11 below 91 stand for nothing.
_THINGS = {x["id"]: x["name"] for x in COCO_CATEGORIES if x["isthing"]}
COCO_80: tuple[str, ...] = tuple(_THINGS.values())
COCO_91: ClassNames = tuple(map(_THINGS.get, range(91)))
# Of panoptic segmentation: the 80, and 53 of stuff.
COCO_PANOPTIC: tuple[str, ...] = tuple(x["name"] for x in COCO_CATEGORIES)
