"""The plan of a training run, from a config of either style."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from traceback import extract_tb
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import (
    build_detection_train_loader,
)
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    build_model,
)
from detectron2.solver import (
    LRMultiplier,
    WarmupParamScheduler,
    build_lr_scheduler,
    build_optimizer,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from .. import data
from ..config.styles import YAML, get, keys_for, put
from ..modeling import BackboneError
from ..modeling.build import named
from ..names import hint, plural
from ..ranges import require_share, require_whole
from ..solver import ClippedAdamW, parameter_groups
from .ema import check_decay
from .evaluation import (
    lazy_evaluate,
    lazy_evaluator,
    lazy_metrics,
    lazy_results,
    require_packages,
    require_results,
    yaml_evaluate,
    yaml_metrics,
    yaml_results,
)
from .evaluator import segmentation_evaluator
from .keys import OF_DETECTRON2S_TRAINER, check_keys, is_detector, optimizer_of, refuse
from .schedule import flat_cosine, share_of
from .writers import plain_config

SCHEDULERS = (
    *("WarmupMultiStepLR", "WarmupCosineLR", "WarmupFlatCosineLR", "WarmupStepWithFixedGammaLR"),
)
WARM_UPS = ("linear", "constant")
# Sections of a LazyConfig, outer ones first.
SECTIONS = (
    *("dataloader", "dataloader.train", "dataloader.train.dataset", "dataloader.train.mapper"),
    *("dataloader.test", "dataloader.test.dataset", "model", "optimizer", "optimizer.params"),
    *("lr_multiplier", "train", "train.amp", "train.ema", "train.ddp", "train.checkpointer"),
)
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Plan(NamedTuple):
    """A training and its evaluation; the functions build new parts on every call."""

    build_model: Callable[..., nn.Module]  # on the config's device, or the one given
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    build_scheduler: Callable[[torch.optim.Optimizer], Any]  # for Detectron2's hook
    build_loader: Callable[..., Any]  # of the training sets, or of a list of records
    build_mapper: Callable[[bool], Any]  # for training or not; turns a record into an input
    mixing: data.Mixing | None  # of training images
    mixed: range  # the positions in the run of images that it mixes
    evaluate: Callable[..., dict]  # of a model and, for its files, a folder in "inference"
    train_sets: Sequence[str]
    test_sets: Sequence[str]
    num_queries: int | None  # of the model; None: not known
    metrics: Sequence[str]  # by which a checkpoint can be the best; empty: not known
    output_dir: str
    weights: str  # to begin with; "": none
    seed: int  # negative: a random one
    max_iter: int
    eval_period: int  # of iterations; 0: at the end only, as for all periods
    checkpoint_period: int
    max_to_keep: int | None  # checkpoints; None: all
    log_period: int
    wandb_project: str  # "": none
    config: dict  # all of it as it was given, for people
    best_metric: str
    patience: int  # early stopping: evaluations without a better metric; 0: never
    precision: torch.dtype | None  # of autocast; None: float32 everywhere
    accumulate: int
    skip_non_finite: bool
    ema_decay: float | None
    fsdp: bool
    ddp: dict  # options of DistributedDataParallel


def make_plan(cfg: CfgNode | DictConfig) -> Plan:
    """Read the plan of a training run from a config.

    Args:
        cfg: a YAML config with the keys of `add_dino_config`, or a LazyConfig with those of
            configs/common

    Raises:
        ValueError: a value is invalid, a batch cannot be divided, two settings are incompatible, or
            a key has no effect, see `check_keys`
    """
    check_keys(cfg)
    keys, for_people, cfg = keys_for(cfg), plain_config(cfg), copy.deepcopy(cfg)
    value = partial(get, cfg)
    fields = yaml_parts(cfg) if keys is YAML else lazy_parts(cfg)
    mixing, images = fields["mixing"], value(keys.batch)
    put(cfg, keys.batch, part_of_batch(images, value(keys.accumulate)))
    # fields named like a key are its value, but for these
    alike = {*Plan._fields} - {"ema_decay", "patience", "num_queries"}
    fields |= {name: value(key) for name, key in vars(keys).items() if name in alike}
    fields["patience"] = value(keys.patience, 0)  # LazyConfigs saved by earlier versions lack it
    plan = Plan(
        **fields,
        mixed=mixing.places(value(keys.max_iter), images) if mixing else range(0),
        config=for_people,
        num_queries=queries_of(cfg),
        precision=precision_of(value(keys.amp_dtype)) if value(keys.amp_enabled) else None,
        skip_non_finite=skips(value(keys.non_finite)),
        ema_decay=value(keys.ema_decay) if value(keys.ema_enabled) else None,
    )
    check_plan(plan)
    return plan


def queries_of(cfg: CfgNode | DictConfig) -> int | None:
    """The number of queries of the model; None if it is not known."""
    if isinstance(cfg, CfgNode) and not is_detector(cfg):
        return None
    number: int | None = get(cfg, keys_for(cfg).num_queries, None)
    return number


def yaml_parts(cfg: CfgNode) -> dict[str, Any]:
    """The fields of a plan that YAML configs build in their own way, or do not have."""
    cfg.defrost()
    refuse(cfg, OF_DETECTRON2S_TRAINER, "here")
    if cfg.SOLVER.FSDP and not is_detector(cfg):
        raise ValueError("SOLVER.FSDP shards the stages of a DINO; train this model without it")
    require_whole(0, **{"DATALOADER.NUM_WORKERS": cfg.DATALOADER.NUM_WORKERS})
    if cfg.TEST.AUG.ENABLED:
        sizes = cfg.TEST.AUG.MIN_SIZES
        require_whole(**{f"TEST.AUG.MIN_SIZES[{i}]": x for i, x in enumerate(sizes)})
        if not sizes:
            raise ValueError("TEST.AUG.MIN_SIZES is empty: name the short sides to detect at")
    require_packages([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    require_results(cfg.DATASETS.TEST, yaml_results(cfg))
    return {
        "build_model": partial(built, "model", yaml_model, cfg),
        "build_optimizer": partial(built, "optimizer", yaml_optimizer, cfg),
        "build_scheduler": partial(built, "learning rate schedule", yaml_scheduler, cfg),
        "build_loader": partial(built, "training data loader", yaml_train_loader, cfg),
        "build_mapper": partial(built, "augmentation", yaml_mapper, cfg),
        "mixing": built("augmentation", yaml_mixing, cfg),
        "evaluate": partial(yaml_evaluate, cfg),
        "metrics": yaml_metrics(cfg),
        "max_to_keep": None,
        "log_period": 20,
        "ddp": {},
    }


def check_plan(plan: Plan) -> None:
    """Raise a ValueError for numbers out of range, and for FSDP with options of DDP."""
    require_whole(0, log_period=plan.log_period)
    if plan.max_to_keep is not None:
        require_whole(max_to_keep=plan.max_to_keep)
    if not isinstance(plan.seed, int):
        raise ValueError(f"the seed is {plan.seed!r}; it has to be a whole number")
    if plan.seed >= 2**32:
        raise ValueError(f"the seed is {plan.seed}; it has to be below 2**32")
    require_whole(0, **{"patience (TEST.PATIENCE, train.patience)": plan.patience})
    if plan.patience and not (plan.eval_period and plan.best_metric and plan.test_sets):
        raise ValueError(
            "early stopping (TEST.PATIENCE, train.patience) needs evaluations of a test set: "
            "set TEST.EVAL_PERIOD and TEST.BEST_METRIC (train.eval_period, train.best_metric) too"
        )
    if plan.ema_decay is not None:
        check_decay(plan.ema_decay)
    options = [name for name, value in plan.ddp.items() if value]
    if plan.fsdp and options:
        raise ValueError(f"FSDP does not use {options[0]} of DistributedDataParallel: unset either")


def built(what: str, make: Callable, *arguments: Any, **options: Any) -> Any:
    """Call a function that builds a part; any error becomes a ValueError about the config."""
    try:
        return make(*arguments, **options)
    except (BackboneError, OmegaConfBaseException, ValueError):
        raise
    except Exception as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        reason = " ".join(str(text).split())
        place = extract_tb(error.__traceback__)[-1]  # often only the name of what was to be built
        raise ValueError(
            f"the {what} cannot be built from this config ({type(error).__name__}: {reason}, in "
            f"{place.name} of {Path(place.filename).name})"
        ) from error


def yaml_model(cfg: CfgNode, device: str | None = None) -> nn.Module:
    named(BACKBONE_REGISTRY, cfg.MODEL.BACKBONE.NAME, "MODEL.BACKBONE.NAME")
    if device:
        cfg = cfg.clone()
        cfg.MODEL.DEVICE = device
    return build_model(cfg)


def yaml_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
    known = {"LR_SCHEDULER_NAME": SCHEDULERS, "WARMUP_METHOD": WARM_UPS}
    for key, names in known.items():
        if (name := cfg.SOLVER[key]) not in names:
            raise ValueError(f"SOLVER.{key} is {name!r}; {hint(str(name), names)}")
    require_share(**{f"SOLVER.{key}": cfg.SOLVER[key] for key in ("GAMMA", "WARMUP_FACTOR")})
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupFlatCosineLR":
        return flat_cosine_scheduler(cfg, optimizer)
    return build_lr_scheduler(cfg, optimizer)


def flat_cosine_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    solver = cfg.SOLVER
    schedule = WarmupParamScheduler(
        flat_cosine(solver.FLAT_SHARE, solver.BASE_LR_END / solver.BASE_LR),
        solver.WARMUP_FACTOR,
        share_of(solver.WARMUP_ITERS, solver.MAX_ITER),
        solver.WARMUP_METHOD,
    )
    return LRMultiplier(optimizer, schedule, solver.MAX_ITER)


def yaml_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    if optimizer_of(cfg) == "SGD":
        return build_optimizer(cfg, model)
    groups = parameter_groups(
        model,
        lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        norm_weight_decay=solver.WEIGHT_DECAY_NORM,
        bias_weight_decay=solver.WEIGHT_DECAY_BIAS,
        bias_multiplier=solver.BIAS_LR_FACTOR,
        backbone_multiplier=solver.BACKBONE_MULTIPLIER,
        offsets_multiplier=solver.OFFSETS_MULTIPLIER,
    )
    return ClippedAdamW(
        groups,
        max_norm=clip.CLIP_VALUE if clip.ENABLED else 0,
        lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
    )


def yaml_train_loader(cfg: CfgNode, dataset: list[dict] | None = None) -> Any:
    return build_detection_train_loader(cfg, mapper=yaml_mapper(cfg), dataset=dataset)


def yaml_mapper(cfg: CfgNode, is_train: bool = True) -> data.Mapper:
    """A mapper; in training with DETR's augmentation or, for other models, Detectron2's."""
    options: dict[str, Any] = {}
    if is_detector(cfg) and is_train:
        options["augmentations"] = data.detr_augmentation(
            min_sizes=cfg.INPUT.MIN_SIZE_TRAIN,
            sampling=cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
            max_size=cfg.INPUT.MAX_SIZE_TRAIN,
            crop_min_sizes=cfg.INPUT.CROP.MIN_SIZE_TRAIN,
            crop_type=cfg.INPUT.CROP.TYPE,
            crop_size=cfg.INPUT.CROP.SIZE if cfg.INPUT.CROP.ENABLED else None,
            flip=cfg.INPUT.RANDOM_FLIP,
            scale_jitter=cfg.INPUT.SCALE_JITTER,
            photometric=cfg.INPUT.PHOTOMETRIC,
            further=cfg.INPUT.AUGMENTATIONS,
        )
        options["min_visible"] = cfg.INPUT.CROP.MIN_VISIBLE
    return data.Mapper(cfg, is_train=is_train, **options)


def yaml_mixing(cfg: CfgNode) -> data.Mixing | None:
    keys = cfg.INPUT.MIXING
    mixing = data.Mixing(keys.MOSAIC, keys.MIXUP, keys.SPAN, cfg.INPUT.CROP.MIN_VISIBLE)
    return mixing if keys.MOSAIC or keys.MIXUP else None


def require_sections(cfg: DictConfig) -> None:
    """Raise a ValueError if a LazyConfig lacks a section that a training needs."""
    for key in SECTIONS:
        found = OmegaConf.select(cfg, key)
        if not isinstance(found, DictConfig):
            what = "is missing" if found is None else f"is {found!r}"
            raise ValueError(
                f"the section '{key}' of the LazyConfig {what}; it has to hold the keys that it "
                "has in configs/common (Detectron2's own LazyConfigs train with its "
                "tools/lazyconfig_train_net.py)"
            )


def lazy_parts(cfg: DictConfig) -> dict[str, Any]:
    """The fields of a plan that LazyConfigs build in their own way, or that only they have."""
    for key in ("train", "test"):
        number = cfg.dataloader[key].get("num_workers", 0)
        require_whole(0, **{f"dataloader.{key}.num_workers": number})
    if lazy_evaluator(cfg) is segmentation_evaluator:
        names = cfg.dataloader.test.dataset.names
        names = [names] if isinstance(names, str) else names
        require_packages(names)
        require_results(names, lazy_results(cfg))
    return {
        "build_model": partial(built, "model", lazy_model, cfg),
        "build_optimizer": partial(built, "optimizer", lazy_optimizer, cfg),
        "build_scheduler": partial(built, "learning rate schedule", lazy_scheduler, cfg),
        "build_loader": partial(built, "training data loader", lazy_train_loader, cfg),
        "build_mapper": partial(built, "augmentation", lazy_mapper, cfg),
        "mixing": built("augmentation", lazy_mixing, cfg),
        "evaluate": partial(lazy_evaluate, cfg),
        "metrics": lazy_metrics(cfg),
        "max_to_keep": cfg.train.checkpointer.max_to_keep,
        "log_period": cfg.train.log_period,
        "ddp": dict(cfg.train.ddp),
    }


def lazy_model(cfg: DictConfig, device: str | None = None) -> nn.Module:
    return instantiate(cfg.model).to(device or cfg.train.device)


def lazy_scheduler(cfg: DictConfig, optimizer: torch.optim.Optimizer) -> Any:
    return instantiate(cfg.lr_multiplier)


def lazy_optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    cfg = copy.deepcopy(cfg)  # or the plan would keep the model
    cfg.optimizer.params.model = model
    return instantiate(cfg.optimizer)


def lazy_mapper(cfg: DictConfig, is_train: bool) -> Any:
    return instantiate(cfg.dataloader["train" if is_train else "test"].mapper)


def lazy_mixing(cfg: DictConfig) -> data.Mixing | None:
    mixing = instantiate(cfg.dataloader.get("mixing"))  # others' configs do not have it
    return mixing if mixing and (mixing.mosaic or mixing.mixup) else None


def lazy_train_loader(cfg: DictConfig, dataset: list[dict] | None = None) -> Any:
    loader = copy.deepcopy(cfg).dataloader.train  # with what it refers to
    if dataset is not None:
        loader.dataset = dataset
    return instantiate(loader)


def part_of_batch(batch: int, accumulate: int, workers: int = 1) -> int:
    """The images per micro-batch; a ValueError if they cannot be divided equally."""
    if not isinstance(accumulate, int) or accumulate < 1 or batch % (accumulate * workers):
        raise ValueError(
            f"a batch of {plural(batch, 'image')} cannot be divided into {accumulate} equal "
            + "micro-batches"
            + (f" on {workers} workers" if workers > 1 else "")
            + ": change the batch size, the accumulation steps or the number of workers"
        )
    return batch // accumulate


def precision_of(name: str) -> torch.dtype:
    if name not in PRECISIONS:
        raise ValueError(f"mixed precision is {name!r}; it can be {' or '.join(PRECISIONS)}")
    return PRECISIONS[name]


def skips(choice: str) -> bool:
    if choice not in ("stop", "skip"):
        raise ValueError(
            f"SOLVER.NON_FINITE (train.non_finite) is {choice!r}; it can be stop or skip"
        )
    return choice == "skip"
