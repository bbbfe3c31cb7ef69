from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from .dino_R_50_4scale_12ep import dataloader, model, optimizer, train
