"""Writes the error analysis of an evaluation as tables (CSV) and pictures."""

import csv
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation import COCOEvaluator
from pycocotools.cocoeval import COCOeval

from ..evaluation.analysis import IOU_50, IOU_75, Analysis, analyse, evaluate_boxes
from ..progress import alive
from ..visualize import draw_error_plots

BACKGROUND = "(background)"


class ErrorAnalysisEvaluator(COCOEvaluator):
    """Detectron2's evaluator, which also writes the error analysis of boxes to its output folder.

    By default it converts registered records again each time, as cached ones of an earlier run may
    be of other data.
    """

    def __init__(self, *args: Any, allow_cached_coco: bool = False, **options: Any):
        super().__init__(*args, allow_cached_coco=allow_cached_coco, **options)

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        # The only method that gets Detectron2's COCOeval; None if there are no detections.
        if iou_type == "bbox" and self._output_dir:
            dataset = self._coco_api.dataset
            with alive("the error analysis"):
                write_analysis(analyse(coco_eval or evaluate_boxes(dataset, [])), self._output_dir)
        return super()._derive_coco_results(coco_eval, iou_type, class_names)


def write_analysis(analysis: Analysis, folder: str | os.PathLike) -> list[Path]:
    """Write five tables (CSV) and pictures (PNG) to a folder; returns the paths of the pictures.

    per_class, ap_by_size, precision_recall (at IoU 0.5 and 0.75, a row per class and recall with
    the score that reaches it), confusion_matrix and errors. Cells without a value are empty.
    """
    for name, rows in _tables(analysis).items():
        path = Path(folder, f"{name}.csv")
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(map(_cells, rows))
    return draw_error_plots(analysis, folder)


def _tables(analysis: Analysis) -> dict[str, Iterable]:
    """Rows by the name of the table, starting with its header."""
    names = [*(x.name for x in analysis.classes), BACKGROUND]
    confusion = zip(names, analysis.confusion.tolist(), strict=True)
    return {
        "per_class": [analysis.classes[0]._fields, *analysis.classes],
        "ap_by_size": [analysis.sizes[0]._fields, *analysis.sizes],
        "errors": [analysis.errors[0]._fields, *analysis.errors],
        "precision_recall": _curves(analysis),
        "confusion_matrix": [["true class", *names], *([name, *row] for name, row in confusion)],
    }


def _curves(analysis: Analysis) -> Iterator[tuple]:
    yield "category_id", "name", "iou", "recall", "precision", "score"
    for k, scores in enumerate(analysis.classes):
        for iou, index in ((0.5, IOU_50), (0.75, IOU_75)):
            curve = zip(analysis.precision[index, :, k], analysis.scores[index, :, k], strict=True)
            for percent, (precision, score) in enumerate(curve):
                yield scores.category_id, scores.name, iou, percent / 100, precision, score


def _cells(row: Iterable) -> list:
    """Format floats with six digits, and NaN as an empty cell."""
    return [("" if np.isnan(x) else f"{x:.6g}") if isinstance(x, float) else x for x in row]
