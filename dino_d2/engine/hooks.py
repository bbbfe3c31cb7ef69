"""What happens around steps, beside Detectron2's own hooks."""

import logging
import math

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.utils import comm

from ..weights.checkpointer import BEST

logger = logging.getLogger(__name__)


class EvalHook(hooks.EvalHook):
    """Detectron2's, which evaluates after a checkpoint is saved. A training that goes on from there
    may have been stopped before or meanwhile, so it begins with this evaluation."""

    def before_train(self) -> None:
        if is_due(self.trainer, self._period):
            self._do_eval()

    def after_train(self) -> None:
        if is_complete(self.trainer):
            super().after_train()


def is_due(trainer: TrainerBase, period: int) -> bool:
    """Whether what a training goes on from was to be evaluated: by its period, or as its end."""
    start = trainer.start_iter
    if not 0 < start < trainer.max_iter:
        return False
    return start == getattr(trainer, "planned_end", None) or bool(period) and start % period == 0


def is_complete(trainer: TrainerBase) -> bool:
    """Whether a training that is over has come to its end, and was not stopped by an error."""
    return trainer.iter >= trainer.max_iter


class BestCheckpointer(HookBase):
    """Keeps the checkpoint with the best evaluation as `model_best.pth`.

    As Detectron2's hook of this name, but it remembers what was best when a training is resumed,
    and every worker has it, so that sharded models can be saved. Comes after :class:`EvalHook`.

    Args:
        period: iterations between evaluations; 0: there is one, at the end
        checkpointer: saves the model
        metric: to be as high as possible, such as "bbox/AP"
    """

    def __init__(self, period: int, checkpointer: DetectionCheckpointer, metric: str):
        self.period, self.checkpointer, self.metric = period, checkpointer, metric
        self.best = -math.inf

    def before_train(self) -> None:
        if is_due(self.trainer, self.period):
            self.save_if_best(self.trainer.start_iter - 1)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self.period and done % self.period == 0 and done != self.trainer.max_iter:
            self.save_if_best(self.trainer.iter)

    def after_train(self) -> None:
        if is_complete(self.trainer):
            self.save_if_best(self.trainer.max_iter - 1)

    def save_if_best(self, iteration: int) -> None:
        """Looks at the evaluation after an iteration, which the main worker alone knows."""
        metrics = self.trainer.storage.latest()
        if comm.is_main_process() and self.metric not in metrics:
            logger.warning(f"no checkpoint is kept as the best: evaluation has no {self.metric}")
        value, when = comm.all_gather(metrics.get(self.metric, (-math.inf, -1)))[0]
        if when != self.trainer.iter or not value > self.best:  # also if it is NaN
            return
        self.best = value
        self.checkpointer.save(BEST, iteration=iteration)
        logger.info(f"{self.metric} is {value:.2f}, the best so far: saved as {BEST}.pth")

    def state_dict(self) -> dict:
        return {"metric": self.metric, "best": self.best}

    def load_state_dict(self, state: dict) -> None:
        if state["metric"] == self.metric:
            self.best = state["best"]
