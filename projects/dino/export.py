#!/usr/bin/env python3
"""Export a trained DINO to a file that runs without Detectron2: ONNX, or PyTorch's .pt2.

The file is then run on the given images, and compared with the model on the same padded images. It
is only accepted if boxes agree within 0.5 pixels and scores within 0.001. See EXPORT.md.
"""

import argparse
import logging
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from itertools import cycle, islice
from pathlib import Path

from program import (
    add_data_arguments,
    add_model_arguments,
    data_of,
    find_files,
    interruptible,
    make_parser,
    one_sentence,
    require_model,
    score,
)

EPILOG = """
Examples:

ONNX, for images of at most 104 x 138 pixels, and a server for it:
    $ python projects/dino/export.py --config-file output/quickstart/config.yaml \\
        --weights output/quickstart/model_final.pth --size 104 138 \\
        --images "output/quickstart/data/images/val_000*.jpg" --output output/model.onnx
    $ python projects/dino/serve_onnx.py output/model.onnx

PyTorch's format, for one image at a time:
    $ python projects/dino/export.py --config-file output/quickstart/config.yaml \\
        --weights output/quickstart/model_final.pth --size 104 138 --batch-size 1 \\
        --images "output/quickstart/data/images/val_000*.jpg" --output output/model.pt2

INT8, calibrated on training images:
    $ python projects/dino/export.py --weights output/quickstart --size 104 138 \\
        --images "output/quickstart/data/images/val_000*.jpg" --output output/model_int8.onnx \\
        --int8 --calibration "output/quickstart/data/images/train_*.jpg" \\
        --val-json output/quickstart/data/val.json --val-images output/quickstart/data/images
"""

CALIBRATED = 64  # images, spread evenly over those that are named


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EPILOG)
    parser.add_argument("--output", type=Path, required=True, help="file, .onnx or .pt2")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        required=True,
        metavar=("HEIGHT", "WIDTH"),
        help="image size of the file, in pixels; other images are resized and padded to it",
    )
    parser.add_argument(
        "--images", nargs="+", required=True, help="images, folders, patterns to compare on"
    )
    parser.add_argument("--batch-size", type=int, help="images at a time; default: any number")
    parser.add_argument(
        "--keep-operator",
        action="store_true",
        help="keep dino_d2's operator in a .pt2, which is then faster but needs dino_d2 to run",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=score,
        default=0.1,
        help="lowest score of detections that are compared; default: 0.1",
    )
    narrow = parser.add_argument_group("a file in lower precision, checked by its AP")
    kinds = narrow.add_mutually_exclusive_group()
    kinds.add_argument(
        "--int8", action="store_true", help="convolutions and linear layers of a .onnx in INT8"
    )
    kinds.add_argument("--bf16", action="store_true", help="a .pt2 in mixed precision, bfloat16")
    narrow.add_argument(
        "--calibration",
        nargs="+",
        metavar="IMAGES",
        help="calibration images for INT8, like those that the model will see: images, folders, "
        f"patterns; up to {CALIBRATED} are used",
    )
    narrow.add_argument("--val-json", metavar="FILE", help="annotations, COCO format")
    narrow.add_argument("--val-images", metavar="FOLDER", help="where its images are")
    add_data_arguments(parser, among=narrow, files=["val_json"])
    add_model_arguments(parser)
    return parser


if __name__ == "__main__":  # so that --help and wrong options do not wait for the imports below
    argument_parser().parse_args()


import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import inference_on_dataset
from torch import Tensor

import dino_d2
from dino_d2.data import Mapper
from dino_d2.engine.evaluator import ErrorAnalysisEvaluator
from dino_d2.export import Exportable, ExportedModel, check, export, save
from dino_d2.export.differences import (
    BOX_TOLERANCE,
    MASK_TOLERANCE,
    SCORE_TOLERANCE,
    Differences,
    compare,
)
from dino_d2.export.quantize import quantize
from dino_d2.export.runtime import (
    About,
    Exported,
    ExportError,
    detections,
    fit,
    installed,
    kind_of,
    needs,
)
from dino_d2.images import SUFFIXES as IMAGE_SUFFIXES
from dino_d2.names import plural
from dino_d2.progress import alive, progress
from dino_d2.structures import Detections, MaskDetections

Batch = tuple[Tensor, Tensor]  # images and image_sizes
AP_TOLERANCE = 0.5  # of boxes and of masks, of 100


def spread(paths: list[Path]) -> list[Path]:
    """Some of many images, spread evenly."""
    step = max(1, len(paths) / CALIBRATED)
    return [paths[int(i * step)] for i in range(min(len(paths), CALIBRATED))]


def make_batches(images: list[np.ndarray], size: tuple[int, int], count: int | None) -> list[Batch]:
    """Batches of `count` images in the format of the file; some repeat to fill the last one."""
    fitted = [fit(image, size) for image in images]
    if count:
        fitted = list(islice(cycle(fitted), -(-len(fitted) // count) * count))
    count = count or 3  # the graph is traced with two images, and must accept other numbers
    parts = [zip(*fitted[i : i + count], strict=True) for i in range(0, len(fitted), count)]
    return [tuple(torch.from_numpy(np.stack(x)) for x in part) for part in parts]


def compare_all(
    expected: list[Detections], actual: list[Detections], threshold: float
) -> Differences:
    each = [compare(*pair, threshold) for pair in zip(expected, actual, strict=True)]
    return Differences(*map(torch.cat, zip(*each, strict=True)))


@torch.no_grad()
def padded(model: dino_d2.DINO, images: Tensor, sizes: Tensor) -> Detections | MaskDetections:
    """The model's detections in padded images, which the file should reproduce."""
    found = Exportable(model)(images.to(model.device), sizes.to(model.device))
    return detections(x.cpu() for x in found)


@torch.no_grad()
def unpadded(model: dino_d2.DINO, images: Tensor, sizes: Tensor) -> Detections:
    """The model's detections in the unpadded images, as in evaluation."""
    cut = [image[:, :h, :w] for image, (h, w) in zip(images, sizes.tolist(), strict=True)]
    found = [model([{"image": image}])[0]["instances"].to("cpu") for image in cut]
    parts = [(x.pred_boxes.tensor, x.scores, x.pred_classes) for x in found]
    return Detections(*zip(*parts, strict=True))


def verify(
    path: Path,
    model: dino_d2.DINO,
    batches: list[Batch],
    expected: list[Detections],
    threshold: float,
) -> bool:
    """Whether the file reproduces the expected detections; prints the differences."""
    file = Exported(path)
    found = compare_all(
        expected,
        [file(*batch) for batch in progress(batches, "batch", what="comparing")],
        threshold,
    )
    alone = [
        unpadded(model, *batch) for batch in progress(batches, "batch", what="without padding")
    ]
    effect = compare_all(alone, expected, threshold)
    print(
        f"{plural(len(found.boxes), 'detection')} compared with the model's: boxes differ by up to "
        f"{found.boxes.max():.2g} pixels, scores by up to {found.scores.max():.2g}, masks by up to "
        f"{found.masks.max():.2g} of their union\n"
        f"padding changes the model's own boxes by {effect.boxes.median():.2g} pixels and scores "
        f"by {effect.scores.median():.2g} (medians)"
    )
    return found.tolerable


def average_precisions(path: Path, name: str, runtime: str = "") -> dict[str, float]:
    """AP of boxes and, for Mask DINO, of masks, of a file on a registered data set."""
    model = ExportedModel(path, runtime)
    image_format = model.file.about.image_format
    mapper = Mapper(is_train=False, augmentations=[], image_format=image_format)
    loader = build_detection_test_loader(DatasetCatalog.get(name), mapper=mapper)
    with redirect_stdout(StringIO()):  # of pycocotools
        found = inference_on_dataset(model, loader, ErrorAnalysisEvaluator(name))
    return {kind: found[kind]["AP"] for kind in ("bbox", "segm") if kind in found}


def to_int8(path: Path, batches: list[Batch]) -> None:
    """Replace an ONNX file by its INT8 version."""
    size = path.stat().st_size
    with alive("the quantization"):
        count = quantize(path, path, batches)
    print(
        f"{count} convolutions and linear layers are in INT8; the file is "
        f"{path.stat().st_size / size:.0%} of its float32 size"
    )


def narrowed_well(path: Path, name: str, before: dict[str, float]) -> bool:
    """Whether a file in lower precision has an AP close to the float32 one, in all installed
    runtimes; prints all.
    """
    losses = []
    for runtime in installed(path):
        after = average_precisions(path, name, runtime)
        for kind, ap in before.items():
            losses.append(ap - after[kind])
            print(f"{runtime}: AP of {kind} {ap:.2f} in float32, {after[kind]:.2f} in this file")
    return max(losses) < AP_TOLERANCE


def validation_set(args: argparse.Namespace, classes: list[str]) -> str:
    """The name of the validation data, registered; a ValueError if its classes are others."""
    name = data_of(args, args.val_json, args.val_images)
    own = MetadataCatalog.get(name).thing_classes
    if own != classes:
        raise ValueError(f"the validation data has the classes {own}, but the model {classes}")
    return name


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.batch_size is not None and args.batch_size < 1:
        parser.error("--batch-size has to be 1 or more")
    is_onnx = kind_of(args.output) == ".onnx"
    if is_onnx:
        if args.keep_operator:
            parser.error("--keep-operator is for .pt2 files: ONNX only has standard operators")
        for name in ("onnx", "onnxscript", "onnxruntime"):
            needs(name)
    if args.int8 and not is_onnx:
        parser.error("--int8 is for .onnx files: ONNX Runtime and OpenVINO compute in INT8")
    if args.bf16 and is_onnx:
        parser.error(
            "--bf16 is for .pt2 files: OpenVINO can run any ONNX file in bfloat16 "
            "(demo.py --runtime openvino --dtype bfloat16)"
        )
    check_narrow(parser, args)


def check_narrow(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if bool(args.val_json) != bool(args.val_images):
        parser.error("--val-json and --val-images go together")
    if args.data and args.val_json:
        parser.error("--data and --val-json exclude each other")
    if args.int8 != bool(args.calibration):
        parser.error("--int8 and --calibration IMAGES go together")
    narrow, has_data = args.int8 or args.bf16, bool(args.data or args.val_json)
    if narrow != has_data:
        parser.error(
            "--int8 and --bf16 go together with validation data: --data, or --val-json and "
            "--val-images"
        )


def check_output(path: Path) -> None:
    """Create the output's folder; raises an OSError if it is not writable."""
    if path.is_dir():
        raise IsADirectoryError(f"--output '{path}' is a folder: name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(
            f"nothing can be written into '{path.parent}': name another --output ({error.strerror})"
        ) from error


def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    threshold, size = args.confidence_threshold, tuple(args.size)
    with one_sentence(parser.prog):
        check_arguments(parser, args)
        paths = find_files(args.images, IMAGE_SUFFIXES, "--images")
        calibration = find_files(args.calibration or [], IMAGE_SUFFIXES, "--calibration")
        predictor = dino_d2.load(args.config_file, args.weights, args.device, args.opts)
        require_model(predictor)
        check(predictor.model, size)
        images = [predictor.read(path) for path in paths]
        typical = [predictor.read(path) for path in spread(calibration)]
        if images[0].dtype != np.uint8:
            raise ExportError(f"exported files need images of 8 bits, not {predictor.image_format}")
        name = validation_set(args, predictor.classes) if args.int8 or args.bf16 else ""
        check_output(args.output)
    batches = make_batches(images, size, args.batch_size)
    expected = [padded(predictor.model, *x) for x in progress(batches, "batch", what="detecting")]
    if not any((x.scores >= threshold).any() for x in expected):
        sys.exit(
            f"{parser.prog}: no detection in these images scores {threshold} or more, so there is "
            "nothing to compare: name other images, or a lower --confidence-threshold"
        )
    unverified = args.output.with_stem(f"{args.output.stem}.unverified")
    logging.getLogger("onnxscript").setLevel(
        logging.ERROR
    )  # it warns of constants that it cannot fold
    about = About(
        predictor.classes, size, predictor.image_format, args.batch_size, predictor.thresholds
    )

    def write(dtype: torch.dtype) -> None:
        options = size, args.batch_size, args.keep_operator, dtype
        try:
            with alive("the export"):
                save(export(predictor.model, *options), unverified, about)
        except (ExportError, OSError) as error:
            sys.exit(f"{parser.prog}: {error}")

    write(torch.float32)
    if not verify(unverified, predictor.model, batches, expected, threshold):
        sys.exit(
            f"{parser.prog}: that is more than {BOX_TOLERANCE} pixels, {SCORE_TOLERANCE} of a "
            f"score or {MASK_TOLERANCE} of a mask: '{unverified}' is kept for inspection, but "
            "differs from the model"
        )
    if name:
        before = average_precisions(unverified, name)
        if args.bf16:
            write(torch.bfloat16)
        else:
            to_int8(unverified, make_batches(typical, size, args.batch_size))
        if not narrowed_well(unverified, name, before):
            sys.exit(
                f"{parser.prog}: that is {AP_TOLERANCE} or more below: '{unverified}' is kept for "
                "inspection (INT8 may lose less with more typical --calibration images)"
            )
    unverified.replace(args.output)
    print(f"exported to '{args.output}': see EXPORT.md for how to run it")


if __name__ == "__main__":
    with interruptible("export.py", "the file was written and compared"):
        main()
