#!/usr/bin/env python3
"""Time a model, stage by stage, and measure its memory, in inference and in training.

Weights and images are random. Every model is compared with the same model on grid_sample, the
published form of deformable attention without a CUDA kernel, and on a GPU with the original CUDA
kernel if torch-ms-deform-attn is installed. Nothing else differs. The runs alternate.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest import mock

from program import make_parser, one_sentence, positive

EPILOG = """
Examples:

Inference and a training step, on the GPU if there is one:
    $ python projects/dino/benchmark_model.py

A larger model, also in half precision and compiled:
    $ python projects/dino/benchmark_model.py --config-file dino_Swin_L_384_4scale_12ep \\
        --mode inference --batch 1 4 --size 640 640 --size 800 1333 --precision fp32 bf16 --compile

Inference in PyTorch, ONNX Runtime and OpenVINO, in all precisions that they support:
    $ python projects/dino/benchmark_model.py --runtime --size 800 1333

How time and memory grow with the image area and with the number of boxes:
    $ python projects/dino/benchmark_model.py --growth area boxes
"""

GROWTH_SIZE, DEFAULT_SIZE = 320, 640
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Transformations of the model before measuring, for --variant
VARIANTS = {
    "inference": ["plain", "folded", "compiled"],
    "training": ["plain", "checkpointed", "compiled"],
}

# --growth: quantities and their values; sides of images in pixels
GROWTH = {
    "area": (192, 288, 416, 576, 768),
    "queries": (100, 300, 900, 1500),
    "boxes": (1, 10, 100, 1000, 3000),
    "classes": (80, 200, 400, 800, 1203),
    "threads": tuple(n for n in (1, 2, 4, 8, 16, 32, 64) if n <= (os.cpu_count() or 1)),
}


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EPILOG)
    add = parser.add_argument
    names = list(dict.fromkeys(name for mode in VARIANTS.values() for name in mode))
    add("--config-file", default="dino_R_50_4scale_12ep", help="a file, or a name of the model zoo")
    add("--mode", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: both")
    add("--batch", nargs="+", type=positive, default=[1], help="images; default: 1")
    size = f"of images, may be repeated; default: {DEFAULT_SIZE}, with --growth {GROWTH_SIZE}"
    add("--size", nargs=2, action="append", type=positive, metavar=("H", "W"), help=size)
    add("--boxes", type=positive, default=7, help="per image, in training; default: 7")
    add("--precision", nargs="+", choices=PRECISIONS, default=["fp32"], help="default: fp32")
    add("--variant", nargs="+", choices=names, default=["plain"], help="default: plain")
    add("--compile", dest="variant", action="append_const", const="compiled", help="add it")
    add("--growth", nargs="+", choices=GROWTH, help="instead, plot time and memory against these")
    runtimes = "instead, compare inference on one image on a CPU; default: all installed"
    add("--runtime", nargs="*", metavar="NAME", help=runtimes)
    add("--repeats", type=positive, default=3, help="rounds; default: 3")
    add("--device", default="", help="cpu or cuda; default: cuda if there is one")
    add("--threads", type=positive, help="default: PyTorch's")
    add("--output", type=Path, default=Path("output/benchmark_model"))
    add("--opts", nargs=argparse.REMAINDER, default=[], help="config overrides")
    return parser


if __name__ == "__main__":  # so that --help and wrong options do not wait for the imports below
    argument_parser().parse_args()


import benchmark_runtimes
import torch
from benchmarking import (
    PeakMemory,
    Stopwatch,
    cell,
    draw_growth,
    find_device,
    has_original,
    headline,
    in_new_process,
    interleave,
    machine,
    markdown,
    original_form_from_offsets,
    published_form_from_offsets,
    save,
)
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from omegaconf import DictConfig
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from dino_d2 import DINO
from dino_d2.config.overrides import apply_overrides
from dino_d2.costs import STAGES
from dino_d2.layers import deformable_attention
from dino_d2.modeling.fold_norms import fold_norms
from dino_d2.names import plural
from dino_d2.solver import ClippedAdamW, parameter_groups
from dino_d2.weights import model_zoo

PUBLISHED, ORIGINAL_KERNEL = "published form", "original kernel"
OPERATORS = {PUBLISHED: published_form_from_offsets, ORIGINAL_KERNEL: original_form_from_offsets}

# Operators by prefixes of their names; all others are the rest.
KINDS = {
    "deformable attention": ("dino_d2::",),
    "convolutions": ("aten::convolution", "mkldnn::_convolution"),
    "matrix products": (
        *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear"),
        "aten::_scaled_dot_product",
    ),
}
TRAINED = "boxes", "classes"  # measured in training, where they cost most
GROWN = {  # axis label, and expected powers of the growth of time and memory
    "area": ("area of the image, pixels", (1, 1)),
    "queries": ("queries", (1, 1)),
    "boxes": ("boxes in the image", (1, 1)),
    "classes": ("classes", (1, 1)),
    "threads": ("threads", (-1, 0)),
}
GROWTH_LAYERS = 2  # in the encoder and in the decoder: quick, but enough to see growth
KEYS = {  # in YAML and in LazyConfig
    "queries": ("MODEL.DINO.NUM_QUERIES", "model.query_selection.num_queries"),
    "encoder layers": ("MODEL.DINO.ENCODER_LAYERS", "model.encoder.num_layers"),
    "decoder layers": ("MODEL.DINO.DECODER_LAYERS", "model.decoder.num_layers"),
}


def checkpointed(model: DINO) -> DINO:
    """As DINO(activation_checkpointing=["backbone", "encoder", "decoder"])."""
    model.recompute_backbone = model.encoder.recompute = model.decoder.recompute = True
    return model


PREPARE: dict[str, Callable[[DINO], DINO]] = {
    "folded": fold_norms,
    "checkpointed": checkpointed,
    "compiled": benchmark_runtimes.compiled,
}


class Setting(NamedTuple):
    """What to measure: sizes (height, width) in pixels, boxes per image."""

    config_file: str
    opts: tuple[str, ...]
    device: str
    threads: int
    mode: str
    batch: int
    size: tuple[int, int]
    precision: str
    variant: str
    boxes: int = 7
    classes: int = 80


class Workload:
    """A model that runs steps of inference or training."""

    def __init__(self, setting: Setting):
        self.setting, device = setting, torch.device(setting.device)
        self.model = build(setting).train(setting.mode == "training")
        if setting.variant in PREPARE:
            self.model = PREPARE[setting.variant](self.model)
        if setting.mode == "training":
            self.optimizer = ClippedAdamW(parameter_groups(self.model, lr=1e-4), lr=1e-4)
        self.channels = len(self.model.pixel_mean)
        self.batch = make_batch(setting, self.channels)
        self.stopwatch = Stopwatch(device)
        for name, stage in self.model.named_children():
            time_stage(name, stage, self.stopwatch)

    def step(self, batch: list[dict]) -> dict[str, float]:
        """Milliseconds, by stage."""
        self.stopwatch.lap("start")
        with operator_of(self.setting):
            (self.infer if self.setting.mode == "inference" else self.train)(batch)
        return self.stopwatch.read()

    def infer(self, batch: list[dict]) -> None:
        with torch.inference_mode(), autocast(self.setting):
            self.model(batch)
        self.stopwatch.lap("rest")

    def train(self, batch: list[dict]) -> None:
        with autocast(self.setting):
            loss = sum(self.model(batch).values())
        self.stopwatch.lap("rest")
        loss.backward()
        self.stopwatch.lap("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.stopwatch.lap("optimizer")


def time_stage(name: str, stage: nn.Module, stopwatch: Stopwatch) -> None:
    stage.register_forward_pre_hook(lambda *_: stopwatch.lap("rest"))
    stage.register_forward_hook(lambda *_: stopwatch.lap(name))


def build(setting: Setting) -> DINO:
    """The setting's model, with random weights."""
    return model_zoo.build(load_config(setting), setting.classes, setting.device)


def load_config(setting: Setting) -> CfgNode | DictConfig:
    cfg = model_zoo.get_config(setting.config_file)
    apply_overrides(cfg, setting.opts)
    return cfg


def make_batch(setting: Setting, channels: int) -> list[dict]:
    """Random images and boxes, in the format of Detectron2's data loader."""
    height, width = setting.size
    batch = []
    for _ in range(setting.batch):
        corner, size = (
            0.7 * torch.rand(setting.boxes, 2),
            0.05 + 0.25 * torch.rand(setting.boxes, 2),
        )
        boxes = torch.cat([corner, corner + size], 1) * torch.tensor([width, height] * 2)
        instances = Instances(setting.size, gt_boxes=Boxes(boxes))
        instances.gt_classes = torch.randint(setting.classes, (setting.boxes,))
        image = torch.randint(256, (channels, height, width), dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})
    return batch


def operator_of(setting: Setting) -> AbstractContextManager:
    """The operator that the setting's model uses."""
    if setting.variant not in OPERATORS:
        return nullcontext()
    name = "ms_deform_attn_from_offsets"
    return mock.patch.object(deformable_attention, name, OPERATORS[setting.variant])


def autocast(setting: Setting) -> AbstractContextManager:
    kind, dtype = torch.device(setting.device).type, getattr(torch, PRECISIONS[setting.precision])
    return torch.autocast(kind, dtype, enabled=dtype != torch.float32)


def measure(settings: Sequence[Setting], repeats: int) -> list[dict]:
    """A row for each side of a setting; the first is the published form."""
    workloads = {setting.variant: Workload(setting) for setting in settings}
    steps = {name: partial(x.step, x.batch) for name, x in workloads.items()}
    laps = interleave(steps, repeats)
    shares = {name: kinds_of(x) for name, x in workloads.items() if name not in OPERATORS}
    del workloads, steps
    rows = []
    for setting in settings:
        taken = laps[setting.variant]
        totals = [sum(step.values()) for step in taken]
        rows.append(
            {
                **setting._asdict(),
                "total_ms": median(totals),
                "samples_ms": totals,
                "stages_ms": {name: median(step[name] for step in taken) for name in taken[0]},
                "shares": shares.get(setting.variant),
                "memory_mib": alone(setting, 1)["memory_mib"],
            }
        )
        rows[-1]["ratio"] = rows[0]["total_ms"] / rows[-1]["total_ms"]
    return rows


def kinds_of(workload: Workload) -> dict[str, float]:
    """The share of each kind of operator in the total time, on a GPU that of its kernels."""
    is_cuda = workload.stopwatch.is_cuda
    cpu, cuda = ProfilerActivity.CPU, ProfilerActivity.CUDA
    with profile(activities=[cpu, cuda] if is_cuda else [cpu]) as profiler:
        workload.step(workload.batch)
    spent = Counter()
    for event in profiler.events():
        # kernels would count twice, as their operators are in the list
        if event.device_type == DeviceType.CPU:
            time = event.self_device_time_total if is_cuda else event.self_cpu_time_total
            spent[kind_of(event)] += time
    return {kind: spent[kind] / spent.total() for kind in (*KINDS, "rest")}


def kind_of(event: FunctionEvent | None) -> str:
    """The kind of an operator, or of the operator that it is part of."""
    while event is not None:
        for kind, names in KINDS.items():
            if event.name.startswith(names):
                return kind
        event = event.cpu_parent
    return "rest"


def alone(setting: Setting, repeats: int) -> dict:
    """`time_and_memory`, on the CPU in a new process without freed memory to reuse."""
    if torch.device(setting.device).type == "cpu":
        return in_new_process(time_and_memory, setting, repeats)
    return time_and_memory(setting, repeats)


def time_and_memory(setting: Setting, repeats: int) -> dict:
    """Median milliseconds of a step, and the peak growth of memory in it in MiB.

    The memory is on top of the model and, in training, of the optimizer.
    """
    torch.set_num_threads(setting.threads)
    workload = Workload(setting)
    small = setting._replace(size=(64, 64))
    workload.step(make_batch(small, workload.channels))  # allocates what persists
    memory = PeakMemory(torch.device(setting.device))
    times = [sum(workload.step(workload.batch).values()) for _ in range(repeats)]
    return {"total_ms": median(times), "memory_mib": memory.read()}


def page(rows: list[dict], args: argparse.Namespace) -> str:
    """A table of stages for each mode, and a table of kinds of operators."""
    parts = [
        f"`{args.config_file}` with random weights, {plural(args.boxes, 'box')} per image. "
        f"Milliseconds, medians of {plural(args.repeats, 'round')}. *{PUBLISHED}* is the same "
        f"model on grid_sample, *{ORIGINAL_KERNEL}* on the CUDA kernel of Deformable DETR. Memory "
        "is the peak of a step on top of the model and the optimizer.",
        headline(machine(torch.device(args.device))),
    ]
    for mode in args.mode:
        parts += [f"**{mode}**", stage_table([row for row in rows if row["mode"] == mode])]
    return "\n\n".join([*parts, "**Where the time goes**", kind_table(rows)])


def stage_table(rows: list[dict]) -> str:
    order = [*STAGES, "criterion", "backward", "optimizer", "rest"]
    stages = [name for name in order if name in rows[0]["stages_ms"]]
    columns = ["setting", "model", "total", "faster", *stages, "memory, MiB"]
    cells = [
        (
            *(describe(row), row["variant"], row["total_ms"], f"{row['ratio']:.1f} x"),
            *(row["stages_ms"][name] for name in stages),
            row["memory_mib"],
        )
        for row in rows
    ]
    return markdown([column.replace("_", " ") for column in columns], cells)


def kind_table(rows: list[dict]) -> str:
    columns = ["mode", "setting", "model", *KINDS, "rest"]
    cells = [
        (row["mode"], describe(row), row["variant"], *(f"{x:.0%}" for x in row["shares"].values()))
        for row in rows
        if row["shares"]
    ]
    return markdown(columns, cells)


def describe(row: dict) -> str:
    height, width = row["size"]
    return f"batch {row['batch']}, {height} x {width}, {row['precision']}"


def compare(args: argparse.Namespace) -> None:
    """Print the tables, and write them to the output folder."""
    base = first_setting(args, DEFAULT_SIZE)
    rows = []
    sizes = args.size or [base.size]
    for mode, batch, size, precision in product(args.mode, args.batch, sizes, args.precision):
        setting = base._replace(mode=mode, batch=batch, size=tuple(size), precision=precision)
        operators = OPERATORS if has_original(torch.device(args.device)) else [PUBLISHED]
        variants = [*operators, *(name for name in args.variant if name in VARIANTS[mode])]
        rows += measure([setting._replace(variant=name) for name in variants], args.repeats)
    facts = machine(torch.device(args.device))
    save(args.output, page(rows, args), {"machine": facts, "results": rows})


def compare_runtimes(args: argparse.Namespace) -> None:
    """Print the table of `benchmark_runtimes.compare`, and write it to the output folder."""
    setting = first_setting(args, DEFAULT_SIZE)
    make = partial(build, setting._replace(device="cpu"))
    table, rows = benchmark_runtimes.compare(
        args.runtime, make, setting.size, args.output / "files", args.repeats
    )
    facts = machine(torch.device("cpu"))
    height, width = setting.size
    about = (
        f"`{args.config_file}` with random weights, one image of {height} x {width}. Medians of "
        f"{plural(args.repeats, 'alternating round')}. Memory is the peak of the first inference "
        "on top of the loaded model."
    )
    page = "\n\n".join([about, headline(facts), table])
    save(args.output, page, {"machine": facts, "results": rows})


def grow(args: argparse.Namespace) -> None:
    """Write a plot for each quantity, and growth.json, to the output folder."""
    layers = {"encoder layers": GROWTH_LAYERS, "decoder layers": GROWTH_LAYERS}
    base = with_numbers(first_setting(args, GROWTH_SIZE), layers)
    facts = machine(torch.device(args.device))
    points = []
    for quantity in args.growth:
        modes = [mode for mode in args.mode if mode == "training" or quantity not in TRAINED]
        for mode, value in product(modes, GROWTH[quantity]):
            setting = with_value(base._replace(mode=mode), quantity, value)
            found = alone(setting, args.repeats)
            x = value**2 if quantity == "area" else value
            points.append({"quantity": quantity, "mode": mode, "value": x, **found})
            time, memory = cell(found["total_ms"]), cell(found["memory_mib"])
            print(f"{mode}, {quantity} {x:,}: {time} ms, {memory} MiB", flush=True)
        title = f"{describe(base._asdict())}, {GROWTH_LAYERS} + {GROWTH_LAYERS} layers"
        title = f"DINO, {title}, unless stated otherwise\n{headline(facts)}"
        chosen = [point for point in points if point["quantity"] == quantity]
        draw_growth(chosen, *GROWN[quantity], title, args.output / f"growth_{quantity}.png")
    text = json.dumps({"machine": facts, "points": points}, indent=1)
    (args.output / "growth.json").write_text(text)


def with_value(setting: Setting, quantity: str, value: int) -> Setting:
    if quantity == "area":
        return setting._replace(size=(value, value))
    if quantity == "queries":
        return with_numbers(setting, {"queries": value})
    return setting._replace(**{quantity: value})


def with_numbers(setting: Setting, numbers: dict[str, int]) -> Setting:
    """A setting with another number of queries or layers."""
    is_yaml = isinstance(load_config(setting), CfgNode)
    opts = list(setting.opts)
    for name, number in numbers.items():
        yaml, lazy = KEYS[name]
        opts += [yaml, str(number)] if is_yaml else [f"{lazy}={number}"]
    return setting._replace(opts=tuple(opts))


def first_setting(args: argparse.Namespace, side: int) -> Setting:
    """The first setting of the command line; `side` is the default size of images."""
    return Setting(
        config_file=args.config_file,
        opts=tuple(args.opts),
        device=args.device,
        threads=args.threads,
        mode=args.mode[0],
        batch=args.batch[0],
        size=tuple(args.size[0]) if args.size else (side, side),
        precision=args.precision[0],
        variant=args.variant[0],
        boxes=args.boxes,
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(words)
    args.threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(args.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler logs an error if there is no GPU
    with one_sentence(parser.prog):
        args.device = str(find_device(args.device))
        args.output.mkdir(parents=True, exist_ok=True)
        build(first_setting(args, DEFAULT_SIZE))
        if args.runtime is not None:
            args.runtime = args.runtime or benchmark_runtimes.installed()
            for name in args.runtime:
                benchmark_runtimes.check(name)
    measured = grow if args.growth else compare if args.runtime is None else compare_runtimes
    measured(args)


if __name__ == "__main__":
    main()
