#!/usr/bin/env python3
"""Train DINO in minutes: generate shapes, train on them, evaluate, plot the results.

With --masks it trains Mask DINO, which also learns masks of the shapes' visible pixels.
"""

import argparse
import json
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

from program import interruptible, make_folder, make_parser, one_sentence

EPILOG = """
Example: `make demo` with another seed, in a separate folder:
    $ python projects/dino/quickstart.py --output output/quickstart_1 SEED 1
"""


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EPILOG)
    parser.add_argument("--masks", action="store_true", help="train Mask DINO")
    parser.add_argument(
        "--output", type=Path, help="default: output/quickstart, or output/quickstart_masks"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides of the YAML config")
    return parser


def name_of(args: argparse.Namespace) -> str:
    """Of the config, and of the folder."""
    return "quickstart_masks" if args.masks else "quickstart"


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argument_parser()
    args = parser.parse_args()
    args.output = args.output or Path("output", name_of(args))
    return parser, args


if __name__ == "__main__":  # so that --help and wrong options do not wait for the imports below
    parse()


import torch
import train_net
from PIL import Image

from dino_d2.data import generate, read_results
from dino_d2.data.normalise import read_annotations
from dino_d2.engine.folder import check_folder
from dino_d2.evaluation.analysis import analyse, evaluate_boxes
from dino_d2.visualize import LEGEND, contact_sheet, draw_curves, draw_image_errors

SHOWN = 12  # images


def draw_detections(data: Path, results: Path, output: Path) -> None:
    """A sheet of the first validation images: ground truth left, detections right."""
    dataset = read_annotations(str(data / "val.json"))
    names = {x["id"]: x["name"] for x in dataset["categories"]}
    pictures = []
    analysis = analyse(evaluate_boxes(dataset, read_results(results, dataset)), threshold=None)
    for matches in analysis.shown[:SHOWN]:
        image = Image.open(data / "images" / matches.image["file_name"])
        pair = draw_image_errors(image, matches, names, side=300)
        pictures.append((pair, matches.image["file_name"]))
    title = f"Validation images: annotated, and detected with {analysis.limit}"
    contact_sheet(pictures, 3, title, LEGEND).save(output)


def training_arguments(args: argparse.Namespace, data: Path) -> argparse.Namespace:
    """The arguments for train_net.py; replaces an earlier run of this demo.

    The first generated image identifies an output folder of this demo.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = (args.output / "data" / "images" / "train_00000.jpg").is_file()
    return train_net.argument_parser().parse_args(
        [
            *("--config-file", f"{name_of(args)}.yaml", *(["--overwrite"] if ours else [])),
            *("--train-json", str(data / "train.json"), "--train-images", str(data / "images")),
            *("--val-json", str(data / "val.json"), "--val-images", str(data / "images")),
            *("MODEL.DEVICE", device, "OUTPUT_DIR", str(args.output), *args.opts),
        ]
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Before generating hundreds of images, check whether training on two of them could begin.

    Raises:
        ValueError: it could not
    """
    make_folder(args.output, "--output")
    with TemporaryDirectory() as folder:
        with redirect_stderr(StringIO()):  # hides its progress bars
            generate(Path(folder), num_train=1, num_val=1)
        told = training_arguments(args, Path(folder))
        try:
            check_folder(str(args.output), overwrite=told.overwrite)
        except ValueError as error:
            raise ValueError(
                f"'{args.output}' has a training run that is not of this demo: choose another "
                "--output"
            ) from error
        train_net.check_all(told)


def main() -> None:
    parser, args = parse()
    data, metrics = args.output / "data", args.output / "metrics.json"

    with one_sentence(parser.prog):
        check_arguments(args)
        told = training_arguments(args, data)  # before data are generated
        generate(data)
    with interruptible(parser.prog, "training ended; to start again, run the same command"):
        train_net.worker(told)
    with interruptible(parser.prog, f"results were plotted; '{args.output}' has the training run"):
        draw_curves(metrics, args.output / "curves.png")
        results = args.output / "inference" / "coco_instances_results.json"
        draw_detections(data, results, args.output / "detections.png")
    result = json.loads(metrics.read_text().splitlines()[-1])
    kinds = {"bbox": "", "segm": " of masks"} if args.masks else {"bbox": ""}
    said = [
        f"AP{what} {result[f'{kind}/AP']:.1f}, AP50 {result[f'{kind}/AP50']:.1f}"
        for kind, what in kinds.items()
    ]
    print(
        f"{' and '.join(said)} on the validation images. "
        f"See {args.output}/: detections.png, curves.png, model_final.pth, log.txt"
    )


if __name__ == "__main__":
    main()
