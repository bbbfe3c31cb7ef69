# DN-DETR (arXiv 2203.01305), table 1: 44.1 AP in the paper, 44.4 in its code.
from detectron2.config import LazyCall as L

from dino_d2.modeling.criterion import BoxesOnly
from dino_d2.modeling.denoising import IndicatorDenoising
from dino_d2.modeling.query_selection import IndicatorPatternQueries

from .dab_detr_R_50_50ep import dataloader, lr_multiplier, model, optimizer, train

model.query_selection.update(_target_=IndicatorPatternQueries, num_patterns=1)
model.denoising = L(IndicatorDenoising)(
    num_classes="${..num_classes}",
    embed_dim="${..encoder.embed_dim}",
    groups=5,
    budget=500,
    label_noise=0.4,  # a label is redrawn with probability 0.2, half of it
    box_noise=0.4,
)
model.criterion._target_ = BoxesOnly
