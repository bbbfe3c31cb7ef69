"""How a plan evaluates: which evaluators a data set gets, and what their scores are called."""

import copy
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import (
    DatasetEvaluator,
    PascalVOCDetectionEvaluator,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.modeling import DatasetMapperTTA
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig
from torch import nn

from .. import data
from ..modeling.mask_dino import MaskDINO
from ..modeling.test_time_augmentation import MaskDINOWithTTA, WithTTA
from .evaluator import (
    OF_MAPS,
    ErrorAnalysisEvaluator,
    LVISEvaluator,
    compared_results,
    segmentation_evaluator,
    thing_names,
)
from .keys import is_detector

TTA_IOU = 0.5  # without TEST.NMS: Detectron2's
BOX_SCORES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
OTHER_SCORES = {
    "pascal_voc": [*BOX_SCORES[:3]],
    "lvis": [*BOX_SCORES, "APr", "APc", "APf"],  # of rare, common and frequent classes
}
PIXEL_SCORES = ("mIoU", "fwIoU", "mACC", "pACC")
CITYSCAPES_SCORES = {"segm": ["AP", "AP50"], "sem_seg": ["IoU", "iIoU", "IoU_sup", "iIoU_sup"]}
PANOPTIC_SCORES = [f"{x}{of}" for of in ("", "_th", "_st") for x in ("PQ", "SQ", "RQ")]
RESULTS = ("instance_on", "panoptic_on", "semantic_on")
PANOPTICAPI = "git+https://github.com/cocodataset/panopticapi.git"


def yaml_evaluate(cfg: CfgNode, model: nn.Module, folder: str = "") -> dict:
    """Evaluate on all data sets; with several, results are grouped by name.

    Files are in `folder` in "inference" of the output folder, for several data sets in folders of
    their own.
    """
    results = {}
    for name in cfg.DATASETS.TEST:
        evaluator = yaml_evaluator(cfg, name, folder)
        results[name] = run_evaluator(model, yaml_test_loader(cfg, name), evaluator)
        if cfg.TEST.AUG.ENABLED:
            results[name] |= yaml_evaluate_tta(cfg, model, name, folder)
    return next(iter(results.values())) if len(results) == 1 else results


def yaml_evaluate_tta(cfg: CfgNode, model: nn.Module, name: str, folder: str) -> dict:
    """The results with test-time augmentation, whose names end in `_TTA` as Detectron2's do.

    Views are made of the image as it was read, where Detectron2's are made of the resized one.
    """
    whole = data.Mapper(cfg, is_train=False, augmentations=[])
    loader = build_detection_test_loader(cfg, name, mapper=whole)
    augmented = (MaskDINOWithTTA if isinstance(model, MaskDINO) else WithTTA)(
        model,
        DatasetMapperTTA(cfg),
        iou=TTA_IOU if cfg.TEST.NMS is None else cfg.TEST.NMS,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
    evaluator = yaml_evaluator(cfg, name, str(Path(folder, "tta")))
    results = run_evaluator(augmented, loader, evaluator)
    return {f"{kind}_TTA": found for kind, found in results.items()}


def yaml_test_loader(cfg: CfgNode, name: str) -> Any:
    return build_detection_test_loader(cfg, name, mapper=data.Mapper(cfg, is_train=False))


def yaml_evaluator(cfg: CfgNode, name: str, folder: str = "") -> DatasetEvaluator:
    """The evaluator of a data set, by the `evaluator_type` of its metadata as in Detectron2.

    COCO-like data sets and boxes of Cityscapes also get an error analysis; `folder` is as of
    `yaml_evaluate`.
    """
    own = own_folder(name, cfg.DATASETS.TEST)
    output_dir = str(Path(cfg.OUTPUT_DIR, "inference", folder, own))
    kind = kind_of(name)
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(name)
    if kind == "lvis":
        return LVISEvaluator(name, output_dir=output_dir)
    if kind in OF_MAPS and (results := yaml_results(cfg)):
        return segmentation_evaluator(name, output_dir, **results)
    return ErrorAnalysisEvaluator(
        name, output_dir=output_dir, kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS
    )


def yaml_results(cfg: CfgNode) -> dict[str, bool] | None:
    """The outputs of a Mask DINO, as options of `segmentation_evaluator`; None for other models."""
    if not is_detector(cfg, MaskDINO):
        return None
    return {name: cfg.MODEL.DINO.TEST[name.upper()] for name in RESULTS}


def yaml_metrics(cfg: CfgNode) -> Sequence[str]:
    if not is_detector(cfg):
        return ()
    return metrics_of(cfg.DATASETS.TEST, yaml_results(cfg))


def own_folder(name: str, names: Sequence[str]) -> str:
    """The folder for files of one of several data sets; "" for the only one."""
    number, stem = names.index(name) + 1, Path(name.partition("@")[0]).stem
    return f"{number}_{stem}" if len(names) > 1 else ""


def lazy_evaluate(cfg: DictConfig, model: nn.Module, folder: str = "") -> dict:
    """As `yaml_evaluate`; `folder` is in the evaluator's folder.

    Of several data sets, each is evaluated as if it were the only one in the config.
    """
    if "evaluator" not in cfg.dataloader:
        return {}
    names = cfg.dataloader.test.dataset.names
    names = [names] if isinstance(names, str) else list(names)
    if len(names) > 1:
        results = {}
        for name in names:
            one = copy.deepcopy(cfg)
            one.dataloader.test.dataset.names = [name]
            for evaluator in listed(one.dataloader.evaluator):
                if (fixed := evaluator.get("dataset_name", name)) != name:
                    raise ValueError(
                        f"dataloader.evaluator.dataset_name is {fixed!r} for every test set: with "
                        'several, write "${dataloader.test.dataset.names[0]}"'
                    )
            results[name] = lazy_evaluate(one, model, str(Path(folder, own_folder(name, names))))
        return results
    told = copy.deepcopy(cfg).dataloader.evaluator  # with what it refers to
    for one in listed(told):
        if one.get("output_dir"):
            one.output_dir = os.path.join(one.output_dir, folder)
    return run_evaluator(model, instantiate(cfg.dataloader.test), instantiate(told))


def listed(evaluator: DictConfig | ListConfig) -> Sequence[DictConfig]:
    """The evaluators of a LazyConfig, of which there may be several."""
    return list(evaluator) if isinstance(evaluator, ListConfig) else [evaluator]


def lazy_results(cfg: DictConfig) -> dict[str, bool] | None:
    """As `yaml_results`."""
    model = cfg.model.get("_target_")
    model = locate(model) if isinstance(model, str) else model
    if not (isinstance(model, type) and issubclass(model, MaskDINO)):
        return None
    return {name: cfg.model.get(name, name == "instance_on") for name in RESULTS}


def lazy_metrics(cfg: DictConfig) -> Sequence[str]:
    if lazy_evaluator(cfg) not in (ErrorAnalysisEvaluator, segmentation_evaluator):
        return ()
    return metrics_of(cfg.dataloader.test.dataset.names, lazy_results(cfg))


def lazy_evaluator(cfg: DictConfig) -> Any:
    """The class or function that makes the evaluator; None if there are none or several."""
    evaluator = cfg.dataloader.get("evaluator")
    target = evaluator.get("_target_") if isinstance(evaluator, DictConfig) else None
    return locate(target) if isinstance(target, str) else target  # as a saved config has it


def kind_of(name: str) -> str:
    """How a data set is evaluated, by its metadata."""
    return MetadataCatalog.get(name).get("evaluator_type", "coco")


def require_packages(names: Sequence[str]) -> None:
    """Raise a ValueError if the package that one of the data sets needs is not installed."""
    for name in names:
        kind = kind_of(name)
        package = "cityscapesscripts" if kind.startswith("cityscapes") else kind
        if package in ("lvis", "cityscapesscripts") and find_spec(package) is None:
            raise ValueError(f"'{name}' needs the code of its authors: pip install {package}")


def require_results(names: Sequence[str], results: dict[str, bool] | None) -> None:
    """Raise a ValueError if a test set needs an output that a Mask DINO does not have.

    Args:
        results: as of `yaml_results`
    """
    if results is None:
        return
    for name in names:
        made = compared_results(name, **results)
        if not made:
            instances = "instances" in OF_MAPS.get(kind_of(name), ("instances",))
            key = "INSTANCE_ON" if instances else "SEMANTIC_ON"
            raise ValueError(
                f"the evaluation of '{name}' needs outputs that the model does not have: set "
                f"MODEL.DINO.TEST.{key} (model.{key.lower()}) to True"
            )
        if "panoptic_seg" in made and find_spec("panopticapi") is None:
            raise ValueError(
                f"the evaluation of '{name}' needs panopticapi: pip install {PANOPTICAPI}"
            )


def metrics_of(names: Sequence[str], results: dict[str, bool] | None = None) -> list[str]:
    """The metrics of a model's results for data sets of these names, of which higher is better.

    So without the costs of errors, and without AP with or without NMS, which is for comparison.
    Empty if the data sets are not registered, or have no class names.

    Args:
        results: as of `yaml_results`
    """
    found = []
    for name in names:
        if name not in DatasetCatalog:
            return []
        scores = {"bbox": box_scores(name)}
        if results is not None:
            made = compared_results(name, **results)
            scores = {x: y for part in made for x, y in mask_scores(name, part).items()}
        if not all(scores.values()):
            return []
        prefix = f"{name}/" if len(names) > 1 else ""
        found += [f"{prefix}{part}/{x}" for part, own in scores.items() for x in own]
    return found


def box_scores(name: str) -> list[str]:
    """The scores of boxes, and of masks, for a data set; [] if it does not name its classes."""
    metadata = MetadataCatalog.get(name)
    if not metadata.get("thing_classes"):
        return []
    classes = thing_names(metadata)
    scores = [*BOX_SCORES, *(f"AP-{x}" for x in classes if len(classes) > 1)]
    return OTHER_SCORES.get(kind_of(name), scores)


def mask_scores(name: str, result: str) -> dict[str, list[str]]:
    """The scores of a result of Mask DINO for a data set, by the group that they are in."""
    if result == "panoptic_seg":
        return {result: PANOPTIC_SCORES}
    if kind_of(name).startswith("cityscapes"):
        if result == "sem_seg":
            return {result: CITYSCAPES_SCORES[result]}
        return {"bbox": box_scores(name), "segm": CITYSCAPES_SCORES["segm"]}
    if result == "sem_seg":
        classes = MetadataCatalog.get(name).get("stuff_classes") or ()
        return {result: [*PIXEL_SCORES, *(f"IoU-{x}" for x in classes)]}
    return dict.fromkeys(("bbox", "segm"), box_scores(name))


def run_evaluator(model: nn.Module, loader: Any, evaluator: DatasetEvaluator) -> dict:
    """Run an evaluator; only the main worker gets results."""
    results = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results
