"""Converts weights of any format to ours."""

import logging
from collections.abc import Callable
from typing import NamedTuple

from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts

from ..data.coco_classes import COCO_80, COCO_91, COCO_PANOPTIC
from ..data.objects365 import OBJECTS365, counterparts
from ..distributed.sharing import gather
from ..layouts import adapt, backbones, detr, dino, maskdino
from ..layouts.adapt import LABELS, ClassNames
from ..layouts.renaming import CheckpointError, State, move
from ..modeling.backbones import TimmBackbone
from ..modeling.detector import Detector
from ..names import plural
from .download import fetch
from .files import read, weights
from .settings import EXPECTED, encoding_of

logger = logging.getLogger(__name__)

DETECTORS: dict[str | None, Callable[[State], State]] = {
    "official": dino.from_official,
    "detrex": dino.from_detrex,
    "mmdet": dino.from_mmdet,
    "maskdino": maskdino.from_maskdino,
    "detr": detr.from_detr,
    "dab_detr": detr.from_dab_detr,
    "deformable_detr": detr.from_deformable_detr,
    "detrex_family": detr.from_detrex,
    "huggingface_detr": detr.from_huggingface_detr,
    "huggingface_dab_detr": detr.from_huggingface_dab_detr,
    "huggingface_deformable_detr": detr.from_huggingface_deformable_detr,
}
BACKBONES: dict[str | None, Callable[[State], State]] = {
    "model_zoo": backbones.from_model_zoo,
    "torchvision": backbones.from_torchvision,
    "convnext": backbones.from_convnext,
}


class OpenedWeights(NamedTuple):
    """The content of a file of weights, which is read only once."""

    file: str
    form: str | None  # as by `detect_format`
    state: State  # of a detector with our names, of a backbone or of unknown form with its own
    settings: dict  # of the model that they go with, as far as they are known
    rest: dict  # of the file: averaged weights, optimizer, iteration, ...
    note: str  # a sentence on what was selected in the file, or ""

    def classes(self, number: int) -> ClassNames | None:
        """The names of the `number` rows of the class heads; None if unknown."""
        return self.settings.get("classes") or known_classes(number)


def open_weights(path: str, *, averaged: bool = False, mmap: bool = False) -> OpenedWeights:
    """Download and read a file of weights.

    Args:
        path: file, URL or `dino_d2://NAME` of a published checkpoint
        averaged: use the moving average that was saved with the weights
        mmap: as of `read`, for weights that are only copied into a model

    Raises:
        CheckpointError: the file is missing or damaged, or has no known weights
    """
    file = fetch(path)
    checkpoint = read(file, mmap=mmap)
    state, form, note = weights(checkpoint, file, averaged=averaged)
    if form is None and "dino_d2" in checkpoint:  # of a detector that is not DINO
        form = "dino_d2"
    convert = DETECTORS.get(form, dict)
    settings = checkpoint.get("dino_d2") or EXPECTED.get(form, {}) | encoding_of(file)
    if form == "maskdino":
        settings = {"anchor_sides": maskdino.anchor_sides(state)} | settings
    thresholds = settings.get("ema_thresholds"), settings.get("thresholds")
    settings = {k: x for k, x in settings.items() if not k.endswith("thresholds")}
    if own := thresholds[0 if averaged else 1]:
        settings["thresholds"] = own
    return OpenedWeights(file, form, convert(state), settings, checkpoint, note)


def known_classes(number: int) -> ClassNames | None:
    """The class names if their number determines them, else None.

    COCO's for 80 or 91 (ids up to 90), or 133 of panoptic segmentation; Objects365's for 365 or 366
    (ids up to 365).
    """
    coco = {80: COCO_80, 91: COCO_91, 133: COCO_PANOPTIC}
    return (coco | {365: OBJECTS365, 366: (None, *OBJECTS365)}).get(number)


def fit_names(opened: OpenedWeights, model: Detector, *, complete: bool) -> State:
    """Rename the state to the names of the model.

    Unknown names of a backbone are matched with the model's, as Detectron2 does.
    """
    state, is_timm = opened.state, isinstance(model.backbone, TimmBackbone)
    # timm's ResNets have torchvision's names, and keep them
    if opened.form is not None and not (opened.form == "torchvision" and is_timm):
        return BACKBONES.get(opened.form, dict)(state)
    caffe2 = any(key.endswith("_w") for key in state)
    backbone = {k: x for k, x in model.state_dict().items() if k.startswith("backbone.")}
    if is_timm:
        return backbones.from_timm(state, backbone)
    # before matching, so that other shapes are left out
    initial = move(backbone, "backbone.", "")
    state = fit_windows(state, initial, opened.file, complete=complete)
    try:
        return align_and_update_state_dicts(backbone, state, c2_conversion=caffe2)
    except ValueError:  # ambiguous: the name is the end of several
        return state


def leave_training_only(state: State, initial: State, file: str) -> State:
    """Leave out tensors of branches and passes that the model does not have."""
    left = {key for key in state if key.startswith(adapt.TRAINING_ONLY) and key not in initial}
    if left:
        logger.info(
            f"{plural(len(left), 'tensor')} of '{file}' are for training only (branches, "
            "passes), and are not in the model"
        )
    return {key: x for key, x in state.items() if key not in left}


def fit_windows(state: State, initial: State, file: str, *, complete: bool) -> State:
    """Interpolate position biases to the windows of the model's Swin transformer.

    They are a good initialisation, but not the trained values.

    Raises:
        CheckpointError: some would be interpolated, but the weights have to be complete
    """
    state, windows = adapt.resize_windows(state, initial)
    if windows:
        before, now = next(iter(windows.values()))
        message = (
            f"the Swin transformer of '{file}' has windows of {before} x {before}, that of the "
            f"model has {now} x {now}"
        )
        if complete:
            raise CheckpointError(
                f"{message}: set model.backbone.window_size to {before}, or fine-tune from them"
            )
        logger.warning(f"{message}: {len(windows)} position biases are interpolated")
    return state


def fit_heads(state: State, model: Detector, file: str) -> State:
    """Copy a shared head to every layer; a CheckpointError if heads had to be merged."""
    given, wanted = adapt.count_heads(state), adapt.count_heads(model.state_dict())
    if given == 1:
        return adapt.repeat_heads(state, wanted)
    if wanted == 1:
        raise CheckpointError(
            f"'{file}' has heads for each of {given} decoder layers, but those of the model are "
            "shared: set MODEL.DINO.SHARED_HEADS (model.decoder.shared_heads) to False"
        )
    return state


def fit_classes(
    state: State, opened: OpenedWeights, model: Detector, classes: ClassNames, *, named: bool
) -> tuple[State, list[str]]:
    """Select rows for the model's classes; returns the new classes, too.

    Args:
        state: of the opened weights, or their average
        classes: of the model
        named: whether these are names, not numbers
    """
    number = model.count_classes(state) or 0
    given = opened.classes(number)
    rows = len(state.get(LABELS, range(number + 1))) - 1
    if rows != number:
        logger.info(
            f"the label embedding of '{opened.file}' is for {plural(rows, 'class')} and its class "
            f"heads for {number}: the embedding keeps the rows of these classes"
            + (", and others are initialised" if rows < number else "")
        )
    if given is None and named and number == model.num_classes:
        logger.warning(
            f"'{opened.file}' does not name its classes: they are assumed to be, in this order, "
            + ", ".join(map(str, classes))
        )
    renamed = counterparts(given or (), classes)
    if given and renamed:
        pairs = (f"{name} ({given[row]})" for row, name in renamed.items())
        logger.info(f"'{opened.file}' has classes under other names: {', '.join(pairs)}")
        given = [renamed.get(row, name) for row, name in enumerate(given)]
    return adapt.select_classes(state, given, classes, gather(model.state_dict()))
