# A small Mask DINO for the generated shapes: minutes on two CPU cores, from scratch. Its queries
# come from a selection with separate heads, as masks become useful later than boxes.
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from dino_d2.modeling import (
    CenterDenoising,
    MaskCriterion,
    MaskDecoder,
    MaskMatcher,
    PixelEmbedding,
)
from dino_d2.modeling.mask_dino import MaskDINO

from .quickstart import dataloader, lr_multiplier, model, optimizer, train

model._target_ = MaskDINO
model.pixel_embedding = L(PixelEmbedding)(
    input_shape="${..neck.input_shape}",
    in_feature="res2",
    embed_dim="${..encoder.embed_dim}",
)
model.backbone.out_features = ["res2", "res3", "res4"]
model.neck.input_shape["res2"] = ShapeSpec(channels=64)
model.neck.in_features = ["res3", "res4"]
model.decoder.update(_target_=MaskDecoder, eps=1e-5)
model.denoising.update(_target_=CenterDenoising, label_noise=0.4, box_noise=0.4, eps=1e-5)
model.criterion.update(
    _target_=MaskCriterion, giou_eps=1e-6, mask_weight=2.0, dice_weight=2.0, num_points=256
)
model.criterion.matcher = L(MaskMatcher)(
    class_cost=4.0, bbox_cost=5.0, giou_cost=2.0, mask_cost=2.0, dice_cost=2.0, giou_eps=1e-6
)

dataloader.train.mapper.update(use_instance_mask=True, instance_mask_format="bitmask")

train.update(max_iter=2700, eval_period=900, best_metric="segm/AP")
train.checkpointer.period = 900
