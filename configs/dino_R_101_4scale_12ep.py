from .dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-101.pkl"
model.backbone.stages.depth = 101
