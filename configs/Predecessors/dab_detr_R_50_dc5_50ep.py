# DAB-DETR-DC5: 44.5 AP.
from detectron2.config import LazyCall as L

from dino_d2.modeling.backbones import dc5_stages

from .dab_detr_R_50_50ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.stages = L(dc5_stages)(depth=50, stride_in_1x1=False, norm="FrozenBN")
