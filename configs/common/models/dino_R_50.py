from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BasicStem, ResNet

from dino_d2.data import num_classes
from dino_d2.modeling import (
    ChannelMapper,
    ContrastiveDenoising,
    Decoder,
    Encoder,
    FocalLoss,
    HungarianMatcher,
    MixedQuerySelection,
    SetCriterion,
)
from dino_d2.modeling.dino import DINO

model = L(DINO)(
    backbone=L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
        stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=False, norm="FrozenBN"),
        out_features=["res3", "res4", "res5"],
        freeze_at=2,
    ),
    neck=L(ChannelMapper)(
        input_shape={
            "res2": ShapeSpec(channels=256),
            "res3": ShapeSpec(channels=512),
            "res4": ShapeSpec(channels=1024),
            "res5": ShapeSpec(channels=2048),
        },
        in_features="${..backbone.out_features}",
        out_channels="${..encoder.embed_dim}",
        num_levels="${..encoder.num_levels}",
    ),
    encoder=L(Encoder)(
        num_layers=6,
        embed_dim=256,
        num_heads=8,
        ffn_dim=2048,
        dropout=0.0,
        num_levels=4,
        num_points=4,
        position_temperature=20.0,
        position_offset=0.0,
    ),
    query_selection=L(MixedQuerySelection)(
        num_queries=900,
        embed_dim="${..encoder.embed_dim}",
        num_classes="${..num_classes}",
    ),
    decoder=L(Decoder)(
        num_classes="${..num_classes}",
        num_layers=6,
        embed_dim="${..encoder.embed_dim}",
        num_heads="${..encoder.num_heads}",
        ffn_dim="${..encoder.ffn_dim}",
        dropout="${..encoder.dropout}",
        num_levels="${..encoder.num_levels}",
        num_points="${..encoder.num_points}",
        shared_heads=True,
        look_forward=2,
    ),
    denoising=L(ContrastiveDenoising)(
        num_classes="${..num_classes}",
        embed_dim="${..encoder.embed_dim}",
        budget=100,
        label_noise=0.5,
        box_noise=1.0,
    ),
    criterion=L(SetCriterion)(
        matcher=L(HungarianMatcher)(class_cost=2.0, bbox_cost=5.0, giou_cost=2.0),
        class_loss=L(FocalLoss)(),
        denoising_class_loss=None,  # as class_loss
        class_weight=1.0,
        bbox_weight=5.0,
        giou_weight=2.0,
        denoising_class_weight=None,  # as class_weight
    ),
    # Taken from the training data; a plain number overrides it.
    num_classes=L(num_classes)(names="${dataloader.train.dataset.names}"),
    max_detections=300,
    nms=None,
    one_class_per_query=False,
    pixel_mean=[123.675, 116.280, 103.530],
    pixel_std=[58.395, 57.120, 57.375],
    activation_checkpointing=[],
)
