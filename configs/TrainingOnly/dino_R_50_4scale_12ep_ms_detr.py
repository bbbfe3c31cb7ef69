# With the one-to-many class head of MS-DETR (arXiv 2401.03989), variant (a).
from detectron2.config import LazyCall as L

from dino_d2.modeling import OneToManyHead

from ..dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.branches = [
    L(OneToManyHead)(num_classes="${...num_classes}", embed_dim="${...encoder.embed_dim}")
]
