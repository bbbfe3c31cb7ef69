#!/usr/bin/env python3
"""Show the errors of a detector: the worst images, tables, curves and a confusion matrix.

Images are ranked by their number of missed boxes plus the scores of their false positives.
index.html is self-contained: sheets of the worst images with annotations left and detections right,
and tables (CSV) and plots (PNG) of AP by class and size, precision and recall, confusion, types
of errors and what each costs in AP. All of these are written as files, too.
"""

import argparse
import io
import sys
from html import escape
from pathlib import Path

from program import (
    add_data_arguments,
    data_of,
    interruptible,
    make_folder,
    make_parser,
    one_sentence,
    score,
)

EPILOG = """
Examples, after `make demo`:

The evaluation results in the output folder of a training run:
    $ python projects/dino/visualize_results.py --annotations output/quickstart/data/val.json \\
        --images output/quickstart/data/images \\
        --results output/quickstart/inference/coco_instances_results.json --output errors

The detections of demo.py:
    $ python projects/dino/demo.py --config-file output/quickstart/config.yaml \\
        --weights output/quickstart/model_final.pth --confidence-threshold 0 \\
        --input "output/quickstart/data/images/val_*.jpg" --json detected.json \\
        --annotations output/quickstart/data/val.json
    $ python projects/dino/visualize_results.py --annotations output/quickstart/data/val.json \\
        --images output/quickstart/data/images --results detected.json --output errors
"""


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EPILOG)
    add_data_arguments(parser)
    parser.add_argument("--annotations", type=Path, help="file in COCO's format")
    parser.add_argument("--images", type=Path, help="folder of its images")
    parser.add_argument("--results", type=Path, required=True, help="detections, COCO's results")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--num-images", type=int, default=12, help="worst images; default: 12")
    parser.add_argument(
        "--confidence-threshold",
        type=score,
        help="lowest score of detections that are drawn and counted as errors; AP uses all "
        "detections; default: for each class the threshold with the best F1 at IoU 0.5",
    )
    return parser


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argument_parser()
    args = parser.parse_args()
    if bool(args.annotations) != bool(args.images):
        parser.error("--annotations and --images go together")
    if bool(args.annotations) == bool(args.data):
        parser.error("name the annotated data: --data, or --annotations and --images")
    if args.num_images < 0:
        parser.error("--num-images has to be 0 or more")
    return parser, args


if __name__ == "__main__":  # so that --help and wrong options do not wait for the imports below
    parse()


from detectron2.data import MetadataCatalog
from PIL import Image

from dino_d2.data import DatasetError, check, read_image, read_results
from dino_d2.data.coco import annotations_of
from dino_d2.data.mapper import check_pixels
from dino_d2.engine.evaluator import write_analysis
from dino_d2.evaluation.analysis import Analysis, analyse, evaluate_boxes, worst_first
from dino_d2.evaluation.matching import false_positives
from dino_d2.names import plural
from dino_d2.progress import alive, progress
from dino_d2.visualize import (
    LEGEND,
    contact_sheet,
    data_uri,
    draw_image_errors,
    html_figure,
    html_page,
)
from dino_d2.visualize.style import short_name

PER_SHEET = 4
CAPTIONS = {
    "per_class": "AP of each class, as in COCO's evaluation; markers are AP at IoU 0.50 and 0.75.",
    "ap_by_size": "AP and average recall of small, medium and large boxes.",
    "precision_recall": "Precision over recall, by class and at several IoUs. If the curve of a "
    "class drops to 0 early, many of its boxes are never detected. Dots mark the best F1, the "
    "harmonic mean of precision and recall.",
    "confusion_matrix": "Annotated classes (rows) and detected classes (columns), above the "
    "threshold. Here, missed boxes are those that are not detected as any class.",
    "errors": "Left: types of errors above the threshold, as in TIDE (arXiv 2008.08115). Here, "
    "missed boxes are all without a detection of their class, even if another class was "
    "detected; TIDE leaves those out. Right: TIDE's dAP, how much AP would rise without errors of "
    "this type, over detections of all scores. It is a mean over COCO's ten IoU thresholds, most "
    "of which are stricter than 0.5. As in TIDE, missed boxes are here only those that no "
    "detection would match even with the right class or box. errors.csv has both by class.",
}


def load(args: argparse.Namespace) -> Analysis:
    """Analyse the results; raises a DatasetError for invalid annotations, images or results."""
    name = data_of(args, args.annotations, args.images)
    check((), [name], None)
    args.images = Path(MetadataCatalog.get(name).image_root)
    dataset = annotations_of(name)
    results = read_results(args.results, dataset)
    with alive("the error analysis"):
        return analyse(evaluate_boxes(dataset, results), args.confidence_threshold)


def draw_worst(analysis: Analysis, args: argparse.Namespace) -> list[Path]:
    """Write sheets of the worst images, replacing those of an earlier run; returns their paths.

    An image that cannot be read, or has another size than its annotations say, is reported and
    skipped.
    """
    names = {x.category_id: x.name for x in analysis.classes}
    worst = [pair for pair in worst_first(analysis) if pair[0] > 0][: args.num_images]
    pictures = []
    for number, (badness, matching) in enumerate(progress(worst, "image"), start=1):
        path = args.images / matching.image["file_name"]
        try:
            check_pixels(matching.image | {"file_name": str(path)})
            picture = Image.fromarray(read_image(str(path), "RGB"))
        except DatasetError as error:
            print(f"left out of the worst images: {error}", file=sys.stderr)
            continue
        wrong, missed = len(false_positives(matching)), int(matching.missed.sum())
        caption = f"{number}. {path.name}: missed {missed}, false positives {wrong} ({badness:.2f})"
        pictures.append((draw_image_errors(picture, matching, names), caption))
    for path in args.output.glob("worst_*.png"):
        path.unlink()
    sheets = []
    for start in range(0, len(pictures), PER_SHEET):
        sheets.append(args.output / f"worst_{start // PER_SHEET:03}.png")
        title = f"The worst images: annotated, and detected with {analysis.limit}"
        contact_sheet(pictures[start : start + PER_SHEET], 1, title, LEGEND).save(sheets[-1])
    return sheets


def summary(analysis: Analysis, rows: int = 20) -> str:
    """A table of the mean over the classes, and the classes of the lowest AP."""
    everything = analysis.sizes[0]
    head = f"{'class':24} {'boxes':>7} {'AP':>6} {'AP50':>6} {'AP75':>6} {'AR':>6}"
    mean = [everything.AP, everything.AP50, everything.AP75, everything.AR]
    lines = [head, _row("all", everything.boxes, mean)]
    scored = sorted((x for x in analysis.classes if x.boxes), key=lambda x: x.AP)
    for x in scored[:rows]:
        lines.append(_row(x.name, x.boxes, [x.AP, x.AP50, x.AP75, x.AR]))
    if len(scored) > rows:
        lines.append(f"... and {plural(len(scored) - rows, 'better class')}, see per_class.csv")
    return "\n".join(lines)


def thresholds_used(analysis: Analysis, most: int = 20) -> str:
    """Which detections are counted and drawn."""
    if not analysis.of_class:
        return f"Only detections with scores ≥ {analysis.threshold:.3g} are drawn and counted."
    names = {x.category_id: x.name for x in analysis.classes}
    own = [f"{short_name(names[id])} {value:.3g}" for id, value in analysis.of_class.items()]
    more = f" and {len(own) - most} more, see per_class.csv" if len(own) > most else ""
    return (
        "Only detections above the threshold of their class are drawn and counted, that of its "
        f"best F1 at IoU 0.5: {', '.join(own[:most])}{more}. For all classes together it is "
        f"{analysis.threshold:.3g}."
    )


def _row(name: str, boxes: int, values: list[float]) -> str:
    return f"{short_name(name):24} {boxes:7,} " + " ".join(f"{value:6.1f}" for value in values)


def index_page(analysis: Analysis, pictures: list[Path], sheets: list[Path] | None) -> str:
    """A self-contained HTML page; its sheets are JPEGs, a tenth as large.

    Args:
        pictures: of the tables, which are next to them
        sheets: of the worst images; None if none were requested
    """
    tables = "".join(_link(x.with_suffix(".csv")) for x in pictures)
    body = f"<pre>{escape(summary(analysis, 80))}</pre>\n<ul>\n{tables}</ul>\n"
    body += f"<p>{escape(thresholds_used(analysis))}</p>\n"
    for x in pictures:
        data = data_uri(x.read_bytes(), "image/png")
        body += html_figure(data, CAPTIONS[x.stem], CAPTIONS[x.stem])
    if sheets is None:
        return html_page("Error analysis", body)
    worst = "".join(
        html_figure(_as_jpeg(x), f"worst images, sheet {number}", "")
        for number, x in enumerate(sheets, start=1)
    )
    worst = worst or "<p>There is no image with a mistake above the threshold to show.</p>\n"
    return html_page("Error analysis", f"{body}<h2>The worst images</h2>\n{worst}")


def _link(table: Path) -> str:
    data = data_uri(table.read_bytes(), "text/csv")
    return f'<li><a download="{escape(table.name)}" href="{data}">{escape(table.name)}</a></li>\n'


def _as_jpeg(sheet: Path) -> str:
    data = io.BytesIO()
    Image.open(sheet).save(data, "JPEG", quality=85)
    return data_uri(data.getvalue(), "image/jpeg")


def main() -> None:
    parser, args = parse()
    with interruptible(parser.prog):
        work(parser.prog, args)


def work(prog: str, args: argparse.Namespace) -> None:
    with one_sentence(prog):
        analysis = load(args)
        make_folder(args.output, "--output")
    pictures = write_analysis(analysis, args.output)
    sheets = draw_worst(analysis, args)
    index = args.output / "index.html"
    page = index_page(analysis, pictures, sheets if args.num_images else None)
    index.write_text(page, encoding="utf-8")
    print(summary(analysis))
    print(thresholds_used(analysis))
    print(f"Everything is in '{index}', {len(page) / 1e6:.1f} MB that need no other file")


if __name__ == "__main__":
    main()
