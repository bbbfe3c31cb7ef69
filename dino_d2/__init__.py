"""DINO (DETR with Improved DeNoising Anchor Boxes) for Detectron2.

Importing the package registers the meta-architectures `DINO` and `MaskDINO`; `load` gives a trained
one, and `train` trains one.
"""

import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .moved import MOVED, MovedModules
from .version import __version__

if find_spec("detectron2") is None:
    raise ModuleNotFoundError(
        "dino_d2 needs Detectron2: its README says how to install it, and `make` in its sources "
        "brings one. Exported files need neither: projects/dino/onnx_detector.py runs an .onnx, "
        "torch.export.load a .pt2",
        name="detectron2",
    )

with warnings.catch_warnings():
    # Detectron2 and fvcore use deprecated functions of PyTorch on import.
    warnings.simplefilter("ignore", FutureWarning)
    from .config import add_dino_config
    from .modeling.dino import DINO
    from .modeling.mask_dino import MaskDINO
    from .predictor import Predictor, load
    from .weights import model_zoo
    from .weights.checkpointer import Checkpointer

# Detectron2 warns so of images that are neither resized nor flipped, and of its Swin.
warnings.filterwarnings("ignore", "The given NumPy array is not writable", module="detectron2")
warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release")

sys.meta_path.append(MovedModules())

__all__ = [
    "DINO",
    "Checkpointer",
    "MaskDINO",
    "Predictor",
    "__version__",
    "add_dino_config",
    "load",
    "model_zoo",
    "train",
]


if TYPE_CHECKING:
    from .engine.job import train


def __getattr__(name: str) -> Any:
    """`train`, whose import takes a second, and modules by their former names."""
    if name == "train":
        return import_module(".engine.job", __name__).train
    if name in MOVED:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
