"""The two styles of config: yacs keys in YAML, and LazyConfig."""

import logging
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.data.transforms import Augmentation
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig
from yaml import MappingNode, ScalarNode, SequenceNode, YAMLError, compose

from ..data import ResizeShortestEdge
from .imports import failed_line, import_parts
from .keys import RENAMED, add_dino_config
from .overrides import keys_of, unknown_key

logger = logging.getLogger(__name__)

Config = TypeVar("Config", CfgNode, DictConfig)


def read_config(file: str) -> CfgNode | DictConfig:
    """Read a config of either style.

    `.py` files, and the `config.yaml` that is saved when training with one of them, are
    LazyConfigs; other YAML files become a CfgNode with the keys of DINO.

    Raises:
        ValueError: the file or its base cannot be read, a YAML file is invalid, empty or has an
            unknown key, or a `.py` file fails; says in which line
    """
    if file.endswith(".py"):
        return rename_keys(_run_config(file), file)
    keys = _yaml_keys(file)
    if "_target_" in keys:
        return rename_keys(LazyConfig.load(file), file)
    cfg = get_cfg()
    add_dino_config(cfg)
    for old in (x for x in RENAMED if x.startswith("MODEL.")):
        put(cfg, old, None)
    try:
        cfg.merge_from_file(file)
    except OSError as error:
        raise ValueError(f"'{file}': its _BASE_ cannot be read: {error}") from error
    except (ValueError, AttributeError, TypeError) as error:  # yacs names the key
        raise ValueError(f"'{file}' is not a config: {' '.join(str(error).split())}") from error
    except KeyError as error:
        known = list(keys_of(cfg))
        given = keys_of(CfgNode.load_yaml_with_base(file, allow_unsafe=True))
        unknown = next(key for key in given if key not in known)
        raise ValueError(f"'{file}': {unknown_key(unknown, known)}") from error
    cfg.IMPORTS = [import_parts(name, Path(file).parent) for name in cfg.IMPORTS or ()]
    return rename_keys(cfg, file)


def rename_keys(cfg: Config, file: str) -> Config:
    """Move values of keys of earlier versions, as saved configs have them, to those of now."""
    for old, new in RENAMED.items():
        section, _, name = old.rpartition(".")
        values = get(cfg, section, None)
        if values is None or name not in values:
            continue
        target = values.get("_target_", "DINO")  # other models may have an argument of this name
        if not str(getattr(target, "__name__", target)).endswith("DINO"):
            continue
        value = values.pop(name)
        if value:
            logger.warning(f"'{file}': {old} is now called {new}: rename it")
            put(cfg, new, value)
    return cfg


def _run_config(file: str) -> DictConfig:
    try:
        return LazyConfig.load(file)
    except SyntaxError as error:
        cause = error.__cause__  # Detectron2 parses the file without details of the error
        line = f", line {cause.lineno} ({cause.msg})" if isinstance(cause, SyntaxError) else ""
        raise ValueError(f"{error}{line}") from error
    except Exception as error:  # a config is a program, and may raise anything
        said = failed_line(error)
        raise ValueError(said if said[0] == "'" else f"'{file}' cannot be read: {said}") from error


def _yaml_keys(file: str) -> set[str]:
    """All keys of a YAML file at any depth, without creating the objects that it describes."""
    try:
        with PathManager.open(file) as opened:
            top = compose(opened)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"'{file}' is a binary file, not a config: give a .yaml or .py file here, and a "
            "checkpoint as the weights"
        ) from error
    except YAMLError as error:
        raise ValueError(f"'{file}' is not YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise ValueError(f"'{file}' cannot be read: {error}") from error
    if not isinstance(top, MappingNode):
        what = "is empty" if top is None else "is not a config: it has no keys"
        raise ValueError(f"'{file}' {what}; a config has keys such as 'MODEL: ...'")
    keys: set[str] = set()
    nodes = [top]
    while nodes:
        node = nodes.pop()
        if isinstance(node, MappingNode):
            keys.update(key.value for key, _ in node.value if isinstance(key, ScalarNode))
            nodes += [value for _, value in node.value]
        elif isinstance(node, SequenceNode):
            nodes += node.value
    return keys


def evaluation_augmentations(cfg: CfgNode | DictConfig) -> list[Augmentation]:
    """The augmentations that resize images in evaluation, of a config of either style."""
    if isinstance(cfg, CfgNode):
        return [ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)]
    return instantiate(cfg.dataloader.test.mapper.augmentations)


# What both styles have: the key in YAML, and in a LazyConfig.
_KEYS = {
    "train_sets": ("DATASETS.TRAIN", "dataloader.train.dataset.names"),
    "test_sets": ("DATASETS.TEST", "dataloader.test.dataset.names"),
    "image_format": ("INPUT.FORMAT", "dataloader.test.mapper.image_format"),
    "num_classes": ("MODEL.DINO.NUM_CLASSES", "model.num_classes"),
    "num_queries": ("MODEL.DINO.NUM_QUERIES", "model.query_selection.num_queries"),
    "weights": ("MODEL.WEIGHTS", "train.init_checkpoint"),
    "device": ("MODEL.DEVICE", "train.device"),
    "output_dir": ("OUTPUT_DIR", "train.output_dir"),
    "seed": ("SEED", "train.seed"),
    "batch": ("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size"),
    "accumulate": ("SOLVER.ACCUMULATE", "train.accumulate"),
    "reference_batch": ("SOLVER.REFERENCE_BATCH", "train.reference_batch"),
    "epochs": ("SOLVER.EPOCHS", "train.epochs"),
    "lr": ("SOLVER.BASE_LR", "optimizer.lr"),
    "max_iter": ("SOLVER.MAX_ITER", "train.max_iter"),
    "iterations": (
        ("SOLVER.STEPS", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD"),
        ("train.checkpointer.period", "train.eval_period"),
    ),
    "warm_up": ("SOLVER.WARMUP_ITERS", "lr_multiplier.warmup_length.iterations"),
    "eval_period": ("TEST.EVAL_PERIOD", "train.eval_period"),
    "checkpoint_period": ("SOLVER.CHECKPOINT_PERIOD", "train.checkpointer.period"),
    "best_metric": ("TEST.BEST_METRIC", "train.best_metric"),
    "patience": ("TEST.PATIENCE", "train.patience"),
    "wandb_project": ("WANDB.PROJECT", "train.wandb_project"),
    "amp_enabled": ("SOLVER.AMP.ENABLED", "train.amp.enabled"),
    "amp_dtype": ("SOLVER.AMP.DTYPE", "train.amp.dtype"),
    "ema_enabled": ("SOLVER.EMA.ENABLED", "train.ema.enabled"),
    "ema_decay": ("SOLVER.EMA.DECAY", "train.ema.decay"),
    "non_finite": ("SOLVER.NON_FINITE", "train.non_finite"),
    "fsdp": ("SOLVER.FSDP", "train.fsdp"),
}


class Keys(SimpleNamespace):
    """The keys of one style, by the names in the table above."""

    def change(self, key: str, value: str) -> str:
        """A change of a key as it is written on the command line."""
        return f"{key} {value}" if self is YAML else f"{key}={value}"


YAML, LAZY = (Keys(**{name: both[i] for name, both in _KEYS.items()}) for i in (0, 1))


# Settings in place of keys, by the names in the table: options of programs, arguments of `train`.
SHORT = {
    "epochs": "epochs",
    "batch_size": "batch",
    "lr": "lr",
    "device": "device",
    "output": "output_dir",
}


def put_short(
    cfg: CfgNode | DictConfig, settings: Mapping[str, Any], given: Sequence[str]
) -> list[str]:
    """Change the keys that settings of `SHORT` stand for, where they are not None.

    Args:
        given: keys that are changed already

    Returns:
        the changed keys

    Raises:
        ValueError: a setting is given and its key as well
    """
    changed = []
    for option, name in SHORT.items():
        value, key = settings.get(option), getattr(keys_for(cfg), name)
        if value is None:
            continue
        if key in given:
            said = option.replace("_", "-")
            raise ValueError(f"--{said} sets {key}: give only one of them")
        put(cfg, key, value)
        changed.append(key)
    return changed


# Sides of images in pixels; the first is what they are relative to.
_SIDES = (
    (
        *("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "INPUT.MIN_SIZE_TRAIN"),
        *("INPUT.MAX_SIZE_TRAIN", "INPUT.CROP.MIN_SIZE_TRAIN", "INPUT.CROP.SIZE"),
    ),
    (
        *(f"test.mapper.augmentations.0.{x}" for x in ("short_edge_length", "max_size")),
        *(f"train.mapper.augmentations.{x}" for x in ("min_sizes", "max_size")),
        *(f"train.mapper.augmentations.{x}" for x in ("crop_min_sizes", "crop_size")),
    ),
)


def scale_images(cfg: CfgNode | DictConfig, size: int) -> None:
    """Make `size` the short side of images in evaluation; other sides follow in proportion.

    These are the sides that the config has. Crops that are shares of an image stay as they are.

    Raises:
        ValueError: the config has no short side, or several
    """
    is_yaml = isinstance(cfg, CfgNode)
    section, keys = (cfg, _SIDES[0]) if is_yaml else (cfg.dataloader, _SIDES[1])
    short = get(section, keys[0], None)
    if not isinstance(short, int | float) or short <= 0:
        raise ValueError(
            f"--size scales all image sizes in proportion to {keys[0]}, which is {short!r} in "
            "this config: set them one by one"
        )
    factor = size / short

    def scaled(x: float) -> float:
        return round(factor * x) if x > 1 else x

    if is_yaml:  # a key that has no effect has to stay as it is
        keys = keys if cfg.INPUT.CROP.ENABLED else keys[:4]
        views = ("TEST.AUG.MIN_SIZES", "TEST.AUG.MAX_SIZE")
        keys = (*keys, *views) if cfg.TEST.AUG.ENABLED else keys
    for key in keys:
        value = get(section, key, None)
        if isinstance(value, int | float):
            put(section, key, scaled(value))
        elif value is not None:
            put(section, key, [*map(scaled, value)])


def keys_for(cfg: CfgNode | DictConfig) -> Keys:
    """The keys of a config's style."""
    return YAML if isinstance(cfg, CfgNode) else LAZY


def get(cfg: CfgNode | DictConfig, key: str, *default: Any) -> Any:
    """The value of a key; if it does not exist, the default, if there is one."""
    return reduce(lambda node, name: getattr(node, name, *default), key.split("."), cfg)


def put(cfg: CfgNode | DictConfig, key: str, value: Any) -> None:
    """Set a key of an existing section."""
    section, _, name = key.rpartition(".")
    setattr(get(cfg, section) if section else cfg, name, value)
