"""The interface of detectors for training, checkpoints and the model zoo."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn

from ..layouts import adapt
from ..layouts.renaming import State

Batch = list[dict[str, Any]]  # Detectron2's, one of an image


class Detector(nn.Module):
    """A meta-architecture of this package: `DINO`, or another one that derives from this.

    Besides Detectron2's interface (a list of dicts in; losses in training, dicts with "instances"
    otherwise), subclasses may override the methods here.

    Args:
        backbone: follows Detectron2's backbone interface
        num_classes: K
        pixel_mean, pixel_std: per channel, in the order and range of the input images
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def loss_divisor(self, batch: Batch) -> int:
        """The divisor of a batch's losses before it is averaged over workers: its number of boxes.

        It is also the weight of a batch in gradient accumulation.
        """
        return sum(len(x["instances"]) for x in batch)

    def settings(self) -> dict[str, Any]:
        """Settings that the weights depend on but that no tensor shape shows; saved with the
        weights, and compared when they are loaded."""
        found: dict[str, Any] = {
            "pixel_mean": [round(x, 3) for x in self.pixel_mean.flatten().tolist()],
            "pixel_std": [round(x, 3) for x in self.pixel_std.flatten().tolist()],
        }
        block = next(iter(getattr(self.backbone, "res3", [])), None)
        if isinstance(block, BottleneckBlock):
            found["stride_in_1x1"] = block.conv1.stride != (1, 1)
        return found

    @staticmethod
    def count_classes(state: State) -> int | None:
        """The number of classes of a state dict; None if it is not of such a detector."""
        return adapt.count_classes(state)
