# DDQ DETR (arXiv 2303.12776): dense and distinct queries.
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler

from dino_d2.engine.schedule import share_of
from dino_d2.modeling import DenseQueries, DistinctQueries, DistinctQuerySelection

from ..dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.query_selection._target_ = DistinctQuerySelection
model.decoder.relation = DistinctQueries
model.branches = [
    L(DenseQueries)(
        num_classes="${...num_classes}", embed_dim="${...encoder.embed_dim}", num_queries=1350
    )
]
optimizer.lr = 2e-4
optimizer.weight_decay = 0.05
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=lr_multiplier,
    warmup_factor=0.0001,
    warmup_length=L(share_of)(iterations=2000, max_iter="${train.max_iter}"),
)
