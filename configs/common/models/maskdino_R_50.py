from detectron2.config import LazyCall as L

from dino_d2.modeling import (
    CenterDenoising,
    MaskCriterion,
    MaskDecoder,
    MaskMatcher,
    PixelEmbedding,
    UnifiedQuerySelection,
)
from dino_d2.modeling.mask_dino import MaskDINO

from .dino_R_50 import model

model._target_ = MaskDINO
model.pixel_embedding = L(PixelEmbedding)(
    input_shape="${..neck.input_shape}",
    in_feature="res2",
    embed_dim="${..encoder.embed_dim}",
)
model.backbone.update(out_features=["res2", "res3", "res4", "res5"], freeze_at=0)
model.neck.in_features = ["res3", "res4", "res5"]
model.encoder.update(num_levels=3, ffn_dim=1024, position_temperature=10000.0)
model.query_selection = L(UnifiedQuerySelection)(
    num_queries=300,
    embed_dim="${..encoder.embed_dim}",
    num_classes="${..num_classes}",
    initialize_box_type="bitmask",
    anchor_sides=(),
)
model.decoder.update(_target_=MaskDecoder, num_layers=9, ffn_dim=2048, eps=1e-5)
model.denoising.update(_target_=CenterDenoising, label_noise=0.4, box_noise=0.4, eps=1e-5)
model.criterion.update(
    _target_=MaskCriterion,
    class_weight=4.0,
    giou_eps=1e-6,
    mask_weight=5.0,
    dice_weight=5.0,
    num_points=12544,
)
model.criterion.matcher = L(MaskMatcher)(
    class_cost=4.0, bbox_cost=5.0, giou_cost=2.0, mask_cost=5.0, dice_cost=5.0, giou_eps=1e-6
)
model.update(max_detections=100, instance_on=True, panoptic_on=False, semantic_on=False)
