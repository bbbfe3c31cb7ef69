# With loss and mixed matching of Align-DETR (arXiv 2304.07527).
from detectron2.config import LazyCall as L

from dino_d2.modeling import AlignLoss, MixedMatching

from ..dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.criterion._target_ = MixedMatching
model.criterion.class_loss = L(AlignLoss)()
