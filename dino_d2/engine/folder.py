"""A training has its output folder to itself, and nothing of an earlier one is lost or mixed."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from detectron2.utils import comm

CHECKPOINTS = "model_[0-9][0-9][0-9][0-9][0-9][0-9][0-9].pth", "model_final.pth", "model_best.pth"
# What a training is remembered by. A run that ended before it had any of it blocks nothing.
RESULTS = (*CHECKPOINTS, "last_checkpoint", "metrics.json", "events.out.tfevents.*")
# What it writes besides. Runs of Weights & Biases have folders of their own in `wandb`.
OTHERS = (
    *("log.txt", "log.txt.rank[0-9]*", "config.yaml", "wandb_id"),
    "non_finite/[0-9]*_worker_[0-9]*.pth",
)
# In "inference", and in the folders in it that several data sets and averaged weights have.
EVALUATION = (
    *("coco_instances_results.json", "instances_predictions.pth", "box_proposals.pkl"),
    *(
        f"{name}.{suffix}"
        for name in ("per_class", "ap_by_size", "precision_recall", "confusion_matrix", "errors")
        for suffix in ("csv", "png")
    ),
)


def check_folder(folder: str, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse a folder in which results of an earlier training would be lost or mixed.

    Args:
        folder: for the output of a training, there or not
        resume: whether the training goes on with what is there; with logs alone, of one that ended
            before its first checkpoint, it begins anew and adds to them, as Detectron2 has it
        overwrite: whether it takes its place

    Raises:
        ValueError: an earlier training's results are there, and are to be neither; or there are
            checkpoints, and it is not known from which one to go on
    """
    if overwrite or (resume and Path(folder, "last_checkpoint").is_file()):
        return
    results = _files(folder, CHECKPOINTS if resume else RESULTS)
    found = next((x for x in results if x.stat().st_size), None)
    if found and resume:
        raise ValueError(
            f"'{folder}' has '{found.name}', but no file 'last_checkpoint' with the name of the "
            "checkpoint to go on from (--resume): write it, or name another output folder"
        )
    if found:
        raise ValueError(
            f"'{folder}' has an earlier training ('{found.name}'): go on with it (--resume), name "
            "another output folder, or replace what it wrote (--overwrite)"
        )


def claim_folder(folder: str, *, resume: bool = False, overwrite: bool = False) -> None:
    """Makes a folder that of the training which begins, before anything is written there.

    To overwrite removes what trainings and their evaluations write, and nothing else. Collective:
    every worker has to call it; the main one looks and removes.

    Args:
        folder, resume, overwrite: as of `check_folder`

    Raises:
        ValueError: as `check_folder` does, on every worker
        OSError: it cannot be made, or something in it not be removed
    """
    error = None
    if comm.is_main_process():
        try:
            check_folder(folder, resume=resume, overwrite=overwrite)
            Path(folder).mkdir(parents=True, exist_ok=True)
            if overwrite:
                remove_training(folder)
        except (ValueError, OSError) as caught:
            error = caught
    if error := comm.all_gather(error)[0]:
        raise error


def remove_training(folder: str) -> None:
    """Removes what trainings and their evaluations have written into a folder, and nothing else."""
    inference = Path(folder, "inference")
    places = [inference, *(x for x in inference.rglob("*") if x.is_dir())]
    for file in chain(_files(folder, RESULTS + OTHERS), *(_files(x, EVALUATION) for x in places)):
        file.unlink()
    for place in [*reversed(places), Path(folder, "non_finite")]:
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def _files(folder: str | Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    root = Path(folder)
    yield from [x for pattern in patterns for x in sorted(root.glob(pattern)) if x.is_file()]
