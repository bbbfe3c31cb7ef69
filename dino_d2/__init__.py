"""DINO (DETR with Improved DeNoising Anchor Boxes) for Detectron2.

Importing the package registers the meta-architecture `DINO`; `load` gives a trained one.
"""

import warnings

with warnings.catch_warnings():
    # Detectron2 and fvcore call what PyTorch deprecates as they are imported.
    warnings.simplefilter("ignore", FutureWarning)
    from .config import add_dino_config
    from .modeling.dino import DINO
    from .predictor import Predictor, load

# Of images that are neither resized nor flipped, which Detectron2 only reads; and of its Swin.
warnings.filterwarnings("ignore", "The given NumPy array is not writable", module="detectron2")
warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release")

__all__ = ["DINO", "Predictor", "add_dino_config", "load"]
