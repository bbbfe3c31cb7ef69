"""Shares a model among workers.

    replicated (DDP)   every worker has the whole model; gradients are averaged over workers
    sharded (FSDP2)    every worker has a shard of each parameter, of its gradient and of the
                       optimizer's state; parameters are gathered when they are needed

`gather` and `scatter` convert between shards and whole tensors, so checkpoints do not depend on how
a model was trained. With one worker, nothing here changes the model.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


def distribute(model: nn.Module, *, fsdp: bool = False, **ddp: Any) -> nn.Module:
    """Share a model among the workers of the process group, if there are several.

    Create the optimizer afterwards: sharding replaces the parameters.

    Args:
        model: the same on every worker, on the worker's device
        fsdp: shard it instead of replicating it
        ddp: options of DistributedDataParallel, and `fp16_compression` of gradients

    Returns:
        the model itself, sharded in place, or a DistributedDataParallel of it

    Raises:
        ValueError: an option of DistributedDataParallel is set for a model that is sharded
    """
    if comm.get_world_size() == 1:
        return model
    if not fsdp:
        return replicate(model, **ddp)
    unused = [name for name, value in ddp.items() if value]
    if unused:
        raise ValueError(
            f"{unused[0]} is an option of replicated models (DistributedDataParallel), but the "
            "model is to be sharded (FSDP): switch one of them off"
        )
    return shard(model)


def replicate(
    model: nn.Module,
    *,
    broadcast_buffers: bool = False,
    fp16_compression: bool = False,
    **options: Any,
) -> DistributedDataParallel:
    """Copy the model to every worker; options are those of DistributedDataParallel."""
    device = next(model.parameters()).device
    device_ids = None if device.type == "cpu" else [device]
    replica = DistributedDataParallel(model, device_ids=device_ids, **options)
    replica.broadcast_buffers = broadcast_buffers  # not an argument, as PyTorch deprecates that
    if fp16_compression:
        replica.register_comm_hook(None, fp16_compress_hook)
    return replica


def shard(model: nn.Module) -> nn.Module:
    """Shard the parameters, in place, over all workers."""
    # FSDP warns of layers that return views of their input; nothing here writes to those.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    # FSDP2 needs contiguous parameters, but convolutions are channels last.
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    mesh = init_device_mesh(next(model.parameters()).device.type, (distributed.get_world_size(),))
    for unit in shard_units(model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    # The remaining parameters are needed throughout the forward and backward pass.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def shard_units(model: nn.Module) -> Iterator[nn.Module]:
    """Modules to gather one at a time: stages of the backbone, layers of other stages."""
    for name, stage in model.named_children():
        if name == "backbone":
            for child in stage.children():
                is_container = isinstance(child, (nn.ModuleList, nn.ModuleDict))
                yield from child.children() if is_container else [child]
        else:
            yield from getattr(stage, "layers", [])


def unwrap(model: nn.Module) -> nn.Module:
    """The model without DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def suspend_sync(model: nn.Module) -> Iterator[None]:
    """Gradient accumulation: add up gradients without averaging them over workers.

    For all but the last backward pass of a step.
    """
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gather a sharded model, so that workers can evaluate different numbers of images.

    Collective; training is not possible inside.
    """
    sharded = [x for x in model.modules() if isinstance(x, FSDPModule)]
    inner = [x for x in sharded if x is not model]
    for module in inner:
        module.set_reshard_after_forward(False, recurse=False)
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in inner:
            module.set_reshard_after_forward(True, recurse=False)
        for module in sharded:
            module.reshard()


def share_buffers(model: nn.Module) -> None:
    """Copy the buffers of the first worker, which a checkpoint contains, to all others; collective.

    Otherwise every worker would evaluate with running statistics of its own images.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


def gather(state: Any) -> Any:
    """Replace sharded tensors of a state (nested dicts and lists) by whole ones on the CPU.

    Collective: every worker has to call it, with the same state.
    """
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, dict):
        return {key: gather(x) for key, x in state.items()}
    if isinstance(state, list):
        return [gather(x) for x in state]
    return state


def scatter(state: Any, like: Any) -> Any:
    """The inverse of `gather`: shard a state as `like`, which has the same nesting, is sharded.

    Tensors that `like` does not have stay as they are. Not collective.
    """
    if isinstance(like, DTensor):
        mesh, placements = like.device_mesh, like.placements
        return distribute_tensor(state.to(like.device), mesh, placements, src_data_rank=None)
    if isinstance(like, dict):
        return {key: scatter(x, like.get(key)) for key, x in state.items()}
    if isinstance(like, list):
        return [scatter(x, y) for x, y in zip(state, like, strict=True)]
    return state


def local_shard(x: Tensor) -> Tensor:
    """This worker's shard of a tensor, sharing its memory; an unsharded tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a gathered state into an optimizer; a ValueError if its parameters differ."""
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    indices = chain.from_iterable(group["params"] for group in state["param_groups"])
    # Moments have the shape of their parameter; the step counter does not.
    like = {
        index: {name: parameter for name, x in values.items() if x.shape == parameter.shape}
        # Not strict: the optimizer checks the number of parameters.
        for index, parameter in zip(indices, parameters, strict=False)
        if (values := state["state"].get(index))
    }
    optimizer.load_state_dict(scatter(state, {"state": like}))


def mean_over_workers(x: Tensor) -> Tensor:
    """The mean of a tensor over the workers; collective."""
    if comm.get_world_size() == 1:
        return x
    x = x.clone()
    distributed.all_reduce(x)
    return x / comm.get_world_size()
