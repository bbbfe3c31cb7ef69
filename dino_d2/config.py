"""The yacs keys of DINO, and the stages that they describe.

LazyConfig users compose the same classes directly, see configs/common/models/dino_R_50.py.
"""

from traceback import extract_tb

from detectron2.config import CfgNode as CN
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data.transforms import Augmentation
from detectron2.layers import ShapeSpec
from detectron2.utils.file_io import PathManager
from detectron2.utils.registry import Registry
from omegaconf import DictConfig
from yaml import MappingNode, ScalarNode, SequenceNode, YAMLError, compose

from .data import ResizeShortestEdge, num_classes
from .modeling import (
    CLASS_LOSS_REGISTRY,
    DENOISING_REGISTRY,
    MATCHER_REGISTRY,
    QUERY_SELECTION_REGISTRY,
    ChannelMapper,
    Decoder,
    Encoder,
    SetCriterion,
)
from .names import hint
from .overrides import keys_of, unknown_key


def add_dino_config(cfg: CN) -> None:
    """Add the keys of DINO, with the defaults of the paper, to Detectron2's default config."""
    cfg.MODEL.DINO = c = CN()
    c.NUM_CLASSES = None  # None: as many as the training data has
    c.EMBED_DIM = 256
    c.NUM_HEADS = 8
    c.FFN_DIM = 2048
    c.DROPOUT = 0.0
    # Feature maps of the backbone; coarser levels are appended until there are NUM_LEVELS.
    c.IN_FEATURES = ["res3", "res4", "res5"]
    c.NUM_LEVELS = 4
    c.NUM_POINTS = 4
    # Of the encoding of pixels: what the weights were trained with, see encode_pixels.
    c.POSITION_TEMPERATURE = 20.0
    c.POSITION_OFFSET = 0.0
    c.ENCODER_LAYERS = 6
    c.DECODER_LAYERS = 6

    c.QUERY_SELECTION = "MixedQuerySelection"  # or PureQuerySelection, StaticQueries
    c.NUM_QUERIES = 900
    c.LOOK_FORWARD = 2  # 2 is look forward twice, 1 is once, 0 does not refine boxes
    c.SHARED_HEADS = True  # one class and one box head for all decoder layers

    # Stages, of "backbone", "encoder" and "decoder", whose activations are computed again in the
    # backward pass instead of being kept: less memory, more time.
    c.CHECKPOINT = []

    c.DENOISING = CN()
    c.DENOISING.NAME = "ContrastiveDenoising"  # or Denoising, or "" to train without
    c.DENOISING.BUDGET = 100  # boxes noised per image (in pairs if contrastive)
    c.DENOISING.LABEL_NOISE = 0.5
    c.DENOISING.BOX_NOISE = 1.0

    c.MATCHER = CN({"CLASS_COST": 2.0, "BBOX_COST": 5.0, "GIOU_COST": 2.0})
    c.MATCHER.NAME = "HungarianMatcher"  # or PositionModulatedMatcher
    c.LOSS = CN({"CLASS_WEIGHT": 1.0, "BBOX_WEIGHT": 5.0, "GIOU_WEIGHT": 2.0})
    c.LOSS.CLASS_LOSS = "FocalLoss"  # or VarifocalLoss, PositionSupervisedLoss, AlignLoss
    # Of the denoising queries; None: as for the others.
    c.LOSS.DENOISING_CLASS_LOSS = None
    c.LOSS.DENOISING_CLASS_WEIGHT = None

    # With MODEL.BACKBONE.NAME "TimmBackbone"; its features, MODEL.DINO.IN_FEATURES, are p2 to p5.
    cfg.MODEL.TIMM = CN({"NAME": "convnext_tiny", "NORM": False})
    cfg.MODEL.TIMM.OPTIONS = CN({"drop_path_rate": None}, new_allowed=True)  # of create_model

    cfg.SOLVER.OPTIMIZER = "ADAMW"  # or "SGD", Detectron2's own, for other meta-architectures
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1  # learning rate of the backbone, relative to BASE_LR
    cfg.SOLVER.OFFSETS_MULTIPLIER = 1.0  # of sampling offsets; Deformable DETR has 0.1
    cfg.SOLVER.AMP.DTYPE = "bfloat16"  # of AMP; float16 comes with a gradient scaler
    cfg.SOLVER.ACCUMULATE = 1  # parts that the IMS_PER_BATCH images of a step are worked on in
    cfg.SOLVER.NON_FINITE = "stop"  # what a loss that is not finite does; or "skip" the step
    cfg.SOLVER.EMA = CN({"ENABLED": False, "DECAY": 0.9999})  # moving average of the weights
    cfg.SOLVER.FSDP = False  # shards parameters, gradients and optimizer over the workers
    # The batch for which BASE_LR and numbers of iterations are given; 0: IMS_PER_BATCH, whatever it
    # is; see engine/schedule.py.
    cfg.SOLVER.REFERENCE_BATCH = 0
    cfg.SOLVER.EPOCHS = None  # length of the training, of its own data; None: MAX_ITER counts
    # Of Weights & Biases, where a training is logged as well; "": nowhere. See engine/writers.py.
    cfg.WANDB = CN({"PROJECT": ""})
    cfg.TEST.BEST_METRIC = "bbox/AP"  # whose best value's checkpoint is kept; "": none is

    # Of the latest Detectron2; that of 2024 has the samplers which read them, but not the keys.
    cfg.DATALOADER.setdefault("RANDOM_SUBSET_RATIO", 1.0)
    cfg.DATASETS.setdefault("TRAIN_REPEAT_FACTOR", [])

    # Short sides before the crop of DETR's augmentation; see dino_d2/data/augmentation.py.
    cfg.INPUT.CROP.MIN_SIZE_TRAIN = (400, 500, 600)


def read_config(file: str) -> CN | DictConfig:
    """A config of either style: `.py` files and what a training with one of them saves as
    `config.yaml` are LazyConfigs, other YAML files become a CfgNode with the keys of DINO.

    Raises:
        ValueError: a file that cannot be read, or whose base cannot, a YAML file that is none, has
            no keys, or one that is unknown, or a `.py` file that fails; says in which line
    """
    if file.endswith(".py"):
        return _run_config(file)
    keys = _yaml_keys(file)
    if "_target_" in keys:
        return LazyConfig.load(file)
    cfg = get_cfg()
    add_dino_config(cfg)
    try:
        cfg.merge_from_file(file)
    except OSError as error:
        raise ValueError(f"'{file}': its _BASE_ cannot be read: {error}") from error
    except (ValueError, AttributeError, TypeError) as error:  # yacs says which key
        raise ValueError(f"'{file}' is no config: {' '.join(str(error).split())}") from error
    except KeyError as error:
        known = list(keys_of(cfg))
        given = keys_of(CN.load_yaml_with_base(file, allow_unsafe=True))
        unknown = next(key for key in given if key not in known)
        raise ValueError(f"'{file}': {unknown_key(unknown, known)}") from error
    return cfg


def _run_config(file: str) -> DictConfig:
    try:
        return LazyConfig.load(file)
    except SyntaxError as error:
        cause = error.__cause__  # Detectron2 parses the file, and does not say more
        line = f", line {cause.lineno} ({cause.msg})" if isinstance(cause, SyntaxError) else ""
        raise ValueError(f"{error}{line}") from error
    except Exception as error:  # whatever a program can end with
        lines = [x for x in extract_tb(error.__traceback__) if x.name == "<module>"]
        if not lines:
            raise ValueError(f"'{file}' cannot be read: {error}") from error
        reason = " ".join(str(error).split())
        raise ValueError(
            f"'{lines[-1].filename}', line {lines[-1].lineno}: {type(error).__name__}: {reason}"
        ) from error


def _yaml_keys(file: str) -> set[str]:
    """All keys of a YAML file, at any depth; no object that it describes is made."""
    try:
        with PathManager.open(file) as opened:
            top = compose(opened)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"'{file}' is no config but a binary file: give a .yaml or .py file here, and a "
            "checkpoint as the weights"
        ) from error
    except YAMLError as error:
        raise ValueError(f"'{file}' is no YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise ValueError(f"'{file}' cannot be read: {error}") from error
    if not isinstance(top, MappingNode):
        what = "is empty" if top is None else "is no config: it has no keys"
        raise ValueError(f"'{file}' {what}; a config has keys such as 'MODEL: ...'")
    keys, nodes = set(), [top]
    while nodes:
        node = nodes.pop()
        if isinstance(node, MappingNode):
            keys.update(key.value for key, _ in node.value if isinstance(key, ScalarNode))
            nodes += [value for _, value in node.value]
        elif isinstance(node, SequenceNode):
            nodes += node.value
    return keys


def evaluation_augmentations(cfg: CN | DictConfig) -> list[Augmentation]:
    """What resizes an image in the evaluation of a config of either style."""
    if isinstance(cfg, CN):
        return [ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)]
    return instantiate(cfg.dataloader.test.mapper.augmentations)


def build_parts(cfg: CN, backbone_shape: dict[str, ShapeSpec]) -> dict:
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
        ),
        "encoder": Encoder(
            num_layers=c.ENCODER_LAYERS,
            position_temperature=c.POSITION_TEMPERATURE,
            position_offset=c.POSITION_OFFSET,
            **transformer,
        ),
        "query_selection": select(cfg, classes),
        "decoder": Decoder(
            num_classes=classes,
            num_layers=c.DECODER_LAYERS,
            shared_heads=c.SHARED_HEADS,
            look_forward=c.LOOK_FORWARD,
            **transformer,
        ),
        "denoising": denoising(cfg, classes) if denoising else None,
        "criterion": build_criterion(c),
    }


def build_criterion(c: CN) -> SetCriterion:
    """The criterion of the keys under MODEL.DINO."""
    matcher = named(MATCHER_REGISTRY, c.MATCHER.NAME, "MODEL.DINO.MATCHER.NAME")
    class_loss = named(CLASS_LOSS_REGISTRY, c.LOSS.CLASS_LOSS, "MODEL.DINO.LOSS.CLASS_LOSS")
    denoising_class_loss = c.LOSS.DENOISING_CLASS_LOSS and named(
        CLASS_LOSS_REGISTRY, c.LOSS.DENOISING_CLASS_LOSS, "MODEL.DINO.LOSS.DENOISING_CLASS_LOSS"
    )
    return SetCriterion(
        matcher=matcher(
            class_cost=c.MATCHER.CLASS_COST,
            bbox_cost=c.MATCHER.BBOX_COST,
            giou_cost=c.MATCHER.GIOU_COST,
        ),
        class_loss=class_loss(),
        denoising_class_loss=denoising_class_loss() if denoising_class_loss else None,
        class_weight=c.LOSS.CLASS_WEIGHT,
        bbox_weight=c.LOSS.BBOX_WEIGHT,
        giou_weight=c.LOSS.GIOU_WEIGHT,
        denoising_class_weight=c.LOSS.DENOISING_CLASS_WEIGHT,
    )


def named(registry: Registry, name: str, key: str) -> type:
    """What is registered under a name that `key` of a YAML config gives.

    Raises:
        ValueError: nothing is; says what is nearest
    """
    known = dict(registry)
    if name not in known:
        near = hint(str(name), sorted(known))
        raise ValueError(f"{key} is {name!r}, which is unknown; {near}")
    return known[name]
