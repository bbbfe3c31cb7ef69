"""Keeps results of different runs from being lost or mixed in an output folder."""

from itertools import chain
from pathlib import Path

from detectron2.utils import comm

CHECKPOINTS = "model_[0-9][0-9][0-9][0-9][0-9][0-9][0-9].pth", "model_final.pth", "model_best.pth"
# Files that must not be lost. A run that ended before it wrote any of them blocks nothing.
RESULTS = (*CHECKPOINTS, "last_checkpoint", "metrics.json", "events.out.tfevents.*")
# Other files of a run. Runs of Weights & Biases have separate folders in `wandb`.
OTHERS = (
    *("log.txt", "log.txt.rank[0-9]*", "config.yaml", "wandb_id"),
    "non_finite/[0-9]*_worker_[0-9]*.pth",
)
# In "inference", and in its folders for several data sets and averaged weights.
EVALUATION = (
    *("coco_instances_results.json", "instances_predictions.pth", "box_proposals.pkl"),
    "thresholds.json",
    *(
        f"{name}.{suffix}"
        for name in ("per_class", "ap_by_size", "precision_recall", "confusion_matrix", "errors")
        for suffix in ("csv", "png")
    ),
)


def check_folder(folder: str, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse a folder in which results of an earlier run would be lost or mixed.

    Args:
        folder: for the output of a run; need not exist
        resume: continue the earlier run; without any checkpoint, start over and append to its
            logs, as Detectron2 does
        overwrite: replace the earlier run

    Raises:
        ValueError: there are results of an earlier training and neither option is given, or there
            are checkpoints without a `last_checkpoint` to resume from
    """
    # A run that was killed while saving may have its first checkpoint without this file.
    if overwrite or (resume and any(_files(folder, ("last_checkpoint", CHECKPOINTS[0])))):
        return
    results = _files(folder, CHECKPOINTS if resume else RESULTS)
    found = next((x for x in results if x.stat().st_size), None)
    if found and resume:
        raise ValueError(
            f"'{folder}' has '{found.name}', but no file 'last_checkpoint' with the name of the "
            "checkpoint to resume from (--resume): write it, or choose another output folder"
        )
    if found:
        raise ValueError(
            f"'{folder}' has an earlier training run ('{found.name}'): resume it (--resume), "
            "choose another output folder, or replace its files (--overwrite)"
        )


def claim_folder(folder: str, *, resume: bool = False, overwrite: bool = False) -> None:
    """Create an output folder after `check_folder`; with `overwrite`, remove an earlier run.

    Collective: every worker has to call it, and the main one does the work.

    Raises:
        ValueError: as `check_folder`, on every worker
        OSError: the folder cannot be created, or a file cannot be removed
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
    """Remove the files of training runs and their evaluations from a folder, and nothing else."""
    inference = Path(folder, "inference")
    places = [inference, *(x for x in inference.rglob("*") if x.is_dir())]
    for file in chain(_files(folder, RESULTS + OTHERS), *(_files(x, EVALUATION) for x in places)):
        file.unlink()
    for place in [*reversed(places), Path(folder, "non_finite")]:
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def _files(folder: str | Path, patterns: tuple[str, ...]) -> list[Path]:
    return [x for pattern in patterns for x in sorted(Path(folder).glob(pattern)) if x.is_file()]
