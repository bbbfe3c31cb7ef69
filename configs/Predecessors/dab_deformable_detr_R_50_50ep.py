# DAB-Deformable-DETR (arXiv 2201.12329), table 5: 46.8 AP in the paper, 48.7 in its code.
from detectron2.config import LazyCall as L

from dino_d2.modeling import StaticQueries
from dino_d2.modeling.positions import ScaledAnchorPosition

from ..common.data import dataloader
from ..common.models.dino_R_50 import model
from ..common.optim import lr_multiplier, optimizer
from ..common.train import train

model.encoder.update(position_temperature=10000.0, position_offset=-0.5)
model.query_selection.update(_target_=StaticQueries, num_queries=300)
model.denoising = None
model.decoder.update(look_forward=1, shared_heads=False, final_norm=False, size_bias=-2.0)
model.decoder.position_head = L(ScaledAnchorPosition)(embed_dim="${...encoder.embed_dim}")
model.criterion.giou_eps = model.criterion.matcher.giou_eps = 1e-6
model.max_detections = 100

lr_multiplier.update(milestones=[40], num_updates=50)
train.max_iter = 50 * 7393
