"""Evaluates boxes and masks, and writes the error analysis as tables (CSV) and plots."""

import csv
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from detectron2 import evaluation
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import BoxMode
from pycocotools.cocoeval import COCOeval

from ..data import read_label_map, with_label_maps
from ..data.mapper import rectangle
from ..evaluation.analysis import (
    IOU_50,
    IOU_75,
    Analysis,
    analyse,
    evaluate_boxes,
    match_images,
    thresholds,
)
from ..evaluation.costs import COSTS, box_scores, outcomes_of
from ..evaluation.matching import without_duplicates
from ..progress import alive
from ..visualize import draw_error_plots

BACKGROUND = "(background)"
NMS_IOU = 0.8
# By the `evaluator_type` of data sets with maps of pixels, which results are compared with them.
OF_MAPS = {
    "coco_panoptic_seg": ("instances", "sem_seg", "panoptic_seg"),
    "sem_seg": ("sem_seg",),
    "cityscapes_instance": ("instances",),
    "cityscapes_sem_seg": ("sem_seg",),
    "cityscapes_panoptic_seg": ("instances", "sem_seg", "panoptic_seg"),
}
logger = logging.getLogger(__name__)


@contextmanager
def old_numpy() -> Iterator[None]:
    """NumPy with the removed names that lvis 0.5.3 and cityscapesscripts 2.3.0 use."""
    names = {"float": float, "in1d": lambda x, values: np.isin(x, values).ravel()}
    lost = [name for name in names if not hasattr(np, name)]
    for name in lost:
        setattr(np, name, names[name])
    try:
        yield
    finally:
        for name in lost:
            delattr(np, name)


class LVISEvaluator(evaluation.LVISEvaluator):
    """Detectron2's, with any NumPy."""

    def evaluate(self) -> dict[str, dict[str, float]]:
        with old_numpy():
            return super().evaluate()


class CityscapesInstanceEvaluator(evaluation.CityscapesInstanceEvaluator):
    """Detectron2's, with any NumPy, and without a file of matches in the current folder."""

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as theirs

        # it writes NumPy's integers, which are no JSON
        theirs.writeDict2JSON = lambda matches, file: None
        with old_numpy():
            return super().evaluate()


class ErrorAnalysisEvaluator(evaluation.COCOEvaluator):
    """Detectron2's evaluator, which also analyses the errors of boxes, and of masks if there are.

    Besides "bbox" it returns as "dAP" what each type of error costs, see `evaluation.costs.Costs`,
    and as "with_nms" AP, AP50 and AP75 of what class-wise NMS at IoU 0.8 leaves. If the model has
    applied NMS itself, and gives what it removed as "suppressed" instances beside its "instances",
    that is instead "without_nms", of all together. "F1" has the score threshold with the highest F1
    at IoU 0.5, over all classes and, as "threshold-NAME", of each. Tables, plots and
    thresholds.json go to the output folder, if there is one.

    Besides "segm", "dAP_segm" and "F1_segm" are the same by the IoU of masks; their files go to the
    folder "segm" in the output folder.

    By default it converts registered records anew, as cached ones may belong to other data.
    """

    def __init__(self, *args: Any, allow_cached_coco: bool = False, **options: Any):
        super().__init__(*args, allow_cached_coco=allow_cached_coco, **options)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            super().process([image], [output])
            if "suppressed" in output:
                rest = output["suppressed"].to(self._cpu_device)
                self._predictions[-1]["suppressed"] = instances_to_coco_json(
                    rest, image["image_id"]
                )

    def _eval_predictions(self, predictions: list[dict], img_ids: list | None = None) -> None:
        self._analyses: dict[str, tuple[dict[str, float], dict[str, Any]]] = {}
        super()._eval_predictions(predictions, img_ids)  # gives results the data set's category ids
        for task, (costs, best) in self._analyses.items():
            suffix = "" if task == "bbox" else f"_{task}"
            self._results[f"dAP{suffix}"] = costs
            if task == "bbox":
                self._add_nms(predictions)
            if found := threshold_metrics(best):
                self._results[f"F1{suffix}"] = found
            if told := (advice if task == "bbox" else mask_advice)(self._results):
                logger.info(told)

    def _add_nms(self, predictions: list[dict]) -> None:
        results = [x for prediction in predictions for x in prediction["instances"]]
        name = "without_nms" if any("suppressed" in x for x in predictions) else "with_nms"
        if name == "with_nms":
            results = without_duplicates(results, NMS_IOU)
        else:
            results += self._suppressed(predictions)
        self._results[name] = self._scores(results)

    def _tasks_from_predictions(self, predictions: list[dict]) -> list[str]:
        """Masks are evaluated if there are any to compare with; one that is missing is its box."""
        tasks = super()._tasks_from_predictions(predictions)
        if "segm" not in tasks:
            return tasks
        annotations = self._coco_api.dataset.get("annotations", [])
        without = [x for x in annotations if not x.get("segmentation")]
        if annotations and len(without) == len(annotations):
            logger.warning("the test set has no masks: only boxes are evaluated")
            return [task for task in tasks if task != "segm"]
        if without:
            logger.warning(
                f"{len(without)} of {len(annotations)} annotations of the test set have no mask: "
                "their boxes are evaluated as masks"
            )
        for annotation in without:
            box = annotation | {"bbox_mode": BoxMode.XYWH_ABS}
            annotation["segmentation"] = [rectangle(box)]
        return tasks

    def _suppressed(self, predictions: list[dict]) -> list[dict]:
        """What NMS removed, with the category ids of the data set."""
        contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id") or {}
        ids = {index: id for id, index in contiguous.items()}
        rest = [x for prediction in predictions for x in prediction.get("suppressed", [])]
        return [x | {"category_id": ids.get(x["category_id"], x["category_id"])} for x in rest]

    def _scores(self, results: list[dict]) -> dict[str, float]:
        of_image = defaultdict(list)
        for result in results:
            of_image[result["image_id"]].append(result)
        images = match_images(self._coco_api, of_image, self._max_dets_per_image[-1])
        return box_scores(outcomes_of(images, sorted(self._coco_api.cats)))

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        # The only method that gets Detectron2's COCOeval; None if there are no detections.
        class_names = class_names and thing_names(self._metadata)
        if iou_type in ("bbox", "segm"):
            with alive("the error analysis"):
                analysis = analyse(coco_eval or evaluate_boxes(self._coco_api.dataset, []))
                best = thresholds(analysis)
                self._analyses[iou_type] = analysis.costs.mean, best
                if self._output_dir:
                    folder = Path(self._output_dir, "segm" if iou_type == "segm" else "")
                    folder.mkdir(exist_ok=True)
                    write_analysis(analysis, folder)
                    path = folder / "thresholds.json"
                    path.write_text(json.dumps(best, indent=2), encoding="utf-8")
        return super()._derive_coco_results(coco_eval, iou_type, class_names)


def segmentation_evaluator(
    dataset_name: str,
    output_dir: str | None = None,
    *,
    instance_on: bool = True,
    panoptic_on: bool = False,
    semantic_on: bool = False,
) -> DatasetEvaluator:
    """The evaluators of a data set with maps of pixels, by the `evaluator_type` of its metadata.

    As in Detectron2's train_net, for the outputs that a Mask DINO has enabled; instances also get
    an error analysis. Panoptic data sets without label maps are evaluated by their segments.

    Args:
        dataset_name: of a kind in `OF_MAPS`, or else instances are evaluated
        output_dir: for tables and predictions; None: none are written
        instance_on, panoptic_on, semantic_on: as of `MaskDINO`
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    is_cityscapes = kind.startswith("cityscapes")
    made = compared_results(dataset_name, instance_on, panoptic_on, semantic_on)
    evaluators: list[DatasetEvaluator] = []
    if "instances" in made:
        tasks = ("bbox",) if is_cityscapes else None
        evaluators.append(ErrorAnalysisEvaluator(dataset_name, tasks, output_dir=output_dir))
    if "instances" in made and is_cityscapes:
        evaluators.append(CityscapesInstanceEvaluator(dataset_name))
    if "sem_seg" in made and is_cityscapes:
        evaluators.append(CityscapesSemSegEvaluator(dataset_name))
    elif "sem_seg" in made:
        name = with_label_maps(dataset_name)
        # Detectron2's own way to read maps fails with NumPy 2.
        number = len(MetadataCatalog.get(name).stuff_classes)
        read = partial(read_label_map, num_classes=number)
        evaluators.append(SemSegEvaluator(name, output_dir=output_dir, sem_seg_loading_fn=read))
    if "panoptic_seg" in made:
        evaluators.append(COCOPanopticEvaluator(dataset_name, output_dir))
    return DatasetEvaluators(evaluators)


def compared_results(
    dataset_name: str, instance_on: bool, panoptic_on: bool, semantic_on: bool
) -> list[str]:
    """Which results of a Mask DINO are compared with a data set."""
    metadata = MetadataCatalog.get(dataset_name)
    kind = metadata.get("evaluator_type", "coco")
    if kind == "coco_panoptic_seg" and not metadata.get("json_file"):  # of instances
        instance_on = False
    made = {"instances": instance_on, "sem_seg": semantic_on, "panoptic_seg": panoptic_on}
    return [x for x in OF_MAPS.get(kind, ("instances",)) if made[x]]


def thing_names(metadata: Any) -> list[str]:
    """The classes with instances, which in panoptic data sets are some of all."""
    names, things = metadata.thing_classes, metadata.get("thing_dataset_id_to_contiguous_id")
    return names if things is None else [names[i] for i in sorted(things.values())]


def threshold_metrics(thresholds: Mapping[str, Any]) -> dict[str, float]:
    """The result of `analysis.thresholds` by name, as Detectron2 names AP and AP-NAME."""
    own = {f"threshold-{name}": x for name, x in thresholds["classes"].items()}
    return own if thresholds["all"] is None else {"threshold": thresholds["all"]} | own


def advice(results: Mapping[str, Mapping[str, float]]) -> str:
    """A sentence on duplicates if they cost 1 AP or more, else on the most costly type of error.

    Args:
        results: of `ErrorAnalysisEvaluator`, "bbox", "dAP" and "with_nms" or "without_nms"
    """
    costs = notable(results["dAP"])
    if not costs:
        return ""
    ap, has_nms = results["bbox"]["AP"], "without_nms" in results
    other = results["without_nms" if has_nms else "with_nms"]["AP"]
    both = f"AP is {ap:.1f}, and {other:.1f} {'without NMS' if has_nms else f'with NMS {NMS_IOU}'}"
    if costs.get("duplicate", 0) < 1:
        kind = max(costs, key=costs.__getitem__)
        return f"of all types of errors, '{kind}' costs most: {costs[kind]:.1f} AP ({both})"
    remedy = "train longer"
    if has_nms:
        remedy += ", or lower TEST.NMS (model.nms)"
    elif other > ap:
        remedy += f", or evaluate with TEST.NMS {NMS_IOU} (model.nms={NMS_IOU})"
    return f"duplicates cost {costs['duplicate']:.1f} AP ({both}): {remedy}"


def mask_advice(results: Mapping[str, Mapping[str, float]]) -> str:
    """A sentence on the most costly type of error by mask IoU, if there is one.

    Args:
        results: of `ErrorAnalysisEvaluator`, "segm" and "dAP_segm"
    """
    costs = notable(results["dAP_segm"])
    if not costs:
        return ""
    kind, ap = max(costs, key=costs.__getitem__), results["segm"]["AP"]
    return f"for masks, '{kind}' costs most: {costs[kind]:.1f} AP (mask AP is {ap:.1f})"


def notable(costs: Mapping[str, float]) -> dict[str, float]:
    """Those that are not written as 0.0, nor NaN."""
    return {kind: cost for kind, cost in costs.items() if cost >= 0.05}


def write_analysis(analysis: Analysis, folder: str | os.PathLike) -> list[Path]:
    """Write five tables (CSV) and plots (PNG) to a folder; returns the paths of the plots.

    per_class, ap_by_size, precision_recall (at IoU 0.5 and 0.75, a row per class and recall with
    the score that reaches it), confusion_matrix and errors (their number, and as dAP their cost in
    AP). Cells without a value are empty.
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
    by_class = analysis.costs.classes.T.tolist()
    return {
        "per_class": [analysis.classes[0]._fields, *analysis.classes],
        "ap_by_size": [analysis.sizes[0]._fields, *analysis.sizes],
        "errors": [
            (*analysis.errors[0]._fields, *(f"dAP_{kind}" for kind in COSTS)),
            *((*counts, *costs) for counts, costs in zip(analysis.errors, by_class, strict=True)),
        ],
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
