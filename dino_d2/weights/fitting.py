"""Weights of any format, made those of a model."""

from collections.abc import Callable

from ..data.coco_classes import COCO_80, COCO_91
from ..layouts import backbones, dino
from ..layouts.adapt import ClassNames
from ..layouts.renaming import State

CONVERTERS: dict[str, Callable[[State], State]] = {
    "official": dino.from_official,
    "detrex": dino.from_detrex,
    "mmdet": dino.from_mmdet,
    "model_zoo": backbones.from_model_zoo,
    "torchvision": backbones.from_torchvision,
    "convnext": backbones.from_convnext,
}


def to_ours(state: State, form: str | None) -> State:
    """From any format that `detect_format` knows."""
    return CONVERTERS[form](state) if form in CONVERTERS else state


def coco_classes(number: int) -> ClassNames | None:
    return {80: COCO_80, 91: COCO_91}.get(number)
