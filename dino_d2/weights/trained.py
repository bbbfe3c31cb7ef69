"""Loads a trained model with its config, classes and thresholds."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..config.overrides import apply_overrides
from ..config.styles import evaluation_augmentations, get, keys_for
from ..layouts.adapt import count_classes
from ..layouts.renaming import CheckpointError
from ..modeling.fold_norms import fold_norms
from ..predictor import Predictor, Thresholds, merge_thresholds
from . import model_zoo
from .checkpointer import Checkpointer
from .fitting import OpenedWeights, open_weights

PUBLISHED = model_zoo.ReleaseHandler.PREFIX


def load_trained(
    config: str,
    weights: str,
    device: str | None,
    overrides: Sequence[str],
    dtype: torch.dtype,
    thresholds: Thresholds,
) -> Predictor:
    """The predictor of a published checkpoint or of a training run; see :func:`dino_d2.load`."""
    config, weights = of_training(config, weights)
    cfg = model_zoo.get_config(config, trained=not weights)
    apply_overrides(cfg, overrides)
    augmentations = evaluation_augmentations(cfg)
    path = weights or model_zoo.weights_of(cfg)
    if not path:
        raise CheckpointError("there are no weights: name a file, a URL or dino_d2://NAME")
    opened = open_weights(model_zoo.fetch_weights(path), mmap=True)
    classes = classes_of(opened)
    model = model_zoo.build(cfg, len(classes), device)
    Checkpointer(model, classes=classes, complete=True).load(opened)
    fold_norms(model.eval())
    return Predictor(
        model,
        classes=classes,
        augmentations=augmentations,
        image_format=get(cfg, keys_for(cfg).image_format),
        thresholds=merge_thresholds(opened.settings.get("thresholds", {}), thresholds, classes),
        dtype=dtype,
    )


def of_training(config: str, weights: str) -> tuple[str, str]:
    """A config and weights; an output folder, or a checkpoint in it, has both.

    Raises:
        ValueError: nothing is named
        FileNotFoundError: there is no config in the folder, or no checkpoint
    """
    if not config and not weights:
        raise ValueError(
            "name a published checkpoint, a config, or the output folder of a training run"
        )
    if not config and weights.startswith(PUBLISHED):
        return weights.removeprefix(PUBLISHED), ""
    place = Path(config or weights).expanduser()
    if not config and place.is_dir():
        weights = ""
    if config and not place.is_dir() and place.suffix != ".pth":
        return config, weights
    folder = place if place.is_dir() else place.parent
    file = folder / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(
            f"'{folder}' has no config.yaml, which training saves next to its checkpoints: name "
            "the config as well"
        )
    if place.is_file():
        return str(file), weights or str(place)
    last = folder / "last_checkpoint"
    names = ["model_best.pth", *([last.read_text().strip()] if last.is_file() else [])]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not weights and not found:
        raise FileNotFoundError(f"'{folder}' has a config, but no checkpoint yet")
    return str(file), weights or str(found[0])


def classes_of(opened: OpenedWeights) -> list[str]:
    """The class names of a checkpoint: its own, or those that their number tells.

    Raises:
        CheckpointError: the weights are of a backbone, or do not exist
    """
    number = count_classes(opened.state)
    if named := opened.classes(number or 0):
        return [name for name in named if name]
    if number is None:
        file = opened.file
        raise CheckpointError(f"'{file}' has no weights of a trained DINO, so it detects nothing")
    return [f"class {i}" for i in range(number)]
