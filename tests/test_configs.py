"""Every config builds, and its two twins say the same."""

import re
from collections.abc import Sequence
from copy import deepcopy
from functools import cache, partial
from inspect import signature
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data.benchmark import DataLoaderBenchmark
from detectron2.modeling import build_model

from dino_d2 import add_dino_config
from dino_d2.data import build_train_loader, detr_augmentation
from dino_d2.engine.plan import Plan, make_plan, yaml_scheduler
from dino_d2.modeling import (
    AlignLoss,
    Denoising,
    FocalLoss,
    HungarianMatcher,
    MatchabilityAwareLoss,
    PositionModulatedMatcher,
    PositionSupervisedLoss,
    PureQuerySelection,
    StaticQueries,
    VarifocalLoss,
)
from dino_d2.weights import model_zoo

CONFIGS = Path(model_zoo.get_config_file("Base-DINO.yaml")).parent
NAMES = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in CONFIGS.rglob("*.yaml")
    if path.stem != "Base-DINO"
)
# Built last are models that take long, and those of other configs with another schedule.
BUILT = [
    pytest.param(name, marks=pytest.mark.slow)
    if re.search("ConvNeXt|FocalNet|Swin|_24ep|_36ep|detrex/|TrainingOnly/", name)
    else name
    for name in NAMES
]


@cache
def read_once(name):
    return model_zoo.get_config(name)


def number_of_classes(name):
    return 133 if name.endswith("panoptic") else 80


def yaml_config(name, *overrides):
    cfg = deepcopy(read_once(f"{name}.yaml"))
    number = number_of_classes(name)
    cfg.merge_from_list(["MODEL.DEVICE", "meta", "MODEL.DINO.NUM_CLASSES", number, *overrides])
    return cfg


def lazy_config(name, *overrides):
    cfg = deepcopy(read_once(f"{name}.py"))
    return LazyConfig.apply_overrides(
        cfg, [f"model.num_classes={number_of_classes(name)}", *overrides]
    )


@pytest.fixture
def on_meta_device(monkeypatch):
    """Shapes without memory or time: what is compared here are names and sizes."""
    on_cpu = partial(torch.linspace, device="cpu")  # Detectron2's Swin makes Python's numbers of it
    monkeypatch.setattr(torch, "linspace", on_cpu)
    with torch.device("meta"):
        yield


@cache
def model_of(style):
    """DINO as published."""
    name = "dino_R_50_4scale_12ep"
    return (
        build_model(yaml_config(name)) if style == "yaml" else instantiate(lazy_config(name).model)
    )


def shapes(model):
    return {name: (tuple(x.shape), x.dtype) for name, x in model.state_dict().items()}


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_there_is_a_config_for_every_promise():
    promised = {f"dino_R_50_{s}scale_{e}ep" for s in (4, 5) for e in (12, 24, 36)}
    others = {"dino_R_101_4scale_12ep", "dino_R_50_4scale_12ep_improved", "own_data", "quickstart"}
    assert promised | others <= set(NAMES)
    assert sum(name.startswith("Ablations/") for name in NAMES) == 4
    assert sum(name.startswith("Relations/") for name in NAMES) == 2
    assert sum(name.startswith("IoUAware/") for name in NAMES) == 4
    assert sum(name.startswith("TrainingOnly/") for name in NAMES) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "start", "number", "things"),
    [("", "bitmask", 80, 80), ("_no_mask_enhance", "no", 80, 80), ("_panoptic", "no", 133, 80)],
)
def test_swin_transformers_make_masks(end, start, number, things, on_meta_device):
    cfg = model_zoo.get_config(f"MaskDINO/maskdino_Swin_L_384_5scale_50ep{end}.py")
    model = instantiate(cfg.model)  # classes and stuff come from the data
    assert model.num_classes == number == things + len(model.stuff_classes)
    assert model.pixel_embedding.lateral[0].in_channels == 192
    assert model.query_selection.initialize_box_type == start
    assert len(model.encoder.level_embed.weight) == len(model.query_selection.anchor_sides) == 5
    total = sum(x.numel() for x in model.parameters())
    assert 220e6 < total < 226e6  # 223 M in the README of the authors' code


@pytest.mark.parametrize(
    "folder", ["Ablations", "IoUAware", "MaskDINO", "Objects365", "Predecessors", "Relations"]
)
def test_the_readme_lists_every_config_of_a_folder(folder):
    readme = (CONFIGS / "README.md").read_text()
    stems = {path.stem for path in (CONFIGS / folder).glob("*.py")}
    assert stems and not [stem for stem in stems if not re.search(rf"\b{stem}\b", readme)]


def test_after_objects365_images_are_one_and_a_half_times_as_large():
    usual, large = (
        lazy_config(name).dataloader
        for name in ("dino_R_50_4scale_12ep", "Objects365/dino_Swin_L_384_5scale_18ep_coco")
    )
    pairs = [(x.train.mapper.augmentations, x.test.mapper.augmentations[0]) for x in (usual, large)]
    for key in ("min_sizes", "crop_min_sizes", "crop_size"):
        assert list(pairs[1][0][key]) == [1.5 * x for x in pairs[0][0][key]]
    assert pairs[1][0].max_size == pairs[1][1].max_size == 2000
    assert pairs[1][1].short_edge_length == 1.5 * pairs[0][1].short_edge_length


@pytest.mark.no_cover
@pytest.mark.parametrize("name", BUILT)
def test_twins_build_the_same_model(name, on_meta_device):
    from_yaml, lazy = build_model(yaml_config(name)), instantiate(lazy_config(name).model)
    assert shapes(from_yaml) == shapes(lazy)
    assert trainable(from_yaml) == trainable(lazy)
    assert repr(from_yaml) == repr(lazy)
    assert dict(options(from_yaml)) == dict(options(lazy))


def options(part, name=""):
    """What a model and its parts were built with, by name, where `repr` may not tell."""
    yield name, type(part)
    for key, value in vars(part).items():
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = list(value)  # not a tuple or OmegaConf's list
        if isinstance(value, bool | int | float | str | list | dict | None):
            if not key.startswith("_"):
                yield f"{name}.{key}", repr(value)
        elif type(value).__module__.startswith("dino_d2"):
            yield from options(value, f"{name}.{key}")
    for key, value in getattr(part, "_modules", {}).items():
        if value is not None:
            yield from options(value, f"{name}.{key}")


@pytest.mark.parametrize("name", NAMES)
def test_twins_normalise_pixels_alike(name):
    cfg, lazy = yaml_config(name), lazy_config(name)
    assert list(cfg.MODEL.PIXEL_MEAN) == list(lazy.model.pixel_mean)
    assert list(cfg.MODEL.PIXEL_STD) == list(lazy.model.pixel_std)
    assert cfg.INPUT.FORMAT == lazy.dataloader.train.mapper.image_format
    assert cfg.INPUT.FORMAT == lazy.dataloader.test.mapper.image_format


@pytest.mark.parametrize("name", NAMES)
def test_twins_feed_the_same_data(name):
    cfg, lazy = yaml_config(name), lazy_config(name).dataloader
    assert list(cfg.DATASETS.TRAIN) == list(lazy.train.dataset.names)
    assert list(cfg.DATASETS.TEST) == list(lazy.test.dataset.names)
    assert cfg.SOLVER.IMS_PER_BATCH == lazy.train.total_batch_size
    assert cfg.DATALOADER.NUM_WORKERS == lazy.train.num_workers == lazy.test.num_workers
    assert not cfg.DATALOADER.ASPECT_RATIO_GROUPING and lazy.train._target_ is build_train_loader
    # so that Detectron2's tools/benchmark.py --task data takes it
    assert {*lazy.train} - {"_target_"} <= {*signature(DataLoaderBenchmark).parameters}
    assert cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS == lazy.train.dataset.filter_empty
    resize = lazy.test.mapper.augmentations[0]
    assert cfg.INPUT.MIN_SIZE_TEST == resize.short_edge_length
    assert cfg.INPUT.MAX_SIZE_TEST == resize.max_size
    augmentation = lazy.train.mapper.augmentations
    assert augmentation._target_ is detr_augmentation
    assert list(cfg.INPUT.MIN_SIZE_TRAIN) == list(augmentation.min_sizes)
    assert cfg.INPUT.MAX_SIZE_TRAIN == augmentation.max_size
    assert cfg.INPUT.RANDOM_FLIP == augmentation.flip
    assert list(cfg.INPUT.SCALE_JITTER) == list(augmentation.scale_jitter)
    assert cfg.INPUT.PHOTOMETRIC == augmentation.photometric
    assert cfg.INPUT.AUGMENTATIONS == augmentation.further
    assert cfg.INPUT.CROP.MIN_VISIBLE == lazy.train.mapper.min_visible == lazy.mixing.min_visible
    keys, mixing = cfg.INPUT.MIXING, lazy.mixing
    assert [keys.MOSAIC, keys.MIXUP, *keys.SPAN] == [mixing.mosaic, mixing.mixup, *mixing.span]
    assert cfg.INPUT.CROP.ENABLED == (augmentation.crop_size is not None)
    if cfg.INPUT.CROP.ENABLED:
        assert list(cfg.INPUT.CROP.SIZE) == list(augmentation.crop_size)
        assert list(cfg.INPUT.CROP.MIN_SIZE_TRAIN) == list(augmentation.crop_min_sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_twins_have_the_same_schedule(name, monkeypatch):
    monkeypatch.setattr("dino_d2.engine.evaluation.find_spec", lambda package: package)
    cfg, lazy = yaml_config(name), lazy_config(name)
    plan, twin = make_plan(cfg), make_plan(lazy)
    functions = {field for field in Plan._fields if callable(getattr(plan, field))}
    assert {"build_model", "build_optimizer", "evaluate"} < functions
    # a style's own types
    own = functions | {"train_sets", "test_sets", "max_to_keep", "ddp", "config"}
    compared = [field for field in Plan._fields if field not in own]
    assert [getattr(plan, x) for x in compared] == [getattr(twin, x) for x in compared]

    solver, train = cfg.SOLVER, lazy.train
    assert solver.REFERENCE_BATCH == train.reference_batch
    assert solver.EPOCHS == train.epochs
    assert solver.BASE_LR == lazy.optimizer.lr
    assert solver.WEIGHT_DECAY == lazy.optimizer.weight_decay
    assert solver.WEIGHT_DECAY_NORM == lazy.optimizer.params.norm_weight_decay
    assert solver.BACKBONE_MULTIPLIER == lazy.optimizer.params.backbone_multiplier
    assert solver.OFFSETS_MULTIPLIER == lazy.optimizer.params.offsets_multiplier
    assert solver.CLIP_GRADIENTS.CLIP_VALUE == lazy.optimizer.max_norm

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    multiplier = yaml_scheduler(cfg, optimizer)._multiplier
    for progress in (0.0, 0.001, 0.02, 0.5, 0.8, 0.84, 0.92, 0.99):
        lazily = instantiate(lazy.lr_multiplier)(progress)
        assert multiplier(progress) == pytest.approx(lazily, abs=1e-6)


def test_twins_give_every_parameter_the_same_learning_rate():
    multipliers = ("SOLVER.BACKBONE_MULTIPLIER", 0.5, "SOLVER.OFFSETS_MULTIPLIER", 0.1)
    cfg = yaml_config("quickstart", *multipliers)
    multipliers = ("backbone_multiplier=0.5", "offsets_multiplier=0.1")
    lazy = lazy_config("quickstart", *(f"optimizer.params.{x}" for x in multipliers))
    lazy.optimizer.params.model = model = instantiate(lazy.model)
    groups, lazily = (
        [(group["lr"], group["params"]) for group in optimizer.param_groups]
        for optimizer in (make_plan(cfg).build_optimizer(model), instantiate(lazy.optimizer))
    )
    assert sorted(lr for lr, _ in groups) == pytest.approx([1e-4, 5e-4, 1e-3])
    assert groups == lazily


def test_ablations_are_the_rows_of_the_paper(on_meta_device):
    n = "Ablations/dino_R_50_4scale_12ep_dn"
    dn, once, pure, static = (
        build_model(yaml_config(x)) for x in (n, f"{n}_once", f"{n}_once_pure", f"{n}_once_static")
    )
    assert all(type(x.denoising) is Denoising for x in (dn, once, pure, static))
    assert [x.decoder.look_forward for x in (dn, once, pure, static)] == [2, 1, 1, 1]
    assert type(pure.query_selection) is PureQuerySelection
    assert type(static.query_selection) is StaticQueries
    assert type(once.query_selection) is type(dn.query_selection)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("Ablations/")])
def test_an_ablation_changes_one_key(name):
    text = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    assert sum(not line.endswith(":") for line in text[1:]) == 1
    text = (CONFIGS / f"{name}.py").read_text().splitlines()
    assert sum(line.startswith("model.") for line in text) == 1


@pytest.mark.parametrize(
    ("name", "matcher", "class_loss", "denoising_class_loss", "weights"),
    [
        ("dino_R_50_4scale_12ep", HungarianMatcher, FocalLoss, FocalLoss, (1, 1)),
        ("dino_R_50_4scale_12ep_improved", HungarianMatcher, FocalLoss, FocalLoss, (2, 1)),
        (
            "IoUAware/dino_R_50_4scale_12ep_varifocal",
            HungarianMatcher,
            VarifocalLoss,
            VarifocalLoss,
            (1, 1),
        ),
        (
            "IoUAware/dino_R_50_4scale_12ep_position_supervised",
            PositionModulatedMatcher,
            PositionSupervisedLoss,
            FocalLoss,
            (6, 1),
        ),
        (
            "IoUAware/dino_R_50_4scale_12ep_align",
            HungarianMatcher,
            AlignLoss,
            AlignLoss,
            (1, 1),
        ),
        (
            "IoUAware/dino_R_50_4scale_12ep_matchability",
            HungarianMatcher,
            MatchabilityAwareLoss,
            MatchabilityAwareLoss,
            (1, 1),
        ),
    ],
)
def test_a_config_names_the_class_loss_and_the_matcher(
    name, matcher, class_loss, denoising_class_loss, weights, on_meta_device
):
    criterion = build_model(yaml_config(name)).criterion
    assert type(criterion.matcher) is matcher
    assert type(criterion.class_loss) is class_loss
    assert type(criterion.denoising_class_loss) is denoising_class_loss
    parts = criterion.weights, criterion.denoising_weights
    assert tuple(part["loss_class"] for part in parts) == weights
    assert all((part["loss_bbox"], part["loss_giou"]) == (5, 2) for part in parts)
    costs = "class_cost", "bbox_cost", "giou_cost"
    assert [getattr(criterion.matcher, cost) for cost in costs] == [2, 5, 2]


def test_the_improved_recipe_is_that_of_detrex_and_mmdetection(on_meta_device):
    name = "dino_R_50_4scale_12ep_improved"
    cfg, lazy = yaml_config(name), lazy_config(name)
    assert (cfg.SOLVER.BASE_LR, lazy.optimizer.lr) == (2e-4, 2e-4)
    for key in ("backbone_multiplier", "offsets_multiplier"):
        assert cfg.SOLVER[key.upper()] == lazy.optimizer.params[key] == 0.1
    assert cfg.SOLVER.EMA.ENABLED is lazy.train.ema.enabled is True
    model = build_model(cfg)
    assert model.denoising.budget == 300
    assert all(parameter.requires_grad for parameter in model.parameters())  # norms have buffers


@pytest.mark.parametrize(
    ("key", "name", "hint"),
    [
        ("LOSS.CLASS_LOSS", "VariFocalLoss", "did you mean: VarifocalLoss"),
        ("LOSS.DENOISING_CLASS_LOSS", "Focal", "did you mean: FocalLoss"),
        ("LOSS.CLASS_LOSS", "", "available: AlignLoss, FocalLoss, MatchabilityAwareLoss, Pos"),
        ("MATCHER.NAME", "PositionModulated", "did you mean: PositionModulatedMatcher"),
        ("QUERY_SELECTION", "MixedSelection", "did you mean: MixedQuerySelection"),
        ("DENOISING.NAME", "ContrastiveDenoise", "did you mean: ContrastiveDenoising"),
        ("CRITERION", "MixedMatch", "did you mean: MixedMatching"),
    ],
)
def test_an_unknown_part_is_answered_with_the_nearest(key, name, hint, on_meta_device):
    cfg = yaml_config("dino_R_50_4scale_12ep", f"MODEL.DINO.{key}", name)
    message = f"MODEL.DINO.{key} is {name!r}, which is unknown; {hint}"
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_the_number_of_classes_comes_from_the_training_data(on_meta_device):
    cfg = model_zoo.get_config("dino_R_50_4scale_12ep")
    cfg.MODEL.DEVICE = "meta"
    lazy = model_zoo.get_config("dino_R_50_4scale_12ep.py")
    assert build_model(cfg).num_classes == instantiate(lazy.model).num_classes == 80


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.denoising=null", lambda model: model.denoising is None),
        ("model.decoder.look_forward=1", lambda model: model.decoder.look_forward == 1),
        ("model.decoder.shared_heads=False", lambda model: len(model.decoder.class_heads) == 6),
        (
            "model.query_selection._target_=dino_d2.modeling.StaticQueries",
            lambda model: type(model.query_selection) is StaticQueries,
        ),
        ("model.encoder.embed_dim=128", lambda model: model.decoder.norm.weight.shape == (128,)),
        ("model.num_classes=7", lambda model: model.decoder.class_heads[0].out_features == 7),
        (
            "model.criterion.class_loss._target_=dino_d2.modeling.AlignLoss",
            lambda model: type(model.criterion.class_loss) is AlignLoss,
        ),
        (
            "model.criterion.denoising_class_weight=3",
            lambda model: model.criterion.denoising_weights["loss_class"] == 3,
        ),
        (
            "model.encoder.position_temperature=10000.0",
            lambda model: model.encoder.position_temperature == 10000,
        ),
        (
            "model.encoder.position_offset=-0.5",
            lambda model: model.encoder.position_offset == -0.5,
        ),
    ],
)
def test_a_lazy_override_changes_the_model(override, expected, on_meta_device):
    changed = instantiate(lazy_config("dino_R_50_4scale_12ep", override).model)
    assert expected(changed) and not expected(model_of("py"))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("DENOISING.NAME", "", lambda model: model.denoising is None),
        ("LOOK_FORWARD", 1, lambda model: model.decoder.look_forward == 1),
        ("SHARED_HEADS", False, lambda model: len(model.decoder.class_heads) == 6),
        (
            "QUERY_SELECTION",
            "StaticQueries",
            lambda model: type(model.query_selection) is StaticQueries,
        ),
        ("EMBED_DIM", 128, lambda model: model.decoder.norm.weight.shape == (128,)),
        ("NUM_CLASSES", 7, lambda model: model.decoder.class_heads[0].out_features == 7),
        ("LOOK_FORWARD", 0, lambda model: model.decoder.look_forward == 0),
        (
            "POSITION_TEMPERATURE",
            10000.0,
            lambda model: model.encoder.position_temperature == 10000,
        ),
        ("POSITION_OFFSET", -0.5, lambda model: model.encoder.position_offset == -0.5),
    ],
)
def test_a_yaml_override_changes_the_model(key, value, expected, on_meta_device):
    changed = build_model(yaml_config("dino_R_50_4scale_12ep", f"MODEL.DINO.{key}", value))
    assert expected(changed) and not expected(model_of("yaml"))


def test_a_name_without_suffix_is_the_yaml_twin():
    assert model_zoo.get_config_file("quickstart") == str(CONFIGS / "quickstart.yaml")


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(FileNotFoundError, match="did you mean: dino_R_50_4scale_12ep,"):
        model_zoo.get_config("dino_R50_4scale_12ep")


def test_the_keys_are_added_to_any_config():
    cfg = get_cfg()
    add_dino_config(cfg)
    assert cfg.MODEL.DINO.NUM_QUERIES == 900
