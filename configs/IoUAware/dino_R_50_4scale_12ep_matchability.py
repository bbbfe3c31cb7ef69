# With the loss of DEIM (arXiv 2412.04234), without its mosaic and mixup.
from detectron2.config import LazyCall as L

from dino_d2.modeling import MatchabilityAwareLoss

from ..dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.criterion.class_loss = L(MatchabilityAwareLoss)()
