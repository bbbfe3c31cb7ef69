#!/usr/bin/env python3
"""Time multi-scale deformable attention, compared with its published form and other packages.

The problem is that of DINO on one image of 800 x 1333 pixels: four levels, 8 heads of 32 channels,
4 points. All implementations are first checked to compute the same; then their runs alternate.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest import mock

from program import make_parser, positive

EPILOG = """
Examples:

All implementations, on the CPU and, if there is one, the GPU:
    $ benchmark_ops.py

Only the CPU, on one thread, for a smaller image:
    $ benchmark_ops.py --device cpu --threads 1 --size 480 640 --output out

Other packages are included if they are installed: torch-ms-deform-attn, on a GPU deformops too.
"""


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EPILOG)
    parser.add_argument("--device", nargs="+", default=[], help="default: all available")
    parser.add_argument("--size", nargs=2, type=positive, default=[800, 1333], metavar=("H", "W"))
    parser.add_argument("--queries", type=positive, default=1100, help="decoder; default: 1100")
    parser.add_argument("--repeats", type=positive, default=5, help="rounds; default: 5")
    parser.add_argument("--threads", type=positive, help="of the CPU; default: PyTorch's")
    parser.add_argument("--output", type=Path, default=Path("output/benchmark_ops"))
    return parser


if __name__ == "__main__":  # so that --help and wrong options do not wait for the imports below
    argument_parser().parse_args()


import torch
from benchmarking import (
    ORIGINAL,
    find_device,
    headline,
    interleave,
    is_installed,
    machine,
    markdown,
    original_form,
    published_form,
    published_form_from_offsets,
    save,
    sizes_and_starts,
    timer,
)
from torch import Tensor

from dino_d2.names import plural
from dino_d2.ops import dispatch, embedding_bag, ms_deform_attn, ms_deform_attn_from_offsets
from dino_d2.ops.reference import resolve

HEADS, CHANNELS, POINTS = 8, 32, 4
STRIDES = 8, 16, 32, 64
HALF = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# Euclidean norm of the difference relative to that of the published form in float32
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class Problem(NamedTuple):
    """The arguments of `ms_deform_attn_from_offsets`."""

    value: Tensor
    shapes: tuple[tuple[int, int], ...]
    reference: Tensor
    offsets: Tensor
    logits: Tensor


class Side(NamedTuple):
    """One way to compute `function(*inputs)`, and its gradients from that of the result."""

    name: str
    function: Callable[..., Tensor]
    inputs: tuple[
        Tensor, Tensor, Tensor
    ]  # value, locations and weights, or value, reference, offsets and logits
    grad: Tensor
    context: Callable[[], AbstractContextManager] = nullcontext

    def forward(self) -> Tensor:
        with torch.no_grad(), self.context():
            return self.function(*self.inputs)

    def forward_backward(self) -> tuple[Tensor, ...]:
        with self.context():
            out = self.function(*self.inputs)
            return out.detach(), *torch.autograd.grad(out, self.inputs, self.grad)


def make_problem(
    shapes: tuple[tuple[int, int], ...], batch: int, num_boxes: int, device: torch.device
) -> Problem:
    """The inputs of an encoder, whose queries look a few pixels around themselves, or of a decoder.

    With a number of boxes it is a decoder, whose boxes look into and around themselves.
    """
    reference = torch.cat([centers(*shape) for shape in shapes])[None, :, None]
    if num_boxes:
        box = torch.rand(1, num_boxes, 1, 2), 0.05 + 0.4 * torch.rand(1, num_boxes, 1, 2)
        reference = torch.cat(box, -1)
    points = batch, reference.shape[1], HEADS, len(shapes), POINTS
    tokens = sum(height * width for height, width in shapes)
    return Problem(
        torch.randn(batch, tokens, HEADS, CHANNELS).to(device),
        shapes,
        reference.expand(batch, -1, len(shapes), -1).contiguous().to(device),
        2 * torch.randn(*points, 2).to(device),
        torch.randn(points).to(device),
    )


def centers(height: int, width: int) -> Tensor:
    """The centres (x, y) in [0, 1] of the pixels of a level: (H_l * W_l, 2)."""
    y, x = (torch.arange(n) + 0.5 for n in (height, width))
    return torch.cartesian_prod(y / height, x / width).flip(-1)


def make_sides(problem: Problem) -> tuple[list[Side], list[Side]]:
    """Sides for locations and weights, and sides that also compute these from offsets and logits.

    The first of either is the published form.
    """
    value, shapes, reference, offsets, logits = problem
    places = resolve([side for shape in shapes for side in shape], offsets, logits, reference)
    grad = torch.randn(*offsets.shape[:2], HEADS * CHANNELS).to(value.device)
    is_cuda = value.device.type == "cuda"

    def from_locations(value, locations, weights):
        return ms_deform_attn(value, shapes, locations, weights)

    def from_offsets(value, offsets, logits):
        return ms_deform_attn_from_offsets(value, shapes, reference, offsets, logits)

    def published(value, locations, weights):
        return published_form(value, shapes, locations, weights)

    def published_from_offsets(value, offsets, logits):
        return published_form_from_offsets(value, shapes, reference, offsets, logits)

    def located(name, function, dtype=torch.float32):
        half = f", {HALF[dtype]}" if dtype in HALF else ""
        return Side(name + half, function, leaves(value.to(dtype), *places), grad.to(dtype))

    def predicted(name, function, dtype=torch.float32, context=nullcontext):
        half = f", {HALF[dtype]}" if dtype in HALF else ""
        tensors = leaves(value.to(dtype), offsets, logits)
        return Side(name + half, function, tensors, grad.to(dtype), context)

    dtypes = [torch.float32, *(HALF if is_cuda else [torch.bfloat16])]
    by_locations = [
        located("published form", published),
        located("dino_d2, from locations", from_locations),
        *(
            located(name, function, dtype)
            for name, function in other_packages(shapes, value.device)
            for dtype in (dtypes if is_cuda else dtypes[:1])
        ),
    ]
    by_offsets = [
        predicted("published form, from offsets", published_from_offsets),
        *(predicted("dino_d2, from offsets", from_offsets, dtype) for dtype in dtypes),
    ]
    if not is_cuda:
        name = "dino_d2, from offsets, without a compiler"
        by_offsets.append(predicted(name, from_offsets, context=without_compiler))
    return by_locations, by_offsets


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() for x in tensors)


def without_compiler() -> AbstractContextManager:
    """The CPU kernels that need no compiler."""
    return mock.patch.object(dispatch, "kernels_for", lambda *_: embedding_bag)


def other_packages(shapes: Sequence, device: torch.device) -> Iterator[tuple[str, Callable]]:
    """Installed packages, by name, as functions of value, locations and weights."""
    sizes, starts = sizes_and_starts(tuple(shapes), device)
    if is_installed(ORIGINAL):

        def original(value, *places):
            return original_form(value, shapes, *places)

        yield f"torch-ms-deform-attn {version(ORIGINAL)}", original
    if device.type == "cuda" and is_installed("deformops"):
        from deformops.registry import msda

        def with_weights_like_value(value, locations, weights):
            return msda(value, sizes, starts, locations, weights.to(value.dtype))

        yield f"deformops {version('deformops')}", with_weights_like_value


def check(sides: list[Side]) -> dict[str, float]:
    """The largest difference of output and gradients of each side, relative to the first side.

    Raises:
        ArithmeticError: a difference is larger than rounding explains
    """
    expected = sides[0].forward_backward()
    found = {}
    for side in sides:
        pairs = zip(side.forward_backward(), expected, strict=True)
        found[side.name] = max(float((x - y).norm() / y.norm()) for x, y in pairs)
        if not found[side.name] <= TOLERANCE[side.inputs[0].dtype]:
            raise ArithmeticError(
                f"{side.name} differs from {sides[0].name} by {found[side.name]:.1e}, which is "
                "more than rounding: report it, or leave that package out"
            )
    return found


def measure(problem: Problem, repeats: int) -> list[dict]:
    """A row for each side: medians, and the speed-up over the published form."""
    groups = make_sides(problem)
    difference = {name: found for group in groups for name, found in check(group).items()}
    sides = [*groups[0], *groups[1][1:]]
    device = problem.value.device
    rows = [{"side": side.name, "difference": difference[side.name]} for side in sides]
    for step in ("forward", "forward_backward"):
        timers = {side.name: timer(getattr(side, step), device) for side in sides}
        times = interleave(timers, repeats)
        baseline = median(times[sides[0].name])
        for row in rows:
            row[f"{step}_ms"] = median(times[row["side"]])
            row[f"{step}_ratio"] = baseline / row[f"{step}_ms"]
            row[f"{step}_samples_ms"] = times[row["side"]]
    return rows


def run(device: torch.device, args: argparse.Namespace) -> tuple[str, list[dict]]:
    """A page about a device."""
    shapes = tuple(tuple(-(-side // stride) for side in args.size) for stride in STRIDES)
    problems = {
        "encoder, batch 1": (1, 0),
        "encoder, batch 2": (2, 0),
        f"decoder, {args.queries:,} queries": (1, args.queries),
    }
    results = []
    for name, (batch, boxes) in problems.items():
        rows = measure(make_problem(shapes, batch, boxes, device), args.repeats)
        results += [{"device": device.type, "problem": name, **row} for row in rows]
    columns = (
        "problem",
        "side",
        "forward, ms",
        "faster",
        "with backward, ms",
        "faster",
        "differs by",
    )
    table = [
        (
            *(row["problem"], row["side"], row["forward_ms"], f"{row['forward_ratio']:.1f} x"),
            *(row["forward_backward_ms"], f"{row['forward_backward_ratio']:.1f} x"),
            f"{row['difference']:.0e}",
        )
        for row in results
    ]
    height, width = args.size
    title = (
        f"Multi-scale deformable attention, an image of {height} x {width} pixels, on "
        f"{device.type}. Medians of {plural(args.repeats, 'round')}; float32 unless stated "
        "otherwise."
    )
    return "\n\n".join([title, headline(machine(device)), markdown(columns, table)]), results


def main(words: Sequence[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(words)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    try:
        there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        devices = [find_device(name) for name in args.device or there]
        pages, results = zip(*(run(device, args) for device in devices), strict=True)
    except (ValueError, ArithmeticError) as error:
        sys.exit(f"{parser.prog}: {error}")
    facts = {device.type: machine(device) for device in devices}
    save(args.output, "\n\n".join(pages), {"machines": facts, "results": sum(results, [])})


if __name__ == "__main__":
    main()
