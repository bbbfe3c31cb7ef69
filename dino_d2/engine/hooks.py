"""Hooks for evaluation and what follows from it."""

import logging
import math

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.utils import comm

from ..names import plural
from ..weights.checkpointer import BEST, Checkpointer

logger = logging.getLogger(__name__)


class EarlyStop(BaseException):
    """Ends training before its last iteration; not an error, which Detectron2's loop would log."""


class EvalHook(hooks.EvalHook):
    """Detectron2's, but a resumed run first catches up on the evaluation of its checkpoint.

    It may have been stopped after saving and before the end of the evaluation.
    """

    def before_train(self) -> None:
        if is_due(self.trainer, self._period):
            self._do_eval()

    def after_train(self) -> None:
        if is_complete(self.trainer):
            super().after_train()


def is_due(trainer: TrainerBase, period: int) -> bool:
    """Whether the checkpoint that a run resumes from was due for evaluation."""
    start = trainer.start_iter
    if not 0 < start < trainer.max_iter:
        return False
    return start == getattr(trainer, "planned_end", None) or bool(period) and start % period == 0


def is_complete(trainer: TrainerBase) -> bool:
    """Whether a run reached its last iteration, and was not stopped by an error."""
    return trainer.iter >= trainer.max_iter


class AfterEvaluation(HookBase):
    """Does something after each evaluation, on every worker. Register it after :class:`EvalHook`.

    Args:
        period: iterations between evaluations; 0: only at the end
    """

    def __init__(self, period: int):
        self.period = period

    def before_train(self) -> None:
        if is_due(self.trainer, self.period):
            self.evaluated(self.trainer.start_iter - 1)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self.period and done % self.period == 0 and done != self.trainer.max_iter:
            self.evaluated(self.trainer.iter)

    def after_train(self) -> None:
        if is_complete(self.trainer):
            self.evaluated(self.trainer.max_iter - 1)

    def evaluated(self, iteration: int) -> None:
        """Called after the evaluation that follows an iteration; results are in the storage."""
        raise NotImplementedError


class ThresholdSaver(AfterEvaluation):
    """Saves the score thresholds of the best F1 with the checkpoint that was evaluated.

    It was saved before evaluation, so that no work is lost if that fails.

    Args:
        period: iterations between evaluations; 0: only at the end
        checkpointer: saves the model
        prefix: of the results of the test set that decides; "" if there is only one
    """

    def __init__(self, period: int, checkpointer: Checkpointer, prefix: str = ""):
        super().__init__(period)
        self.checkpointer, self.prefix = checkpointer, prefix

    def evaluated(self, iteration: int) -> None:
        metrics = self.trainer.storage.latest()
        found = {}
        for kind in ("", "ema/"):
            start = f"{kind}{self.prefix}F1/threshold"
            found[kind] = {
                name.removeprefix(start).removeprefix("-"): value
                for name, (value, when) in metrics.items()
                if name.startswith(start) and when == self.trainer.iter
            }
        thresholds = comm.all_gather(found)[0]
        own = {f"{kind.replace('/', '_')}thresholds": x for kind, x in thresholds.items() if x}
        self.checkpointer.add_thresholds(iteration, own)


class BestCheckpointer(AfterEvaluation):
    """Keeps the checkpoint with the best evaluation as `model_best.pth`.

    Like Detectron2's, but survives a resume, and runs on every worker because saving shards is
    collective.

    Args:
        period: iterations between evaluations; 0: only at the end
        checkpointer: saves the model
        metric: higher is better, such as "bbox/AP"
        patience: evaluations in a row without improvement after which training ends by an
            :class:`EarlyStop`; 0: never
    """

    def __init__(
        self, period: int, checkpointer: DetectionCheckpointer, metric: str, patience: int = 0
    ):
        super().__init__(period)
        self.checkpointer, self.metric, self.patience = checkpointer, metric, patience
        self.best, self.worse = -math.inf, 0  # its metric, and how many were not better since

    def evaluated(self, iteration: int) -> None:
        self.save_if_best(iteration)
        if not is_complete(self.trainer):
            self.stop_early(iteration)

    def save_if_best(self, iteration: int) -> None:
        """Save the model if the evaluation after an iteration, on the main worker, is the best."""
        metrics = self.trainer.storage.latest()
        if comm.is_main_process() and self.metric not in metrics:
            logger.warning(f"no best checkpoint is saved: evaluation has no {self.metric}")
        value, when = comm.all_gather(metrics.get(self.metric, (-math.inf, -1)))[0]
        if when != self.trainer.iter:
            return
        if not value > self.best:  # also if it is NaN
            self.worse += self.best > -math.inf
            return
        self.best, self.worse = value, 0
        self.checkpointer.save(BEST, iteration=iteration)
        logger.info(f"{self.metric} is {value:.2f}, the best so far: saved as {BEST}.pth")

    def stop_early(self, iteration: int) -> None:
        """If the last evaluations were not better, save `model_final` and raise an EarlyStop, on
        every worker."""
        if self.patience and self.worse >= self.patience:
            self.checkpointer.save("model_final", iteration=iteration)
            raise EarlyStop(
                f"early stopping: {plural(self.worse, 'evaluation')} in a row had no better "
                f"{self.metric} than {self.best:.2f}, that of {BEST}.pth (TEST.PATIENCE, "
                "train.patience)"
            )

    def state_dict(self) -> dict:
        return {"metric": self.metric, "best": self.best, "worse": self.worse}

    def load_state_dict(self, state: dict) -> None:
        if state["metric"] == self.metric:
            self.best, self.worse = state["best"], state.get("worse", 0)
