"""What weights expect of the model around them, and no shape of a tensor tells."""

import os

from detectron2.modeling.backbone.resnet import BottleneckBlock

from ..modeling.dino import DINO
from .releases import RELEASES

# What weights expect of the model around them, and no shape of a tensor tells.
TORCHVISION = {
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
    "stride_in_1x1": False,
}
MSRA = {"pixel_mean": [103.53, 116.28, 123.675], "pixel_std": [1.0] * 3, "stride_in_1x1": True}
EXPECTED = {
    "official": {"position_temperature": 20.0, "position_offset": 0.0, **TORCHVISION},
    "detrex": TORCHVISION,
    "mmdet": TORCHVISION,
}
USUAL_ENCODING = {"dino_d2": (20.0, 0.0), "detrex": (10000.0, -0.5), "mmdet": (20.0, 0.0)}
REMEDIES = {
    "pixel_mean": "MODEL.PIXEL_MEAN and the colour order INPUT.FORMAT (model.pixel_mean and "
    "image_format of the mapper)",
    "pixel_std": "MODEL.PIXEL_STD (model.pixel_std)",
    "stride_in_1x1": "MODEL.RESNETS.STRIDE_IN_1X1 (model.backbone.stages.stride_in_1x1)",
    "position_temperature": "MODEL.DINO.POSITION_TEMPERATURE (model.encoder.position_temperature)",
    "position_offset": "MODEL.DINO.POSITION_OFFSET (model.encoder.position_offset)",
}


def settings(model: DINO) -> dict:
    """What a model and its weights have to agree on without a tensor's shape telling."""
    found = {
        "pixel_mean": [round(x, 3) for x in model.pixel_mean.flatten().tolist()],
        "pixel_std": [round(x, 3) for x in model.pixel_std.flatten().tolist()],
        "position_temperature": float(model.encoder.position_temperature),
        "position_offset": float(model.encoder.position_offset),
    }
    block = next(iter(getattr(model.backbone, "res3", [])), None)
    if isinstance(block, BottleneckBlock):
        found["stride_in_1x1"] = block.conv1.stride != (1, 1)
    return found


def pixels_of(model: DINO) -> dict:
    """What pixels a ResNet was trained with, told by how strongly its first layer answers.

    MSRA's weights, on which most of Detectron2's model zoo is built, take pixels as they are, with
    a standard deviation of about 58. Others take them divided by it, in an order nothing tells.
    """
    conv = getattr(getattr(model.backbone, "stem", None), "conv1", None)
    norm = getattr(conv, "norm", None)
    if not hasattr(norm, "running_var"):
        return {}
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    response = (conv.weight.flatten(1).norm(dim=1) * scale.abs()).median()
    divided = {"pixel_std": TORCHVISION["pixel_std"]}
    return MSRA if response < 0.06 else divided  # they have 0.02 and 0.2


def encoding_of(filename: str) -> dict:
    """The encoding of pixels that a published file needs."""
    for release in RELEASES.values():
        if release.file == os.path.basename(filename):
            temperature, offset = release.encoding
            return {"position_temperature": temperature, "position_offset": offset}
    return {}
