# Deformable DETR (arXiv 2010.04159), table 1: 43.8 AP in the paper, 44.5 in its code.
from detectron2.config import LazyCall as L

from dino_d2.modeling.positions import LearnedPosition
from dino_d2.modeling.query_selection import PointQueries

from ..common.data import dataloader
from ..common.models.dino_R_50 import model
from ..common.optim import lr_multiplier, optimizer
from ..common.train import train

model.encoder.update(ffn_dim=1024, dropout=0.1, position_temperature=10000.0, position_offset=-0.5)
model.query_selection = L(PointQueries)(num_queries=300, embed_dim="${..encoder.embed_dim}")
model.denoising = None
model.decoder.update(look_forward=0, final_norm=False, size_bias=-2.0, eps=1e-5)
model.decoder.position_head = L(LearnedPosition)()
model.criterion.class_weight = 2.0
model.max_detections = 100

dataloader.train.total_batch_size = train.reference_batch = 32
optimizer.lr = 2e-4
optimizer.params.offsets_multiplier = 0.1
lr_multiplier.update(milestones=[40], num_updates=50)
train.max_iter = 50 * 3697  # 118,287 images, batch size 32
train.checkpointer.period = train.eval_period = 3697
