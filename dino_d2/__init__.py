"""DINO (DETR with Improved DeNoising Anchor Boxes) for Detectron2.

Importing the package registers the meta-architectures `DINO` and `MaskDINO`; `load` gives a trained
one, and `train` trains one. Without Detectron2 there is only `load`, for exported files.
"""

import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .moved import MOVED, MovedModules
from .version import __version__

with warnings.catch_warnings():
    # Detectron2 and fvcore use deprecated functions of PyTorch on import.
    warnings.simplefilter("ignore", FutureWarning)
    from .detectron import INSTALLED, MISSING
    from .predictor import Predictor, load

    if TYPE_CHECKING or INSTALLED:
        from .config import add_dino_config
        from .modeling.dino import DINO
        from .modeling.mask_dino import MaskDINO
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
    if not INSTALLED and (name in __all__ or name in MOVED):
        raise ModuleNotFoundError(MISSING.format(f"dino_d2.{name}"), name="detectron2")
    if name == "train":
        return import_module(".engine.job", __name__).train
    if name in MOVED:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
