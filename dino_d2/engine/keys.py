"""Refuses keys that would have no effect."""

import json
from collections.abc import Iterator, Sequence

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from omegaconf import DictConfig, OmegaConf

from ..config.keys import add_dino_config
from ..config.overrides import keys_of
from ..config.styles import get
from ..modeling.build import named
from ..modeling.detector import Detector
from ..modeling.mask_dino import MaskDINO
from ..names import hint, nearest
from ..weights import model_zoo

# Sections and keys of YAML configs by the only component that uses them; without it, they are
# refused. All other keys work as in Detectron2.
NOWHERE = ("VERSION", "GLOBAL")
OF_DETECTRON2S_TRAINER = ("TEST.EXPECTED_RESULTS", "TEST.PRECISE_BN")
OF_OUR_TRAINER = (
    *("INPUT.MIXING", "SOLVER.ACCUMULATE", "SOLVER.EMA", "SOLVER.FSDP", "SOLVER.NON_FINITE"),
    *("TEST.PATIENCE", "WANDB"),
)
OF_OUR_MODELS = (
    *("INPUT.CROP.MIN_SIZE_TRAIN", "INPUT.CROP.MIN_VISIBLE", "INPUT.MIXING", "INPUT.PHOTOMETRIC"),
    *("INPUT.AUGMENTATIONS", "INPUT.SCALE_JITTER"),
    *("TEST.AUG", "TEST.NMS", "TEST.ONE_CLASS_PER_QUERY"),
)
OF_OTHER_MODELS = (
    *("MODEL.ANCHOR_GENERATOR", "MODEL.PANOPTIC_FPN", "MODEL.PROPOSAL_GENERATOR"),
    *("MODEL.RETINANET", "MODEL.RPN", "MODEL.SEM_SEG_HEAD"),
    *("MODEL.ROI_BOX_CASCADE_HEAD", "MODEL.ROI_BOX_HEAD", "MODEL.ROI_HEADS"),
    *("MODEL.ROI_KEYPOINT_HEAD", "MODEL.ROI_MASK_HEAD"),
    *("MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS"),
    *("DATASETS.PROPOSAL_FILES_TRAIN", "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN"),
    *("DATASETS.PROPOSAL_FILES_TEST", "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST"),
    *("TEST.KEYPOINT_OKS_SIGMAS", "VIS_PERIOD"),
)
OF_MASKS = ("MODEL.MASK_ON", "INPUT.MASK_FORMAT")
OF_MASK_DINO = (
    *("MODEL.DINO.MASK", "MODEL.DINO.TEST"),
    *("MODEL.DINO.MATCHER.MASK_COST", "MODEL.DINO.MATCHER.DICE_COST"),
    *("MODEL.DINO.LOSS.MASK_WEIGHT", "MODEL.DINO.LOSS.DICE_WEIGHT", "MODEL.DINO.LOSS.NUM_POINTS"),
)
# Other models' own number of classes, by the meta-architecture.
NUM_CLASSES = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}
OF_ADAMW = ("SOLVER.BACKBONE_MULTIPLIER", "SOLVER.OFFSETS_MULTIPLIER")
OF_SGD = ("SOLVER.MOMENTUM", "SOLVER.NESTEROV", "SOLVER.CLIP_GRADIENTS.NORM_TYPE")
# By the backbone that ignores them; unknown backbones may use any key.
OF_OTHER_BACKBONES = {
    "build_resnet_backbone": ("MODEL.FPN", "MODEL.TIMM"),
    "build_resnet_fpn_backbone": ("MODEL.TIMM",),
    "build_retinanet_resnet_fpn_backbone": ("MODEL.TIMM",),
    "build_resnet_dc5_backbone": (
        *("MODEL.FPN", "MODEL.TIMM", "MODEL.RESNETS.NUM_GROUPS", "MODEL.RESNETS.WIDTH_PER_GROUP"),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", "MODEL.RESNETS.RES5_DILATION"),
        *("MODEL.RESNETS.DEFORM_ON_PER_STAGE", "MODEL.RESNETS.DEFORM_MODULATED"),
        "MODEL.RESNETS.DEFORM_NUM_GROUPS",
    ),
    # and of MODEL.RESNETS, which configs inherit from Base-DINO.yaml
    "TimmBackbone": (
        *("MODEL.FPN", "MODEL.BACKBONE.FREEZE_AT", "MODEL.RESNETS.DEPTH", "MODEL.RESNETS.NORM"),
    ),
}


def is_detector(cfg: CfgNode, kind: type = Detector) -> bool:
    """Whether the meta-architecture is a Detector, such as DINO; one that is unknown is not."""
    return issubclass(dict(META_ARCH_REGISTRY).get(cfg.MODEL.META_ARCHITECTURE, object), kind)


def optimizer_of(cfg: CfgNode) -> str:
    """ADAMW or SGD: that of the config or, where it names none, of the meta-architecture."""
    name: str = cfg.SOLVER.OPTIMIZER or ("ADAMW" if is_detector(cfg) else "SGD")
    return name


def check_keys(cfg: CfgNode | DictConfig) -> None:
    """Refuse keys of a config of either style that have no effect.

    Raises:
        ValueError: a key differs from its default, or is in `train` of a LazyConfig, and nothing
            uses it; or the optimizer is invalid
    """
    if isinstance(cfg, DictConfig):
        check_train(cfg.train)
        return
    named(META_ARCH_REGISTRY, cfg.MODEL.META_ARCHITECTURE, "MODEL.META_ARCHITECTURE")
    check_optimizer(cfg)
    is_ours, backbone, optimizer = is_detector(cfg), cfg.MODEL.BACKBONE.NAME, optimizer_of(cfg)
    by_model = OF_OTHER_MODELS if is_ours else OF_OUR_MODELS
    refuse(cfg, NOWHERE, "here")
    refuse(cfg, by_model, f"on a {cfg.MODEL.META_ARCHITECTURE}")
    if is_detector(cfg, MaskDINO):
        check_views(cfg)
    elif is_ours:
        refuse(cfg, (*OF_MASKS, *OF_MASK_DINO), f"on a {cfg.MODEL.META_ARCHITECTURE}")
    refuse(cfg, OF_OTHER_BACKBONES.get(backbone, ()), f"on the backbone {backbone}")
    by_optimizer = OF_ADAMW if optimizer == "SGD" else OF_SGD
    if cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupFlatCosineLR":
        refuse(cfg, ("SOLVER.FLAT_SHARE",), "without SOLVER.LR_SCHEDULER_NAME WarmupFlatCosineLR")
    if not (cfg.INPUT.MIXING.MOSAIC or cfg.INPUT.MIXING.MIXUP):
        refuse(cfg, ("INPUT.MIXING.SPAN",), "without INPUT.MIXING.MOSAIC or MIXUP")
    refuse(cfg, by_optimizer, f"with SOLVER.OPTIMIZER {optimizer}")


def check_views(cfg: CfgNode) -> None:
    """Raise a ValueError for maps of pixels with test-time augmentation, which merges objects."""
    for key in ("PANOPTIC_ON", "SEMANTIC_ON") if cfg.TEST.AUG.ENABLED else ():
        if cfg.MODEL.DINO.TEST[key]:
            raise ValueError(
                "test-time augmentation merges boxes and masks of objects, not maps of pixels: set "
                f"TEST.AUG.ENABLED or MODEL.DINO.TEST.{key} to False"
            )


def check_optimizer(cfg: CfgNode) -> None:
    """Raise a ValueError for an optimizer that is unknown, unsuitable or cannot clip gradients."""
    optimizer, clip = optimizer_of(cfg), cfg.SOLVER.CLIP_GRADIENTS
    if optimizer not in ("ADAMW", "SGD"):
        raise ValueError(
            f"SOLVER.OPTIMIZER is {optimizer!r}; it can be ADAMW or SGD; "
            + hint(optimizer, ("ADAMW", "SGD"))
        )
    if optimizer == "SGD" and is_detector(cfg):
        raise ValueError("SOLVER.OPTIMIZER SGD is for other models: a DINO trains with ADAMW")
    if clip.ENABLED and (clip.CLIP_TYPE == "full_model") != (optimizer == "ADAMW"):
        raise ValueError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}; ADAMW clips by 'full_model', "
            "SGD by 'value' or 'norm'"
        )


def refuse(cfg: CfgNode, keys: Sequence[str], where: str) -> None:
    """Raise a ValueError if keys or sections, without effect `where`, are not at their defaults."""
    usual = get_cfg()
    add_dino_config(usual)
    for key in leaves(usual, keys):
        value, default = get(cfg, key), get(usual, key)
        if json.dumps(value) != json.dumps(default):  # files have lists in place of tuples
            raise ValueError(f"{key} has no effect {where}: leave it at {default!r}")


def leaves(cfg: CfgNode, keys: Sequence[str]) -> Iterator[str]:
    """The keys below the given keys and sections."""
    for key in keys_of(cfg):
        inside = any(f"{key}.".startswith(f"{x}.") for x in keys)
        if inside and not isinstance(get(cfg, key), CfgNode):
            yield key


def check_train(train: DictConfig) -> None:
    """Raise a ValueError for keys of `train` that configs/common/train.py does not have.

    Options of DistributedDataParallel are allowed.
    """
    usual = OmegaConf.to_container(model_zoo.get_config("common/train.py").train)
    known = list(keys_of(usual, "train."))
    for key in keys_of(OmegaConf.to_container(train, resolve=False), "train."):
        if key not in known and not key.startswith("train.ddp."):
            near = ", ".join(nearest(key, known))
            end = f"; did you mean: {near}" if near else ""
            raise ValueError(f"{key} has no effect here: leave it out{end}")
