"""Configs of either style: the keys of DINO, reading of files, overrides."""

from ..modeling.build import build_criterion, build_parts, named
from .keys import add_dino_config
from .overrides import apply_overrides
from .styles import evaluation_augmentations, read_config
