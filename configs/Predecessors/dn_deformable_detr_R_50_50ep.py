# DN-Deformable-DETR (arXiv 2203.01305, "++" in its second version): 49.5 AP in paper and code.
from detectron2.config import LazyCall as L

from dino_d2.modeling.criterion import BoxesOnly
from dino_d2.modeling.denoising import IndicatorDenoising
from dino_d2.modeling.query_selection import IndicatorQueries

from .dab_deformable_detr_R_50_50ep import dataloader, lr_multiplier, model, optimizer, train

model.query_selection._target_ = IndicatorQueries
model.denoising = L(IndicatorDenoising)(
    num_classes="${..num_classes}",
    embed_dim="${..encoder.embed_dim}",
    groups=5,
    budget=500,
    label_noise=0.4,  # a label is redrawn with probability 0.2, half of it
    box_noise=0.4,
)
model.criterion._target_ = BoxesOnly
