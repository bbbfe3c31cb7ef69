"""Exponential moving average of weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..distributed.sharing import local_shard, scatter, unwrap


class EMA:
    """Averaged weights, which usually detect better than the weights of any single step.

    The decay of update n is at most (1 + n) / (10 + n), so that the initial weights are soon
    forgotten. Floating-point buffers, such as running statistics, are averaged, others copied.

    Args:
        model: on its device, wrapped or not
        decay: weight of the old average in an update, in [0, 1)
    """

    def __init__(self, model: nn.Module, decay: float):
        check_decay(decay)
        self.model, self.decay = unwrap(model), decay
        self.reset()

    def reset(self) -> None:
        """Restart from the model's current weights."""
        self.updates = 0
        self.weights = {key: x.detach().clone() for key, x in self.model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        state = self.model.state_dict()
        averaged = [key for key, x in state.items() if x.is_floating_point()]
        torch._foreach_lerp_(  # one kernel for hundreds of tensors
            [local_shard(self.weights[key]) for key in averaged],
            [local_shard(state[key]) for key in averaged],
            1 - keep,
        )
        for key in state.keys() - averaged:
            self.weights[key].copy_(state[key])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the averaged weights in the model."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for key, x in self.model.state_dict().items():
            kept = x.clone()
            x.copy_(self.weights[key])
            self.weights[key].copy_(kept)

    def state_dict(self) -> dict:
        return {"weights": self.weights, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        weights = scatter(state["weights"], self.weights)
        for key, x in self.weights.items():
            x.copy_(weights[key])


def check_decay(decay: float) -> None:
    """Raise a ValueError unless a decay is in [0, 1)."""
    if not 0 <= decay < 1:
        raise ValueError(f"the decay of the averaged weights is {decay}; it has to be in [0, 1)")
