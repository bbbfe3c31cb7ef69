"""DINO (DETR with Improved DeNoising Anchor Boxes) for Detectron2.

Importing the package registers the meta-architecture `DINO`.
"""

from .config import add_dino_config
from .modeling.dino import DINO

__all__ = ["DINO", "add_dino_config"]
