"""Shared parts of the benchmarks: the published form of the operator, clocks, tables, plots."""

import ctypes
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from functools import lru_cache
from pathlib import Path
from statistics import linear_regression

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor
from torch.nn import functional as F

from dino_d2.names import check_device
from dino_d2.ops import backends
from dino_d2.ops.reference import resolve

MIB = 2**20
ORIGINAL = "torch_ms_deform_attn"
STATUS = Path("/proc/self/status")
REPLAYS = 20  # replays of a CUDA graph between two events
Shapes = Sequence[tuple[int, int]]


def published_form(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Deformable attention as Deformable DETR and DINO compute it without their CUDA kernels.

    All samples by grid_sample, then one weighted sum, differentiated by autograd. Arguments and
    result as of `dino_d2.ops.ms_deform_attn`.
    """
    batch, _, heads, channels = value.shape
    images = value.split([height * width for height, width in shapes], 1)
    samples = [
        F.grid_sample(
            image.permute(0, 2, 3, 1).reshape(batch * heads, channels, *shape),
            grid.transpose(1, 2).flatten(0, 1),
            align_corners=False,
        )
        for image, grid, shape in zip(images, (2 * locations - 1).unbind(3), shapes, strict=True)
    ]  # (B * H, D, Q, P) of each level
    weights = weights.transpose(1, 2).flatten(0, 1).flatten(-2)[:, None]
    out = (torch.stack(samples, -2).flatten(-2) * weights).sum(-1)
    return out.view(batch, heads * channels, -1).transpose(1, 2).contiguous()


def published_form_from_offsets(
    value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """The same from offsets and logits, as `dino_d2.ops.ms_deform_attn_from_offsets`.

    In float32 under autocast, as in the published models.
    """
    sides = [side for shape in shapes for side in shape]
    locations, weights = resolve(sides, offsets.float(), logits.float(), reference)
    return published_form(value.float(), shapes, locations, weights).to(value.dtype)


def has_original(device: torch.device) -> bool:
    """Whether the CUDA kernel of Deformable DETR can take part: a package of it is installed."""
    return device.type == "cuda" and is_installed(ORIGINAL)


def original_form(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Deformable attention by the kernels of :data:`ORIGINAL`, which are those of Deformable DETR.

    In float32, to which published models cast under autocast. Arguments and result as of
    `published_form`.
    """
    from torch_ms_deform_attn import ms_deform_attn

    sizes, starts = sizes_and_starts(tuple(shapes), value.device)
    return ms_deform_attn(value.float(), sizes, starts, locations, weights).to(value.dtype)


def original_form_from_offsets(
    value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """The same from offsets and logits."""
    sides = [side for shape in shapes for side in shape]
    locations, weights = resolve(sides, offsets.float(), logits.float(), reference)
    return original_form(value, shapes, locations, weights)


@lru_cache
def sizes_and_starts(shapes: Shapes, device: torch.device) -> tuple[Tensor, Tensor]:
    """(height, width) of levels, and their first tokens; a copy to a GPU would wait."""
    sizes = torch.tensor(shapes, device=device)
    return sizes, sizes.prod(1).cumsum(0) - sizes.prod(1)


def find_device(name: str) -> torch.device:
    """A device by name; "" is the GPU if there is one, else the CPU.

    Raises:
        ValueError: it does not exist, or cannot be measured
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(name)
    device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"the device is {name!r}, but only cpu and cuda can be measured")
    return device


def machine(device: torch.device) -> dict[str, str]:
    """A description of the hardware and versions of a measurement."""
    kernels = next(x.kernels for x in backends() if x.device == device.type)
    gpu = {"GPU": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        "CPU": cpu_name(),
        "cores": str(os.cpu_count()),
        **gpu,
        "threads": str(torch.get_num_threads()),
        "PyTorch": torch.__version__,
        "kernels": kernels,
        "date": date.today().isoformat(),
    }


def cpu_name() -> str:
    """The name of the CPU by Linux, or else by Python."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def interleave(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list]:
    """Call each side `repeats` times, in turns, and return its results.

    So other load on the machine affects all sides alike. A first round warms up and is not counted.
    """
    rounds = [{name: side() for name, side in sides.items()} for _ in range(repeats + 1)]
    return {name: [results[name] for results in rounds[1:]] for name in sides}


def timer(call: Callable, device: torch.device) -> Callable[[], float]:
    """A function that calls `function` and returns the milliseconds that it took.

    On a GPU it replays the kernels alone, without Python in between.
    """

    def on_cpu() -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    if device.type == "cpu":
        return on_cpu
    graph = capture(call)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def on_gpu() -> float:
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / REPLAYS

    return on_gpu


def capture(call: Callable) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and tunes before the capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


class Stopwatch:
    """Splits time into laps without waiting for a GPU: there it leaves events between the work."""

    def __init__(self, device: torch.device):
        self.is_cuda = device.type == "cuda"
        self.laps: list[tuple[str, object]] = []

    def lap(self, name: str) -> None:
        """`name` is what the time since the last lap went to; that of the first is not used."""
        if self.is_cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.laps.append((name, mark))

    def read(self) -> dict[str, float]:
        """Milliseconds by name, summed over the laps of a name; forgets them."""
        if self.is_cuda:
            torch.cuda.synchronize()
        spent: dict[str, float] = {}
        for (_, start), (name, end) in zip(self.laps, self.laps[1:], strict=False):
            lasted = start.elapsed_time(end) if self.is_cuda else 1e3 * (end - start)
            spent[name] = spent.get(name, 0.0) + lasted
        self.laps.clear()
        return spent


def markdown(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A table; floats with three digits, None as a dash."""
    lines = [columns, ["---"] * len(columns), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def save(output: Path, page: str, results: Mapping[str, object]) -> None:
    """Print a page, and write it as table.md to a folder, with results.json."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text(page + "\n")
    (output / "results.json").write_text(json.dumps(results, indent=1))
    print(page)


def headline(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in facts.items())


class PeakMemory:
    """The peak growth of memory in MiB since this was created.

    On the CPU that of the process, on Linux only, else None. `resource.getrusage` would not do: its
    peak includes that of the parent process.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device) / MIB
        elif STATUS.exists():
            ctypes.CDLL(None).malloc_trim(0)  # freed memory would be reused
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            self.before = resident("VmRSS")

    def read(self) -> float | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / MIB - self.before
        return resident("VmHWM") - self.before if STATUS.exists() else None


def resident(key: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most so far."""
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) / 1024


def in_new_process(function: Callable, *arguments: object) -> object:
    """The result of a function in a new process that has only imported dino_d2.

    Raises:
        SystemExit: the process died
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["dino_d2"]
    )  # import once for all processes, as it takes seconds
    try:
        # multiprocessing.Pool would wait forever for a process that died
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise SystemExit(
            f"error: the process of {function.__name__}{arguments} died; the usual reason is that "
            "memory is not enough: choose smaller images or fewer objects"
        ) from None


def draw_growth(
    points: Sequence[Mapping], label: str, expected: Sequence[int], title: str, path: Path
) -> None:
    """Plot time and memory of points with "mode", "value", "total_ms" and "memory_mib".

    Both axes are logarithmic. Dashed lines grow from the first value with the `expected` powers.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(title, fontsize=9)
    panels = ("total_ms", "time of a step, ms"), ("memory_mib", "memory of a step, MiB")
    for axes, exponent, (key, unit) in zip(figure.subplots(1, 2), expected, panels, strict=True):
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel=unit)
        for mode in dict.fromkeys(point["mode"] for point in points):
            pairs = [(p["value"], p[key]) for p in points if p["mode"] == mode and p[key]]
            draw_curve(axes, mode, pairs, exponent)
        measured = [point[key] for point in points if point[key]] or [1]
        axes.set_ylim(min(measured) / 2, 2 * max(measured))
        values = sorted({point["value"] for point in points})
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    figure.savefig(path, dpi=110)


def draw_curve(axes: Axes, name: str, pairs: Sequence[tuple[float, float]], exponent: int) -> None:
    """A line through (value, measured) pairs, and one that grows with an exponent."""
    x = [value for value, _ in pairs]
    label = f"{name}, power {power(pairs):.2f} at the end" if len(pairs) > 1 else name
    (line,) = axes.plot(*zip(*pairs, strict=True), "o-", label=label)
    start = pairs[0][1]
    grown = [start * (value / x[0]) ** exponent for value in x]
    axes.plot(x, grown, "--", color=line.get_color(), alpha=0.5, label=f"power {exponent}")


def power(pairs: Sequence[tuple[float, float]]) -> float:
    """The p of y = c x^p through the last three points, where constant costs matter least."""
    x, y = zip(*pairs[-3:], strict=True)
    return linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope
