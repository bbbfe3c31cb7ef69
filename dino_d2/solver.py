"""The optimizer of DETR-like detectors."""

from collections.abc import Callable, Iterable

import torch
from torch import nn


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that first clips the gradient norm over all parameters together.

    Detectron2's own `CLIP_TYPE: norm` clips each parameter by itself, which is not the same.

    Args:
        params: as of any optimizer
        max_norm: the norm gradients are clipped to; 0 leaves them as they are
        options: of AdamW
    """

    def __init__(self, params: Iterable, *, max_norm: float = 0.1, **options):
        super().__init__(params, fused=True, **options)
        self.defaults["max_norm"] = max_norm  # where copies and pickles find it
        # A gradient scaler then unscales before this optimizer clips, and not inside its kernel.
        self._step_supports_amp_scaling = False

    def step(self, closure: Callable | None = None) -> torch.Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.defaults["max_norm"]:
            parameters = [p for group in self.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.defaults["max_norm"])
        super().step()
        return loss


def parameter_groups(model: nn.Module, *, lr: float, backbone_multiplier: float = 0.1) -> list:
    """Two groups: the backbone, at `lr` times `backbone_multiplier`, and everything else.

    Frozen parameters are left out. Weight decay is the same for all, as in official DINO.
    """
    backbone, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (backbone if name.startswith("backbone.") else others).append(parameter)
    groups = [{"params": others, "lr": lr}, {"params": backbone, "lr": lr * backbone_multiplier}]
    return [group for group in groups if group["params"]]
