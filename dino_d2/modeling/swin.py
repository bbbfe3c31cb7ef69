"""Swin transformer as a backbone."""

from typing import Any

from detectron2.modeling import SwinTransformer as Detectron2Swin
from detectron2.modeling.backbone import swin
from torch import Tensor
from torchvision.ops import StochasticDepth


def window_reverse(windows: Tensor, side: int, height: int, width: int) -> Tensor:
    """Puts windows together again.

    Args:
        windows: (B * n, side, side, C), the n windows of an image row by row
        side, height, width: in tokens, height and width are multiples of side

    Returns:
        (B, height, width, C)
    """
    channels = windows.shape[-1]
    rows = windows.view(-1, width // side, side, side, channels).transpose(1, 2)
    return rows.reshape(-1, height, width, channels)


# Detectron2's own makes a Python number of B, which then is the same in an exported graph for ever.
swin.window_reverse = window_reverse


class SwinTransformer(Detectron2Swin):
    """Detectron2's, with three obstacles taken out of the way: stochastic depth is torchvision's,
    not that of `timm`; its `size_divisibility` raises AttributeError, while images of any size
    are fine, as windows are padded inside; and exported graphs are for any number of images.

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
