"""A training job: a config with its overrides, and data. All of it is checked first."""

import argparse
import logging
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, default_setup
from detectron2.utils import logger as logger_module
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from .. import data
from ..config.overrides import apply_overrides
from ..config.styles import (
    LAZY,
    YAML,
    get,
    keys_for,
    put,
    put_short,
    read_config,
    scale_images,
)
from ..data.coco_json import dataset_name
from ..distributed.launch import world_size
from ..layouts.renaming import CheckpointError
from ..names import check_device, plural
from ..predictor import Predictor, load
from ..ranges import require_whole
from ..weights import model_zoo
from . import run
from .folder import check_folder, claim_folder
from .keys import NUM_CLASSES, is_detector
from .plan import Plan, make_plan, part_of_batch, require_sections
from .schedule import scale_schedule
from .writers import require_wandb

logger = logging.getLogger(__name__)

# Of a command line, and not of a call of `train`.
NO_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(("train_json", "train_images", "val_json", "val_images", "found")),
    **{"eval_only": False, "num_gpus": 1, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"},
}


# The ends of keys, of either style, that --size changes.
SIDES = ("_SIZE_TRAIN", "_SIZE_TEST", "CROP.SIZE", "_sizes", "max_size", "edge_length", "crop_size")


class Contents(NamedTuple):
    """The data set in the folder of --data."""

    line: str  # description
    splits: tuple[str, ...]


class Job(NamedTuple):
    """What the command line asks for."""

    cfg: CfgNode | DictConfig  # with the command line merged in
    plan: Plan


def load_job(args: argparse.Namespace) -> Job:
    """Load a config of either style, check its data, and make its plan.

    Raises:
        ValueError: the config, the data or the machine does not allow it
    """
    if not args.config_file:
        raise ValueError("--config-file is missing: a file, or a name such as quickstart.py")
    # Resolve the name here: Detectron2 also opens the file, and does not know names.
    args.config_file = file = model_zoo.get_config_file(args.config_file)
    if not file.endswith((".yaml", ".yml", ".py")):
        raise ValueError(f"--config-file is {file!r}, neither a .yaml nor a .py file")
    cfg = read_config(file)
    keys = keys_for(cfg)
    given = apply_overrides(cfg, args.opts)
    given += put_short(cfg, vars(args), given)
    if keys is LAZY:
        require_sections(cfg)
    set_size(cfg, args.size, given)
    set_data(cfg, args, given)
    if keys.device not in given:
        put(cfg, keys.device, device_here(get(cfg, keys.device)))
    require_device(get(cfg, keys.device), keys.change(keys.device, "cpu"))
    check_weights(args, get(cfg, keys.weights), keys.weights)
    check_output(get(cfg, keys.output_dir), keys.output_dir)
    if not args.eval_only:
        if keys is YAML and cfg.SOLVER.REFERENCE_WORLD_SIZE:  # Detectron2's own scaling
            cfg = DefaultTrainer.auto_scale_workers(cfg, world_size(args))
            cfg.SOLVER.REFERENCE_BATCH = cfg.SOLVER.IMS_PER_BATCH
        scale_schedule(cfg, given=given)
        part_of_batch(get(cfg, keys.batch), get(cfg, keys.accumulate), world_size(args))
    if keys is YAML:
        cfg.freeze()
    plan = make_plan(cfg)
    if plan.wandb_project and not args.eval_only:
        require_wandb()
    return Job(cfg, plan)


def set_size(cfg: CfgNode | DictConfig, size: int | None, given: Collection[str]) -> None:
    """Scale images to the size of --size; None leaves them as they are."""
    if size is None:
        return
    require_whole(**{"the size of images (--size)": size})
    if sides := [x for x in given if x.endswith(SIDES)]:
        raise ValueError(f"--size sets {sides[0]}: give only one of them")
    scale_images(cfg, size)


def set_data(cfg: CfgNode | DictConfig, args: argparse.Namespace, given: Collection[str]) -> None:
    """Set data sets and number of classes, also for those who load the saved config."""
    keys = keys_for(cfg)
    for split, key in (("train", keys.train_sets), ("val", keys.test_sets)):
        put(cfg, key, datasets(args, split, get(cfg, key), key in given))
    test_sets, number = get(cfg, keys.test_sets), get(cfg, keys.num_classes)
    # A LazyConfig may call a function of the training data; other models have a key of their own.
    others = keys is YAML and not is_detector(cfg)
    if isinstance(number, DictConfig) or others:
        number = None
    found = check_data(args, get(cfg, keys.train_sets), test_sets, number)
    put(cfg, keys.num_classes, found)
    own = NUM_CLASSES.get(cfg.MODEL.META_ARCHITECTURE) if others else None
    if own and get(cfg, own) != found:
        raise ValueError(
            f"{own} is {get(cfg, own)}, but the data has {plural(found, 'class')}: end the "
            f"command with {own} {found}"
        )
    if keys is LAZY and not test_sets:
        del cfg.dataloader.evaluator


def datasets(args: argparse.Namespace, split: str, names: Sequence[str], given: bool) -> Sequence:
    """The dataset names of a split, from the command line or the config.

    If the command line gives data for another split, COCO's names are dropped from the config,
    where they are only placeholders.

    Args:
        split: "train" or "val"
        names: of the config
        given: whether the command line gave these names
    """
    if args.data:
        if args.found is None:
            found = data.find_folder(os.path.expanduser(args.data))
            args.found = Contents(str(found), tuple(found.splits))
        own = [f"{args.data}@{split}"] if split in args.found.splits else []
    else:
        file, images = getattr(args, f"{split}_json"), getattr(args, f"{split}_images")
        own = [dataset_name(file, images)] if file else []
    changes = data.class_changes(args.drop, args.merge, args.ignore)
    own = [changes.add_to(name) for name in own]
    if own and given:
        raise ValueError(f"the {split} data is named as {own[0]!r} and as {list(names)}: drop one")
    if own or given or not (args.data or args.train_json or args.val_json):
        return own or names
    return [name for name in names if not data.is_built_in(name)]


def check_data(
    args: argparse.Namespace, train: Sequence[str], test: Sequence[str], num_classes: int | None
) -> int:
    """The number of classes of the data, checked as by `data.check`."""
    if args.eval_only:  # does not need the training data
        train = ()
    if not (test if args.eval_only else train):
        split = "val" if args.eval_only else "train"
        raise ValueError(
            f"there is no {split} data: give --data, or --{split}-json and --{split}-images"
        )
    return data.check(train, test, num_classes)


def check_weights(args: argparse.Namespace, path: str, key: str) -> None:
    if args.eval_only and not path and not args.resume:
        raise ValueError(f"--eval-only needs a checkpoint: name one as {key}")
    if path and not args.resume:
        try:
            model_zoo.fetch_weights(path)
        except CheckpointError as error:
            raise ValueError(f"{key}: {error}") from error


def check_output(folder: str, key: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise ValueError(f"{key} is {folder!r}, which cannot be written to: {error}") from error


def device_here(device: str) -> str:
    """The CPU, with a warning, if the configured GPU is not available."""
    if device != "cuda" or torch.cuda.is_available():
        return device
    logger.warning("PyTorch finds no GPU: the CPU is used, which is many times slower")
    return "cpu"


def require_device(device: str, remedy: str) -> None:
    try:
        check_device(device)
    except ValueError as error:
        raise ValueError(f"{error}; end the command with {remedy} to do without") from error


def check_all(args: argparse.Namespace) -> Job:
    """The job of `load_job`, checked whole; only its output folder is created.

    Raises:
        ValueError: the config, the data, the weights or the machine does not allow it
    """
    if args.resume and args.overwrite:
        raise ValueError(
            "--overwrite starts a new run, --resume continues one: give only one of them"
        )
    job = load_job(args)
    if not args.eval_only:
        check_folder(job.plan.output_dir, resume=args.resume, overwrite=args.overwrite)
    run.check(job.plan, resume=args.resume, eval_only=args.eval_only)
    return job


def train(
    config: str | os.PathLike = "quickstart",
    data: str | os.PathLike = "",
    *,
    epochs: float | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    size: int | None = None,
    device: str | None = None,
    output: str | os.PathLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
    drop: str | Collection[str] = (),
    merge: Mapping[str, str | Collection[str]] = MappingProxyType({}),
    ignore: str | Collection[str] = (),
) -> Predictor:
    """Train in this process, as projects/dino/train_net.py does with one worker.

    Args:
        config: a file, or a name of the model zoo
        data: folder of a data set as annotation tools export it (COCO, YOLO, VOC); default: the
            data sets that the config names
        epochs, batch_size, lr, device, output: in place of the config's; the device is the GPU if
            there is one
        size: short side of images in evaluation, in pixels; other sides of the config follow in
            proportion
        resume: continue from the last checkpoint in the output folder
        overwrite: remove the files of an earlier run from that folder
        overrides: of the config, see `apply_overrides`
        drop, merge, ignore: classes of `data` to remove, to merge (by their new name) and to turn
            into ignore regions, see `data.class_changes`

    Returns:
        what `load` gives for the output folder: the best checkpoint, or else the last

    Raises:
        ValueError: the config, the data or the machine does not allow it, or the model is not one
            of this package
        DatasetError, CheckpointError: the data or the weights do not allow it
    """
    if (drop or merge or ignore) and not data:
        raise ValueError("drop, merge and ignore change the classes of data: name its folder")
    args = argparse.Namespace(
        config_file=os.fspath(config),
        data=os.fspath(data),
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        size=size,
        device=device,
        output=None if output is None else os.fspath(output),
        resume=resume,
        overwrite=overwrite,
        opts=[str(x) for x in overrides],
        drop=drop,
        merge=merge,
        ignore=ignore,
        **NO_OPTIONS,
    )
    job = check_all(args)
    if isinstance(job.cfg, CfgNode) and not is_detector(job.cfg):
        raise ValueError(
            f"there is no predictor for {job.cfg.MODEL.META_ARCHITECTURE}: train it with "
            "projects/dino/train_net.py"
        )
    claim_folder(job.plan.output_dir, resume=resume, overwrite=overwrite)
    with logging_to(job.plan.output_dir):
        default_setup(job.cfg, args)
        run.train(job.plan, resume=resume)
    return load(job.plan.output_dir, device=device)


@contextmanager
def logging_to(folder: str) -> Iterator[None]:
    """Log to a folder and the console, and to neither afterwards: another run may follow."""
    loggers = [logging.getLogger(name) for name in ("fvcore", "detectron2", "dino_d2")]
    before = [list(x.handlers) for x in loggers]
    setup_logger(folder, name="dino_d2")
    try:
        yield
    finally:
        for own, kept in zip(loggers, before, strict=True):
            for handler in [x for x in own.handlers if x not in kept]:
                own.removeHandler(handler)
        for cached in (setup_logger, logger_module._cached_log_stream):  # Detectron2's
            cached.cache_clear()
