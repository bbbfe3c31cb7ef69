# DAB-DETR (arXiv 2201.12329), table 2: 42.2 AP.
from detectron2.config import LazyCall as L

from dino_d2.modeling.decoder_layers import ConditionalDecoderLayer, FirstConditionalDecoderLayer
from dino_d2.modeling.encoder import ConditionalEncoderLayer
from dino_d2.modeling.positions import ConditionalPosition
from dino_d2.modeling.query_selection import PatternQueries

from ..common.data import dataloader
from ..common.models.dino_R_50 import model
from ..common.optim import lr_multiplier, optimizer
from ..common.train import train

model.backbone.out_features = ["res5"]
model.neck.norm = False
model.encoder.update(layer=ConditionalEncoderLayer, num_levels=1, level_embed=False)
model.encoder.scale_position = True
model.query_selection = L(PatternQueries)(
    num_queries=300, embed_dim="${..encoder.embed_dim}", num_patterns=0
)
model.denoising = None
model.decoder.update(layer=ConditionalDecoderLayer, first_layer=FirstConditionalDecoderLayer)
model.decoder.position_head = L(ConditionalPosition)(embed_dim="${...encoder.embed_dim}")
model.criterion.giou_eps = model.criterion.matcher.giou_eps = 1e-6

lr_multiplier.update(milestones=[40], num_updates=50)
train.max_iter = 50 * 7393
