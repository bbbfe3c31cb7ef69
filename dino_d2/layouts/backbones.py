"""Renames the weights of backbones from their authors' names to ours, by pure functions.

    torchvision  an ImageNet ResNet of torchvision
    convnext     an ImageNet ConvNeXt of its authors, for a backbone of `timm`
    timm         an ImageNet model of `timm`, for a backbone of `timm`
    model_zoo    the backbone of a detector of Detectron2's model zoo

Our Swin transformers and ViTs (MAE) have their authors' names.
"""

import re
from collections.abc import Iterable

from torch import Tensor

from .renaming import State, move, rename


def resnet_names(prefix: str) -> str:
    """torchvision's names, also in official DINO and mmdetection, as a table for `rename`."""
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


# detrex uses the authors' names, and adds norms of the features.
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


# As in its authors' code of detectors, of the models with norms after the parts of a block.
_FOCALNET = """
    backbone.net.stem                             backbone.patch_embed
    backbone.net.layers_1.downsample              backbone.layers.0.downsample
    backbone.net.layers_2.downsample              backbone.layers.1.downsample
    backbone.net.layers_3.downsample              backbone.layers.2.downsample
    backbone.net.layers_#.blocks.#.norm1_post     backbone.layers.#.blocks.#.norm1
    backbone.net.layers_#.blocks.#.norm2_post     backbone.layers.#.blocks.#.norm2
    backbone.net.layers_#.blocks.#.ls#.gamma      backbone.layers.#.blocks.#.gamma_#
    backbone.net.layers_#.blocks.#                backbone.layers.#.blocks.#
    backbone.norms.p2                             backbone.norm0
    backbone.norms.p3                             backbone.norm1
    backbone.norms.p4                             backbone.norm2
    backbone.norms.p5                             backbone.norm3
"""


_MMDET_SWIN = """
    backbone.patch_embed.proj                 backbone.patch_embed.projection
    backbone.layers.#.blocks.#.attn           backbone.stages.#.blocks.#.attn.w_msa
    backbone.layers.#.blocks.#.mlp.fc1        backbone.stages.#.blocks.#.ffn.layers.0.0
    backbone.layers.#.blocks.#.mlp.fc2        backbone.stages.#.blocks.#.ffn.layers.1
    backbone.layers                           backbone.stages
"""


def from_model_zoo(state: State) -> State:
    """The backbone of a detector, without its feature pyramid."""
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
    """Rename the ConvNeXt of a detector to `timm`'s names; other detectors are not changed."""
    return rename(state, _CONVNEXT) if "backbone.downsample_layers.0.0.weight" in state else state


def focalnet_of_timm(state: State) -> State:
    """Rename the FocalNet-L of a detector to `timm`'s names; other detectors are not changed.

    Where `timm` has convolutions of 1 x 1 pixel, these are linear layers there.
    """
    if "backbone.layers.0.blocks.0.modulation.f.weight" not in state:
        return state
    linear = re.compile(r"backbone\..*\.(modulation\.(f|proj)|mlp\.fc\d)\.weight")
    given = {k: x[..., None, None] if linear.match(k) else x for k, x in state.items()}
    return rename(given, _FOCALNET)


def swin_of_mmdet(state: State) -> State:
    """Rename the Swin transformer of mmdetection's detectors to its authors' names.

    Its patch merging takes the pixels of 2 x 2 patches channel by channel, and the second and third
    in the other order. Other detectors are not changed.
    """
    if not any(key.startswith("backbone.stages.") for key in state):
        return state

    def reordered(key: str, x: Tensor) -> Tensor:
        if not re.search(r"stages\.\d+\.downsample\.(norm|reduction)\.", key):
            return x
        return x.unflatten(-1, (-1, 4)).transpose(-1, -2)[..., [0, 2, 1, 3], :].flatten(-2)

    return rename({key: reordered(key, x) for key, x in state.items()}, _MMDET_SWIN)


def from_timm(state: State, names: Iterable[str]) -> State:
    """Rename the weights of a `timm` classifier for a :class:`TimmBackbone`.

    As a feature extractor, `timm` names the classifier's `stages.0` `stages_0`.

    Args:
        state: of the classifier; tensors that the backbone does not have keep their names
        names: of the backbone's tensors in the detector
    """

    def bare_name(name: str) -> str:
        return re.sub(r"^backbone\.net\.(model\.)?", "", name).replace("_", ".")

    places = {bare_name(name): name for name in names}
    return {places.get(bare_name(key), key): x for key, x in state.items()}
