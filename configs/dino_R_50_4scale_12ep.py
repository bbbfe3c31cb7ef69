from .common.data import dataloader
from .common.models.dino_R_50 import model
from .common.optim import lr_multiplier, optimizer
from .common.train import train
