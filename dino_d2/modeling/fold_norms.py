"""Makes a trained model faster for inference."""

from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


def fold_norms(model: nn.Module) -> nn.Module:
    """Merge frozen or evaluated batch norms into the preceding convolutions, in place.

    Detections stay the same up to rounding, but the model can no longer be trained, or saved as a
    checkpoint of its config.
    """
    for conv in model.modules():
        if not isinstance(conv, Conv2d):  # Detectron2's, which owns its norm
            continue
        norm = conv.norm
        fixed = isinstance(norm, nn.BatchNorm2d) and not norm.training
        if fixed or isinstance(norm, FrozenBatchNorm2d):
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight,
                conv.bias,
                norm.running_mean,
                norm.running_var,
                norm.eps,
                norm.weight,
                norm.bias,
            )
            conv.norm = None
    return model
