"""A trainer for scripts around Detectron2's `DefaultTrainer`, such as its tools/train_net.py."""

import weakref
from typing import Any

import torch
from detectron2 import engine
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from .. import data
from ..data.box_sizes import log_box_sizes
from .evaluation import yaml_evaluator, yaml_test_loader
from .hooks import BestCheckpointer
from .keys import OF_OUR_TRAINER, check_keys, refuse
from .plan import precision_of, queries_of, yaml_optimizer, yaml_scheduler, yaml_train_loader
from .run import make_checkpointer


class DefaultTrainer(engine.DefaultTrainer):
    """Detectron2's, with the optimizer, the augmentation and the evaluator of a DINO.

    Detectron2's own only has SGD, and clips the gradient of each parameter separately. Steps, hooks
    and the order of images are Detectron2's. Gradient accumulation, averaged weights, sharding, W&B
    and exact resuming need `train`.

    Args:
        cfg: a YAML config with the keys of `add_dino_config`

    Raises:
        ValueError: a key has no effect here, or the schedule is still to be scaled, see
            `scale_schedule`
        DatasetError: the data cannot be used for training or evaluation
    """

    def __init__(self, cfg: CfgNode):
        check_keys(cfg)
        refuse(cfg, OF_OUR_TRAINER, "in Detectron2's trainer, only in projects/dino/train_net.py")
        solver = cfg.SOLVER
        if solver.EPOCHS or solver.REFERENCE_BATCH not in (0, solver.IMS_PER_BATCH):
            raise ValueError(
                f"the schedule is for SOLVER.REFERENCE_BATCH {solver.REFERENCE_BATCH} and "
                f"SOLVER.EPOCHS {solver.EPOCHS}, not for batch size {solver.IMS_PER_BATCH}: "
                "call dino_d2.engine.scale_schedule(cfg) first or, to keep it, set "
                "SOLVER.REFERENCE_BATCH 0 and SOLVER.EPOCHS None"
            )
        data.check(cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.MODEL.DINO.NUM_CLASSES)
        super().__init__(cfg)
        if isinstance(self._trainer, AMPTrainer):
            self._trainer.precision = precision_of(cfg.SOLVER.AMP.DTYPE)

    def build_hooks(self) -> list[HookBase | None]:
        # Hooks need the checkpointer first. Ours reads all formats and saves class names.
        cfg, proxy = self.cfg, weakref.proxy(self)
        self.checkpointer = make_checkpointer(
            self.model, cfg.OUTPUT_DIR, cfg.DATASETS.TRAIN, trainer=proxy
        )
        hooks = super().build_hooks()
        if cfg.TEST.BEST_METRIC and cfg.DATASETS.TEST:
            metric = cfg.TEST.BEST_METRIC
            hooks.append(BestCheckpointer(cfg.TEST.EVAL_PERIOD, self.checkpointer, metric))
        return hooks

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return yaml_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        return yaml_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        loader = yaml_train_loader(cfg)
        if comm.is_main_process():
            log_box_sizes(loader, queries_of(cfg))
        return loader

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        data.check((), dataset_name, cfg.MODEL.DINO.NUM_CLASSES)
        return yaml_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return yaml_evaluator(cfg, dataset_name)
