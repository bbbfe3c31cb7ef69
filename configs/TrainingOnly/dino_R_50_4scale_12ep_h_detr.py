# With the one-to-many queries of H-DETR (arXiv 2207.13080).
from detectron2.config import LazyCall as L

from dino_d2.modeling import OneToManyQueries

from ..dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.branches = [
    L(OneToManyQueries)(num_classes="${...num_classes}", embed_dim="${...encoder.embed_dim}")
]
