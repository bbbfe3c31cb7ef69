# DETR-DC5: 43.3 AP. Published for one image per GPU: padding of a batch costs AP.
from detectron2.config import LazyCall as L

from dino_d2.modeling.backbones import dc5_stages

from .detr_R_50_500ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.stages = L(dc5_stages)(depth=50, stride_in_1x1=False, norm="FrozenBN")
