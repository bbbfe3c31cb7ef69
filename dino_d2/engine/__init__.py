"""Training: what is around a model while it learns."""

from .distributed import (
    distribute,
    gather,
    launch,
    load_optimizer,
    mean_over_workers,
    scatter,
    suspend_sync,
    unwrap,
    whole,
    world_size,
)

__all__ = [
    "distribute",
    "gather",
    "launch",
    "load_optimizer",
    "mean_over_workers",
    "scatter",
    "suspend_sync",
    "unwrap",
    "whole",
    "world_size",
]
