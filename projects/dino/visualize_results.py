#!/usr/bin/env python3
"""See where a detector goes wrong: the worst images, tables, curves and a confusion matrix.

An image is the worse, the more boxes it misses and the surer its false positives are: the number of
the first plus the scores of the second. Index.html shows everything that is written: sheets of the
worst images with the annotations to the left and the detections to the right, and tables (CSV) and
pictures (PNG) of AP by class and size, precision and recall, confusion and kinds of errors.
"""

import argparse
import sys
from html import escape
from pathlib import Path

from PIL import Image
from program import make_parser, one_sentence

from dino_d2.data import DatasetError, check, read_image, read_results
from dino_d2.data.coco_faults import read
from dino_d2.data.mapper import check_pixels
from dino_d2.evaluation.errors import THRESHOLD, Analysis, analyse, evaluate, worst_first
from dino_d2.evaluation.evaluator import write_analysis
from dino_d2.evaluation.matching import false_positives
from dino_d2.visualize import LEGEND, contact_sheet, draw_image_errors

PER_SHEET = 4
CAPTIONS = {
    "per_class": "AP of each class, as in COCO's evaluation; markers are AP at IoU 0.50 and 0.75.",
    "ap_by_size": "AP and average recall of small, medium and large boxes.",
    "precision_recall": "Precision over recall, of each class and at several IoUs. A curve that "
    "drops to 0 early belongs to a class with boxes that are never found.",
    "confusion_matrix": "What annotated boxes (rows) are detected as (columns), above the "
    "threshold.",
    "errors": "Kinds of errors above the threshold, as in TIDE (arXiv 2008.08115).",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 1100px }
body { padding: 0 1rem }
img { max-width: 100%; height: auto; background: white }
pre { overflow-x: auto }
figure { margin: 1.5rem 0 }
:root { color-scheme: light dark }
"""
EPILOG = """
Examples:

What evaluation left in the output folder of a training:
    $ visualize_results.py --annotations output/quickstart/data/val.json \\
        --images output/quickstart/data/images \\
        --results output/quickstart/inference/coco_instances_results.json --output errors

What demo.py detected:
    $ demo.py --config-file output/quickstart/config.yaml \\
        --weights output/quickstart/model_final.pth --confidence-threshold 0 \\
        --input "output/quickstart/data/images/val_*.jpg" --json detected.json \\
        --annotations output/quickstart/data/val.json
    $ visualize_results.py --annotations output/quickstart/data/val.json \\
        --images output/quickstart/data/images --results detected.json --output errors
"""


def load(args: argparse.Namespace) -> Analysis:
    """
    Raises:
        DatasetError: annotations, images or results cannot be used
    """
    check((), [f"{args.annotations}@{args.images}"], None)
    dataset = read(str(args.annotations))
    results = read_results(args.results, dataset)
    return analyse(evaluate(dataset, results), args.confidence_threshold)


def draw_worst(analysis: Analysis, args: argparse.Namespace) -> list[Path]:
    """Write sheets of the worst images.

    Returns:
        the files

    Raises:
        DatasetError: an image cannot be read, or has another size than its annotations say
    """
    names = {x.category_id: x.name for x in analysis.classes}
    worst = [pair for pair in worst_first(analysis) if pair[0] > 0][: args.num_images]
    pictures = []
    for number, (badness, matching) in enumerate(worst, start=1):
        path = args.images / matching.image["file_name"]
        check_pixels(matching.image | {"file_name": str(path)})
        picture = Image.fromarray(read_image(str(path), "RGB"))
        wrong, missed = len(false_positives(matching)), int(matching.missed.sum())
        caption = f"{number}. {path.name}: missed {missed}, false positives {wrong} ({badness:.2f})"
        pictures.append((draw_image_errors(picture, matching, names), caption))
    sheets = []
    for start in range(0, len(pictures), PER_SHEET):
        sheets.append(args.output / f"worst_{start // PER_SHEET:03}.png")
        title = f"The worst images: annotated, and detected with score ≥ {analysis.threshold:g}"
        contact_sheet(pictures[start : start + PER_SHEET], 1, title, LEGEND).save(sheets[-1])
    return sheets


def summary(analysis: Analysis, rows: int = 20) -> str:
    """A table: the mean over the classes, then the classes of the lowest AP."""
    everything = analysis.sizes[0]
    head = f"{'class':24} {'boxes':>7} {'AP':>6} {'AP50':>6} {'AP75':>6} {'AR':>6}"
    mean = [everything.AP, everything.AP50, everything.AP75, everything.AR]
    lines = [head, _row("all", everything.boxes, mean)]
    scored = sorted((x for x in analysis.classes if x.boxes), key=lambda x: x.AP)
    for x in scored[:rows]:
        lines.append(_row(x.name, x.boxes, [x.AP, x.AP50, x.AP75, x.AR]))
    if len(scored) > rows:
        lines.append(f"... and {len(scored) - rows} better classes, see per_class.csv")
    return "\n".join(lines)


def _row(name: str, boxes: int, values: list[float]) -> str:
    name = name if len(name) <= 24 else f"{name[:23]}…"
    return f"{name:24} {boxes:7,} " + " ".join(f"{value:6.1f}" for value in values)


def write_index(analysis: Analysis, pictures: list[Path], sheets: list[Path], path: Path) -> None:
    """A page of everything that was written beside it."""
    tables = "".join(
        f'<li><a href="{escape(x.stem)}.csv">{escape(x.stem)}.csv</a></li>' for x in pictures
    )
    figures = "".join(
        f'<figure><img src="{x.name}" alt="{escape(CAPTIONS[x.stem])}">'
        f"<figcaption>{escape(CAPTIONS[x.stem])}</figcaption></figure>"
        for x in pictures
    )
    worst = "".join(
        f'<figure><img src="{x.name}" alt="worst images, sheet {number}"></figure>'
        for number, x in enumerate(sheets, start=1)
    )
    path.write_text(
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Error analysis</title><style>{STYLE}</style></head><body>"
        f"<h1>Error analysis</h1><pre>{escape(summary(analysis, 80))}</pre><ul>{tables}</ul>"
        f"{figures}<h2>The worst images</h2>"
        f"{worst or '<p>No image has a mistake above the threshold.</p>'}</body></html>",
        encoding="utf-8",
    )


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EPILOG)
    parser.add_argument("--annotations", type=Path, required=True, help="file of COCO's format")
    parser.add_argument("--images", type=Path, required=True, help="folder of its images")
    parser.add_argument("--results", type=Path, required=True, help="detections, COCO's results")
    parser.add_argument("--output", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--num-images", type=int, default=12, help="of the worst; default: 12")
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=THRESHOLD,
        help="least score of what is drawn, confused and counted as error; AP takes all "
        f"detections; default: {THRESHOLD}",
    )
    return parser


def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    if args.num_images < 0:
        parser.error("--num-images has to be 0 or more")
    with one_sentence(parser.prog):
        analysis = load(args)
        args.output.mkdir(parents=True, exist_ok=True)
    try:
        sheets = draw_worst(analysis, args)
    except DatasetError as error:
        sys.exit(f"{parser.prog}: {error}")
    pictures = write_analysis(analysis, args.output)
    index = args.output / "index.html"
    write_index(analysis, pictures, sheets, index)
    print(summary(analysis))
    print(f"Everything is in '{index}'")


if __name__ == "__main__":
    main()
