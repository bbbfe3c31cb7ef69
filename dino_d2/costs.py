"""Costs of a DINO by stage, without training it: operations and memory of activations."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .modeling.dino import DINO
from .structures import Target

STAGES = "backbone", "neck", "encoder", "query_selection", "denoising", "decoder"


class Flops(NamedTuple):
    """Multiply-adds of detection in one image, as `fvcore` counts them."""

    stages: Counter[str]
    operators: Counter[str]
    uncounted: Counter[str]  # calls of operators without a count: elementwise arithmetic


class Detection(nn.Module):
    """`DINO.detect` as a module, without postprocessing.

    Returns the predictions of all layers, as tracing removes unused computations.
    """

    def __init__(self, model: DINO):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[Tensor]:
        output = self.model.detect(images, no_padding(images))
        return [x for predictions in output.result.layers for x in predictions]


def no_padding(images: Tensor) -> Tensor:
    """(B, H, W), False everywhere."""
    return torch.zeros_like(images[:, 0], dtype=torch.bool)


def count_flops(model: DINO, height: int, width: int) -> Flops:
    """Count operations by running a model, in evaluation mode, on height x width pixels.

    Counts what `fvcore` supports (matrix products, convolutions and norms) and both kinds of
    attention, but no elementwise arithmetic.
    """
    image = torch.zeros(1, len(model.pixel_mean), height, width, device=model.device)
    analysis = FlopCountAnalysis(Detection(model), image)
    analysis.set_op_handle("dino_d2::ms_deform_attn", ms_deform_attn_flops)
    analysis.set_op_handle("aten::scaled_dot_product_attention", attention_flops)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    with torch.no_grad():
        of_modules = analysis.by_module()
    return Flops(
        Counter({name: of_modules[f"model.{name}"] for name in stages_of(model)}),
        analysis.by_operator(),
        analysis.unsupported_ops(),
    )


def ms_deform_attn_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Per channel of a sample (B, Q, H, L, P): 4 for bilinear interpolation, 1 for its weight."""
    channels, samples = get_shape(inputs[0])[-1], prod(get_shape(inputs[3]))
    return 5 * channels * samples


def attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Two matrix products of queries (B, H, Q, D), keys (B, H, K, D) and values."""
    query, key, value = (get_shape(x) for x in inputs[:3])
    return prod(query[:-1]) * key[-2] * (key[-1] + value[-1])


def kept_activations(model: DINO, height: int, width: int, boxes: int) -> Counter[str]:
    """Bytes by stage that a training step keeps from the forward for the backward pass.

    Measured on one image of height x width pixels with a number of ground-truth boxes, and on a
    copy of the model in float32, without parameters and without the criterion, whose share is
    small. What two stages share counts for the first; what belongs to none is "rest". With
    activation checkpointing, inputs count in place of activations.
    """
    model = copy.deepcopy(model).train()
    pixels = torch.rand(1, len(model.pixel_mean), height, width, device=model.device)
    labels = torch.zeros(boxes, dtype=torch.long, device=model.device)
    targets = [Target(labels, torch.full((boxes, 4), 0.5, device=model.device))]
    kept: Counter[str] = Counter()
    with watched(model, lambda stage, size: kept.update({stage: size})):
        model.detect(pixels, no_padding(pixels), targets)
    return kept


@contextmanager
def watched(model: DINO, report: Callable[[str, int], None]) -> Iterator[None]:
    """Call `report` with the stage and the bytes of every new storage that autograd keeps."""
    stage = "rest"
    storages = [x.untyped_storage() for x in (*model.parameters(), *model.buffers())]
    known = {storage._cdata: storage for storage in storages}

    def enter(name: str) -> None:
        nonlocal stage
        stage = name

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in known:  # an address is not reused while its storage is held
            known[storage._cdata] = storage
            report(stage, storage.nbytes())
        return x.detach()  # its graph would be a reference cycle

    def keep_inputs(module: nn.Module, inputs: tuple) -> None:
        for x in tree_leaves(inputs):
            if isinstance(x, Tensor):
                keep(x)

    handles = [x.register_forward_pre_hook(keep_inputs) for x in recomputed(model)]
    for name in stages_of(model):
        module = getattr(model, name)
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
        handles.append(module.register_forward_hook(lambda *_: enter("rest")))
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            yield
    finally:
        for handle in handles:
            handle.remove()


def recomputed(model: DINO) -> list[nn.Module]:
    """The modules under activation checkpointing."""
    backbone = [model.backbone] if model.recompute_backbone else []
    stages = [x for x in (model.encoder, model.decoder) if x.recompute]
    return [*backbone, *(layer for stage in stages for layer in stage.layers)]


def stages_of(model: DINO) -> list[str]:
    """Names of the stages that the model has, in the order of the data flow."""
    return [name for name in STAGES if getattr(model, name) is not None]
