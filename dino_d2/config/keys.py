"""The yacs keys of DINO; modeling/build.py makes the stages that they describe.

LazyConfig users compose the same classes directly, see configs/common/models/dino_R_50.py.
"""

from detectron2.config import CfgNode as CN

# What keys of earlier versions are called now.
RENAMED = {
    "MODEL.DINO.CHECKPOINT": "MODEL.DINO.ACTIVATION_CHECKPOINTING",
    "model.checkpoint": "model.activation_checkpointing",
}


def add_dino_config(cfg: CN) -> None:
    """Add the keys of DINO, with the defaults of the paper, to Detectron2's default config."""
    cfg.MODEL.DINO = c = CN()
    c.NUM_CLASSES = None  # None: the number of the training data
    c.EMBED_DIM = 256
    c.NUM_HEADS = 8
    c.FFN_DIM = 2048
    c.ENCODER_FFN_DIM = None  # None: as FFN_DIM
    c.DROPOUT = 0.0
    # Feature maps of the backbone; coarser levels are appended until there are NUM_LEVELS.
    c.IN_FEATURES = ["res3", "res4", "res5"]
    c.NUM_LEVELS = 4
    c.NECK_NORM = True  # a GroupNorm behind each projection of a feature map
    c.NUM_POINTS = 4
    # The position encoding that the weights were trained with, see encode_pixels.
    c.POSITION_TEMPERATURE = 20.0
    c.POSITION_OFFSET = 0.0
    c.LEVEL_EMBED = True  # a learned embedding of each level is added to positions
    c.SCALE_POSITION = False  # positions of tokens are scaled by their content (DAB-DETR)
    c.ENCODER_LAYERS = 6
    c.ENCODER_LAYER = "EncoderLayer"  # or DenseEncoderLayer, ConditionalEncoderLayer
    c.DECODER_LAYERS = 6
    c.DECODER_LAYER = "DecoderLayer"  # or DenseDecoderLayer, ConditionalDecoderLayer
    c.FIRST_DECODER_LAYER = ""  # FirstConditionalDecoderLayer; "": like the others

    # Or PureQuerySelection, StaticQueries, DistinctQuerySelection; of the predecessors
    # ObjectQueries, PointQueries, ProposalQueries, PatternQueries, IndicatorPatternQueries,
    # IndicatorQueries.
    c.QUERY_SELECTION = "MixedQuerySelection"
    c.NUM_QUERIES = 900
    c.SELECTION_IOU = 0.8  # of DistinctQuerySelection: largest IoU of two selected boxes
    c.NUM_PATTERNS = 0  # learned contents of PatternQueries, each with every anchor; 0: zeros
    # Or LearnedPosition, ScaledAnchorPosition, ConditionalPosition.
    c.POSITION_HEAD = "AnchorPosition"
    c.LOOK_FORWARD = 2  # 2: look forward twice, 1: once, 0: boxes are not refined
    # Relation between queries, in all decoder layers but the first: DistinctQueries,
    # PositionRelation, or "" for none.
    c.RELATION = ""
    c.SHARED_HEADS = True  # all decoder layers share one class head and one box head
    c.FINAL_NORM = True  # a norm of the queries before class and box heads
    # Where width and height start in the first box head; None: all box heads start at random.
    c.SIZE_BIAS = 0.0
    c.INVERSE_SIGMOID_EPS = 1e-3  # where references are cut off

    # Stages, of "backbone", "encoder" and "decoder", whose activations are recomputed in the
    # backward pass: less memory, more time.
    c.ACTIVATION_CHECKPOINTING = []
    cfg.register_renamed_key("MODEL.DINO.CHECKPOINT", RENAMED["MODEL.DINO.CHECKPOINT"])

    c.DENOISING = CN()
    c.DENOISING.NAME = "ContrastiveDenoising"  # or Denoising, IndicatorDenoising, or "" for none
    c.DENOISING.GROUPS = 5  # of IndicatorDenoising
    c.DENOISING.BUDGET = 100  # boxes noised per image (in pairs if contrastive)
    c.DENOISING.LABEL_NOISE = 0.5
    c.DENOISING.BOX_NOISE = 1.0

    # Supervision in training only: OneToManyHead, OneToManyQueries, DenseQueries, AuxiliaryFCOS,
    # AuxiliaryFasterRCNN; and extra passes through the decoder: InstructedPass, SeparatePass.
    c.BRANCHES = []
    c.PASSES = []

    c.CRITERION = "SetCriterion"  # or MixedMatching, AllProposals, BoxesOnly
    c.MATCHER = CN({"CLASS_COST": 2.0, "BBOX_COST": 5.0, "GIOU_COST": 2.0})
    c.MATCHER.NAME = "HungarianMatcher"  # or PositionModulatedMatcher, SoftmaxMatcher
    c.GIOU_EPS = 0.0  # added to both divisors of the generalized IoU, in costs and losses
    c.LOSS = CN({"CLASS_WEIGHT": 1.0, "BBOX_WEIGHT": 5.0, "GIOU_WEIGHT": 2.0})
    c.LOSS.CLASS_LOSS = "FocalLoss"  # or VarifocalLoss, PositionSupervisedLoss, AlignLoss,
    # MatchabilityAwareLoss, SoftmaxLoss (with the SoftmaxMatcher)
    # For denoising queries; None: as for the others.
    c.LOSS.DENOISING_CLASS_LOSS = None
    c.LOSS.DENOISING_CLASS_WEIGHT = None

    # Of MaskDINO, with UnifiedQuerySelection, MaskMatcher and MaskCriterion.
    c.MATCHER.update({"MASK_COST": 5.0, "DICE_COST": 5.0})
    c.LOSS.update({"MASK_WEIGHT": 5.0, "DICE_WEIGHT": 5.0})
    c.LOSS.NUM_POINTS = 12544  # points per mask at which costs and losses are computed
    c.MASK = CN({"FEATURE": "res2"})  # of the backbone, at the stride of masks
    c.MASK.INITIALIZE_BOX_TYPE = "bitmask"  # where decoding starts; or "mask2box", "no"
    c.MASK.ANCHOR_SIDES = []  # of each level, finest first; []: 0.05, 0.1, 0.2, ...
    # The outputs of MaskDINO; for panoptic segmentation, the lowest score of a query, and the
    # minimal share of its pixels that it wins; TEMPERATURE of the softmax over sigmoids, or None.
    c.TEST = CN({"INSTANCE_ON": True, "PANOPTIC_ON": False, "SEMANTIC_ON": False})
    c.TEST.update({"OBJECT_MASK_THRESHOLD": 0.25, "OVERLAP_THRESHOLD": 0.8, "TEMPERATURE": 0.06})

    # With MODEL.BACKBONE.NAME "TimmBackbone"; its features, MODEL.DINO.IN_FEATURES, are p2 to p5.
    cfg.MODEL.TIMM = CN({"NAME": "convnext_tiny", "NORM": False})
    cfg.MODEL.TIMM.OPTIONS = CN({"drop_path_rate": None}, new_allowed=True)  # of create_model

    # With MODEL.BACKBONE.NAME "SwinTransformer", likewise of p0 to p3.
    cfg.MODEL.SWIN = CN({"EMBED_DIM": 192, "DEPTHS": [2, 2, 18, 2], "NUM_HEADS": [6, 12, 24, 48]})
    cfg.MODEL.SWIN.update({"WINDOW_SIZE": 12, "PRETRAIN_IMG_SIZE": 384, "DROP_PATH_RATE": 0.2})

    # Python files or modules that register custom components, imported before anything is built. A
    # file is relative to the config, or else to the working directory.
    cfg.IMPORTS = []

    # "ADAMW", or "SGD", Detectron2's own; "": what the meta-architecture is trained with
    cfg.SOLVER.OPTIMIZER = ""
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1  # learning rate of the backbone, relative to BASE_LR
    cfg.SOLVER.OFFSETS_MULTIPLIER = 1.0  # of sampling offsets; Deformable DETR has 0.1
    cfg.SOLVER.AMP.DTYPE = "bfloat16"  # of AMP; float16 comes with a gradient scaler
    cfg.SOLVER.ACCUMULATE = 1  # gradient accumulation: micro-batches per step
    cfg.SOLVER.NON_FINITE = "stop"  # on a loss that is not finite; or "skip" the step
    cfg.SOLVER.FLAT_SHARE = 0.5  # of the run, before the cosine of WarmupFlatCosineLR
    cfg.SOLVER.EMA = CN({"ENABLED": False, "DECAY": 0.9999})  # moving average of the weights
    cfg.SOLVER.FSDP = False  # shards parameters, gradients and optimizer over the workers
    # The batch size that BASE_LR and numbers of iterations are for; 0: no scaling with
    # IMS_PER_BATCH; see engine/schedule.py.
    cfg.SOLVER.REFERENCE_BATCH = 0
    cfg.SOLVER.EPOCHS = None  # length of training; None: MAX_ITER
    # Project of Weights & Biases for logging; "" disables it. See engine/writers.py.
    cfg.WANDB = CN({"PROJECT": ""})
    # IoU threshold of class-wise NMS of the detections; None: no NMS.
    cfg.TEST.NMS = None
    cfg.TEST.ONE_CLASS_PER_QUERY = False  # keep only the best class of each query
    cfg.TEST.BEST_METRIC = "bbox/AP"  # metric that selects model_best.pth; "" disables it
    cfg.TEST.PATIENCE = 0  # early stopping: evaluations without improvement; 0: never

    # Keys of the latest Detectron2; that of 2024 has the samplers, but not their keys.
    cfg.DATALOADER.setdefault("RANDOM_SUBSET_RATIO", 1.0)
    cfg.DATASETS.setdefault("TRAIN_REPEAT_FACTOR", [])

    # Short sides before the crop of DETR's augmentation; see dino_d2/data/augmentation.py.
    cfg.INPUT.CROP.MIN_SIZE_TRAIN = (400, 500, 600)
    cfg.INPUT.CROP.MIN_VISIBLE = 0.0  # boxes of which less of the area is left are dropped
    # Additional augmentations, applied last, by name, or [name, {arguments}]: Detectron2's
    # transforms, or registered ones; see projects/dino/OWN_PARTS.md.
    cfg.INPUT.AUGMENTATIONS = []
    # For your own data, all off; see projects/dino/DATA.md. RANDOM_FLIP may also be "both".
    cfg.INPUT.PHOTOMETRIC = 0.0  # largest change of brightness, contrast and saturation
    cfg.INPUT.SCALE_JITTER = ()  # or two factors of MAX_SIZE_TRAIN, in place of MIN_SIZE_TRAIN
    # Probabilities of mosaic and mixup, and their part of the training; see dino_d2/data/mixing.py.
    cfg.INPUT.MIXING = CN({"MOSAIC": 0.0, "MIXUP": 0.0, "SPAN": (0.05, 0.5)})
