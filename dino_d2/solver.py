"""The optimizer of DETR-like detectors."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from detectron2.solver import get_default_optimizer_params
from torch import nn

from .ranges import require_not_negative


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that first clips the gradient norm over all parameters together.

    Detectron2's own `CLIP_TYPE: norm` clips each parameter by itself, which is not the same.

    Args:
        params: as of any optimizer
        max_norm: the norm gradients are clipped to; 0 leaves them as they are
        options: of AdamW
    """

    def __init__(self, params: Iterable, *, max_norm: float = 0.1, **options):
        require_not_negative(max_norm=max_norm)
        super().__init__(params, fused=True, **options)
        self.defaults["max_norm"] = max_norm  # where copies and pickles find it
        # A gradient scaler then unscales before this optimizer clips, and not inside its kernel.
        self._step_supports_amp_scaling = False

    def step(self, closure: Callable | None = None) -> Any:
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
    weight_decay: float = 1e-4,
    norm_weight_decay: float | None = None,
    bias_weight_decay: float | None = None,
    bias_multiplier: float = 1.0,
    backbone_multiplier: float = 0.1,
    offsets_multiplier: float = 1.0,
) -> list[dict]:
    """The parameters that are not frozen, in groups of the same learning rate and weight decay.

    Args:
        model: whose backbone is called `backbone`
        lr: of what has no multiplier
        weight_decay: of all but normalisation layers
        norm_weight_decay: of the parameters of normalisation layers; None: the same, as in official
            DINO; detrex has 0
        bias_weight_decay: of all biases, those of normalisation layers too; None: as the weights
            beside them
        bias_multiplier: of the learning rate of biases, beside the multipliers below
        backbone_multiplier: of the backbone
        offsets_multiplier: of the linear layers that say where to look, `sampling_offsets` and
            `reference_points`; Deformable DETR has 0.1, DINO 1

    Raises:
        ValueError: a number is negative, or not finite
    """

    require_not_negative(
        lr=lr,
        weight_decay=weight_decay,
        bias_multiplier=bias_multiplier,
        backbone_multiplier=backbone_multiplier,
        offsets_multiplier=offsets_multiplier,
    )
    of_some = {"norm_weight_decay": norm_weight_decay, "bias_weight_decay": bias_weight_decay}
    require_not_negative(**{name: x for name, x in of_some.items() if x is not None})

    def multiplier(name: str) -> float:
        of_bias = bias_multiplier if name.endswith(".bias") else 1.0
        if name.startswith("backbone."):
            return of_bias * backbone_multiplier
        says_where = "sampling_offsets" in name or "reference_points" in name
        return of_bias * (offsets_multiplier if says_where else 1.0)

    return get_default_optimizer_params(
        model,
        base_lr=lr,
        weight_decay=weight_decay,
        weight_decay_norm=norm_weight_decay,
        weight_decay_bias=bias_weight_decay,
        lr_factor_func=multiplier,
    )
