#!/usr/bin/env python3
"""Detect objects in images and videos: annotated images, and the detections as JSON."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from program import (
    add_data_arguments,
    add_model_arguments,
    data_of,
    make_folder,
    make_parser,
    one_sentence,
    score,
)

EPILOG = """
The JSON is a list in COCO's results format, as pycocotools' loadRes reads it: image_id,
category_id, bbox (x, y, width, height in pixels) and score; besides the names, file_name and
category, and for videos the frame, counted from 0; with --track, the track_id of objects in more
than one frame, counted from 0 in each video. With --annotations, ids are those of that file.
Without, images and then frames are counted from 1 in the order of the input, and category ids are
COCO's for the 80 classes of COCO, for others the position of the class, counted from 1.

Examples:

A training of one's own:
    $ python projects/dino/demo.py --config-file output/quickstart/config.yaml \\
        --weights output/quickstart/model_final.pth \\
        --input "output/quickstart/data/images/val_*.jpg" --output output/detected

The val split of a folder of data, as Roboflow or Ultralytics export it:
    $ python projects/dino/demo.py --config-file output/mine/config.yaml \\
        --weights output/mine/model_best.pth --data my/cells --output output/detected

Detections for an evaluation, all of them, with the ids of the annotations:
    $ python projects/dino/demo.py --config-file output/quickstart/config.yaml \\
        --weights output/quickstart/model_final.pth \\
        --input "output/quickstart/data/images/val_*.jpg" --batch-size 8 \\
        --annotations output/quickstart/data/val.json --confidence-threshold 0 --json detected.json

A published checkpoint by name, see the README; folders, images and videos:
    $ python projects/dino/demo.py --config-file detrex/dino_R_50_4scale_24ep \\
        --input photos/ cat.jpg street.mp4 --output output/detected

Small objects in large images, in tiles of 640 pixels:
    $ python projects/dino/demo.py --weights output/mine --input aerial/ --tiles 640 \\
        --output output/detected

The objects of a video, with ids that they keep:
    $ python projects/dino/demo.py --weights output/mine --input street.mp4 --track \\
        --output output/detected --json tracks.json

The camera, in a window until q is pressed:
    $ python projects/dino/demo.py --config-file detrex/dino_R_50_4scale_24ep --webcam --show
"""


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EPILOG)
    parser.add_argument(
        "--input",
        nargs="+",
        default=[],
        help="images, videos, folders and patterns of them; images that this program has drawn "
        "are skipped, unless named explicitly",
    )
    parser.add_argument(
        "--webcam",
        type=int,
        nargs="?",
        const=0,
        metavar="NUMBER",
        help="a camera, by default the first (0), until q is pressed in the window, or Ctrl-C",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for annotated images and videos; inputs in this folder are not overwritten; "
        "small images are drawn enlarged, so that there is room for labels",
    )
    parser.add_argument("--json", type=Path, help="file for the detections, see below")
    parser.add_argument("--show", action="store_true", help="in a window; needs OpenCV")
    parser.add_argument(
        "--annotations", type=Path, help="COCO-format file that gives the JSON its ids"
    )
    add_data_arguments(parser, files=())
    parser.add_argument(
        "--confidence-threshold",
        type=threshold,
        nargs="+",
        default=[],
        metavar="SCORE",
        help="0 to 1, or of single classes, as in cat=0.4 dog=0.3; default: those of the best F1 "
        "at the last evaluation of the training run, otherwise 0.5",
    )
    parser.add_argument(
        "--tiles",
        type=int,
        metavar="PIXELS",
        help="detect in tiles of this size that overlap by a fifth, each resized as an image "
        "would be, and merge the detections: for small objects in large images; needs supervision",
    )
    parser.add_argument(
        "--track",
        action="store_true",
        help="give the objects of a video ids, which they keep from frame to frame; needs trackers",
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, help="images, or tiles, at once (default: 1)"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="of matrix products; bfloat16 is several times faster on hardware that knows it",
    )
    parser.add_argument(
        "--runtime",
        default="",
        metavar="NAME",
        help="of a .onnx file: onnxruntime or openvino; default: the first that is installed",
    )
    return parser


def threshold(text: str) -> tuple[str, float]:
    """The `type` of an option that is a score, for all classes (""), or for one as in cat=0.4."""
    name, _, value = text.rpartition("=")
    return name, score(value)


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argument_parser()
    args = parser.parse_args()
    if not (args.input or args.data) and args.webcam is None:
        parser.error("say what to look at: --input FILES, --data FOLDER or --webcam")
    if args.data and args.annotations:
        parser.error("--data has annotations of its own: leave out --annotations")
    if not (args.output or args.json or args.show):
        parser.error("say where to: --output FOLDER, --json FILE or --show")
    if args.annotations and not args.json:
        parser.error("--annotations is about the ids of --json FILE")
    if args.batch_size < 1:
        parser.error("--batch-size has to be 1 or more")
    if args.tiles is not None and args.tiles < 1:
        parser.error("--tiles has to be 1 or more")
    return parser, args


if __name__ == "__main__":  # so that --help and wrong options do not wait for the imports below
    parse()


import torch
from demo_annotate import Annotator, find_inputs, run
from demo_track import trackers
from demo_video import Video, Window, opencv
from detectron2.data import MetadataCatalog

import dino_d2
from dino_d2.atomic import replacing
from dino_d2.data import annotations_of
from dino_d2.data.coco_writer import category_ids, image_ids
from dino_d2.data.normalise import read_annotations
from dino_d2.evaluation.analysis import THRESHOLD
from dino_d2.tiles import supervision


def check_videos(
    args: argparse.Namespace, videos: Sequence[Path | Video], annotations: dict[str, list] | None
) -> None:
    """Refuse what the videos, or their absence, and the installed packages rule out.

    Raises:
        ValueError: there are videos where there should be none, or none
        ImportError: a package is missing
    """
    if videos and annotations:
        raise ValueError("annotations are of images: leave out videos and cameras")
    if args.track and not videos:
        raise ValueError("--track is for videos and cameras, and there are none in the input")
    if videos:
        opencv()
    if args.tiles:
        supervision()
    if args.track:
        trackers()


def prepare_outputs(args: argparse.Namespace, inputs: Sequence[Path]) -> None:
    """Create the output folders.

    Args:
        inputs: files that are read, besides the annotations, the config and the weights

    Raises:
        IsADirectoryError: the JSON is a folder
        ValueError: the JSON would replace an input, or its folder cannot be created
    """
    if args.output:
        make_folder(args.output, "--output")
    if args.json:
        if args.json.is_dir():
            raise IsADirectoryError(f"--json '{args.json}' is a folder")
        read = (*inputs, *filter(None, (args.annotations, args.config_file, args.weights)))
        if args.json.exists() and args.json.resolve() in {Path(x).resolve() for x in read}:
            raise ValueError(f"--json '{args.json}' would replace an input: name another file")
        make_folder(args.json.parent, "the folder of --json")


def check_results(args: argparse.Namespace, predictor: dino_d2.Predictor) -> None:
    """Raise a ValueError for options of detections if the model gives none."""
    given = (
        ("--json", args.json),
        ("--confidence-threshold", args.confidence_threshold),
        ("--tiles", args.tiles),
        ("--track", args.track),
    )
    for option, value in given:
        if value and not predictor.gives_instances:
            raise ValueError(
                f"{option} is about detections, and this model gives segments alone: leave it out, "
                "or set MODEL.DINO.TEST.INSTANCE_ON (model.instance_on) to True with --opts"
            )


def make_annotator(
    args: argparse.Namespace,
    inputs: Sequence[Path],
    annotations: dict[str, list] | None,
    passed_over: int,
) -> Annotator:
    """Load the model and open the outputs.

    Raises:
        ValueError: the model or the window is not available, or annotations have other classes
    """
    window = Window() if args.show else None
    dtype, least = getattr(torch, args.dtype), dict(args.confidence_threshold)
    predictor = dino_d2.load(
        *(args.config_file, args.weights, args.device, args.opts, dtype, least, args.runtime)
    )
    check_results(args, predictor)
    predictor.thresholds = dict.fromkeys(predictor.classes, THRESHOLD) | predictor.thresholds
    return Annotator(
        predictor,
        output=args.output,
        batch_size=args.batch_size,
        categories=category_ids(predictor.classes, annotations) if args.json else None,
        taken=[*inputs, args.json] if args.json else inputs,
        window=window,
        passed_over=passed_over,
        tiles=args.tiles,
        track=args.track,
    )


def main() -> None:
    parser, args = parse()
    with one_sentence(parser.prog):
        annotations = read_annotations(args.annotations) if args.annotations else None
        if args.data:
            name = data_of(args)
            annotations, root = annotations_of(name), Path(MetadataCatalog.get(name).image_root)
            args.input = args.input or [root / x["file_name"] for x in annotations["images"]]
        images, videos, passed_over = find_inputs(args.input)
        inputs = [*images, *videos]
        if args.webcam is not None:
            videos = [*videos, Video(args.webcam)]
        check_videos(args, videos, annotations)
        ids = image_ids(images, annotations)
        prepare_outputs(args, inputs)
        annotator = make_annotator(args, inputs, annotations, passed_over)
    try:
        run(annotator, images, ids, videos)
    except KeyboardInterrupt:
        if args.webcam is None:  # ends a camera's video
            done = annotator.summary() + (f": see '{args.output}'" if args.output else "")
            lacks = f"; '{args.json}' is not written" if args.json else ""
            sys.exit(f"{parser.prog}: interrupted after {done}{lacks}")
    if not annotator.images + annotator.frames:
        sys.exit(f"{parser.prog}: nothing was done: no input could be read")
    if args.json:
        with one_sentence(parser.prog), replacing(str(args.json)) as file:
            file.write(json.dumps(annotator.results, indent=1).encode())
    places = " and ".join(f"'{path}'" for path in (args.output, args.json) if path)
    print(annotator.summary() + (f": see {places}" if places else ""))


if __name__ == "__main__":
    main()
