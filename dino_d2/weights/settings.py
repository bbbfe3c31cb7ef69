"""Settings of a model that weights depend on, but that no tensor's shape shows."""

import logging
import os
from typing import Any

import numpy as np

from ..layouts.renaming import CheckpointError
from ..modeling.detector import Detector
from .releases import RELEASES

logger = logging.getLogger(__name__)

TORCHVISION = {
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
    "stride_in_1x1": False,
}
MSRA = {"pixel_mean": [103.53, 116.28, 123.675], "pixel_std": [1.0] * 3, "stride_in_1x1": True}
EXPECTED: dict[str | None, dict[str, object]] = {
    "official": {"position_temperature": 20.0, "position_offset": 0.0, **TORCHVISION},
    "detrex": TORCHVISION,
    "mmdet": TORCHVISION,
    "maskdino": {"position_temperature": 10000.0, "position_offset": 0.0, **TORCHVISION},
}
for _form, _temperature, _offset in (
    ("detr", 10000.0, 0.0),
    ("dab_detr", 20.0, 0.0),
    ("deformable_detr", 10000.0, -0.5),
):
    _encoding = {"position_temperature": _temperature, "position_offset": _offset}
    EXPECTED[_form] = EXPECTED[f"huggingface_{_form}"] = _encoding | TORCHVISION
EXPECTED["detrex_family"] = EXPECTED["deformable_detr"]
USUAL_ENCODING = {"dino_d2": (20.0, 0.0), "detrex": (10000.0, -0.5), "mmdet": (20.0, 0.0)}
REMEDIES = {
    "pixel_mean": "MODEL.PIXEL_MEAN and the colour order INPUT.FORMAT (model.pixel_mean and "
    "image_format of the mapper)",
    "pixel_std": "MODEL.PIXEL_STD (model.pixel_std)",
    "stride_in_1x1": "MODEL.RESNETS.STRIDE_IN_1X1 (model.backbone.stages.stride_in_1x1)",
    "position_temperature": "MODEL.DINO.POSITION_TEMPERATURE (model.encoder.position_temperature)",
    "position_offset": "MODEL.DINO.POSITION_OFFSET (model.encoder.position_offset)",
    "anchor_sides": "MODEL.DINO.MASK.ANCHOR_SIDES (model.query_selection.anchor_sides)",
    "initialize_box_type": "MODEL.DINO.MASK.INITIALIZE_BOX_TYPE (model.query_selection."
    "initialize_box_type)",
}


def pixels_of(model: Detector) -> dict:
    """The normalisation of pixels that a ResNet was trained with, from the size of its first
    weights.

    MSRA's weights, in most of Detectron2's model zoo, take unscaled pixels, with a standard
    deviation of about 58. Others take pixels divided by it, in an unknown order of channels.
    """
    conv = getattr(getattr(model.backbone, "stem", None), "conv1", None)
    norm = getattr(conv, "norm", None)
    if conv is None or norm is None or not hasattr(norm, "running_var"):
        return {}
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    response = (conv.weight.flatten(1).norm(dim=1) * scale.abs()).median()
    divided = {"pixel_std": TORCHVISION["pixel_std"]}
    return MSRA if response < 0.06 else divided  # they have 0.02 and 0.2


def encoding_of(filename: str) -> dict:
    """The position encoding that a published file needs."""
    for release in RELEASES.values():
        if release.encoding and release.file == os.path.basename(filename):
            temperature, offset = release.encoding
            return {"position_temperature": temperature, "position_offset": offset}
    return {}


def check_settings(model: Detector, expected: dict, file: str, *, complete: bool) -> None:
    """Compare the settings of a model with those that weights need.

    A wrong position encoding is always an error; a wrong normalisation of pixels only if weights
    have to be complete, as for evaluation, because training can adapt to it.

    Raises:
        CheckpointError: they differ in one of these
    """
    for name, found in model.settings().items():
        value = expected.get(name, found)
        exact = name.startswith("position")
        if agree(found, value, rtol=1e-3 if exact else 0.05):
            continue
        message = (
            f"the weights of '{file}' need {name} {value}, but the model has {found}: change "
            f"{REMEDIES.get(name, name)}"  # a Detector may have settings of its own
        )
        if complete or exact:
            raise CheckpointError(message)
        logger.warning(message)


def agree(found: Any, value: Any, *, rtol: float) -> bool:
    """Whether two settings, numbers or texts, are the same."""
    if isinstance(found, str) or np.shape(found) != np.shape(value):
        return found == value
    return np.allclose(found, value, rtol=rtol)


def warn_of_encoding(model: Detector, form: str | None, expected: dict, file: str) -> None:
    """Warn if weights do not say which position encoding they need, and the model's is unusual."""
    own = model.settings()
    encoding = own.get("position_temperature"), own.get("position_offset")
    usual = USUAL_ENCODING.get(form or "", encoding)
    if "position_offset" not in expected and encoding != usual:
        logger.warning(
            f"'{file}' does not say with which position encoding it was trained: the model has "
            f"temperature and offset {encoding}, most of {form} have {usual}"
        )
