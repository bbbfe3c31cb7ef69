# With the position relation of Relation-DETR (arXiv 2407.11699), without its other parts.
from dino_d2.modeling import PositionRelation

from ..dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.relation = PositionRelation
