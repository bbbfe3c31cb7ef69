# DETR (arXiv 2005.12872), table 1: 42.0 AP.
from detectron2.config import LazyCall as L

from dino_d2.modeling import SoftmaxLoss, SoftmaxMatcher
from dino_d2.modeling.decoder_layers import DenseDecoderLayer
from dino_d2.modeling.encoder import DenseEncoderLayer
from dino_d2.modeling.positions import LearnedPosition
from dino_d2.modeling.query_selection import ObjectQueries

from ..common.data import dataloader
from ..common.models.dino_R_50 import model
from ..common.optim import lr_multiplier, optimizer
from ..common.train import train

model.backbone.out_features = ["res5"]
model.neck.norm = False
model.encoder.update(layer=DenseEncoderLayer, num_levels=1, level_embed=False)
model.encoder.update(dropout=0.1, position_temperature=10000.0)
model.query_selection = L(ObjectQueries)(num_queries=100, embed_dim="${..encoder.embed_dim}")
model.denoising = None
model.decoder.update(layer=DenseDecoderLayer, look_forward=0, softmax=True, size_bias=None)
model.decoder.position_head = L(LearnedPosition)()
model.criterion.class_loss = L(SoftmaxLoss)(no_object_weight=0.1)
model.criterion.matcher.update(_target_=SoftmaxMatcher, class_cost=1.0)
model.max_detections = 100

dataloader.train.total_batch_size = train.reference_batch = 64
lr_multiplier.update(milestones=[400], num_updates=500)
train.max_iter = 500 * 1849  # 118,287 images, batch size 64
train.checkpointer.period = train.eval_period = 1849
