# DINO for your own data: the best recipe for short training runs, from an ImageNet backbone.
# How it was chosen: projects/dino/BENCHMARKS.md.
from detectron2.config import LazyCall as L

from dino_d2.engine.schedule import flat_cosine
from dino_d2.modeling import DistinctQueries, DistinctQuerySelection

from .dino_R_50_4scale_12ep import dataloader, model, optimizer, train

model.encoder.num_layers = model.decoder.num_layers = 3
model.encoder.ffn_dim = 512
model.query_selection._target_ = DistinctQuerySelection
model.query_selection.num_queries = 300
model.query_selection.iou_threshold = 0.5
model.decoder.relation = DistinctQueries
model.criterion.class_weight = 4.0
model.max_detections = 100

dataloader.train.mapper.augmentations.crop_size = None
dataloader.train.total_batch_size = 1

optimizer.lr = 3e-4
optimizer.params.backbone_multiplier = 0.5
lr_multiplier = L(flat_cosine)(flat=0.7)

train.reference_batch = 0
train.max_iter = 2400
train.eval_period = train.checkpointer.period = 600
