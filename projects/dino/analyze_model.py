#!/usr/bin/env python3
"""Print a model's parameters, operations, memory and time by stage, as a table.

GFLOPs are 10^9 multiply-adds of inference on one image, as Detectron2's tools/analyze_model.py and
fvcore count them: matrix products, convolutions, norms and, here, both kinds of attention. Weights
are random: none are needed.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

from program import interruptible, make_parser, one_sentence, positive

MIN_SIDE = 64  # pixels: batch norm needs more than one in the coarsest map of a backbone
NUM_IMAGES = 20
EPILOG = """
Examples:

DINO-4scale with R-50 on 800 x 1333 pixels:
    $ python projects/dino/analyze_model.py --config-file dino_R_50_4scale_12ep

A model of your own, at its image size, with fewer queries:
    $ python projects/dino/analyze_model.py --config-file output/quickstart/config.yaml \\
        --size 104 139 --opts MODEL.DINO.NUM_QUERIES 20

GFLOPs averaged over the first images of a data set, resized as in evaluation:
    $ python projects/dino/analyze_model.py --config-file output/quickstart/config.yaml \\
        --annotations output/quickstart/data/val.json --num-images 20
"""


def side(text: str) -> int:
    """The `type` of an option that is the side of an image."""
    if positive(text) < MIN_SIDE:
        raise argparse.ArgumentTypeError(f"{text} pixels are too few: give at least {MIN_SIDE}")
    return int(text)


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EPILOG)
    add = parser.add_argument
    add("--config-file", required=True, help="a file, or a name of the model zoo")
    size = f"of the image, in pixels, at least {MIN_SIDE} each; default: 800 1333"
    add("--size", nargs=2, type=side, default=[800, 1333], metavar=("H", "W"), help=size)
    add("--annotations", type=Path, help="COCO annotations: GFLOPs of their images instead")
    number = f"number of these images; default: the first {NUM_IMAGES}"
    add("--num-images", type=positive, metavar="N", help=number)
    add("--repeats", type=positive, default=3, help="runs, whose median is the time; default: 3")
    add("--device", default="", help="cpu or cuda; default: cuda if there is one")
    add("--threads", type=positive, help="default: PyTorch's")
    add("--output", type=Path, help="file to write the table to, as Markdown")
    add("--opts", nargs=argparse.REMAINDER, default=[], help="config overrides")
    return parser


def parse(words: Sequence[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argument_parser()
    args = parser.parse_args(words)
    if args.num_images and not args.annotations:
        parser.error("--num-images needs --annotations")
    return parser, args


if __name__ == "__main__":  # so that --help and wrong options do not wait for the imports below
    parse()


import numpy as np
import torch
from benchmark_model import Setting, Workload, build, load_config
from benchmarking import MIB, PeakMemory, cell, find_device, headline, machine
from detectron2.data.transforms import AugInput, AugmentationList
from tabulate import tabulate
from torch import nn

from dino_d2.config.styles import evaluation_augmentations, get, keys_for
from dino_d2.costs import Flops, count_flops, kept_activations, stages_of
from dino_d2.data import DatasetError
from dino_d2.data.normalise import read_annotations
from dino_d2.modeling.dino import DINO
from dino_d2.names import plural
from dino_d2.weights import model_zoo

BOXES = 7  # in the image of a training step, the average of COCO

Size = tuple[int, int]


def parameters(module: nn.Module) -> tuple[int, int]:
    """The number of parameters, and of trained parameters."""
    found = list(module.parameters())
    return sum(p.numel() for p in found), sum(p.numel() for p in found if p.requires_grad)


def evaluation_sizes(setting: Setting, annotations: Path, number: int) -> list[Size]:
    """The evaluation sizes (height, width) of the first images of a data set.

    Raises:
        DatasetError: the file has no COCO annotations, or an image has no size
    """
    resize = AugmentationList(evaluation_augmentations(load_config(setting)))
    sizes = []
    for image in read_annotations(annotations)["images"][:number]:
        size = image.get("height"), image.get("width")
        if not all(isinstance(side, int) and side > 0 for side in size):
            raise DatasetError(
                f"'{annotations}': image '{image['file_name']}' has height and width {size}: make "
                "them positive integers"
            )
        x = AugInput(np.zeros((*size, 3), np.uint8))
        resize(x)
        sizes.append(x.image.shape[:2])
    return sizes


def average_flops(model: DINO, sizes: Sequence[Size]) -> tuple[Flops, list[int]]:
    """The mean count over sizes, and the sum of each; every distinct size is run once."""
    counts = {size: count_flops(model, *size) for size in dict.fromkeys(sizes)}
    chosen = [counts[size] for size in sizes]
    parts = zip(*chosen, strict=True)
    means = Flops(*(average(counters) for counters in parts))
    return means, [sum(flops.stages.values()) for flops in chosen]


def average(counters: Sequence[Counter]) -> Counter:
    total: Counter = Counter()
    for counter in counters:
        total.update(counter)
    return Counter({name: value / len(counters) for name, value in total.items()})


def measure(setting: Setting, repeats: int) -> tuple[dict[str, float], dict[str, float | None]]:
    """Milliseconds of inference by stage, and the peak growth of memory in MiB."""
    workload = Workload(setting)
    workload.step(workload.batch)  # allocates what persists
    laps = [workload.step(workload.batch) for _ in range(repeats)]
    times = {name: median(lap[name] for lap in laps) for name in laps[0]}
    times["total"] = median(sum(lap.values()) for lap in laps)
    total = PeakMemory(workload.model.device)
    workload.step(workload.batch)
    return times, {"total": total.read(), **stage_memory(workload)}


def stage_memory(workload: Workload) -> dict[str, float | None]:
    started, peaks = {}, {}

    def start(name: str) -> None:
        started[name] = PeakMemory(workload.model.device)

    def stop(name: str) -> None:
        peaks[name] = started[name].read()

    for name, stage in workload.model.named_children():
        stage.register_forward_pre_hook(lambda *_, name=name: start(name))
        stage.register_forward_hook(lambda *_, name=name: stop(name))
    workload.step(workload.batch)
    return peaks


def table(
    model: DINO,
    flops: Flops,
    kept: Counter[str],
    times: dict[str, float],
    peaks: dict[str, float | None],
) -> str:
    """An aligned Markdown table."""
    total = sum(flops.stages.values())

    def row(name: str, module: nn.Module, count: float, kept_bytes: int) -> list[str]:
        counts = [f"{number / 1e6:.2f} M" for number in parameters(module)]
        share = f"{count / total:.1%}"
        costs = [f"{count / 1e9:.2f}", share, times.get(name), peaks.get(name), kept_bytes / MIB]
        return [name.replace("_", " "), *counts, *map(cell, costs)]

    rows = [row(x, getattr(model, x), flops.stages[x], kept[x]) for x in stages_of(model)]
    rest = [x for name, x in model.named_children() if name not in stages_of(model)]
    rows.append(row("rest", nn.ModuleList(rest), 0, kept["rest"]))
    rows.append(row("total", model, total, kept.total()))
    columns = ["stage", "parameters", "trained", "GFLOPs", "share", "time, ms"]
    columns += ["memory, MiB", "kept for backward, MiB"]
    align = ("left", *["right"] * (len(columns) - 1))
    return tabulate(rows, columns, tablefmt="github", colalign=align, disable_numparse=True)


def page(args: argparse.Namespace, body: str, flops: Flops, counts: Sequence[int]) -> str:
    """The table with its setting, and notes on its numbers."""
    height, width = args.size
    what = f"`{args.config_file}` on {height} x {width} pixels, batch 1, float32"
    notes = [
        "GFLOPs: 10^9 multiply-adds of inference. Time and memory: of inference; memory is the "
        "peak that a stage adds. Kept for backward: activations that the forward pass of a "
        f"training step with {BOXES} boxes keeps. Rest: outside the stages.",
        "Counted, GFLOPs: " + ", ".join(f"{x} {cell(n / 1e9)}" for x, n in rank(flops.operators)),
        "Not counted, calls: " + ", ".join(f"{x} {cell(n)}" for x, n in rank(flops.uncounted)),
    ]
    if args.annotations:
        gflops = [count / 1e9 for count in counts]
        images = plural(len(gflops), "image")
        what += f"; GFLOPs are means over the first {images} of `{args.annotations}`"
        notes.insert(
            0,
            f"GFLOPs of these images: mean {cell(mean(gflops))}, from {cell(min(gflops))} to "
            f"{cell(max(gflops))}",
        )
    facts = headline(machine(torch.device(args.device)))
    return "\n\n".join([what, facts, body, *notes])


def rank(counter: Counter[str]) -> list[tuple[str, float]]:
    return [(name.removeprefix("aten::"), number) for name, number in counter.most_common()]


def setting_of(args: argparse.Namespace) -> Setting:
    """The setting for a config, with its number of classes."""
    setting = Setting(
        config_file=args.config_file,
        opts=tuple(args.opts),
        device=args.device,
        threads=args.threads,
        mode="inference",
        batch=1,
        size=tuple(args.size),
        precision="fp32",
        variant="plain",
    )
    cfg = load_config(setting)
    number = get(cfg, keys_for(cfg).num_classes)
    return setting._replace(classes=number if isinstance(number, int) else model_zoo.NUM_CLASSES)


def main(words: Sequence[str] | None = None) -> None:
    parser, args = parse(words)
    with interruptible(parser.prog, "the table was complete"):
        work(parser.prog, args)


def work(prog: str, args: argparse.Namespace) -> None:
    args.threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(args.threads)
    with one_sentence(prog):
        args.device = str(find_device(args.device))
        setting = setting_of(args)
        model = build(setting).eval()
        sizes = [setting.size]
        if args.annotations:
            sizes = evaluation_sizes(setting, args.annotations, args.num_images or NUM_IMAGES)
        if args.output:
            args.output.open("a").close()
    flops, counts = average_flops(model, sizes)
    kept = kept_activations(model, *setting.size, BOXES)
    text = page(args, table(model, flops, kept, *measure(setting, args.repeats)), flops, counts)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
