"""Small building blocks shared by the stages."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class MLP(nn.Module):
    """Linear layers from (..., dims[0]) to (..., dims[-1]), with ReLU and dropout in between."""

    def __init__(self, *dims: int, dropout: float = 0.0):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(dims))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = self.dropout(layer(x).relu_())  # in place: backward does not need its input
        return last(x)


def class_head(embed_dim: int, num_classes: int, prior: float = 0.01) -> nn.Module:
    """Linear layer for class logits; every class starts at probability `prior` (RetinaNet, 4.1)."""
    head = nn.Linear(embed_dim, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - prior) / prior))
    return head


def box_head(embed_dim: int) -> nn.Module:
    """MLP for changes of a reference box; starts at no change."""
    head = MLP(embed_dim, embed_dim, embed_dim, 4)
    for parameter in head.layers[-1].parameters():
        nn.init.zeros_(parameter)
    return head


def recompute(module: Callable[..., Any], *args: Any) -> Any:
    """Call with activation checkpointing: recompute activations in the backward pass."""
    return checkpoint(module, *args, use_reentrant=False)


def xavier_uniform_(module: nn.Module) -> None:
    """Initialise every matrix of `module` as DETR initialises its transformer."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
