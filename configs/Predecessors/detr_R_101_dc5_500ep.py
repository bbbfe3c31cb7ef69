# DETR-DC5 with a ResNet-101: 44.9 AP.
from .detr_R_50_dc5_500ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.stages.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-101.pkl"
