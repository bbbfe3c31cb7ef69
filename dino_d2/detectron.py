"""What running an exported file needs of Detectron2, with stand-ins where it is not installed."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

INSTALLED = find_spec("detectron2") is not None
MISSING = (
    "{} needs Detectron2: the README of dino_d2 says how to install it, and `make` in its sources "
    "installs one. Without it, dino_d2.load runs exported files, .onnx and .pt2"
)

if TYPE_CHECKING or INSTALLED:
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.file_io import PathManager
else:
    from iopath.common.file_io import PathManager as PlainPathManager

    from .instances import Boxes, Instances

    PathManager = PlainPathManager()

__all__ = ["INSTALLED", "MISSING", "Boxes", "Instances", "PathManager"]
