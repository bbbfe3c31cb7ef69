from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler

from .common.data import dataloader
from .common.models.dino_ViTDet import model
from .common.optim import lr_multiplier, optimizer
from .common.train import train

train.init_checkpoint = "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth"

# It is not stable without a warm-up.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=lr_multiplier, warmup_factor=0.001, warmup_length=250 / train["max_iter"]
)
