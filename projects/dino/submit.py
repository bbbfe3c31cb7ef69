#!/usr/bin/env python3
"""Train DINO on a SLURM cluster: train_net.py, with one task per GPU of every node.

Arguments after -- are passed to train_net.py. A job that is preempted or out of time is requeued
and resumes from the last checkpoint in the output folder. Needs submitit.
"""

import argparse
import re
import runpy
import sys
from pathlib import Path
from typing import Any

from program import add_training_arguments, make_parser

TRAIN_NET = Path(__file__).resolve().with_name("train_net.py")

EPILOG = """
Examples:

Two nodes of 8 GPUs, for a day at a time:
    $ submit.py --nodes 2 --gpus-per-node 8 --time 24:00:00 --partition gpu -- \\
        --config-file configs/dino_R_50_4scale_36ep.yaml SOLVER.IMS_PER_BATCH 64

Whatever else sbatch takes:
    $ submit.py --nodes 2 --slurm qos=high mem=0 constraint=h100 -- --config-file ...

The same on this machine, without SLURM:
    $ submit.py --local --gpus-per-node 2 -- --config-file configs/quickstart.yaml MODEL.DEVICE cpu
"""


class Training:
    """The task of every worker of the job; pickled together with this file's path.

    Args:
        program: train_net.py
        words: its arguments
    """

    def __init__(self, program: str, words: list[str]):
        self.program, self.words = program, words

    def __call__(self) -> None:
        """Run train_net.py; raises a RuntimeError with the sentence that it ends with."""
        from submitit.helpers import TorchDistributedEnvironment

        # Every worker sees all GPUs of its node and selects its own. Overwrite, as a job submitted
        # from within another one inherits its variables.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        sys.argv = [self.program, *self.words]
        sys.path.insert(0, str(Path(self.program).parent))  # as if Python ran it as a program
        try:
            runpy.run_path(self.program, run_name="__main__")
        except SystemExit as end:
            if isinstance(end.code, str):
                raise RuntimeError(end.code) from end
            raise  # called by submitit before the job is queued again

    def checkpoint(self) -> Any:
        """What submitit queues when the job is interrupted."""
        from submitit.helpers import DelayedSubmission

        words = self.words if "--resume" in self.words else ["--resume", *self.words]
        return DelayedSubmission(Training(self.program, words))


def minutes(text: str) -> int:
    """Minutes of a SLURM time [DAYS-]HOURS:MINUTES:SECONDS; seconds count as a minute.

    Raises:
        ArgumentTypeError: it has another format
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 24:00:00 or 2-12:00:00")
    days, hours, mins, seconds = (int(x or 0) for x in match.groups())
    return (24 * days + hours) * 60 + mins + (seconds > 0)


def pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EPILOG)
    parser.usage = "%(prog)s [options] -- ARGUMENTS OF train_net.py"
    add = parser.add_argument
    add("--nodes", type=int, default=1)
    add("--gpus-per-node", type=int, default=8, help="one worker each (default: 8)")
    add("--cpus-per-gpu", type=int, default=8, help="per worker and its loader (default: 8)")
    add("--time", type=minutes, default="24:00:00", metavar="[D-]HH:MM:SS", help="until requeued")
    add("--requeues", type=int, default=10, help="how often to requeue after --time (default: 10)")
    add("--partition")
    add("--account")
    add(
        "--slurm",
        type=pair,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="other sbatch options",
    )
    add("--name", default="dino", help="of the job")
    add("--folder", default="output/slurm", help="for the logs; every node has to see it")
    add("--local", action="store_true", help="run on this machine, and wait until it ends")
    add("words", nargs="+", help=argparse.SUPPRESS)
    return parser


def options(args: argparse.Namespace) -> dict:
    """Options of the executor of submitit."""
    wanted = {"partition": args.partition, "account": args.account}
    return {
        "name": args.name,
        "nodes": args.nodes,
        "tasks_per_node": args.gpus_per_node,
        "gpus_per_node": args.gpus_per_node,
        "cpus_per_task": args.cpus_per_gpu,
        "timeout_min": args.time,
        # Otherwise the other workers would wait for one that has failed.
        "slurm_srun_args": ["--kill-on-bad-exit=1"],
        "slurm_additional_parameters": dict(args.slurm),
        **{f"slurm_{name}": value for name, value in wanted.items() if value},
    }


def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    checker = make_parser("What follows --.", "")
    add_training_arguments(checker)
    checker.prog = TRAIN_NET.name
    checker.parse_args(args.words)  # do not queue what train_net.py would refuse
    try:
        import submitit
    except ImportError:
        sys.exit(f"{parser.prog}: submitit is missing: pip install submitit")
    try:
        executor = submitit.AutoExecutor(
            args.folder,
            cluster="local" if args.local else "slurm",
            slurm_max_num_timeout=args.requeues,
        )
        executor.update_parameters(**options(args))
    except (RuntimeError, ValueError) as error:  # no SLURM, or several nodes with --local
        sys.exit(f"{parser.prog}: {error}")
    job = executor.submit(Training(str(TRAIN_NET), args.words))
    print(f"job {job.job_id}: logs are {job.paths.stdout} and {job.paths.stderr}", flush=True)
    if args.local:
        try:
            job.results()
        except submitit.core.utils.FailedJobError as error:
            sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
