# With the loss of Align-DETR (arXiv 2304.07527), without its mixed matching.
from detectron2.config import LazyCall as L

from dino_d2.modeling import AlignLoss

from ..dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.criterion.class_loss = L(AlignLoss)()
