from .common.data import dataloader
from .common.models.dino_timm import model
from .common.optim import lr_multiplier, optimizer
from .common.train import train

train.init_checkpoint = "https://dl.fbaipublicfiles.com/convnext/convnext_tiny_22k_1k_384.pth"
