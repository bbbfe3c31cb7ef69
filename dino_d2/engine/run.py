"""Runs a plan: training or evaluation."""

import logging
import shutil
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase, default_writers, hooks
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventWriter
from torch import nn

from .. import data
from ..data.box_sizes import log_box_sizes
from ..data.stream import TrainingStream, require_places
from ..distributed.sharing import distribute, share_buffers, unsharded, unwrap
from ..images import channels_of
from ..layouts.renaming import CheckpointError
from ..modeling.detector import Detector
from ..names import hint
from ..weights.checkpointer import Checkpointer
from .ema import EMA
from .folder import CHECKPOINTS, claim_folder
from .hooks import BestCheckpointer, EarlyStop, EvalHook, ThresholdSaver
from .plan import Plan
from .trainer import Trainer
from .writers import WandbWriter, require_wandb

logger = logging.getLogger(__name__)

# Replaces the data when a loader is only built; many records, as samplers may take a small share.
RECORDS: list[dict[str, list]] = [{"annotations": []}] * 1000


class Training(NamedTuple):
    """A training run that is ready to begin."""

    trainer: Trainer
    first: int  # iteration
    goes_on: bool  # with what a checkpoint has


def check(plan: Plan, *, resume: bool = False, eval_only: bool = False) -> None:
    """Try the start of `train`, or of `test`, on the CPU, to find errors before workers start.

    Raises their errors (CheckpointError, ValueError), and logs nothing.
    """
    with silence():
        model = plan.build_model("cpu")
        for is_train in (False,) if eval_only else (False, True):
            channels_of(getattr(plan.build_mapper(is_train), "image_format", "RGB"))
        if eval_only:
            load_for_test(plan, model, resume)
        else:
            loader = plan.build_loader(RECORDS)
            if plan.mixing:
                require_places(loader)
            check_metric(plan)
            prepare(plan, model, 0, resume)


@contextmanager
def silence() -> Iterator[None]:
    """Disable logging."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def train(plan: Plan, *, resume: bool = False, overwrite: bool = False) -> None:
    """Train and evaluate; results are in the plan's output folder.

    Args:
        plan: what to do
        resume: continue from the last checkpoint in the output folder, if there is one
        overwrite: replace an earlier run there, including an open log, see `claim_folder`

    Raises:
        CheckpointError: weights cannot be read or do not fit, or there is no room to save
        DatasetError: an image cannot be used
        NonFiniteLoss: see `Trainer`
        ValueError: a part of the plan cannot be built, there is an earlier run in the output
            folder, or a project of Weights & Biases is named, but `wandb` is not installed
    """
    if plan.wandb_project:
        require_wandb()
    claim_folder(plan.output_dir, resume=resume, overwrite=overwrite)
    tell_changes(plan.train_sets)
    tell_changes(plan.test_sets)
    seed = plan.seed if plan.seed >= 0 else comm.shared_random_seed()
    seed_all_rng(seed)  # equal weights on every worker
    model = distribute(plan.build_model(), fsdp=plan.fsdp, **plan.ddp)
    trainer, first, goes_on = prepare(plan, model, seed, resume)
    if comm.is_main_process():  # only now, so that W&B gets no run that cannot start
        writers = make_writers(plan, goes_on)
        trainer.register_hooks([hooks.PeriodicWriter(writers, plan.log_period or plan.max_iter)])
    try:
        trainer.train(first, plan.max_iter)
    except EarlyStop as reason:
        logger.info(reason)


def tell_changes(names: Sequence[str]) -> None:
    """Log the class changes of data sets."""
    for told in data.changes_of(names):
        logger.info(told)


def prepare(plan: Plan, model: nn.Module, seed: int, resume: bool) -> Training:
    """Build the trainer of a model, and load its initial weights."""
    ema = None if plan.ema_decay is None else EMA(model, plan.ema_decay)
    trainer = make_trainer(plan, model, seed)
    # A strong reference would be a cycle and keep the model alive.
    saved: dict[str, Any] = {"trainer": weakref.proxy(trainer)} | ({"ema": ema} if ema else {})
    checkpointer = make_checkpointer(model, plan.output_dir, plan.train_sets, **saved)
    check_room(plan, unwrap(model))
    goes_on = resume and checkpointer.has_checkpoint()
    if resume and not goes_on and any(Path(plan.output_dir).glob(CHECKPOINTS[0])):
        raise CheckpointError(
            f"'{plan.output_dir}' has checkpoints, but no file 'last_checkpoint' with the name of "
            "the one to resume from (--resume): write it, or choose another output folder"
        )
    trainer.register_hooks(make_hooks(plan, trainer, checkpointer, ema))
    checkpointer.resume_or_load(plan.weights, resume=resume)
    if ema and not ema.updates:
        ema.reset()  # to the weights that were loaded
    return Training(trainer, first_iteration(plan, trainer, goes_on), goes_on)


def make_trainer(plan: Plan, model: nn.Module, seed: int) -> Trainer:
    return Trainer(
        model,
        TrainingStream(partial(training_loader, plan), seed, plan.mixing, plan.mixed),
        plan.build_optimizer(unwrap(model)),
        precision=plan.precision,
        accumulate=plan.accumulate,
        skip_non_finite=plan.skip_non_finite,
        output_dir=plan.output_dir,
    )


def training_loader(plan: Plan) -> Any:
    """The plan's loader; logs the sizes of its boxes."""
    loader = plan.build_loader()
    if comm.is_main_process():
        log_box_sizes(loader, plan.num_queries)
    return loader


def first_iteration(plan: Plan, trainer: Trainer, goes_on: bool) -> int:
    """The first iteration; a CheckpointError if there is no checkpoint, or workers disagree."""
    if goes_on and trainer.last < 0:
        raise CheckpointError(
            f"the last checkpoint in '{plan.output_dir}' has weights but no state to resume "
            "from: give it as MODEL.WEIGHTS (train.init_checkpoint), without --resume"
        )
    starts = comm.all_gather(trainer.last + 1)
    if len(set(starts)) > 1:
        raise CheckpointError(
            f"workers would begin at the iterations {starts}: all machines have to see the same "
            f"output folder, '{plan.output_dir}'"
        )
    return starts[0]


def test(plan: Plan, *, resume: bool = False) -> dict:
    """Evaluate the plan's weights or, to `resume`, the last checkpoint in its output folder.

    Returns:
        the results of `evaluate`

    Raises:
        CheckpointError: the weights cannot be read, or are not complete
    """
    tell_changes(plan.test_sets)
    model = plan.build_model()
    return evaluate(plan, model, load_for_test(plan, model, resume))


def load_for_test(plan: Plan, model: nn.Module, resume: bool) -> EMA | None:
    """Load the weights that `test` evaluates; returns the averaged weights, if there are any."""
    ema = None if plan.ema_decay is None else EMA(model, plan.ema_decay)
    options: dict[str, Any] = {"complete": True} | ({"ema": ema} if ema else {})
    checkpointer = make_checkpointer(model, plan.output_dir, plan.test_sets, **options)
    if resume and checkpointer.has_checkpoint():
        rest = checkpointer.resume_or_load("", resume=True)
    else:
        rest = checkpointer.load(plan.weights)
    if "ema" in rest:
        logger.info("the checkpoint has averaged weights, too: with EMA they would be evaluated")
    if ema and not ema.updates:
        logger.warning("the checkpoint has no averaged weights (EMA): its weights are evaluated")
        return None
    return ema


def evaluate(plan: Plan, model: nn.Module, ema: EMA | None) -> dict:
    """Evaluate the model's weights and, as "ema", the averaged weights.

    Files of the latter are in a folder of this name.
    """
    with unsharded(model):
        share_buffers(model)
        results = plan.evaluate(unwrap(model))
    if ema is None:
        return results
    with ema.applied(), unsharded(model):
        share_buffers(model)
        averaged = plan.evaluate(unwrap(model), "ema")
    return results | {"ema": averaged} if results else results


def make_checkpointer(
    model: nn.Module, output_dir: str, names: Sequence[str], *, complete: bool = False, **saved: Any
) -> DetectionCheckpointer:
    """A checkpointer for the classes of data sets; for models that are no Detector, Detectron2's.

    If `complete`, weights have to fill the model. What is `saved` goes with the model.
    """
    model = unwrap(model)
    if not isinstance(model, Detector):
        return DetectionCheckpointer(model, output_dir, **saved)
    classes = data.class_names(names)
    return Checkpointer(model, output_dir, classes=classes, complete=complete, **saved)


def make_hooks(
    plan: Plan, trainer: Trainer, checkpointer: DetectionCheckpointer, ema: EMA | None
) -> list[HookBase | None]:
    """Detectron2's hooks in its order, with averaged weights, best checkpoint and writers."""
    is_main = comm.is_main_process()
    average = hooks.CallbackHook(after_step=lambda _: ema.update()) if ema else None
    metric = f"ema/{plan.best_metric}" if ema else plan.best_metric
    save = hooks.PeriodicCheckpointer(
        checkpointer,
        plan.checkpoint_period or plan.max_iter,
        max_to_keep=plan.max_to_keep if is_main else None,
    )
    best = BestCheckpointer(plan.eval_period, checkpointer, metric, plan.patience)
    thresholds = None
    if isinstance(checkpointer, Checkpointer) and plan.test_sets:
        sets = [f"{name}/" for name in plan.test_sets] if len(plan.test_sets) > 1 else [""]
        deciding = next((x for x in sets if plan.best_metric.startswith(x)), sets[0])
        thresholds = ThresholdSaver(plan.eval_period, checkpointer, deciding)
    return [
        hooks.IterationTimer(),
        hooks.LRScheduler(trainer.optimizer, plan.build_scheduler(trainer.optimizer)),
        average,
        save if is_main or plan.fsdp else None,  # saving a sharded model is collective
        EvalHook(plan.eval_period, lambda: evaluate(plan, trainer.model, ema)),
        thresholds,
        best if plan.best_metric and plan.test_sets else None,
    ]


def make_writers(plan: Plan, goes_on: bool) -> list[EventWriter]:
    """Detectron2's writers (log, metrics.json, TensorBoard) and that of W&B."""
    writers = default_writers(plan.output_dir, plan.max_iter)
    if plan.wandb_project:
        options: dict[str, Any] = {"config": plan.config, "resume": goes_on}
        writers.append(WandbWriter(plan.wandb_project, plan.output_dir, **options))
    return writers


def check_metric(plan: Plan) -> None:
    """Raise a ValueError if no checkpoint can be the best by the plan's best metric."""
    if not plan.metrics or not plan.best_metric:
        return
    if plan.best_metric not in plan.metrics:
        ema = plan.best_metric.startswith("ema/")
        end = "EMA adds 'ema/' by itself" if ema else hint(plan.best_metric, plan.metrics)
        raise ValueError(
            f"the metric of the best checkpoint (TEST.BEST_METRIC, train.best_metric) is "
            f"{plan.best_metric!r}, which evaluation does not give; {end}"
        )


def check_room(plan: Plan, model: nn.Module) -> None:
    """Raise a CheckpointError if the disk has no room for a checkpoint."""
    weights = sum(x.nbytes for x in model.state_dict().values())
    moments = 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    needed = weights * (1 if plan.ema_decay is None else 2) + moments
    free = shutil.disk_usage(plan.output_dir).free
    if needed > free:
        raise CheckpointError(
            f"a checkpoint has about {needed / 1e6:.0f} MB, but the disk of '{plan.output_dir}' "
            f"has {free / 1e6:.0f} MB left: make room, or choose another output folder"
        )
