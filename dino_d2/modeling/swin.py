"""Swin transformer as a backbone."""

from typing import Any

from detectron2.modeling import SwinTransformer as Detectron2Swin
from torchvision.ops import StochasticDepth


class SwinTransformer(Detectron2Swin):
    """Detectron2's, with two obstacles taken out of the way: stochastic depth is torchvision's, not
    that of `timm`; and its `size_divisibility` raises AttributeError, while images of any size
    are fine, as windows are padded inside.

    Args:
        drop_path_rate: probability of leaving the last block out; rises linearly from 0
        options: of Detectron2's SwinTransformer
    """

    size_divisibility = 0

    def __init__(self, *, drop_path_rate: float = 0.2, **options: Any):
        super().__init__(drop_path_rate=0.0, **options)
        blocks = [block for layer in self.layers for block in layer.blocks]
        for i, block in enumerate(blocks):
            block.drop_path = StochasticDepth(drop_path_rate * i / max(len(blocks) - 1, 1), "row")
