# With the loss of VarifocalNet (arXiv 2008.13367).
from detectron2.config import LazyCall as L

from dino_d2.modeling import VarifocalLoss

from ..dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.criterion.class_loss = L(VarifocalLoss)()
