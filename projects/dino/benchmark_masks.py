#!/usr/bin/env python3
"""Measure memory and time of Mask DINO's masks, compared with the published implementation.

The published form computes the masks of all queries in all stages, and keeps them; ours computes
those of matched queries, some at a time, and recomputes them in the backward pass. Backbone,
encoder and decoder are not included: embeddings are random. Each implementation runs in a new
process.

Also measures the data loader with large-scale jitter.
"""

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

from program import make_parser, positive

EPILOG = """
Examples:

A training step at 1024 x 1024 with 20 and with 50 objects, inference at 800 x 1333, data loading
with 100 objects:
    $ python projects/dino/benchmark_masks.py

In bfloat16, too:
    $ python projects/dino/benchmark_masks.py --precision fp32 bf16
"""


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EPILOG)
    parser.add_argument("--objects", nargs="+", type=positive, default=[20, 50], help="per image")
    parser.add_argument("--size", type=positive, default=1024, help="side of a training image")
    parser.add_argument("--test-size", nargs=2, type=positive, default=[800, 1333])
    parser.add_argument(
        "--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32"], metavar="NAME"
    )
    parser.add_argument(
        "--loader-objects", type=positive, default=100, help="per loaded image; default: 100"
    )
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--output", type=Path, default=Path("output/benchmark_masks"))
    return parser


if __name__ == "__main__":  # so that --help and wrong options do not wait for the imports below
    argument_parser().parse_args()


import time
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from benchmarking import PeakMemory, headline, in_new_process, machine, markdown, save
from detectron2.data.detection_utils import BoxMode
from detectron2.projects.point_rend.point_features import (
    get_uncertain_point_coords_with_randomness,
    point_sample,
)
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dino_d2.data import Mapper, detr_augmentation
from dino_d2.data.masks import decode_mask, encode_mask
from dino_d2.modeling.mask_loss import (
    MaskCriterion,
    MaskMatcher,
    MaskTruth,
    dice,
    pairwise_cross_entropy,
    pairwise_dice,
)
from dino_d2.resizing import resize_masks
from dino_d2.structures import Match

STAGES, QUERIES, CHANNELS, POINTS, BUDGET, DETECTIONS = 11, 300, 256, 12544, 100, 100
LOADED = 10  # images that the loader makes for a repeat


class Problem(NamedTuple):
    """What the stages before give, of one image."""

    pixels: Tensor  # (C, h, w)
    masks: Tensor  # (N, Q, C), of the result and the proposals
    noised: Tensor  # (N - 1, T, C), of denoising
    truth: Tensor  # (M, H, W) bool
    queries: Tensor  # (N, M), matched with the objects


def make_problem(size: int, objects: int, dtype: torch.dtype) -> Problem:
    torch.manual_seed(0)
    groups = max(BUDGET // objects, 1)
    embeddings = (
        torch.randn(STAGES, QUERIES, CHANNELS),
        torch.randn(STAGES - 1, groups * objects, CHANNELS),
    )
    parts = torch.randn(CHANNELS, size // 4, size // 4), *(x / 16 for x in embeddings)
    masks = torch.zeros(objects, size, size, dtype=torch.bool)
    for mask in masks:
        x, y = torch.randint(size - size // 8, (2,)).tolist()
        mask[y : y + size // 8, x : x + size // 8] = True
    queries = torch.stack([torch.randperm(QUERIES)[:objects] for _ in range(STAGES)])
    pixels, own, noised = (x.to(dtype).requires_grad_() for x in parts)
    return Problem(pixels, own, noised, masks, queries)


def train_ours(problem: Problem) -> Tensor:
    """Costs of matching, and losses, of `MaskCriterion`."""
    pixels, masks, noised, truth, queries = problem
    criterion = MaskCriterion(matcher=MaskMatcher(), num_points=POINTS)
    count, extent = len(truth), pixels.new_ones(2)
    labels, boxes = torch.zeros(count, dtype=torch.int64), torch.zeros(count, 4)
    known = torch.ones(count, dtype=torch.bool)
    target = MaskTruth(labels, boxes, truth, known, known, pixels, extent)
    with torch.no_grad():
        points = criterion.at_points(target)
        for stage in masks:
            logits = (stage @ points.pixels).float()
            pairwise_cross_entropy(logits, points.masks) + pairwise_dice(logits, points.masks)
    image = torch.zeros(count, dtype=torch.int64)
    own = Match(image, queries, torch.arange(count))
    groups = noised.shape[1] // count
    dn = Match(
        image.repeat(groups), torch.arange(groups * count), torch.arange(count).repeat(groups)
    )
    sums = [
        criterion.mask_sums(x[:, None], match, [target])
        for x, match in ((masks, own), (noised, dn))
    ]
    return sum(x.sum() for part in sums for x in part.values())


def train_published(problem: Problem) -> Tensor:
    """The same of maps of all queries, as Mask2Former's criterion computes it."""
    pixels, masks, noised, truth, queries = problem
    flat = pixels.flatten(1)
    maps = [(stage @ flat).view(-1, *pixels.shape[1:]) for stage in masks]
    of_noised = [(stage @ flat).view(-1, *pixels.shape[1:]) for stage in noised]
    with torch.no_grad():
        for stage in maps:
            points = torch.rand(1, POINTS, 2)
            logits = at_points(stage, points)
            expected = at_points(truth, points)
            pairwise_cross_entropy(logits, expected) + pairwise_dice(logits, expected)
    groups = noised.shape[1] // len(truth)
    total = pixels.new_zeros(())
    for stage, matched in zip(maps, queries, strict=True):
        total = total + published_loss(stage[matched], truth)
    for stage in of_noised:
        total = total + published_loss(stage, truth.repeat(groups, 1, 1))
    return total


def published_loss(maps: Tensor, truth: Tensor) -> Tensor:
    # autocast samples in float32
    maps, truth = maps[:, None].float(), truth[:, None].float()
    with torch.no_grad():
        points = get_uncertain_point_coords_with_randomness(
            maps, lambda logits: -logits.abs(), POINTS, 3, 0.75
        ).to(maps.dtype)
        expected = point_sample(truth, points, align_corners=False)[:, 0]
    logits = point_sample(maps, points, align_corners=False)[:, 0].float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, expected.float(), reduction="none")
    return cross_entropy.mean(1).sum() + dice(logits.sigmoid(), expected.float()).sum()


def at_points(maps: Tensor, points: Tensor) -> Tensor:
    """Float samples (n, P) of maps (n, h, w) at the same points of all."""
    maps = maps[:, None].float()
    return point_sample(maps, points.expand(len(maps), -1, -1), align_corners=False)[:, 0]


def detect_ours(problem: Problem, size: tuple[int, int]) -> Tensor:
    """Masks of the detections, of the size of the image."""
    maps = (problem.masks[0, :DETECTIONS] @ problem.pixels.flatten(1)).detach()
    return resize_masks(maps.view(-1, *problem.pixels.shape[1:]), 4, size, size)[0]


def detect_published(problem: Problem, size: tuple[int, int]) -> Tensor:
    """Maps of all queries, resized to the padded image and cut; then those of the detections."""
    maps = (problem.masks[0] @ problem.pixels.flatten(1)).detach()
    maps = maps.view(1, -1, *problem.pixels.shape[1:]).float()
    padded = F.interpolate(maps, scale_factor=4, mode="bilinear", align_corners=False)
    cut = padded[:, :, : size[0], : size[1]].expand(1, -1, -1, -1)
    masks = F.interpolate(cut, size, mode="bilinear", align_corners=False)[0, :DETECTIONS]
    found = (masks > 0).float()
    (masks.sigmoid().flatten(1) * found.flatten(1)).sum(1) / (found.flatten(1).sum(1) + 1e-6)
    return found > 0


SIDES: dict[str, dict[str, Callable]] = {
    "training": {"published form": train_published, "ours": train_ours},
    "inference": {"published form": detect_published, "ours": detect_ours},
}


def measure(
    side: str, objects: int, size: tuple[int, int], dtype: torch.dtype, repeats: int
) -> dict:
    """Median seconds and peak growth of memory in MiB; without objects, of inference."""
    problem = make_problem(max(size), objects or 1, dtype)
    if not objects:
        height, width = (-(-x // 4) for x in size)
        problem = problem._replace(pixels=problem.pixels[:, :height, :width].detach())
    run = SIDES["training" if objects else "inference"][side]

    def step() -> None:
        if not objects:
            run(problem, size)
            return
        run(problem).backward()
        for x in problem[:3]:
            x.grad = None

    step()
    memory, seconds = PeakMemory(torch.device("cpu")), []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": median(seconds), "memory_mib": memory.read()}


def make_record(folder: str, objects: int, size: int, form: str) -> dict:
    """A record of an image of noise, whose objects are polygons of 40 points, or RLE of these."""
    rng, path = np.random.default_rng(0), Path(folder, "image.jpg")
    Image.fromarray(rng.integers(256, size=(size, size, 3), dtype=np.uint8)).save(path)
    angles, annotations = np.linspace(0, 2 * np.pi, 40, endpoint=False), []
    for _ in range(objects):
        radii = size / 16 * rng.uniform(0.6, 1, len(angles))
        points = rng.uniform(size / 16, size - size / 16, 2) + np.stack(
            [radii * np.cos(angles), radii * np.sin(angles)], 1
        )
        mask = [points.ravel().tolist()]
        annotations.append(
            {
                "bbox": [*points.min(0), *points.max(0)],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 0,
                "segmentation": encode_mask(decode_mask(mask, (size, size)))
                if form == "RLE"
                else mask,
            }
        )
    return {"file_name": str(path), "height": size, "width": size, "annotations": annotations}


def measure_loader(form: str, objects: int, size: int, repeats: int) -> dict:
    """As `measure`, of the mapper that Mask DINO's configs train with, for an image.

    The jitter is random, so that an image is `LOADED` times read for a repeat.
    """
    jitter = {"crop_size": None, "scale_jitter": (0.1, 2.0), "max_size": size}
    mapper = Mapper(
        is_train=True,
        augmentations=detr_augmentation(**jitter),
        image_format="RGB",
        use_instance_mask=True,
        instance_mask_format="bitmask",
        recompute_boxes=True,
    )
    with TemporaryDirectory() as folder:
        record = make_record(folder, objects, size, form)
        np.random.seed(0)
        mapper(record)
        memory, seconds = PeakMemory(torch.device("cpu")), []
        for _ in range(LOADED * repeats):
            start = time.perf_counter()
            mapper(record)
            seconds.append(time.perf_counter() - start)
        return {"seconds": median(seconds), "memory_mib": memory.read()}


def main() -> None:
    args = argument_parser().parse_args()
    problems = [(n, (args.size, args.size)) for n in args.objects] + [(0, tuple(args.test_size))]
    results, rows = [], []
    for (objects, size), precision in product(problems, args.precision):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        sides = {
            side: in_new_process(measure, side, objects, size, dtype, args.repeats)
            for side in SIDES["training"]
        }
        name = f"training, {objects} objects" if objects else f"inference, {DETECTIONS} detections"
        results.append({"problem": name, "size": size, "precision": precision, **sides})
        rows.append(
            [
                f"{name}, {size[0]} x {size[1]}, {precision}",
                *(f"{side['memory_mib']:.0f}" for side in sides.values()),
                *(f"{side['seconds']:.2f}" for side in sides.values()),
            ]
        )
    forms = {
        form: in_new_process(measure_loader, form, args.loader_objects, args.size, args.repeats)
        for form in ("polygons", "RLE")
    }
    columns = ["", "published form, MiB", "ours, MiB", "published form, s", "ours, s"]
    loaded = [
        [form, f"{x['memory_mib']:.0f}", f"{1000 * x['seconds']:.0f}"] for form, x in forms.items()
    ]
    of_loader = f"loader, {args.loader_objects} objects, {args.size} x {args.size}"
    facts = machine(torch.device("cpu"))
    tables = markdown(columns, rows), markdown([of_loader, "MiB", "ms of an image"], loaded)
    save(
        args.output,
        "\n\n".join([headline(facts), *tables]),
        {"results": results, "loader": forms} | facts,
    )


if __name__ == "__main__":
    main()
