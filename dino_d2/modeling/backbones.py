"""ViTDet for images of any size, all models of `timm`, and dilated ResNets, as backbones."""

from collections.abc import Mapping, Sequence
from functools import partial
from math import log2
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.layers.batch_norm import LayerNorm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, SimpleFeaturePyramid
from detectron2.modeling import ViT as Detectron2ViT
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, ResNet
from omegaconf import OmegaConf
from torch import Tensor, nn

from ..names import hint


class BackboneError(ValueError):
    """A backbone is not available, or does not provide the requested features."""


class ViT(Detectron2ViT):
    """Detectron2's, with the LayerNorm epsilon of its published weights (MAE).

    Args:
        options: of Detectron2's ViT

    Raises:
        BackboneError: `timm` is not installed, which Detectron2's ViT needs
    """

    def __init__(self, **options: Any):
        import_timm()
        super().__init__(norm_layer=partial(nn.LayerNorm, eps=1e-6), **options)


class ViTDet(SimpleFeaturePyramid):
    """Feature maps of several strides from the last map of a ViT (ViTDet, section 3).

    Images of any size are padded to multiples of the coarsest stride, not counting `top_block`,
    which pools the map before it: 32 pixels for the maps p3 to p6. Detectron2's class declares this
    padding, but under a misspelt name that nothing reads.
    """

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility


def dc5_stages(*, depth: int, norm: str = "FrozenBN", **options: Any) -> list[list[nn.Module]]:
    """Stages of a ResNet whose last keeps the stride of 16 pixels (DETR-DC5).

    In its 3x3 convolutions, the first block has a dilation of 1 and the others of 2, as in
    torchvision. (RES5_DILATION of Detectron2 has 2 in all.)

    Args:
        depth: 50, 101 or 152
        options: of `ResNet.make_default_stages`

    Raises:
        ValueError: a ResNet of this depth has no such stage
    """
    if depth not in (50, 101, 152):
        raise ValueError(
            f"the depth of a DC5 ResNet (MODEL.RESNETS.DEPTH, model.backbone.stages.depth) is "
            f"{depth}; it can be 50, 101 or 152"
        )
    *stages, last = ResNet.make_default_stages(depth, norm=norm, **options)
    dilated = ResNet.make_stage(
        BottleneckBlock,
        len(last),
        in_channels=1024,
        bottleneck_channels=512,
        out_channels=2048,
        stride_per_block=[1] * len(last),
        dilation_per_block=[1] + [2] * (len(last) - 1),
        norm=norm,
        **options,
    )
    return [*stages, dilated]


@BACKBONE_REGISTRY.register()
def build_resnet_dc5_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """A ResNet with :func:`dc5_stages`, of the keys of Detectron2's ResNets."""
    r = cfg.MODEL.RESNETS
    stem = BasicStem(input_shape.channels, r.STEM_OUT_CHANNELS, norm=r.NORM)
    stages = dc5_stages(depth=r.DEPTH, norm=r.NORM, stride_in_1x1=r.STRIDE_IN_1X1)
    return ResNet(stem, stages, out_features=r.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


@BACKBONE_REGISTRY.register()
class TimmBackbone(Backbone):
    """A model of `timm` that returns feature maps and accepts images of any size.

    Images are padded to multiples of the coarsest stride. Weights are loaded by the checkpointer,
    or by `timm` with `pretrained=True`. Of models with branches (HRNet), use all maps, or some
    parameters get no gradient.

    Args:
        name: of the model, see timm.list_models()
        options: of timm.create_model, such as drop_path_rate
        out_features: maps by their stride: "p3" has a stride of 2**3 pixels, and so on
        norm: apply a LayerNorm over channels to each map, as detectors with ConvNeXt and FocalNet
            do

    Raises:
        BackboneError: `timm` is not installed, has no such model or map, or the model needs images
            of a single size
    """

    @configurable
    def __init__(
        self,
        *,
        name: str,
        options: Mapping[str, Any] = MappingProxyType({}),
        out_features: Sequence[str] = ("p3", "p4", "p5"),
        norm: bool = False,
    ):
        super().__init__()
        maps = feature_maps(name, options)
        unknown = [key for key in out_features if key not in maps]
        if unknown:
            known = ", ".join(maps)
            raise BackboneError(f"timm's {name} has no feature map {unknown[0]!r}; it has {known}")
        self._out_features = [key for key in maps if key in out_features]  # finest first
        self._out_feature_channels = {key: maps[key][1].channels for key in maps}
        self._out_feature_strides = {key: maps[key][1].stride for key in maps}
        indices = [maps[key][0] for key in self._out_features]
        self.net = create_model(name, {**options, "out_indices": indices})
        if self.net.pretrained_cfg["fixed_input_size"] and options.get("strict_img_size", True):
            raise BackboneError(
                f"timm's {name} takes images of a single size: give it the option "
                "strict_img_size=False if it is a Swin transformer, or take another model"
            )
        self.channels_last = getattr(self.net, "output_fmt", "NCHW") == "NHWC"
        normed = self._out_features if norm else []
        self.norms = nn.ModuleDict({key: LayerNorm(maps[key][1].channels) for key in normed})

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        return {
            "name": cfg.MODEL.TIMM.NAME,
            "norm": cfg.MODEL.TIMM.NORM,
            "out_features": cfg.MODEL.DINO.IN_FEATURES,
            "options": cfg.MODEL.TIMM.OPTIONS,
        }

    @property
    def size_divisibility(self) -> int:
        return self._out_feature_strides[self._out_features[-1]]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps (B, C, H / stride, W / stride) of images (B, 3, H, W)."""
        maps = self.net(x)
        if self.channels_last:
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        features = dict(zip(self._out_features, maps, strict=True))
        return features | {key: norm(features[key]) for key, norm in self.norms.items()}


def feature_shapes(
    name: str, options: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, ShapeSpec]:
    """Channels and strides of the feature maps of a model of `timm`, for the neck of a LazyConfig.

    Args:
        name, options: as of :class:`TimmBackbone`

    Raises:
        BackboneError: `timm` is not installed or has no such model
    """
    return {key: shape for key, (_, shape) in feature_maps(name, options).items()}


def feature_maps(name: str, options: Mapping[str, Any]) -> dict[str, tuple[int, ShapeSpec]]:
    """Index and shape of each feature map of a model of `timm`, finest first.

    Of several maps with the same stride, the last counts.
    """
    timm = import_timm()
    if not timm.is_model(name):
        raise BackboneError(f"timm has no model {name!r}; {hint(name, timm.list_models())}")
    with torch.device("meta"):
        model = create_model(name, {**options, "pretrained": False})
    return {
        f"p{round(log2(x['reduction']))}": (i, ShapeSpec(x["num_chs"], stride=x["reduction"]))
        for i, x in enumerate(model.feature_info.info)
    }


def create_model(name: str, options: Mapping[str, Any]) -> Any:
    """A model of `timm` that gives feature maps; converts a LazyConfig's lists for it."""
    plain = {
        key: OmegaConf.to_container(x) if OmegaConf.is_config(x) else x
        for key, x in options.items()
    }
    return import_timm().create_model(name, features_only=True, **plain)


def import_timm() -> ModuleType:
    """Import `timm`; raise a BackboneError if it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise BackboneError("this backbone needs timm: pip install timm") from error
    return timm
