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


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    backbone_multiplier: float = 0.1,
    offsets_multiplier: float = 1.0,
) -> list:
    """The parameters that are not frozen, in groups by what they are: the rest, the backbone and,
    where it has a rate of its own, what says where to look.

    Weight decay is the same for all, as in official DINO.

    Args:
        model: whose backbone is called `backbone`
        lr: of what has no multiplier
        backbone_multiplier: of the backbone
        offsets_multiplier: of the linear layers that say where to look, `sampling_offsets` and
            `reference_points`; Deformable DETR has 0.1, DINO 1
    """
    others, backbone, offsets = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        says_where = "sampling_offsets" in name or "reference_points" in name
        if name.startswith("backbone."):
            backbone.append(parameter)
        elif says_where and offsets_multiplier != 1:
            offsets.append(parameter)
        else:
            others.append(parameter)
    rates = (others, 1.0), (backbone, backbone_multiplier), (offsets, offsets_multiplier)
    return [{"params": params, "lr": lr * rate} for params, rate in rates if params]
