from .common.data import dataloader
from .common.models.dino_Swin import model
from .common.optim import lr_multiplier, optimizer
from .common.train import train

train.init_checkpoint = (
    "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
    "swin_large_patch4_window12_384_22k.pth"
)
