from .common.data import dataloader
from .common.models.dino_ViTDet import model
from .common.optim import lr_multiplier, optimizer
from .common.train import train

train.init_checkpoint = "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth"
