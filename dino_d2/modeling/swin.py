"""Swin transformer as a backbone."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling import SwinTransformer as Detectron2Swin
from detectron2.modeling.backbone import swin
from torch import Tensor
from torchvision.ops import StochasticDepth


def window_reverse(windows: Tensor, side: int, height: int, width: int) -> Tensor:
    """Merge windows (B * n, side, side, C), row by row, to (B, height, width, C).

    Height and width are multiples of side, in tokens.
    """
    channels = windows.shape[-1]
    rows = windows.view(-1, width // side, side, side, channels).transpose(1, 2)
    return rows.reshape(-1, height, width, channels)


# Detectron2's own calls int() on the batch size, which export freezes.
swin.window_reverse = window_reverse


@BACKBONE_REGISTRY.register()
class SwinTransformer(Detectron2Swin):
    """Detectron2's, also for YAML (MODEL.SWIN), with three fixes.

    Stochastic depth does not need `timm`; images may have any size, as windows are padded inside
    (in Detectron2, `size_divisibility` raises an AttributeError); and exported graphs accept any
    number of images.

    Args:
        drop_path_rate: probability of dropping the last block; rises linearly from 0
        options: of Detectron2's SwinTransformer
    """

    size_divisibility = 0

    @configurable
    def __init__(self, *, drop_path_rate: float = 0.2, **options: Any):
        super().__init__(drop_path_rate=0.0, **options)
        blocks = [block for layer in self.layers for block in layer.blocks]
        for i, block in enumerate(blocks):
            block.drop_path = StochasticDepth(drop_path_rate * i / max(len(blocks) - 1, 1), "row")

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        of_masks = [cfg.MODEL.DINO.MASK.FEATURE] if cfg.MODEL.MASK_ON else []
        stages = {f"p{i}": i for i in range(len(cfg.MODEL.SWIN.DEPTHS))}
        used = {*cfg.MODEL.DINO.IN_FEATURES, *of_masks}
        if unknown := sorted(used - stages.keys()):
            raise ValueError(
                f"a SwinTransformer has no feature map {unknown[0]!r}: name those of "
                f"MODEL.DINO.IN_FEATURES and MODEL.DINO.MASK.FEATURE of {', '.join(stages)}"
            )
        return {
            "out_indices": sorted(stages[x] for x in used),
            "in_chans": input_shape.channels,
            **{key.lower(): x for key, x in cfg.MODEL.SWIN.items()},
        }
