#!/usr/bin/env python3
"""Train and evaluate DINO with Detectron2, from a YAML or a LazyConfig file."""

import argparse
import errno
import logging
import multiprocessing
import os
import sys
from itertools import product
from logging.handlers import MemoryHandler

from program import add_training_arguments, make_parser, one_sentence

EPILOG = """
Examples:

Train on COCO, found where DETECTRON2_DATASETS points, with 8 GPUs:
    $ python projects/dino/train_net.py --config-file configs/dino_R_50_4scale_12ep.yaml \\
        --num-gpus 8

Train on a folder of data, as Roboflow, CVAT, Label Studio, FiftyOne or Ultralytics export it:
    $ python projects/dino/train_net.py --config-file configs/dino_R_50_4scale_12ep.yaml \\
        --data my/cells

The same with one class dropped, two merged, and one as ignore regions:
    $ python projects/dino/train_net.py --config-file configs/dino_R_50_4scale_12ep.yaml \\
        --data my/roads --drop rider --merge vehicle=car,truck --ignore DontCare

Train on files in COCO format; works with .py configs too:
    $ python projects/dino/train_net.py --config-file configs/dino_R_50_4scale_12ep.yaml \\
        --train-json my/train.json --train-images my/images \\
        --val-json my/val.json --val-images my/images

Train for 50 epochs, batch size 16 as gradient accumulation over 8 micro-batches of 2:
    $ python projects/dino/train_net.py --config-file configs/dino_R_50_4scale_12ep.yaml \\
        --train-json ... --epochs 50 --batch-size 16 --output out SOLVER.ACCUMULATE 8

Override config keys at the end of the command, YAML and LazyConfig:
    $ python projects/dino/train_net.py --config-file configs/quickstart.yaml \\
        SOLVER.BASE_LR 0.001 OUTPUT_DIR out
    $ python projects/dino/train_net.py --config-file configs/quickstart.py \\
        optimizer.lr=0.001 train.output_dir=out

Evaluate your own or a published checkpoint; resume an interrupted run:
    $ python projects/dino/train_net.py --config-file ... --eval-only \\
        MODEL.WEIGHTS out/model_final.pth
    $ python projects/dino/train_net.py --config-file ... --eval-only \\
        MODEL.WEIGHTS dino_d2://detrex/dino_R_50_4scale_24ep
    $ python projects/dino/train_net.py --config-file ... --resume
"""


# What a process that has read config and data passes on, besides the options.
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
        parser.error("--data and --train-json or --val-json exclude each other")
    if args.num_gpus < 1:
        parser.error("--num-gpus is the number of workers, also on CPUs: at least 1")
    if args.num_machines > 1 and args.dist_url == "auto":
        parser.error("--num-machines needs --dist-url tcp://HOST:PORT, of the first machine")
    if args.overwrite and (args.resume or args.eval_only):
        other = "--resume" if args.resume else "--eval-only"
        parser.error(f"--overwrite is for a new training run, not for {other}")
    return parser, args


if __name__ == "__main__":  # so that --help and wrong options do not wait for the imports below
    parse()


from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException

from dino_d2 import data
from dino_d2.data import DatasetError
from dino_d2.distributed.launch import check_gpus, is_worker, launch
from dino_d2.engine.folder import claim_folder
from dino_d2.engine.job import check_all, load_job
from dino_d2.engine.run import test, train
from dino_d2.engine.trainer import NonFiniteLoss
from dino_d2.layouts.renaming import CheckpointError
from dino_d2.modeling import BackboneError

logger = logging.getLogger("dino_d2")

# Warnings before the log exists: printed at once, and logged later.
EARLY = MemoryHandler(10_000, logging.CRITICAL + 1)

# Later errors that need no traceback.
SENTENCES = (BackboneError, CheckpointError, DatasetError, NonFiniteLoss)


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
