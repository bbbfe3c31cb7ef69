"""Starts the workers of a training run."""

import argparse
import os
from collections.abc import Callable

import torch
from detectron2.engine import launch as spawn
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch import distributed

from ..names import plural

# Set by torchrun, and by scripts for SLURM.
WORKER_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


def launch(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run `main(args)` in every worker of a training run.

    A process that torchrun or a SLURM script started (with `WORKER_VARIABLES` in the environment)
    joins the others and ignores the options below. Otherwise Detectron2 starts the workers. They
    communicate through NCCL on GPUs, through gloo otherwise.

    Args:
        main: a module-level function, which other processes can import
        args: with Detectron2's num_gpus (workers on this machine, also without GPUs), num_machines,
            machine_rank and dist_url

    Raises:
        ValueError: this machine has fewer GPUs than workers, or the environment is incomplete
    """
    if is_worker():
        check_gpus(int(os.environ["LOCAL_WORLD_SIZE"]))
        join()
        work(main, args)
        return
    check_gpus(args.num_gpus)
    spawn(
        work,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(main, args),
    )


def work(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run `main(args)`, then close the process group, if there is one.

    Detectron2's launcher leaves it open, and its threads can then abort the exiting process.
    """
    main(args)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def world_size(args: argparse.Namespace) -> int:
    """The number of workers on all machines that `launch` will run."""
    if is_worker():
        return int(os.environ["WORLD_SIZE"])
    return args.num_gpus * args.num_machines


def is_worker() -> bool:
    """Whether this process was started as one of several workers.

    Raises:
        ValueError: only some variables are set; each worker would train a model of its own
    """
    if "RANK" not in os.environ:
        return False
    missing = [name for name in WORKER_VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(
            f"the environment has RANK, like that of a worker, but not {missing[0]}: start workers "
            f"with torchrun, set all of {', '.join(WORKER_VARIABLES)}, or unset RANK"
        )
    return True


def check_gpus(workers: int) -> None:
    """Raise a ValueError if this machine has GPUs, but fewer than workers."""
    gpus = torch.cuda.device_count()
    own = gpus == 1 and is_worker()  # under SLURM, each worker may see only its own GPU
    if gpus and workers > gpus and not own:
        raise ValueError(
            f"{workers} workers were requested on this machine, which has {plural(gpus, 'GPU')}: "
            f"request at most {gpus} with --num-gpus (torchrun: --nproc-per-node)"
        )


def join() -> None:
    """Join the process group that the environment describes."""
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    distributed.init_process_group(backend, timeout=DEFAULT_TIMEOUT)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
