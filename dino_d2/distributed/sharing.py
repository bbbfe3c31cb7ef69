"""How many workers share a model.

    replicated (DDP)   every worker has the whole model; gradients are averaged over workers
    sharded (FSDP2)    every worker has a part of each parameter, of its gradient and of the
                       optimizer's state; parts are put together where they are needed

`gather` and `scatter` go between parts and whole tensors, so a checkpoint does not depend on how it
was trained. With one worker everything here leaves the model as it is.
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
    """Share a model among the workers of the process group; alone it stays as it is.

    Sharding replaces the parameters: an optimizer has to be made afterwards.

    Args:
        model: the same on every worker, on the worker's device
        fsdp: shard it instead of replicating it
        ddp: options of DistributedDataParallel, and `fp16_compression`: whether gradients travel as
            float16

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
    device = next(model.parameters()).device
    device_ids = None if device.type == "cpu" else [device]
    replica = DistributedDataParallel(model, device_ids=device_ids, **options)
    replica.broadcast_buffers = broadcast_buffers  # newer constructors warn of it
    if fp16_compression:
        replica.register_comm_hook(None, fp16_compress_hook)
    return replica


def shard(model: nn.Module) -> nn.Module:
    # Layers that pass something on as it came make FSDP warn of views; nothing here changes those.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    # FSDP2 takes parameters of no other layout, but convolutions are channels last.
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    mesh = init_device_mesh(next(model.parameters()).device.type, (distributed.get_world_size(),))
    for unit in shard_units(model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    # What is left is needed from the first to the last.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def shard_units(model: nn.Module) -> Iterator[nn.Module]:
    """What is put together by itself: stages of the backbone, layers of other stages."""
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
    """Forward and backward passes in here add up gradients without averaging them over workers: for
    all but the last of the passes that make a step."""
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
def whole(model: nn.Module) -> Iterator[None]:
    """Every worker has all of a sharded model, so that each can run as many forward passes as it
    has images. Entering is collective; training in here is not possible."""
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
    """Every worker gets the buffers of the first, which are those that a checkpoint has.

    Each has running statistics of its own images, and would evaluate with these. Collective.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


def gather(state: Any) -> Any:
    """A state (nested dicts and lists) with whole tensors on the CPU where it has sharded ones.

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
    """The reverse of `gather`: sharded as the tensors of `like` are, whose nesting is the same;
    what `like` does not have stays as it is. Not collective: every worker has the whole state."""
    if isinstance(like, DTensor):
        mesh, placements = like.device_mesh, like.placements
        return distribute_tensor(state.to(like.device), mesh, placements, src_data_rank=None)
    if isinstance(like, dict):
        return {key: scatter(x, like.get(key)) for key, x in state.items()}
    if isinstance(like, list):
        return [scatter(x, y) for x, y in zip(state, like, strict=True)]
    return state


def local_shard(x: Tensor) -> Tensor:
    """This worker's part of a sharded tensor, sharing its memory; another tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load what `gather` made of the state of an optimizer of the same parameters, sharded or not.

    Raises:
        ValueError: the parameters or their groups are others
    """
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    indices = chain.from_iterable(group["params"] for group in state["param_groups"])
    # Moments have the shape of their parameter, the number of steps has not.
    like = {
        index: {name: parameter for name, x in values.items() if x.shape == parameter.shape}
        # Not strict: the optimizer compares their numbers.
        for index, parameter in zip(indices, parameters, strict=False)
        if (values := state["state"].get(index))
    }
    optimizer.load_state_dict(scatter(state, {"state": like}))


def mean_over_workers(x: Tensor) -> Tensor:
    """The mean of what the workers have; collective."""
    if comm.get_world_size() == 1:
        return x
    x = x.clone()
    distributed.all_reduce(x)
    return x / comm.get_world_size()
