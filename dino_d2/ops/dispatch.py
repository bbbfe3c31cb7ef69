"""Chooses the kernels for tensors, and says why there are no faster ones."""

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import compiled, embedding_bag, reference

WHY_NOT_COMPILED = compiled.load_library()
WHY_NOT_TRITON = (
    "there is no CUDA device"
    if not torch.cuda.is_available()
    else "Triton is not installed"
    if find_spec("triton") is None
    else ""
)


class Backend(NamedTuple):
    """The kernels in use on a kind of device."""

    device: str
    kernels: str
    why_not_faster: str  # "" if these are the fastest


def backends() -> list[Backend]:
    """The kernels in use on CPUs and GPUs, as `python -m dino_d2.ops` prints them.

    Other devices, and float64, which only tests need, always use plain PyTorch.
    """
    cpu = f"C++ ({compiled.CAPABILITY})" if not WHY_NOT_COMPILED else "embedding_bag, grid_sample"
    cuda = "Triton" if not WHY_NOT_TRITON else "grid_sample"
    return [Backend("cpu", cpu, WHY_NOT_COMPILED), Backend("cuda", cuda, WHY_NOT_TRITON)]


def kernels_for(value: Tensor, points: Tensor) -> ModuleType:
    """The module whose `forward` and `backward` to use for these tensors."""
    device = value.device.type
    if points.dtype != torch.float32:
        return reference
    if device == "cuda":
        if not WHY_NOT_TRITON:
            return import_module(".triton_kernels", __package__)  # Triton is slow to import
        warn_once("CUDA", WHY_NOT_TRITON, "install triton")
    if device == "cpu":
        if not WHY_NOT_COMPILED and value.dtype in compiled.DTYPES:
            return compiled
        if WHY_NOT_COMPILED:
            warn_once("CPU", WHY_NOT_COMPILED, "`python -m dino_d2.ops --build` compiles them")
        return embedding_bag
    return reference


@cache
def warn_once(device: str, reason: str, remedy: str) -> None:
    warnings.warn(
        f"deformable attention runs without its {device} kernels, several times slower, because "
        f"{reason}; {remedy}",
        stacklevel=2,
    )
