"""`benchmark_model.py --runtime`: one model in PyTorch, ONNX Runtime and OpenVINO, on a CPU."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from benchmarking import PeakMemory, cell, in_new_process, interleave, is_installed, markdown, timer

from dino_d2 import DINO
from dino_d2.costs import count_flops
from dino_d2.export import About, Exported, export, save
from dino_d2.export.quantize import quantize
from dino_d2.modeling.fold_norms import fold_norms
from dino_d2.names import hint

CPU = torch.device("cpu")
FLOAT, INT8 = "float.onnx", "int8.onnx"
SIDE = 4096  # of the matrices whose product shows what the CPU can do


class Runtime(NamedTuple):
    """What runs the model: PyTorch by itself, or a package that runs an exported file."""

    package: str  # "": PyTorch
    file: str = ""
    dtype: torch.dtype = torch.float32  # of autocast, or that OpenVINO computes in
    compiled: bool = False


RUNTIMES = {
    "eager": Runtime(""),
    "eager-bf16": Runtime("", dtype=torch.bfloat16),
    "compiled": Runtime("", compiled=True),
    "compiled-bf16": Runtime("", dtype=torch.bfloat16, compiled=True),
    "onnxruntime": Runtime("onnxruntime", FLOAT),
    "onnxruntime-int8": Runtime("onnxruntime", INT8),
    "openvino": Runtime("openvino", FLOAT),
    "openvino-bf16": Runtime("openvino", FLOAT, torch.bfloat16),
    "openvino-int8": Runtime("openvino", INT8),
}


def installed() -> list[str]:
    """The names of runtimes whose packages are there."""
    return [name for name, x in RUNTIMES.items() if not x.package or is_installed(x.package)]


def check(name: str) -> None:
    """Raise a ValueError if a runtime is not known, or its package is not installed."""
    if name not in RUNTIMES:
        raise ValueError(f"--runtime is {name!r}; {hint(name, list(RUNTIMES))}")
    if name not in installed():
        package = RUNTIMES[name].package
        raise ValueError(f"--runtime {name} needs the package {package}: pip install {package}")


def write_files(model: DINO, size: tuple[int, int], folder: Path) -> None:
    """Export a model in float32 and, calibrated on random images, in INT8."""
    about = About([str(i) for i in range(100)], size, "RGB", 1)
    save(export(model, size, 1), folder / FLOAT, about)
    quantize(folder / FLOAT, folder / INT8, [inputs_of(size)])


def inputs_of(size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """One random image of this height and width, and its size."""
    torch.manual_seed(0)
    return torch.randint(256, (1, 3, *size), dtype=torch.uint8), torch.tensor([size])


def detector(
    name: str, build: Callable[[], DINO], size: tuple[int, int], folder: Path
) -> Callable[[], object]:
    """A function that detects in one image in the way of this name."""
    runtime, (images, sizes) = RUNTIMES[name], inputs_of(size)
    if runtime.package:
        return partial(
            Exported(folder / runtime.file, runtime.package, runtime.dtype), images, sizes
        )
    model = fold_norms(build().eval())
    if runtime.compiled:
        torch._inductor.config.freezing = True  # weights are constants, in the layout of kernels
        compiled(model)

    def detect() -> object:
        narrow = runtime.dtype != torch.float32
        with torch.no_grad(), torch.autocast("cpu", runtime.dtype, enabled=narrow):
            return model([{"image": images[0]}])

    return detect


def compiled(model: DINO) -> DINO:
    """Compile each stage by itself, as the code between them depends on the images."""
    for name in ("backbone", "neck", "encoder", "query_selection", "decoder"):
        setattr(model, name, torch.compile(getattr(model, name)))
    return model


def memory_of(
    threads: int, name: str, build: Callable[[], DINO], size: tuple[int, int], folder: Path
) -> float | None:
    """MiB that the first detection takes at most on top of the loaded model."""
    torch.set_num_threads(threads)
    detect = detector(name, build, size, folder)
    if RUNTIMES[name].compiled:  # the compiler itself takes more
        detect()
    memory = PeakMemory(CPU)
    detect()
    return memory.read()


def seconds_by_products(multiply_adds: float, dtype: torch.dtype) -> float:
    """The time of as many multiply-adds in large matrix products: no model takes less."""
    a, b = torch.randn(2, SIDE, SIDE).to(dtype)
    product = timer(lambda: a @ b, CPU)
    product()  # warms up
    seconds = min(product() for _ in range(10)) / 1e3  # a limit: other load only adds
    return multiply_adds / SIDE**3 * seconds


def compare(
    names: Sequence[str],
    build: Callable[[], DINO],
    size: tuple[int, int],
    folder: Path,
    repeats: int,
) -> tuple[str, list[dict]]:
    """A table of time, memory and size of files; and its rows.

    Args:
        names: of `RUNTIMES`
        build: makes the model, and can go to another process
        size: height and width of the image
        folder: for exported files
        repeats: rounds, in which all take turns
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = fold_norms(build().eval())
    multiply_adds = sum(count_flops(model, *size).stages.values())
    if any(RUNTIMES[name].file for name in names):
        write_files(model, size, folder)
    calls = {name: timer(detector(name, build, size, folder), CPU) for name in names}
    taken = {name: median(times) for name, times in interleave(calls, repeats).items()}
    del calls
    limits = {x: seconds_by_products(multiply_adds, x) for x in (torch.float32, torch.bfloat16)}
    threads = torch.get_num_threads()
    rows = [
        {
            "runtime": name,
            "total_ms": taken[name],
            "ratio": taken[names[0]] / taken[name],
            "limit_ms": None if "int8" in name else 1e3 * limits[RUNTIMES[name].dtype],
            "memory_mib": in_new_process(memory_of, threads, name, build, size, folder),
            "file_mib": file_size(folder / RUNTIMES[name].file) if RUNTIMES[name].file else None,
        }
        for name in names
    ]
    columns = ["runtime", "ms", f"speed-up over {names[0]}", "lower bound, ms"]
    columns += ["memory, MiB", "file, MiB"]
    cells = [
        (x["runtime"], x["total_ms"], f"{x['ratio']:.2f} x", *map(cell, list(x.values())[3:]))
        for x in rows
    ]
    return markdown(columns, cells), rows


def file_size(path: Path) -> float:
    """MiB of a file."""
    return path.stat().st_size / 2**20
