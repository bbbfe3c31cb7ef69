from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from dino_d2.engine.schedule import share_of
from dino_d2.modeling import DistinctQueries, DistinctQuerySelection

from .dino_R_50_4scale_12ep import dataloader, model, optimizer, train

# A small DINO for the generated shapes of `make demo`: minutes on two CPU cores, from scratch.
model.backbone.stages.depth = 18
del model.backbone.stages.stride_in_1x1  # its blocks have no such convolution
model.backbone.stages.norm = model.backbone.stem.norm = "BN"
model.backbone.out_features = ["res3", "res4"]
model.backbone.freeze_at = 0
model.neck.input_shape = {"res3": ShapeSpec(channels=128), "res4": ShapeSpec(channels=256)}
model.encoder.num_layers = 2
model.encoder.embed_dim = 128
model.encoder.num_heads = 4
model.encoder.ffn_dim = 256
model.encoder.num_levels = 3
model.query_selection._target_ = DistinctQuerySelection
model.query_selection.num_queries = 30
model.decoder.num_layers = 3
model.decoder.relation = DistinctQueries
model.denoising.budget = 30
model.criterion.class_weight = 4.0
model.max_detections = 100

dataloader.train.mapper.augmentations.min_sizes = [96, 104, 112]
dataloader.train.mapper.augmentations.max_size = 200
dataloader.train.mapper.augmentations.crop_size = None
dataloader.train.total_batch_size = 4
dataloader.train.num_workers = dataloader.test.num_workers = 0
dataloader.test.mapper.augmentations[0].short_edge_length = 104
dataloader.test.mapper.augmentations[0].max_size = 200

optimizer.lr = 1e-3
optimizer.params.backbone_multiplier = 1.0
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_factor=0.001,
    warmup_length=L(share_of)(iterations=100, max_iter="${train.max_iter}"),
)

train.init_checkpoint = ""
train.reference_batch = 4
train.max_iter = 2400
train.eval_period = train.checkpointer.period = 600
train.seed = 1
