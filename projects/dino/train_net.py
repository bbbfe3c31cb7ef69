#!/usr/bin/env python3
"""Train and evaluate DINO with Detectron2, from a YAML or a LazyConfig file."""

import argparse
import errno
import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Collection, Sequence
from itertools import product
from logging.handlers import MemoryHandler
from typing import NamedTuple

from program import add_training_arguments, make_parser, one_sentence, short_overrides

EPILOG = """
Examples:

Train on COCO, found where DETECTRON2_DATASETS points, with 8 GPUs:
    $ python projects/dino/train_net.py --config-file configs/dino_R_50_4scale_12ep.yaml \\
        --num-gpus 8

Train on a folder of data, as Roboflow, CVAT, Label Studio, FiftyOne or Ultralytics export it:
    $ python projects/dino/train_net.py --config-file configs/dino_R_50_4scale_12ep.yaml \\
        --data my/cells

Train on files in COCO format; works with .py configs too:
    $ python projects/dino/train_net.py --config-file configs/dino_R_50_4scale_12ep.yaml \\
        --train-json my/train.json --train-images my/images \\
        --val-json my/val.json --val-images my/images

Train for 50 epochs, 16 images a step, with gradient accumulation over 8 batches of 2:
    $ python projects/dino/train_net.py --config-file configs/dino_R_50_4scale_12ep.yaml \\
        --train-json ... --epochs 50 --batch-size 16 --output out SOLVER.ACCUMULATE 8

Change the config at the end of the command, YAML and LazyConfig:
    $ python projects/dino/train_net.py --config-file configs/quickstart.yaml \\
        SOLVER.BASE_LR 0.001 OUTPUT_DIR out
    $ python projects/dino/train_net.py --config-file configs/quickstart.py \\
        optimizer.lr=0.001 train.output_dir=out

Evaluate a checkpoint, of one's own or a published one; go on with an interrupted training:
    $ python projects/dino/train_net.py --config-file ... --eval-only \\
        MODEL.WEIGHTS out/model_final.pth
    $ python projects/dino/train_net.py --config-file ... --eval-only \\
        MODEL.WEIGHTS dino_d2://detrex/dino_R_50_4scale_24ep
    $ python projects/dino/train_net.py --config-file ... --resume
"""


# What a process that has looked at config and data hands on, beside the options.
SEEN = {"job": None, "found": None, "registered": (), "early": ()}


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EPILOG)
    add_training_arguments(parser)
    parser.set_defaults(**SEEN)
    return parser


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argument_parser()
    args = parser.parse_args()
    for split in ("train", "val"):
        if bool(getattr(args, f"{split}_json")) != bool(getattr(args, f"{split}_images")):
            parser.error(f"--{split}-json and --{split}-images go together")
    if args.data and (args.train_json or args.val_json):
        parser.error("--data is in place of --train-json and --val-json: give either")
    if args.num_gpus < 1:
        parser.error("--num-gpus is the number of workers, also on CPUs: at least 1")
    if args.num_machines > 1 and args.dist_url == "auto":
        parser.error("--num-machines needs --dist-url tcp://HOST:PORT, of the first machine")
    if args.overwrite and (args.resume or args.eval_only):
        other = "--resume" if args.resume else "--eval-only"
        parser.error(f"--overwrite is for a training that begins, not for {other}")
    return parser, args


if __name__ == "__main__":  # so that --help and wrong options do not wait for the imports below
    parse()


from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from torch.multiprocessing import ProcessExitedException

from dino_d2 import data
from dino_d2.config.overrides import apply_overrides
from dino_d2.config.styles import LAZY, YAML, get, keys_for, put, read_config
from dino_d2.data import DatasetError
from dino_d2.data.coco_json import dataset_name
from dino_d2.distributed.launch import check_gpus, is_worker, launch, world_size
from dino_d2.engine.folder import check_folder, claim_folder
from dino_d2.engine.keys import NUM_CLASSES, is_detector
from dino_d2.engine.plan import Plan, make_plan, part_of_batch, require_sections
from dino_d2.engine.run import check, test, train
from dino_d2.engine.schedule import scale_schedule
from dino_d2.engine.trainer import NonFiniteLoss
from dino_d2.engine.writers import require_wandb
from dino_d2.layouts.renaming import CheckpointError
from dino_d2.modeling import BackboneError
from dino_d2.names import check_device, plural
from dino_d2.weights import model_zoo

logger = logging.getLogger("dino_d2")

# Warnings before the log exists: printed at once, and logged later.
EARLY = MemoryHandler(10_000, logging.CRITICAL + 1)

# Later errors that need no traceback.
SENTENCES = (BackboneError, CheckpointError, DatasetError, NonFiniteLoss)


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
    given = apply_overrides(cfg, short_overrides(args, keys))
    if keys is LAZY:
        require_sections(cfg)
    set_data(cfg, args, given)
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


def require_device(device: str, remedy: str) -> None:
    try:
        check_device(device)
    except ValueError as error:
        raise ValueError(f"{error}; end the command with {remedy} to do without") from error


def check_all(args: argparse.Namespace) -> Job:
    """Run the checks of `main` without writing anything; returns the job.

    Raises:
        ValueError: the config, the data, the weights or the machine does not allow it
    """
    job = load_job(args)
    if not args.eval_only:
        check_folder(job.plan.output_dir, resume=args.resume, overwrite=args.overwrite)
    check(job.plan, resume=args.resume, eval_only=args.eval_only)
    return job


def main(args: argparse.Namespace) -> None:
    """Train or evaluate in one process of `launch`, and write to the output folder."""
    data.register_again(args.registered)
    cfg, plan = args.job or load_job(args)
    said = {x.getMessage() for x in EARLY.buffer}
    EARLY.buffer[:0] = [x for x in args.early if x.getMessage() not in said]
    if not args.eval_only:  # before the log exists
        claim_folder(plan.output_dir, resume=args.resume, overwrite=args.overwrite)
    own = {key: value for key, value in vars(args).items() if key not in SEEN}
    default_setup(cfg, argparse.Namespace(**own))  # which logs them
    begin_log(plan.output_dir)
    if args.data:
        logger.info(args.found.line)
    if args.eval_only:
        test(plan, resume=args.resume)
    else:
        train(plan, resume=args.resume)


def keep_early() -> None:
    """Keep warnings for the log, and print them to the console in the first process.

    Other workers read the same data, and would repeat the warnings.
    """
    logger.addHandler(EARLY)
    if multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0":
        logger.addHandler(logging.lastResort)


def begin_log(folder: str) -> None:
    """Start this worker's log with the warnings that were kept."""
    logger.removeHandler(EARLY)
    logger.removeHandler(logging.lastResort)
    setup_logger(folder, distributed_rank=comm.get_rank(), name="dino_d2")
    streams = [x for x in logger.handlers if isinstance(x, logging.StreamHandler)]
    files = [x for x in streams if x.stream is not sys.stdout]
    for record, file in product(EARLY.buffer, files):
        file.handle(record)
    EARLY.buffer.clear()


def worker(args: argparse.Namespace) -> None:
    """`main`, but errors in the input end in one sentence without a traceback.

    Raises:
        SystemExit: with that sentence
    """
    logging.getLogger("detectron2.engine.train_loop").addFilter(leave_the_sentence)
    keep_early()
    try:
        main(args)
    except SENTENCES as error:
        sys.exit(f"train_net.py: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(
            f"train_net.py: the disk is full ({error}): make room; --resume goes on from the last "
            "checkpoint"
        )


def leave_the_sentence(record: logging.LogRecord) -> bool:
    """Removes the traceback of errors in the input from Detectron2's log."""
    error = record.exc_info and record.exc_info[1]
    if isinstance(error, SENTENCES):
        record.msg, record.exc_info = str(error), None
    return True


def invoke_main() -> None:
    parser, args = parse()
    with one_sentence(parser.prog):  # fail on bad input before starting several processes
        keep_early()
        check_gpus(args.num_gpus)
        args.job = check_all(args)
    if args.num_gpus * args.num_machines > 1 and not is_worker():  # they may not get all of it
        args.job, args.registered, args.early = None, data.registered(), list(EARLY.buffer)
    end = "" if args.eval_only else "; --resume goes on from the last checkpoint"
    try:
        launch(worker, args)
    except KeyboardInterrupt:  # the same error as in the other workers, which leave it to this one
        sys.exit(f"{parser.prog}: interrupted{end}")
    except ProcessExitedException as error:
        if error.exit_code > 0:  # it has printed why
            sys.exit(error.exit_code)
        sys.exit(
            f"{parser.prog}: a worker was killed by signal {-error.exit_code}, as the system does "
            f"when memory is short{end}"
        )


if __name__ == "__main__":
    invoke_main()
