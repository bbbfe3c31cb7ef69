# With loss and matching of Stable-DINO (arXiv 2304.04742), without its memory fusion.
from detectron2.config import LazyCall as L

from dino_d2.modeling import FocalLoss, PositionModulatedMatcher, PositionSupervisedLoss

from ..dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.criterion.matcher._target_ = PositionModulatedMatcher
model.criterion.update(
    class_loss=L(PositionSupervisedLoss)(),
    denoising_class_loss=L(FocalLoss)(),
    class_weight=6.0,
    denoising_class_weight=1.0,
)
