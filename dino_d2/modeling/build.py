"""Builds the stages from the keys of a YAML config."""

from detectron2.config import CfgNode as CN
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry

from ..data import num_classes
from ..names import hint
from . import (
    BRANCH_REGISTRY,
    CLASS_LOSS_REGISTRY,
    CRITERION_REGISTRY,
    DECODER_LAYER_REGISTRY,
    DENOISING_REGISTRY,
    ENCODER_LAYER_REGISTRY,
    MATCHER_REGISTRY,
    PASS_REGISTRY,
    POSITION_HEAD_REGISTRY,
    QUERY_SELECTION_REGISTRY,
    RELATION_REGISTRY,
    ChannelMapper,
    Decoder,
    Encoder,
    SetCriterion,
    SoftmaxLoss,
)
from .matcher import costs_from_config


def build_parts(
    cfg: CN, backbone_shape: dict[str, ShapeSpec], decoder: type[Decoder] = Decoder
) -> dict[str, object]:
    """The stages after the backbone, as arguments of :class:`DINO`."""
    c = cfg.MODEL.DINO
    classes = c.NUM_CLASSES or num_classes(cfg.DATASETS.TRAIN)
    transformer = {
        "embed_dim": c.EMBED_DIM,
        "num_heads": c.NUM_HEADS,
        "ffn_dim": c.FFN_DIM,
        "dropout": c.DROPOUT,
        "num_levels": c.NUM_LEVELS,
        "num_points": c.NUM_POINTS,
    }
    select = named(QUERY_SELECTION_REGISTRY, c.QUERY_SELECTION, "MODEL.DINO.QUERY_SELECTION")
    first_layer = c.FIRST_DECODER_LAYER and named(
        DECODER_LAYER_REGISTRY, c.FIRST_DECODER_LAYER, "MODEL.DINO.FIRST_DECODER_LAYER"
    )
    position_head = named(POSITION_HEAD_REGISTRY, c.POSITION_HEAD, "MODEL.DINO.POSITION_HEAD")
    relation = c.RELATION and named(RELATION_REGISTRY, c.RELATION, "MODEL.DINO.RELATION")
    denoising = c.DENOISING.NAME and named(
        DENOISING_REGISTRY, c.DENOISING.NAME, "MODEL.DINO.DENOISING.NAME"
    )
    return {
        "num_classes": classes,
        "neck": ChannelMapper(
            input_shape=backbone_shape,
            in_features=c.IN_FEATURES,
            out_channels=c.EMBED_DIM,
            num_levels=c.NUM_LEVELS,
            norm=c.NECK_NORM,
        ),
        "encoder": Encoder(
            num_layers=c.ENCODER_LAYERS,
            layer=named(ENCODER_LAYER_REGISTRY, c.ENCODER_LAYER, "MODEL.DINO.ENCODER_LAYER"),
            level_embed=c.LEVEL_EMBED,
            scale_position=c.SCALE_POSITION,
            position_temperature=c.POSITION_TEMPERATURE,
            position_offset=c.POSITION_OFFSET,
            **transformer | {"ffn_dim": c.ENCODER_FFN_DIM or c.FFN_DIM},
        ),
        "query_selection": select(cfg, classes),
        "decoder": decoder(
            num_classes=classes,
            num_layers=c.DECODER_LAYERS,
            shared_heads=c.SHARED_HEADS,
            look_forward=c.LOOK_FORWARD,
            layer=named(DECODER_LAYER_REGISTRY, c.DECODER_LAYER, "MODEL.DINO.DECODER_LAYER"),
            first_layer=first_layer or None,
            position_head=position_head(embed_dim=c.EMBED_DIM),
            final_norm=c.FINAL_NORM,
            size_bias=c.SIZE_BIAS,
            eps=c.INVERSE_SIGMOID_EPS,
            softmax=c.LOSS.CLASS_LOSS == SoftmaxLoss.__name__,
            relation=relation or None,
            **transformer,
        ),
        "denoising": denoising(cfg, classes) if denoising else None,
        "criterion": build_criterion(c),
        "branches": all_named(BRANCH_REGISTRY, c.BRANCHES, "MODEL.DINO.BRANCHES", cfg, classes),
        "passes": all_named(PASS_REGISTRY, c.PASSES, "MODEL.DINO.PASSES", cfg, classes),
    }


def build_criterion(c: CN) -> SetCriterion:
    """The criterion of the keys under MODEL.DINO."""
    matcher = named(MATCHER_REGISTRY, c.MATCHER.NAME, "MODEL.DINO.MATCHER.NAME")
    class_loss = named(CLASS_LOSS_REGISTRY, c.LOSS.CLASS_LOSS, "MODEL.DINO.LOSS.CLASS_LOSS")
    denoising_class_loss = c.LOSS.DENOISING_CLASS_LOSS and named(
        CLASS_LOSS_REGISTRY, c.LOSS.DENOISING_CLASS_LOSS, "MODEL.DINO.LOSS.DENOISING_CLASS_LOSS"
    )
    criterion = named(CRITERION_REGISTRY, c.CRITERION, "MODEL.DINO.CRITERION")
    return criterion(
        matcher=matcher(**costs_from_config(c, matcher), giou_eps=c.GIOU_EPS),
        class_loss=class_loss(),
        denoising_class_loss=denoising_class_loss() if denoising_class_loss else None,
        class_weight=c.LOSS.CLASS_WEIGHT,
        bbox_weight=c.LOSS.BBOX_WEIGHT,
        giou_weight=c.LOSS.GIOU_WEIGHT,
        denoising_class_weight=c.LOSS.DENOISING_CLASS_WEIGHT,
        giou_eps=c.GIOU_EPS,
        **{name: c.LOSS[name.upper()] for name in getattr(criterion, "further_options", ())},
    )


def all_named(
    registry: Registry, names: list[str], key: str, cfg: CN, num_classes: int
) -> list[object]:
    """What is registered under each name in `key`; a ValueError for one that is there twice."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{key} has {name!r} twice: name each once")
    return [named(registry, name, key)(cfg, num_classes) for name in names]


def named(registry: Registry, name: str, key: str) -> type:
    """The class registered under the name in `key`; a ValueError if there is none."""
    known = dict(registry)
    if name not in known:
        near = hint(str(name), sorted(known))
        raise ValueError(f"{key} is {name!r}, which is unknown; {near}")
    return known[name]
