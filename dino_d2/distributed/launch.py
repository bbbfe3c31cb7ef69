"""How the workers of a training are started."""

import argparse
import os
from collections.abc import Callable

import torch
from detectron2.engine import launch as spawn
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch import distributed

from ..names import plural

# What torchrun sets, and scripts for SLURM.
WORKER_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


def launch(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run `main(args)` in every worker of a training.

    A process that torchrun or a SLURM script has started as one of the workers (the environment has
    RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT) joins the others;
    the options below do not count then. Otherwise Detectron2 starts them. They talk through NCCL
    where there are GPUs, through gloo otherwise.

    Args:
        main: a function of a module, as it is sent to other processes
        args: with Detectron2's num_gpus (workers on this machine, also where it has no GPU),
            num_machines, machine_rank and dist_url

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
    """`main(args)` in a worker that has joined the others, or alone; then leave them.

    A worker that ends with its process group still open may abort: the group's threads run on
    while the process takes itself down. Detectron2's launcher leaves it open.
    """
    main(args)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def world_size(args: argparse.Namespace) -> int:
    """How many workers `launch` runs, on all machines, known before it does.

    Raises:
        ValueError: the environment is that of a worker, but incomplete
    """
    if is_worker():
        return int(os.environ["WORLD_SIZE"])
    return args.num_gpus * args.num_machines


def is_worker() -> bool:
    """Whether this process was started as one of several.

    Raises:
        ValueError: RANK is set and another variable is not: alone, every worker would train a model
            of its own
    """
    if "RANK" not in os.environ:
        return False
    missing = [name for name in WORKER_VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(
            f"the environment has RANK, as one of several workers has, but not {missing[0]}: start "
            f"workers with torchrun, set all of {', '.join(WORKER_VARIABLES)}, or unset RANK"
        )
    return True


def check_gpus(workers: int) -> None:
    """
    Raises:
        ValueError: there are GPUs, but not one for each of the workers of this machine
    """
    gpus = torch.cuda.device_count()
    own = gpus == 1 and is_worker()  # each may see another one, as SLURM can have it
    if gpus and workers > gpus and not own:
        raise ValueError(
            f"{workers} workers were asked for on this machine, which has {plural(gpus, 'GPU')}: "
            f"ask for at most {gpus} with --num-gpus (torchrun: --nproc-per-node)"
        )


def join() -> None:
    """Become the worker that the environment describes."""
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    distributed.init_process_group(backend, timeout=DEFAULT_TIMEOUT)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
