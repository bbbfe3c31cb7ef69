"""The program `submit.py`: what it asks of SLURM, and a training that it runs on this machine."""

import argparse
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dino_d2.data import generate
from dino_d2.weights.model_zoo import get_config_file

PROGRAMS = Path(__file__).parents[1] / "projects" / "dino"
sys.path.insert(0, str(PROGRAMS))
import submit  # noqa: E402

TINY = [
    *("MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("MODEL.DINO.ENCODER_LAYERS", "1", "MODEL.DINO.DECODER_LAYERS", "1"),
    *("SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0", "SOLVER.WARMUP_ITERS", "0"),
    *("SOLVER.CHECKPOINT_PERIOD", "5", "TEST.EVAL_PERIOD", "0"),
]


@pytest.fixture
def submitit():
    return pytest.importorskip("submitit", reason="submitit, which submits to SLURM, is missing")


@pytest.fixture
def run_main(monkeypatch):
    """Runs the program in this process."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["submit.py", *map(str, words)])
        submit.main()

    return run


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("24:00:00", 1440), ("0:30:00", 30), ("0:00:01", 1), ("2-12:05:00", (2 * 24 + 12) * 60 + 5)],
)
def test_times_are_written_as_slurm_writes_them(text, minutes):
    assert submit.minutes(text) == minutes


@pytest.mark.parametrize("text", ["24", "24:00", "a day", "-1:00:00", "1:0:0", ""])
def test_other_times_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a time such as 24:00:00"):
        submit.minutes(text)


@pytest.mark.parametrize("text", ["qos", "=high", ""])
def test_an_option_of_sbatch_without_a_value_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not NAME=VALUE"):
        submit.pair(text)


def test_what_train_net_refuses_is_refused_before_it_waits_in_a_queue(run_main, capsys):
    with pytest.raises(SystemExit):
        run_main("--", "--config-file", "a.yaml", "--num-gpu", "many")
    assert "train_net.py: error: argument --num-gpus" in capsys.readouterr().err


def test_a_missing_submitit_is_one_sentence(run_main, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SystemExit, match=r"submitit is missing: pip install submitit$"):
        run_main("--", "--config-file", "a.yaml")


def test_a_missing_slurm_is_one_sentence(submitit, run_main, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="Could not detect .srun."):
        run_main("--folder", tmp_path, "--", "--config-file", "a.yaml")


def test_this_machine_is_one_node(submitit, run_main, tmp_path):
    with pytest.raises(SystemExit, match="LocalExecutor can use only one node"):
        run_main("--local", "--nodes", 2, "--folder", tmp_path, "--", "--config-file", "a.yaml")


@pytest.fixture
def slurm(submitit, tmp_path, monkeypatch):
    """A cluster that takes jobs and does nothing."""
    programs = {"srun": "true", "sbatch": "echo Submitted batch job 12345"}
    for name, command in programs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{command}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def test_slurm_is_asked_for_a_task_per_gpu_that_ends_when_another_fails(
    slurm, run_main, tmp_path, capsys
):
    wanted = "--nodes", 2, "--gpus-per-node", 4, "--cpus-per-gpu", 6, "--time", "1-00:00:00"
    wanted += "--partition", "gpu", "--account", "me", "--slurm", "qos=high", "mem=0"
    run_main(*wanted, "--folder", tmp_path / "jobs", "--", "--config-file", "a.yaml")
    assert "job 12345: logs are " in capsys.readouterr().out
    lines = (tmp_path / "jobs" / "12345_submission.sh").read_text().splitlines()
    expected = {
        *("nodes=2", "gpus-per-node=4", "ntasks-per-node=4", "cpus-per-task=6", "time=1440"),
        *("partition=gpu", "account=me", "qos=high", "mem=0", "job-name=dino"),
    }
    assert {f"#SBATCH --{option}" for option in expected} <= set(lines)
    assert "--kill-on-bad-exit=1" in next(line for line in lines if line.startswith("srun "))


def test_what_is_not_said_is_left_to_the_cluster(slurm, run_main, tmp_path):
    run_main("--folder", tmp_path / "jobs", "--", "--config-file", "a.yaml")
    text = (tmp_path / "jobs" / "12345_submission.sh").read_text()
    assert "partition" not in text and "account" not in text


def test_a_job_that_is_queued_again_goes_on_from_its_last_checkpoint(submitit):
    training = submit.Training("train_net.py", ["--config-file", "a.yaml", "OUTPUT_DIR", "out"])
    again = training.checkpoint().function
    assert again.words == ["--resume", *training.words]
    assert pickle.loads(pickle.dumps(again)).checkpoint().function.words == again.words


# ---- on this machine


# The executor of submitit gives GPUs 0 and 1 to two workers, whether they are there or not.
needs_no_or_two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="two workers on one GPU cannot talk through NCCL"
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    generate(root, num_train=12, num_val=1)
    return root


@pytest.fixture
def begin(submitit, shapes, tmp_path):
    """Starts a tiny training that submit.py submits to this machine."""
    started = []

    def begin(workers, *words):
        command = [sys.executable, PROGRAMS / "submit.py", "--local", "--gpus-per-node", workers]
        command += ["--time", "0:20:00", "--folder", tmp_path / "jobs", "--"]
        command += ["--config-file", get_config_file("quickstart.yaml")]
        command += ["--train-json", shapes / "train.json", "--train-images", shapes / "images"]
        paths = [str(PROGRAMS.parents[1]), *submitit.__path__[0].rsplit("/submitit", 1)[:1]]
        process = subprocess.Popen(
            [str(word) for word in [*command, *TINY, "OUTPUT_DIR", tmp_path / "out", *words]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()


def log(tmp_path):
    return (tmp_path / "out" / "log.txt").read_text()


def wait_for(condition, timeout=600):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"nothing happened for {timeout} s"
        time.sleep(0.1)


def children(pid):
    """Processes that a process has started (Linux)."""
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@needs_no_or_two_gpus
def test_a_preempted_training_goes_on_and_ends(begin, tmp_path):
    process = begin(2, "SOLVER.MAX_ITER", 40)
    wait_for((tmp_path / "out" / "last_checkpoint").exists)
    (controller,) = children(process.pid)
    for task in children(controller):
        os.kill(task, signal.SIGUSR2)  # as SLURM does some time before it ends a job
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert "Rank of current process: 0. World size: 2" in log(tmp_path)
    starts = [x for x in log(tmp_path).splitlines() if "Starting training from iteration" in x]
    assert len(starts) == 2
    assert starts[0].endswith(" 0") and not starts[1].endswith(" 0")
    assert (tmp_path / "out" / "model_final.pth").is_file()


@pytest.mark.slow
def test_what_ends_a_training_is_said_where_it_was_submitted(begin):
    process = begin(1, "MODEL.WEIGHTS", "nowhere.pth")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "RuntimeError: train_net.py: MODEL.WEIGHTS: " in said and "nowhere.pth" in said
