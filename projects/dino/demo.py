#!/usr/bin/env python3
"""Detect objects in images: annotated pictures, and the detections as JSON."""

import argparse
import glob
import json
import sys
from collections import Counter
from pathlib import Path

from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode, Instances
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

import dino_d2
from dino_d2.checkpoint import CheckpointError
from dino_d2.visualize import draw_instances

SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
EPILOG = """
Examples:

A published checkpoint by name, see the README:
    $ demo.py --config detrex/dino_R_50_4scale_24ep --input photos/ cat.jpg --output detected

A training of one's own:
    $ demo.py --config output/quickstart/config.yaml --weights output/quickstart/model_final.pth \\
        --input "output/quickstart/data/images/val_*.jpg" --output detected --json detected.json
"""


def find_images(inputs: list[str]) -> list[Path]:
    """The images that paths, folders and patterns mean.

    Raises:
        FileNotFoundError: one of them means none
    """
    images = []
    for name in inputs:
        path = Path(name)
        found = path.iterdir() if path.is_dir() else map(Path, glob.glob(name, recursive=True))
        found = sorted(x for x in found if x.suffix.lower() in SUFFIXES and x.is_file())
        if not found:
            raise FileNotFoundError(
                f"--input '{name}' is no image, nor a folder or pattern of some"
            )
        images += found
    return images


def to_json(path: Path, instances: Instances, classes: list[str]) -> list[dict]:
    """As COCO's results, with names in place of ids."""
    boxes = instances.pred_boxes.tensor
    boxes = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
    scores, labels = instances.scores.tolist(), instances.pred_classes.tolist()
    return [
        {"image": str(path), "category": classes[label], "bbox": box, "score": score}
        for box, score, label in zip(boxes, scores, labels, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a file, or a name of the model zoo")
    parser.add_argument("--weights", default="", help="file or URL; default: the config's")
    parser.add_argument("--input", nargs="+", required=True, help="images, folders, patterns")
    parser.add_argument("--output", type=Path, help="folder for annotated pictures")
    parser.add_argument("--json", type=Path, help="file for the detections")
    parser.add_argument("--confidence-threshold", type=float, default=0.5, help="default: 0.5")
    parser.add_argument("--batch-size", type=int, default=1, help="default: 1")
    parser.add_argument("--device", help="cpu, cuda, mps; default: cuda if there is one")
    args = parser.parse_args()
    if not args.output and not args.json:
        parser.error("say where to: --output FOLDER, --json FILE or both")
    if args.batch_size < 1:
        parser.error("--batch-size has to be 1 or more")
    try:
        images = find_images(args.input)
        predictor = dino_d2.load(args.config, args.weights, args.device)
        detections = run(predictor, images, args)
    except (CheckpointError, FileNotFoundError, UnidentifiedImageError) as error:
        sys.exit(f"{parser.prog}: {error}")
    if args.json:
        args.json.write_text(json.dumps(detections, indent=1))
    places = " and ".join(f"'{x}'" for x in (args.output, args.json) if x)
    print(f"{len(detections)} detections in {len(images)} images: see {places}")


def run(predictor: dino_d2.Predictor, images: list[Path], args: argparse.Namespace) -> list[dict]:
    """Pictures go to the output folder, detections are returned."""
    detections = []
    stems = Counter(path.stem for path in images)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, len(images), args.batch_size), unit="batch", disable=None):
        batch = images[start : start + args.batch_size]
        for path, instances in zip(batch, predictor(batch), strict=True):
            instances = instances[instances.scores >= args.confidence_threshold]
            detections += to_json(path, instances, predictor.classes)
            if args.output:
                picture = Image.fromarray(read_image(str(path), "RGB"))
                picture = draw_instances(picture, instances, predictor.classes)
                number = "" if stems[path.stem] == 1 else f"_{images.index(path)}"
                picture.save(args.output / f"{path.stem}{number}.png")
    return detections


if __name__ == "__main__":
    main()
