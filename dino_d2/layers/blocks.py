"""Small building blocks shared by the stages."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class MLP(nn.Module):
    """Linear layers from (..., dims[0]) to (..., dims[-1]), with ReLU, or another activation,
    and dropout in between."""

    def __init__(
        self,
        *dims: int,
        dropout: float = 0.0,
        activation: Callable[[], nn.Module] | None = None,
    ):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(dims))
        # in place, as its backward pass does not need its input
        self.activation = activation() if activation else nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        # Of more than two dimensions layers give views: in place, their gradients would be copied.
        rows = x.reshape(-1, x.shape[-1])
        for layer in hidden:
            rows = self.dropout(self.activation(layer(rows)))
        rows = last(rows)
        return rows.view(x.shape[:-1] + rows.shape[1:])


def class_head(embed_dim: int, num_classes: int, prior: float = 0.01) -> nn.Module:
    """Linear layer for class logits; every class starts at probability `prior` (RetinaNet, 4.1)."""
    head = nn.Linear(embed_dim, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - prior) / prior))
    return head


class SoftmaxHead(nn.Linear):
    """Linear layer for logits of K classes and, last, of no object (DETR, section 3.1)."""

    def __init__(self, embed_dim: int, num_classes: int):
        super().__init__(embed_dim, num_classes)
        self.no_object = nn.Linear(embed_dim, 1)  # apart, so that classes can be added and left out

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), self.no_object(x)], -1)


def absolute_box_head(embed_dim: int) -> MLP:
    """MLP for boxes before the sigmoid (DETR, section 3.2)."""
    return MLP(embed_dim, embed_dim, embed_dim, 4)


def box_head(embed_dim: int) -> MLP:
    """MLP for changes of a reference box; initialised to no change."""
    head = absolute_box_head(embed_dim)
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
