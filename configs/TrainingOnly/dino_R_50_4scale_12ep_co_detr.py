# With auxiliary detection heads on the encoder's memory, as Co-DETR (arXiv 2211.12860).
from detectron2.config import LazyCall as L

from dino_d2.modeling import AuxiliaryFasterRCNN, AuxiliaryFCOS

from ..dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.branches = [
    L(kind)(
        num_classes="${...num_classes}",
        embed_dim="${...encoder.embed_dim}",
        num_levels="${...encoder.num_levels}",
    )
    for kind in (AuxiliaryFCOS, AuxiliaryFasterRCNN)
]
