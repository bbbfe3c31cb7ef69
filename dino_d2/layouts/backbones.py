"""Weights of a backbone alone, under their authors' names, as pure functions to the names of ours.

    torchvision  an ImageNet ResNet of torchvision
    convnext     an ImageNet ConvNeXt of its authors, for a backbone of `timm`
    timm         an ImageNet model of `timm`, for a backbone of `timm`
    model_zoo    a detector of Detectron2's model zoo, of which the backbone is taken

Swin transformers and ViTs (MAE) of their authors have the names of ours already.
"""

import re
from collections.abc import Iterable

from .renaming import State, move, rename


def resnet_names(prefix: str) -> str:
    """torchvision's, which official DINO and mmdetection use, as a table for `rename`."""
    stages = "".join(
        f"""
    backbone.res{i + 1}.#.conv#.norm             {prefix}.layer{i}.#.bn#
    backbone.res{i + 1}.#.shortcut.norm          {prefix}.layer{i}.#.downsample.1
    backbone.res{i + 1}.#.shortcut               {prefix}.layer{i}.#.downsample.0
    backbone.res{i + 1}                          {prefix}.layer{i}"""
        for i in (1, 2, 3, 4)
    )
    return f"""
    backbone.stem.conv1.norm              {prefix}.bn1
    backbone.stem.conv1                   {prefix}.conv1{stages}"""


# detrex has the names of its authors, and norms of the features.
_CONVNEXT = """
    backbone.net.stem_#                       backbone.downsample_layers.0.#
    backbone.net.stages_#.downsample.#        backbone.downsample_layers.#.#
    backbone.net.stages_#.blocks.#.conv_dw    backbone.stages.#.#.dwconv
    backbone.net.stages_#.blocks.#.mlp.fc1    backbone.stages.#.#.pwconv1
    backbone.net.stages_#.blocks.#.mlp.fc2    backbone.stages.#.#.pwconv2
    backbone.net.stages_#.blocks.#            backbone.stages.#.#
    backbone.norms.p2                         backbone.norm0
    backbone.norms.p3                         backbone.norm1
    backbone.norms.p4                         backbone.norm2
    backbone.norms.p5                         backbone.norm3
"""


def from_model_zoo(state: State) -> State:
    """The backbone of a detector, without the feature pyramid that it was part of."""
    prefix = "backbone.bottom_up."
    return move({k: x for k, x in state.items() if k.startswith(prefix)}, prefix, "backbone.")


def from_torchvision(state: State) -> State:
    """The ResNet, without its classifier."""
    backbone = {f"backbone.{k}": x for k, x in state.items() if not k.startswith("fc.")}
    return rename(backbone, resnet_names("backbone"))


def from_convnext(state: State) -> State:
    """The ConvNeXt, without its classifier and the norm before it."""
    own = {k: x for k, x in state.items() if not k.startswith(("head.", "norm."))}
    return convnext_of_timm(move(own, "", "backbone."))


def convnext_of_timm(state: State) -> State:
    """A detector with a ConvNeXt of its authors, whose backbone becomes one of `timm`; others
    stay as they are."""
    return rename(state, _CONVNEXT) if "backbone.downsample_layers.0.0.weight" in state else state


def from_timm(state: State, names: Iterable[str]) -> State:
    """A model of `timm` with a classifier, for a :class:`TimmBackbone`.

    Where features are taken from, `timm` has `stages_0` for the `stages.0` of the whole model.

    Args:
        state: of the whole model; what the backbone does not have keeps its name
        names: of the backbone's tensors in the detector
    """

    def bare_name(name: str) -> str:
        return re.sub(r"^backbone\.net\.(model\.)?", "", name).replace("_", ".")

    places = {bare_name(name): name for name in names}
    return {places.get(bare_name(key), key): x for key, x in state.items()}
