"""The optimizer of DETR-like detectors."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from detectron2.solver import get_default_optimizer_params
from torch import nn

from .ranges import require_not_negative


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that first clips the norm of the whole gradient.

    Detectron2's `CLIP_TYPE: norm` clips the gradient of each parameter by itself instead.

    Args:
        params: parameters or groups, as for any optimizer
        max_norm: largest norm of the gradient; 0 disables clipping
        options: of AdamW
    """

    def __init__(self, params: Iterable, *, max_norm: float = 0.1, **options):
        require_not_negative(max_norm=max_norm)
        super().__init__(params, fused=True, **options)
        self.defaults["max_norm"] = max_norm  # survives copying and pickling
        # So that a GradScaler unscales before clipping, not inside the fused kernel.
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
    """Trainable parameters in groups of equal learning rate and weight decay.

    Args:
        model: with its backbone in `backbone`
        lr: base learning rate
        weight_decay: of all parameters but those below
        norm_weight_decay: of normalisation layers; None: `weight_decay`, as in official DINO;
            detrex has 0
        bias_weight_decay: of all biases; None: as the weights of their layer
        bias_multiplier: of the learning rate of biases, on top of the multipliers below
        backbone_multiplier: of the learning rate of the backbone
        offsets_multiplier: of the learning rate of `sampling_offsets` and `reference_points`;
            Deformable DETR has 0.1, DINO 1

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
