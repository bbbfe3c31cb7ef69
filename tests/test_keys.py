"""Every key of Detectron2's config does what it says, or is refused."""

from itertools import islice

import pytest
import torch
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.data import transforms as T
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.modeling import META_ARCH_REGISTRY

from dino_d2.config.keys import add_dino_config
from dino_d2.config.overrides import apply_overrides, keys_of
from dino_d2.config.styles import get
from dino_d2.data import ResizeShortestEdge, generate, register
from dino_d2.data.stream import TrainingStream
from dino_d2.engine import keys
from dino_d2.engine.evaluation import yaml_evaluator
from dino_d2.engine.plan import make_plan, yaml_mapper, yaml_train_loader
from dino_d2.weights import model_zoo

# What a DINO heeds, or its backbone does; some of them a newer Detectron2 has.
HEEDED = [
    f"{section}{name}"
    for section, names in {
        "": ("CUDNN_BENCHMARK", "FLOAT32_PRECISION", "OUTPUT_DIR", "SEED"),
        "MODEL.": ("DEVICE", "META_ARCHITECTURE", "PIXEL_MEAN", "PIXEL_STD", "WEIGHTS"),
        "MODEL.BACKBONE.": ("FREEZE_AT", "NAME"),
        "MODEL.FPN.": ("FUSE_TYPE", "IN_FEATURES", "NORM", "OUT_CHANNELS"),
        "MODEL.RESNETS.": (
            *("DEFORM_MODULATED", "DEFORM_NUM_GROUPS", "DEFORM_ON_PER_STAGE", "DEPTH", "NORM"),
            *("NUM_GROUPS", "OUT_FEATURES", "RES2_OUT_CHANNELS", "RES5_DILATION"),
            *("STEM_OUT_CHANNELS", "STRIDE_IN_1X1", "WIDTH_PER_GROUP"),
        ),
        "INPUT.": (
            *("FORMAT", "MAX_SIZE_TEST", "MAX_SIZE_TRAIN", "MIN_SIZE_TEST", "MIN_SIZE_TRAIN"),
            *("MIN_SIZE_TRAIN_SAMPLING", "RANDOM_FLIP"),
        ),
        "INPUT.CROP.": ("ENABLED", "SIZE", "TYPE"),
        "DATASETS.": ("TEST", "TRAIN", "TRAIN_REPEAT_FACTOR"),
        "DATALOADER.": (
            *("ASPECT_RATIO_GROUPING", "FILTER_EMPTY_ANNOTATIONS", "NUM_WORKERS"),
            *("RANDOM_SUBSET_RATIO", "REPEAT_SQRT", "REPEAT_THRESHOLD", "SAMPLER_TRAIN"),
        ),
        "SOLVER.": (
            *("AMP.ENABLED", "BASE_LR", "BASE_LR_END", "BIAS_LR_FACTOR", "CHECKPOINT_PERIOD"),
            *("GAMMA", "IMS_PER_BATCH", "LR_SCHEDULER_NAME", "MAX_ITER", "NUM_DECAYS"),
            *("REFERENCE_WORLD_SIZE", "RESCALE_INTERVAL", "STEPS", "WARMUP_FACTOR"),
            *("WARMUP_ITERS", "WARMUP_METHOD", "WEIGHT_DECAY", "WEIGHT_DECAY_BIAS"),
            "WEIGHT_DECAY_NORM",
        ),
        "SOLVER.CLIP_GRADIENTS.": ("CLIP_TYPE", "CLIP_VALUE", "ENABLED"),
        "TEST.": ("DETECTIONS_PER_IMAGE", "EVAL_PERIOD"),
        "TEST.AUG.": ("ENABLED", "FLIP", "MAX_SIZE", "MIN_SIZES"),
    }.items()
    for name in names
]
FOR_DINO = (*keys.NOWHERE, *keys.OF_DETECTRON2S_TRAINER, *keys.OF_OTHER_MODELS, *keys.OF_MASKS)
REFUSED = list(keys.leaves(get_cfg(), (*FOR_DINO, *keys.OF_SGD)))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    generate(root, num_train=6, num_val=2)
    names = [f"{root}/{x}.json@{root}/images" for x in ("train", "val")]
    register(names)
    return names


def config(*options, name="quickstart"):
    cfg = model_zoo.get_config(name)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *options])
    return cfg


def data_config(shapes, *options):
    train, test = ((name,) for name in shapes)
    return config("DATASETS.TRAIN", train, "DATASETS.TEST", test, *options)


def other(value):
    """Another value of the same type, or a number in place of None."""
    if value is None:
        return 0.5
    if isinstance(value, (tuple, list)):
        return type(value)([*value, 1])
    if isinstance(value, bool):
        return not value
    return f"{value}_" if isinstance(value, str) else value + 1


def test_every_key_of_detectron2_is_heeded_or_refused():
    everything = [key for key in keys_of(get_cfg()) if not isinstance(get(get_cfg(), key), CfgNode)]
    assert len(REFUSED) > 90 and not set(REFUSED) & set(HEEDED)
    new = [key for key in everything if key not in REFUSED and key not in HEEDED]
    assert not new, f"heed these keys, or refuse them in dino_d2/engine/keys.py: {', '.join(new)}"


def test_every_table_names_keys_that_there_are():
    cfg = get_cfg()
    add_dino_config(cfg)
    tables = (FOR_DINO, keys.OF_OUR_MODELS, keys.OF_OUR_TRAINER, keys.OF_ADAMW, keys.OF_SGD)
    for name in (name for table in (*tables, *keys.OF_OTHER_BACKBONES.values()) for name in table):
        assert name in keys_of(cfg)


@pytest.mark.parametrize("section", [*FOR_DINO, *keys.OF_SGD])
def test_a_key_without_effect_is_refused(section):
    for key in keys.leaves(get_cfg(), [section]):
        cfg = config()
        usual = get(cfg, key)
        cfg.merge_from_list([key, other(usual)])
        with pytest.raises(ValueError) as error:
            make_plan(cfg)
        assert str(error.value).startswith(f"{key} has no effect ")
        assert str(error.value).endswith(f": leave it at {usual!r}")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("SOLVER.MOMENTUM", 0.8), "with SOLVER.OPTIMIZER ADAMW"),
        (("MODEL.FPN.NORM", "GN"), "on the backbone build_resnet_backbone"),
        (("MODEL.TIMM.NORM", True), "on the backbone build_resnet_backbone"),
        (("MODEL.BACKBONE.NAME", "TimmBackbone", "MODEL.RESNETS.DEPTH", 101), "TimmBackbone"),
        (("MODEL.BACKBONE.NAME", "TimmBackbone", "MODEL.BACKBONE.FREEZE_AT", 5), "TimmBackbone"),
        (("MODEL.RPN.NMS_THRESH", 0.6), "on a DINO"),
        (("SOLVER.OPTIMIZER", "SGD"), "a DINO trains with ADAMW"),
    ],
)
def test_where_a_key_has_no_effect_is_said(options, part):
    with pytest.raises(ValueError, match=part):
        make_plan(config(*options, name="dino_R_50_4scale_12ep"))


def test_every_config_of_this_project_uses_what_it_sets():
    root = model_zoo.Path(model_zoo.get_config_file("Base-DINO.yaml")).parent
    for path in sorted(root.rglob("dino_*.yaml")):
        keys.check_keys(model_zoo.get_config(str(path)))


def test_a_config_that_a_training_saved_is_taken(tmp_path):
    (tmp_path / "config.yaml").write_text(config().dump())
    keys.check_keys(model_zoo.get_config(str(tmp_path / "config.yaml")))


@pytest.mark.parametrize(
    "name",
    [
        "COCO-Detection/faster_rcnn_R_50_FPN_1x",
        "COCO-Detection/retinanet_R_50_FPN_1x",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x",
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x",
    ],
)
def test_other_models_have_their_own_keys(name):
    cfg = get_cfg()
    add_dino_config(cfg)
    cfg.merge_from_file(detectron2_zoo.get_config_file(f"{name}.yaml"))
    cfg.merge_from_list(["SOLVER.OPTIMIZER", "SGD", "VIS_PERIOD", 20, "SOLVER.MOMENTUM", 0.8])
    make_plan(cfg)
    for key in ("SOLVER.BACKBONE_MULTIPLIER", *keys.leaves(cfg, keys.OF_OUR_MODELS)):
        changed = cfg.clone()
        changed.merge_from_list([key, other(get(cfg, key))])
        with pytest.raises(ValueError, match=f"{key} has no effect"):
            make_plan(changed)


def test_a_model_derived_from_dino_is_one():
    registry = META_ARCH_REGISTRY
    derived = type("DerivedDINO", (registry.get("DINO"),), {})
    registry.register(derived)
    try:
        with pytest.raises(ValueError, match="MODEL.MASK_ON has no effect on a DerivedDINO"):
            make_plan(config("MODEL.META_ARCHITECTURE", "DerivedDINO", "MODEL.MASK_ON", True))
    finally:
        del registry._obj_map["DerivedDINO"]


# ---- what is heeded


def augmentations(*options):
    return yaml_mapper(config(*options)).augmentations.augs


def test_sizes_are_a_choice_or_in_a_range():
    key = "INPUT.MIN_SIZE_TRAIN_SAMPLING"
    for style, sizes in (("choice", (50, 60, 70)), ("range", (50, 70))):
        *_, resize = augmentations(key, style, "INPUT.MIN_SIZE_TRAIN", sizes)
        drawn = {resize.get_transform(torch.zeros(9, 9, 3).numpy()).new_h for _ in range(50)}
        assert (drawn <= {50, 60, 70}) == (style == "choice") and min(drawn) >= 50


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("relative", [0.5, 0.25]),
        ("relative_range", [0.5, 0.25]),
        ("absolute", [40, 20]),
        ("absolute_range", [20, 40]),
    ],
)
def test_crops_are_of_the_type_that_is_asked_for(kind, size):
    options = ("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", kind, "INPUT.CROP.SIZE", size)
    _, branch, _ = augmentations(*options)
    crop = branch.aug.augs[1]
    drawn = [crop.get_crop_size((80, 80)) for _ in range(50)]
    expected = {"relative": {(40, 20)}, "absolute": {(40, 20)}}
    if kind in expected:
        assert set(drawn) == expected[kind]
    else:
        lowest, highest = ((40, 20), (80, 80)) if kind == "relative_range" else ((20, 20), (40, 40))
        assert len(set(drawn)) > 10
        assert all(lowest[i] <= x[i] <= highest[i] for x in drawn for i in (0, 1))


@pytest.mark.parametrize("model", ["DINO", "RetinaNet"])
@pytest.mark.parametrize("flip", ["horizontal", "vertical", "none", "both"])
def test_flips_are_of_the_kind_that_is_asked_for(flip, model):
    options = ("INPUT.RANDOM_FLIP", flip, "MODEL.META_ARCHITECTURE", model)
    flips = [x for x in augmentations(*options) if type(x) is T.RandomFlip]
    kinds = [(x.horizontal, x.vertical) for x in flips]
    expected = {"horizontal": [(True, False)], "vertical": [(False, True)], "none": []}
    expected["both"] = expected["horizontal"] + expected["vertical"]
    assert kinds == expected[flip]


def test_augmentations_of_data_of_ones_own_are_off_and_can_be_asked_for():
    usual = [type(x) for x in augmentations()]
    assert usual == [T.RandomFlip, ResizeShortestEdge]
    options = ("INPUT.PHOTOMETRIC", 0.2, "INPUT.SCALE_JITTER", (0.1, 2.0))
    mapper = yaml_mapper(config(*options, "INPUT.CROP.MIN_VISIBLE", 0.4))
    assert mapper.min_visible == 0.4
    kinds = [type(x).__name__ for x in mapper.augmentations.augs]
    colours = ["RandomBrightness", "RandomContrast", "RandomSaturation"]
    assert kinds == ["RandomFlip", "ResizeScale", "RandomCrop", *colours]


@pytest.mark.parametrize("style", [".yaml", ".py"])
def test_images_are_mixed_in_a_part_of_the_training(style):
    cfg = model_zoo.get_config(f"quickstart{style}")
    assert make_plan(cfg).mixing is None
    changes = {
        ".yaml": [
            *("INPUT.MIXING.MOSAIC", "0.5", "INPUT.MIXING.SPAN", "(0.25,0.5)"),
            *("INPUT.CROP.MIN_VISIBLE", "0.4", "SOLVER.ACCUMULATE", "2"),
        ],
        ".py": [
            *("dataloader.mixing.mosaic=0.5", "dataloader.mixing.span=[0.25,0.5]"),
            *("dataloader.mixing.min_visible=0.4", "train.accumulate=2"),
        ],
    }
    apply_overrides(cfg, changes[style])
    plan = make_plan(cfg)
    assert (plan.mixing.mosaic, plan.mixing.mixup, plan.mixing.min_visible) == (0.5, 0.0, 0.4)
    assert plan.mixed == range(600 * 4, 1200 * 4)  # of 2400 iterations of 4 images, 2 at a time
    cfg = model_zoo.get_config(f"quickstart_masks{style}")
    apply_overrides(cfg, changes[style][:2])
    assert make_plan(cfg).mixing.mosaic == 0.5


def test_other_models_are_fed_as_by_detectron2():
    crop = ("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "relative", "INPUT.CROP.SIZE", [0.5, 1])
    other_model = ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.MASK_ON", True)
    mapper = yaml_mapper(config(*crop, *other_model))
    kinds = [type(x) for x in mapper.augmentations.augs]
    assert kinds == [T.RandomCrop, T.ResizeShortestEdge, T.RandomFlip]
    assert mapper.use_instance_mask and mapper.recompute_boxes


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("TrainingSampler", ()),
        ("RandomSubsetTrainingSampler", ("DATALOADER.RANDOM_SUBSET_RATIO", 0.5)),
        ("RepeatFactorTrainingSampler", ("DATALOADER.REPEAT_THRESHOLD", 1.0)),
        ("WeightedTrainingSampler", ("DATASETS.TRAIN_REPEAT_FACTOR",)),
        ("WeightedCategoryTrainingSampler", ("DATASETS.TRAIN_REPEAT_FACTOR",)),
    ],
)
def test_images_are_drawn_by_the_sampler_of_the_config_also_when_a_training_goes_on(
    sampler, options, shapes
):
    if options == ("DATASETS.TRAIN_REPEAT_FACTOR",):
        options = (*options, [[shapes[0], 2.0]])
    options += ("DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.NUM_WORKERS", 0)
    cfg = data_config(shapes, *options, "SOLVER.IMS_PER_BATCH", 2, "SEED", 3)
    plan = make_plan(cfg)
    drawn = {x["image_id"] for batch in islice(plan.build_loader(), 12) for x in batch}
    assert len(drawn) == (3 if "Subset" in sampler else 6)
    whole, resumed = TrainingStream(plan.build_loader, 3), TrainingStream(plan.build_loader, 3)
    resumed.start = 4
    later, again = islice(whole, 4, 7), islice(resumed, 3)
    for first, second in zip(later, again, strict=True):
        assert all(torch.equal(x["image"], y["image"]) for x, y in zip(first, second, strict=True))


def test_images_can_be_grouped_by_their_aspect_ratio(shapes):
    loader = yaml_train_loader(data_config(shapes, "DATALOADER.ASPECT_RATIO_GROUPING", True))
    assert type(loader) is AspectRatioGroupedDataset


def test_biases_have_a_learning_rate_and_a_weight_decay_of_their_own():
    model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(1, 1), "head": torch.nn.Linear(1, 1)})
    cfg = config("SOLVER.BASE_LR", 1.0, "SOLVER.BACKBONE_MULTIPLIER", 0.5)
    cfg.merge_from_list(["SOLVER.BIAS_LR_FACTOR", 2.0, "SOLVER.WEIGHT_DECAY_BIAS", 0.25])
    groups = make_plan(cfg).build_optimizer(model).param_groups
    of = {x: (group["lr"], group["weight_decay"]) for group in groups for x in group["params"]}
    assert {name: of[x] for name, x in model.named_parameters()} == {
        "backbone.weight": (0.5, 1e-4),
        "backbone.bias": (1.0, 0.25),
        "head.weight": (1.0, 1e-4),
        "head.bias": (2.0, 0.25),
    }


def test_key_points_are_evaluated_with_the_sigmas_of_the_config(shapes):
    cfg = data_config(shapes, "TEST.KEYPOINT_OKS_SIGMAS", [0.5, 0.25])
    assert yaml_evaluator(cfg, shapes[1])._kpt_oks_sigmas == [0.5, 0.25]


# ---- LazyConfig


@pytest.mark.parametrize(
    ("key", "part"),
    [
        (
            "train.ema.decy",
            "train.ema.decy has no effect here: leave it out; did you mean: train.ema.decay",
        ),
        ("train.checkpointer.file_prefix", "train.checkpointer.file_prefix has no effect"),
        ("train.model_ema.enabled", "train.model_ema has no effect here: leave it out"),
    ],
)
def test_a_key_of_train_without_effect_is_refused(key, part):
    cfg = model_zoo.get_config("quickstart.py")
    with pytest.raises(ValueError, match=part):
        make_plan(LazyConfig.apply_overrides(cfg, [f"+{key}=1"]))


def test_options_of_replicas_are_passed_on():
    cfg = model_zoo.get_config("quickstart.py")
    plan = make_plan(LazyConfig.apply_overrides(cfg, ["+train.ddp.bucket_cap_mb=5"]))
    assert plan.ddp["bucket_cap_mb"] == 5


def test_there_is_a_key_for_all_that_detectron2_has():
    def known(config):
        return set(keys_of(config.train))

    theirs = LazyConfig.load(detectron2_zoo.get_config_file("common/train.py"))
    ours = model_zoo.get_config("common/train.py")
    assert known(theirs) | {"cudnn_benchmark"} <= known(ours)
