#!/usr/bin/env python3
"""Detect objects in images: annotated pictures, and the detections as JSON."""

import argparse
import glob
import json
import sys
from pathlib import Path

import torch
from detectron2.structures import BoxMode, Instances
from PIL import Image
from program import add_model_arguments, make_parser, one_sentence
from tqdm import tqdm

import dino_d2
from dino_d2.data import DatasetError, read_image
from dino_d2.visualize import draw_instances

SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
EPILOG = """
Examples:

A published checkpoint by name, see the README:
    $ demo.py --config-file detrex/dino_R_50_4scale_24ep --input photos/ cat.jpg --output detected

A training of one's own:
    $ demo.py --config-file output/quickstart/config.yaml \\
        --weights output/quickstart/model_final.pth \\
        --input "output/quickstart/data/images/val_*.jpg" --output detected --json detected.json
"""


def find_images(inputs: list[str]) -> list[Path]:
    """The images that paths, folders and patterns mean, each once.

    Raises:
        FileNotFoundError: one of them means none
    """
    images = []
    for name in inputs:
        path = Path(name)
        if path.is_file():
            images.append(path)
            continue
        found = path.iterdir() if path.is_dir() else map(Path, glob.glob(name, recursive=True))
        found = sorted(x for x in found if x.suffix.lower() in SUFFIXES and x.is_file())
        if not found:
            raise FileNotFoundError(
                f"--input '{name}' is no image, nor a folder or pattern of some"
            )
        images += found
    return list(dict.fromkeys(images))


def to_json(path: Path, instances: Instances, classes: list[str]) -> list[dict]:
    """As COCO's results, with names in place of ids."""
    boxes = instances.pred_boxes.tensor
    boxes = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
    scores, labels = instances.scores.tolist(), instances.pred_classes.tolist()
    return [
        {"image": str(path), "category": classes[label], "bbox": box, "score": score}
        for box, score, label in zip(boxes, scores, labels, strict=True)
    ]


def read(paths: list[Path]) -> dict:
    """The images that can be read; what is wrong with the others is printed."""
    pictures = {}
    for path in paths:
        try:
            pictures[path] = read_image(str(path), "RGB")
        except DatasetError as error:
            tqdm.write(f"{error}; it is left out", file=sys.stderr)
    return pictures


def free_name(folder: Path, stem: str, taken: set[Path]) -> Path:
    """A name for a picture that no other of this run has."""
    names = (folder / f"{stem}{f'_{i}' if i else ''}.png" for i in range(len(taken) + 1))
    name = next(name for name in names if name not in taken)
    taken.add(name)
    return name


def run(predictor: dino_d2.Predictor, paths: list[Path], args: argparse.Namespace) -> list[dict]:
    """Pictures go to the output folder, detections are returned."""
    detections, drawn = [], set()
    for start in tqdm(range(0, len(paths), args.batch_size), unit="batch", disable=None):
        pictures = read(paths[start : start + args.batch_size])
        found = predictor(list(pictures.values()))
        for (path, picture), instances in zip(pictures.items(), found, strict=True):
            instances = instances[instances.scores >= args.confidence_threshold]
            detections += to_json(path, instances, predictor.classes)
            if args.output:
                picture = draw_instances(Image.fromarray(picture), instances, predictor.classes)
                picture.save(free_name(args.output, path.stem, drawn))
    return detections


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EPILOG)
    add_model_arguments(parser)
    parser.add_argument("--input", nargs="+", required=True, help="images, folders, patterns")
    parser.add_argument("--output", type=Path, help="folder for annotated pictures")
    parser.add_argument("--json", type=Path, help="file for the detections")
    parser.add_argument("--confidence-threshold", type=float, default=0.5, help="default: 0.5")
    parser.add_argument("--batch-size", type=int, default=1, help="default: 1")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="of matrix products; bfloat16 is several times faster on hardware that knows it",
    )
    return parser


def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    if not args.output and not args.json:
        parser.error("say where to: --output FOLDER, --json FILE or both")
    if args.batch_size < 1:
        parser.error("--batch-size has to be 1 or more")
    with one_sentence(parser.prog):
        paths = find_images(args.input)
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
        if args.json:
            args.json.open("a").close()
        dtype = getattr(torch, args.dtype)
        predictor = dino_d2.load(args.config_file, args.weights, args.device, args.opts, dtype)
    detections = run(predictor, paths, args)
    if args.json:
        args.json.write_text(json.dumps(detections, indent=1))
    places = " and ".join(f"'{x}'" for x in (args.output, args.json) if x)
    print(f"{len(detections)} detections in {len(paths)} images: see {places}")


if __name__ == "__main__":
    main()
