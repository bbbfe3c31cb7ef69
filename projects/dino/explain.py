#!/usr/bin/env python3
"""Explain with figures how DINO arrives at its detections in an image, and what it learns from one.

Writes explain.html, a self-contained page, and each figure as a PNG: the encoder's proposals,
boxes and masks after each decoder layer, sampling points or attention maps, attention between
queries; for an image with ground truth also denoising and matching. With ground truth it explains
a true positive, a false positive and a missed object, otherwise the most confident detections.
"""

import argparse
import os
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from program import (
    add_data_arguments,
    add_model_arguments,
    data_of,
    interruptible,
    make_folder,
    make_parser,
    one_sentence,
    require_model,
)

MAX_QUERIES = 8
SUREST = 3  # queries to explain by default
EPILOG = """
The image is resized as in evaluation, also to explain its ground truth; training would also flip
and crop it. The noise of denoising is drawn with --seed.

Examples, after `make demo`:

An image and its ground truth:
    $ python projects/dino/explain.py --config-file output/quickstart/config.yaml \\
        --weights output/quickstart/model_final.pth \\
        --annotations output/quickstart/data/val.json --images output/quickstart/data/images

Another of these images, and chosen queries:
    $ python projects/dino/explain.py --config-file output/quickstart/config.yaml \\
        --weights output/quickstart/model_final.pth \\
        --annotations output/quickstart/data/val.json --images output/quickstart/data/images \\
        --image val_00002.jpg --query 0 7 --output output/explain_2

A photograph, with a published checkpoint:
    $ python projects/dino/explain.py --config-file detrex/dino_R_50_4scale_24ep \\
        --input photo.jpg --output explained
"""


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EPILOG)
    add_model_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--input", metavar="IMAGE", help="an image without ground truth")
    what.add_argument("--annotations", metavar="JSON", help="COCO annotations of the images")
    add_data_arguments(parser, among=what)
    parser.add_argument("--images", metavar="FOLDER", help="folder of the annotated images")
    parser.add_argument(
        "--image", metavar="NAME", help="one of them; default: the first that has boxes"
    )
    parser.add_argument(
        "--query",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help=f"queries to explain, at most {MAX_QUERIES}; default: with ground truth those of the "
        "most confident true positive and false positive, and of the largest missed object, "
        "otherwise those with the 3 highest scores",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the denoising noise; default: 0")
    parser.add_argument(
        "--output", type=Path, default=Path("output/explain"), help="default: output/explain"
    )
    return parser


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argument_parser()
    args = parser.parse_args()
    if bool(args.annotations) != bool(args.images):
        parser.error("--annotations and --images go together")
    if args.image and args.input:
        parser.error("--image names one of the annotated images, not of --input")
    if len(args.query) > MAX_QUERIES:
        parser.error(f"--query takes at most {MAX_QUERIES} queries, not {len(args.query)}")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed is a number from 0 to {2**63 - 1}, not {args.seed}")
    return parser, args


if __name__ == "__main__":  # so that --help and wrong options do not wait for the imports below
    parse()


import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from matplotlib.figure import Figure
from PIL import Image

import dino_d2
from dino_d2.boxes import cxcywh_to_xyxy, iou, xyxy_to_cxcywh
from dino_d2.data import class_names, read_image
from dino_d2.data.mapper import check_pixels
from dino_d2.data.masks import decode_mask
from dino_d2.evaluation.analysis import THRESHOLD
from dino_d2.evaluation.matching import ERRORS, ImageMatches, detection_kinds, match_image
from dino_d2.modeling.postprocess import detections_of, non_maximum_suppression
from dino_d2.names import hint, path_hint, plural
from dino_d2.structures import MaskTarget, Target
from dino_d2.trace import Trace, denoised_boxes, image_masks, match_stages, trace
from dino_d2.visualize import (
    draw_attention_maps,
    draw_denoising,
    draw_masks,
    draw_matching,
    draw_proposals,
    draw_refinement,
    draw_sampling,
    draw_self_attention,
    explanation_page,
    surest_queries,
)
from dino_d2.visualize.canvas import shrink
from dino_d2.visualize.style import DPI


class Subject(NamedTuple):
    """The image to explain."""

    path: str
    picture: Image.Image
    target: Target | MaskTarget | None  # None without ground truth
    # Annotations with the model's positions of classes: those of the target, then crowd regions.
    truth: list[dict]


def find_record(dataset: str, name: str | None) -> tuple[dict, list[str]]:
    """A record of a dataset, by default the first with boxes, and the classes.

    Raises:
        ValueError: the dataset is invalid, or has no such image
    """
    classes = class_names([dataset])
    images = MetadataCatalog.get(dataset).image_root
    records = {os.path.relpath(x["file_name"], images): x for x in DatasetCatalog.get(dataset)}
    if name is None:
        return max(records.values(), key=lambda x: len(objects(x)) > 0), classes
    if name not in records:
        raise ValueError(f"'{dataset}' has no image '{name}'; {hint(name, records)}")
    return records[name], classes


def objects(record: dict) -> list[dict]:
    """Annotations except crowd regions, as in training."""
    return [x for x in record["annotations"] if not x["iscrowd"]]


def to_target(
    record: dict, classes: list[str], known: list[str], has_masks: bool = False
) -> Target | MaskTarget:
    """The ground truth of a record without crowd regions, as in training.

    Args:
        record: in Detectron2's format
        classes: of the dataset
        known: classes of the model
        has_masks: whether the model learns masks

    Raises:
        ValueError: the model does not know a class
    """
    boxes = objects(record)
    names = [classes[x["category_id"]] for x in boxes]
    for name in names:
        if name not in known:
            raise ValueError(
                f"'{record['file_name']}' has a box of class '{name}', which the model does not "
                f"know; {hint(name, known)}"
            )
    corners = torch.tensor([x["bbox"] for x in boxes], dtype=torch.float32).view(-1, 4)
    corners[:, 2:] += corners[:, :2]
    size = torch.tensor([record["width"], record["height"]]).tile(2)
    labels = torch.tensor([known.index(name) for name in names], dtype=torch.int64)
    target = Target(labels, xyxy_to_cxcywh(corners / size))
    if not has_masks:
        return target
    shape = record["height"], record["width"]
    found = [decode_mask(x.get("segmentation"), shape) for x in boxes]
    masks = torch.zeros(len(boxes), *shape, dtype=torch.bool)
    for mask, pixels in zip(masks, found, strict=True):
        if pixels is not None:
            mask.copy_(torch.from_numpy(pixels))
    is_known = torch.tensor([x is not None for x in found], dtype=torch.bool)
    return MaskTarget(*target, masks, is_known, torch.ones_like(is_known))


def to_truth(record: dict, classes: list[str], known: list[str]) -> list[dict]:
    """The `truth` of a `Subject`, of the arguments of `to_target`."""
    named = [(x, classes[x["category_id"]]) for x in record["annotations"]]
    truth = [x | {"category_id": known.index(name)} for x, name in named if name in known]
    return sorted(truth, key=lambda x: x["iscrowd"])


def read_subject(args: argparse.Namespace, known: list[str], has_masks: bool = False) -> Subject:
    """Read the image and its ground truth, with masks if the model learns them.

    Raises:
        ValueError: the image or its ground truth cannot be read
    """
    path, target, truth = args.input, None, []
    if args.input:
        if not os.path.isfile(path):
            raise ValueError(f"--input '{path}' is not a file{path_hint(path)}")
    else:
        name = data_of(args, args.annotations, args.images)
        record, classes = find_record(name, args.image)
        check_pixels(record)
        path, target = record["file_name"], to_target(record, classes, known, has_masks)
        truth = to_truth(record, classes, known)
    return Subject(path, Image.fromarray(read_image(path, "RGB")), target, truth)


def run(predictor: dino_d2.Predictor, subject: Subject, seed: int) -> tuple[Trace, str]:
    """A trace, and a sentence about its input."""
    model, target, size = predictor.model, subject.target, subject.picture.size
    inputs = predictor.prepare(subject.picture)
    targets = target and [target._make(x.to(model.device) for x in target)]
    torch.manual_seed(seed)
    recorded = trace(model, model.preprocess_images([inputs]), targets)
    height, width = inputs["image"].shape[-2:]
    return recorded, (
        f"The image of {size[0]} × {size[1]} pixels was resized to {width} × {height}, as in "
        "evaluation."
    )


def choose(
    asked: list[int], subject: Subject, recorded: Trace, predictor: dino_d2.Predictor
) -> dict[int, str]:
    """Queries to explain, and why each is; raises a ValueError if one does not exist."""
    count = recorded.scores[-1].shape[1]
    for query in asked:
        if not 0 <= query < count:
            raise ValueError(f"there is no query {query} for this image: choose 0 to {count - 1}")
    if asked:
        return dict.fromkeys(asked, "chosen by --query")
    chosen = judged_queries(subject, recorded, predictor) if subject.target else {}
    for query in surest_queries(recorded, SUREST):
        if len(chosen) < SUREST:
            chosen.setdefault(query, "one of the highest scores")
    return chosen


def judged_queries(
    subject: Subject, recorded: Trace, predictor: dino_d2.Predictor
) -> dict[int, str]:
    """Queries of a correct, a wrong and a missed detection as far as there are, with reasons."""
    found = match_detections(subject, recorded, predictor)
    judged = list(zip(found.detections, detection_kinds(found), strict=True))
    reasons = defaultdict(list)
    for name, kinds in (("correct detection", ("correct",)), ("false positive", ERRORS)):
        for x, kind in [pair for pair in judged if pair[1] in kinds][:1]:
            of_what = f"{predictor.classes[x['category_id']]} {x['score']:.2f}"
            error = f" ({kind})" if kind in ERRORS else ""
            reasons[x["query"]].append(f"the most confident {name}, {of_what}{error}")
    if subject.target and found.missed.any():
        query, reason = missed_query(subject.target, found.missed, recorded, predictor)
        reasons[query].append(reason)
    return {query: "; ".join(parts) for query, parts in reasons.items() if query >= 0}


def match_detections(
    subject: Subject, recorded: Trace, predictor: dino_d2.Predictor
) -> ImageMatches:
    """What demo.py would draw, matched as in evaluation; each detection has its "query".

    Scores of masks are of their maps, which demo.py resizes first.
    """
    model, last = predictor.model, recorded.output.result.layers[-1]
    choice = model.choose(last)
    if (pixels := recorded.output.pixels) is not None:
        maps = image_masks(last.masks[0, choice.queries[0]], pixels, pixels.maps.shape[-2:])
        inside = maps > 0
        certainty = (maps.sigmoid() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
        choice = choice._replace(scores=choice.scores * certainty)
    found = detections_of(last, choice)
    found = found._replace(boxes=found.boxes.clamp(0, 1))
    kept = torch.ones_like(choice.queries, dtype=torch.bool)
    if model.nms is not None:
        kept = non_maximum_suppression(found, model.nms)
    corners = found.boxes * torch.tensor(subject.picture.size).tile(2)
    boxes = BoxMode.convert(corners[0], BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    columns = boxes, *(x[0] for x in choice)
    names = "bbox", "score", "category_id", "query"
    detections = [
        dict(zip(names, row, strict=True))
        for row in zip(*(x[kept[0]].tolist() for x in columns), strict=True)
    ]
    least = {i: predictor.thresholds.get(x, THRESHOLD) for i, x in enumerate(predictor.classes)}
    return match_image({}, subject.truth, detections, len(detections)).above(THRESHOLD, least)


def missed_query(
    target: Target | MaskTarget, missed: np.ndarray, recorded: Trace, predictor: dino_d2.Predictor
) -> tuple[int, str]:
    """The query that is matched with the largest missed object, or -1; and a reason.

    Args:
        target: of the image
        missed: (M,) bool, or longer with crowd regions at its end
    """
    areas = target.boxes[:, 2:].prod(-1)
    largest = max(np.flatnonzero(missed).tolist(), key=lambda i: float(areas[i]))
    query = int(match_stages(predictor.model, recorded.output, target).queries[-1, largest])
    box, label = recorded.output.result.layers[-1].boxes[0, query], target.labels[largest]
    overlap = iou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(target.boxes[largest]))
    score = recorded.scores[-1][0, query, label]
    return query, (
        f"matched with the largest missed object, {predictor.classes[int(label)]}: its IoU is "
        f"{float(overlap):.2f}, its score for this class {float(score):.2f}"
    )


def draw(
    subject: Subject, recorded: Trace, model: dino_d2.DINO, queries: list[int], classes: list[str]
) -> dict[str, Figure | str]:
    """Figures by name, or sentences on why there is none."""
    subject = subject._replace(picture=shrink(subject.picture))  # once, not for every picture
    what = subject.picture, recorded, queries, classes
    deformable = recorded.layers[-1].locations is not None
    no_selection = "The queries of this model are learned, not selected: there are no proposals."
    one_map = recorded.encoder_attention is not None and len(recorded.shapes) == 1
    look: dict[str, Figure | str] = {
        "attention": "This figure is only for models with a single feature map."
    }
    if deformable:
        look = {"sampling": draw_sampling(*what)}
    elif one_map:
        look = {"attention": draw_attention_maps(*what)}
    pictures = {
        "proposals": draw_proposals(*what, subject.target) if recorded.selection else no_selection,
        "refinement": draw_refinement(*what),
        **({} if recorded.output.pixels is None else {"masks": draw_masks(*what)}),
        **look,
        "self_attention": draw_self_attention(*what),
    }
    return pictures | draw_training(subject, recorded, model, classes)


def draw_training(
    subject: Subject, recorded: Trace, model: dino_d2.DINO, classes: list[str]
) -> dict[str, Figure | str]:
    """As `draw`, for denoising and matching."""
    picture, target = subject.picture, subject.target
    if target is None or not len(target.labels):
        reason = "The image has no boxes to learn from."
        if target is None:
            reason = "This needs an image with ground truth: --annotations and --images."
        return {"denoising": reason, "matching": reason}
    denoising = "This model is trained without denoising."
    if recorded.output.named("dn"):
        denoising = draw_denoising(picture, denoised_boxes(recorded.output, target))
    matching = match_stages(model, recorded.output, target)
    last = recorded.output.result.layers[-1]
    matching = draw_matching(picture, target, matching, last, classes)
    return {"denoising": denoising, "matching": matching}


def write(
    pictures: dict[str, Figure | str],
    subject: Subject,
    facts: list[str],
    queries: dict[int, str],
    folder: Path,
) -> None:
    """Write the page, and a PNG of each figure."""
    contents = {}
    for name, figure in pictures.items():
        contents[name] = figure
        if not isinstance(figure, str):
            file = folder / f"{name}.png"
            figure.savefig(file, dpi=DPI)
            contents[name] = file.read_bytes()
    heading = f"How DINO sees {Path(subject.path).name}"
    page = explanation_page(heading, facts, queries, contents)
    (folder / "explain.html").write_text(page, encoding="utf-8")


def main() -> None:
    parser, args = parse()
    with interruptible(parser.prog):
        work(parser.prog, args)


def work(prog: str, args: argparse.Namespace) -> None:
    with one_sentence(prog):
        predictor = dino_d2.load(args.config_file, args.weights, args.device, args.opts)
        require_model(predictor)
        subject = read_subject(args, predictor.classes, predictor.model.has_masks)
        make_folder(args.output, "--output")
    recorded, resized = run(predictor, subject, args.seed)
    with one_sentence(prog):
        queries = choose(args.query, subject, recorded, predictor)
    facts = [
        resized,
        f"The model is {args.config_file or args.weights} with "
        f"{plural(recorded.scores[-1].shape[1], 'query')} and "
        f"{plural(len(predictor.classes), 'class')}. This page explains:",
    ]
    pictures = draw(subject, recorded, predictor.model, list(queries), predictor.classes)
    write(pictures, subject, facts, queries, args.output)
    number = sum(not isinstance(x, str) for x in pictures.values())
    print(f"explain.html and its {plural(number, 'figure')} are in '{args.output}'")


if __name__ == "__main__":
    main()
