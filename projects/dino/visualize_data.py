#!/usr/bin/env python3
"""Show the images and boxes that the model is trained on, as the data loader yields them.

Augmentation, cropping and clipping are those of training. With a seed in the config, iteration
0 shows the images of the first step; without one, every run differs, and seed 0 is shown. The
same iteration always shows the same images.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from program import (
    add_data_arguments,
    data_of,
    interruptible,
    make_folder,
    make_parser,
    one_sentence,
)

EPILOG = """
Examples, after `make demo`:

Sheets of the first 24 images of a data folder, as Roboflow or Ultralytics export it:
    $ python projects/dino/visualize_data.py --config-file configs/quickstart.yaml \\
        --data my/cells --output look

The same for files in COCO's format:
    $ python projects/dino/visualize_data.py --config-file configs/quickstart.yaml \\
        --train-json output/quickstart/data/train.json \\
        --train-images output/quickstart/data/images --output look

The images of iteration 1000, one per sheet, with a config override at the end:
    $ python projects/dino/visualize_data.py --config-file configs/quickstart.yaml \\
        --train-json output/quickstart/data/train.json \\
        --train-images output/quickstart/data/images --output look \\
        --iteration 1000 --num-images 4 --per-sheet 1 INPUT.RANDOM_FLIP none
"""


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EPILOG)
    parser.add_argument("--config-file", required=True, help="a file, or a name of the model zoo")
    add_data_arguments(parser, "train", files=["train_json"])
    parser.add_argument("--train-json", metavar="FILE", help="annotations, COCO format")
    parser.add_argument("--train-images", metavar="FOLDER", help="where its images are")
    parser.add_argument("--output", type=Path, required=True, help="folder for the sheets")
    parser.add_argument("--num-images", type=int, default=24, help="default: 24")
    parser.add_argument("--per-sheet", type=int, default=12, help="default: 12; 1: in full size")
    parser.add_argument("--iteration", type=int, default=0, help="of training; default: 0")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, at the end")
    return parser


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argument_parser()
    args = parser.parse_args()
    if bool(args.train_json) != bool(args.train_images):
        parser.error("--train-json and --train-images go together")
    if args.data and args.train_json:
        parser.error("--data and --train-json exclude each other")
    if min(args.num_images, args.per_sheet, args.iteration + 1) < 1:
        parser.error("--num-images and --per-sheet have to be 1 or more, --iteration 0 or more")
    return parser, args


if __name__ == "__main__":  # so that --help and wrong options do not wait for the imports below
    parse()


import numpy as np
from detectron2.structures import BitMasks, Instances, PolygonMasks
from PIL import Image

from dino_d2 import data
from dino_d2.config.overrides import apply_overrides
from dino_d2.config.styles import get, keys_for, put
from dino_d2.data import DatasetError
from dino_d2.data.box_sizes import BoxSizes, sizes_line, warnings_of
from dino_d2.data.mapper import to_picture
from dino_d2.data.stream import TrainingStream
from dino_d2.engine.plan import Plan, make_plan
from dino_d2.images import channels_of
from dino_d2.names import plural
from dino_d2.progress import progress
from dino_d2.visualize import Mark, class_colour, contact_sheet, draw_marks, resize_long_side
from dino_d2.weights import model_zoo

SIDE = 480  # long side of pictures in a sheet, in pixels
COLUMNS = 4


class Source(NamedTuple):
    """The origin of the images."""

    plan: Plan
    classes: list[str]
    image_format: str  # channels of the model's input: "RGB", "BGR", "L"
    seed: int  # of the config, or 0


class Seen(NamedTuple):
    """What was in the images."""

    counts: Counter  # boxes by class
    boxes: BoxSizes


def load(args: argparse.Namespace) -> Source:
    """Load the config and its data; raises a ValueError if either is invalid."""
    cfg = model_zoo.get_config(args.config_file)
    apply_overrides(cfg, args.opts)
    given = args.data or args.train_json
    names = [data_of(args, args.train_json, args.train_images)] if given else None
    keys = keys_for(cfg)
    put(cfg, keys.train_sets, names or get(cfg, keys.train_sets))
    image_format = get(cfg, keys.image_format)
    channels_of(image_format)
    plan = make_plan(cfg)
    if not plan.train_sets:
        raise ValueError("there is no data: give --data, or --train-json and --train-images")
    data.check(plan.train_sets, (), None)
    if plan.seed < 0:
        print("no seed in the config, so training draws one: showing seed 0")
    classes = data.class_names(plan.train_sets)
    return Source(plan, classes, image_format, max(plan.seed, 0))


def samples(source: Source, iteration: int) -> Iterator[dict]:
    """Images of the loader from an iteration on, one by one.

    Raises:
        ValueError: the loader cannot be built from the config; on reading, a DatasetError: an image
            cannot be used
    """
    plan = source.plan
    stream = TrainingStream(plan.build_loader, source.seed, plan.mixing, plan.mixed)
    stream.start = iteration * plan.accumulate
    return chain.from_iterable(stream)


def draw(sample: dict, source: Source, side: int | None) -> tuple[Image.Image, str]:
    """The picture with a long side of `side` pixels (None: unchanged), and its caption."""
    picture = to_picture(sample["image"].permute(1, 2, 0), source.image_format)
    name = Path(sample["file_name"]).name
    if others := sample.get("mixed_with"):
        name += f" + {len(others)}"
    instances = sample["instances"]
    caption = f"{name}  {picture.width} x {picture.height}, {plural(len(instances), 'box')}"
    picture, scale = resize_long_side(picture, side or max(picture.size))
    labels = instances.gt_classes.tolist()
    masks = masks_of(instances, picture.size)
    marks = [
        Mark([scale * x for x in box], source.classes[label], class_colour(label), mask=mask)
        for box, label, mask in zip(instances.gt_boxes.tensor.tolist(), labels, masks, strict=True)
    ]
    return draw_marks(picture, marks), caption


def masks_of(instances: Instances, size: tuple[int, int]) -> list[np.ndarray | None]:
    """The known masks of objects, resized to a width and height; None for others."""
    if not instances.has("gt_masks"):
        return [None] * len(instances)
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):  # of Mask R-CNN
        masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
    known = instances.has_mask.tolist()
    return [
        np.array(Image.fromarray(mask).resize(size)) if is_known else None
        for mask, is_known in zip(masks.tensor.numpy(), known, strict=True)
    ]


def run(stream: Iterator[dict], source: Source, args: argparse.Namespace) -> Seen:
    """Write the sheets; returns what is in them.

    Raises:
        DatasetError: an image cannot be used
    """
    seen = Seen(Counter(), BoxSizes([], []))
    stream = progress(islice(stream, args.num_images), "image", total=args.num_images)
    number = 0
    while batch := list(islice(stream, args.per_sheet)):
        for sample in batch:
            instances = sample["instances"]
            seen.counts.update(instances.gt_classes.tolist())
            seen.boxes.counts.append(len(instances))
            seen.boxes.sides.extend(instances.gt_boxes.area().sqrt().tolist())
        side = SIDE if args.per_sheet > 1 else None
        pictures = [draw(sample, source, side) for sample in batch]
        title = f"Training images from iteration {args.iteration} on (seed {source.seed})"
        contact_sheet(pictures, COLUMNS, title).save(args.output / f"sheet_{number:03}.png")
        number += 1
    return seen


def main() -> None:
    parser, args = parse()
    with interruptible(parser.prog):
        work(parser.prog, args)


def work(prog: str, args: argparse.Namespace) -> None:
    with one_sentence(prog):
        source = load(args)
        stream = samples(source, args.iteration)
        make_folder(args.output, "--output")
    try:
        seen = run(stream, source, args)
    except DatasetError as error:
        sys.exit(f"{prog}: {error}")
    classes = ", ".join(f"{source.classes[k]} {n}" for k, n in seen.counts.most_common())
    print(
        f"{plural(args.num_images, 'image')}, {seen.boxes.counts.count(0)} of them without boxes, "
        f"{plural(len(seen.boxes.sides), 'box')}: "
        f"{classes or 'none'}. See '{args.output}'"
    )
    if seen.boxes.sides:
        print(sizes_line(seen.boxes))
    for warning in warnings_of(seen.boxes, source.plan.num_queries):
        print(warning)


if __name__ == "__main__":
    main()
