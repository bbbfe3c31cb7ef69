"""The CPU kernels in C++ (csrc/), if they were compiled."""

from pathlib import Path

import torch
from torch import Tensor

from .build import FOLDER, LIBRARY, REASON

DTYPES = (torch.float32, torch.bfloat16)  # of value; everything else is float32
# The instruction set; PyTorch's ATEN_CPU_CAPABILITY can lower it.
CAPABILITY = torch.backends.cpu.get_cpu_capability()

Input = Tensor | list[int] | None


def load_library(folder: Path = FOLDER) -> str:
    """Load the library; returns why that is not possible, or ""."""
    library, reason = folder / LIBRARY, folder / REASON
    if not library.exists():
        return reason.read_text() if reason.exists() else "they have not been compiled"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library} cannot be loaded ({error.__cause__ or error})"
    return ""


def forward(*inputs: Input) -> Tensor:
    """As `reference.forward`, for a value in one of `DTYPES` and the others in float32."""
    return torch.ops.dino_d2_cpu.forward(*contiguous(inputs), CAPABILITY)


def backward(*inputs: Input) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.backward`, for the same dtypes; deterministic for a given number of threads."""
    return torch.ops.dino_d2_cpu.backward(*contiguous(inputs), CAPABILITY)


def contiguous(inputs: tuple[Input, ...]) -> list[Input]:
    """The arguments with contiguous tensors, which the library needs."""
    return [x.contiguous() if isinstance(x, Tensor) else x for x in inputs]
