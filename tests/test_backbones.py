"""ViTDet, and models of timm as backbones: shapes, padding, a training step with each, mistakes."""

import sys
from functools import partial

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model

from dino_d2.modeling.backbones import (
    BackboneError,
    TimmBackbone,
    ViT,
    ViTDet,
    feature_shapes,
)
from dino_d2.modeling.dino import padding_mask
from dino_d2.weights import model_zoo

SMALL = [
    *("model.encoder.embed_dim=64", "model.encoder.num_heads=2", "model.encoder.ffn_dim=32"),
    *("model.encoder.num_layers=1", "model.decoder.num_layers=1", "model.denoising.budget=2"),
    *("model.query_selection.num_queries=10", "model.num_classes=3"),
]
SMALL_YAML = [
    *("MODEL.DINO.EMBED_DIM", 64, "MODEL.DINO.NUM_HEADS", 2, "MODEL.DINO.FFN_DIM", 32),
    *("MODEL.DINO.ENCODER_LAYERS", 1, "MODEL.DINO.DECODER_LAYERS", 1),
    *("MODEL.DINO.NUM_QUERIES", 10, "MODEL.DINO.NUM_CLASSES", 3, "MODEL.DEVICE", "cpu"),
]
# Of every kind one that is built and run in a moment, and what makes it that small.
TIMM = {
    "test_convnext": {},
    "test_resnet": {},
    "test_efficientnet": {},
    "regnetx_002": {},
    "pvt_v2_b0": {"depths": [1, 1, 1, 1]},
    "swin_tiny_patch4_window7_224": {
        "depths": [1, 1, 2, 1],
        "embed_dim": 16,
        "num_heads": [1, 2, 2, 4],
        "window_size": 4,
        "strict_img_size": False,
    },
}
QUICK = ["test_convnext", "swin_tiny_patch4_window7_224"]
FEW = [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in TIMM]
VITDET = [
    *("model.backbone.net.embed_dim=32", "model.backbone.net.num_heads=2"),
    *("model.backbone.net.depth=2", "model.backbone.net.window_block_indexes=[0]"),
    *("model.backbone.net.window_size=3", "model.backbone.net.img_size=64"),
    "model.backbone.out_channels=32",
]


def make_cfg(config, *overrides):
    return LazyConfig.apply_overrides(model_zoo.get_config(f"{config}.py"), [*SMALL, *overrides])


def timm_cfg(name, *overrides):
    cfg = make_cfg("dino_ConvNeXt_T_384_4scale_12ep", f"model.backbone.name={name}", *overrides)
    cfg.model.backbone.options = {"drop_path_rate": 0.1, **TIMM[name]}
    return cfg


def train_one_step(cfg, batch):
    """Every parameter has a gradient, and the backbone learns; returns the model."""
    cfg.optimizer.params.model = model = instantiate(cfg.model)
    for name, x in model.backbone.named_parameters():
        if name.endswith(
            ".bias"
        ):  # as trained: without any, padding is a vector of zeros for the norms
            torch.nn.init.normal_(x, std=0.02)
    optimizer = instantiate(cfg.optimizer)
    before = {name: x.detach().clone() for name, x in model.backbone.named_parameters()}
    losses = model(batch)
    sum(losses.values()).backward()
    assert all(x.isfinite() for x in losses.values())
    assert [name for name, x in model.named_parameters() if x.grad is None] == []
    assert all(x.grad.isfinite().all() for x in model.parameters())
    optimizer.step()
    learned = model.backbone.named_parameters()
    assert any(not torch.equal(x, before[name]) for name, x in learned)
    return model


ODD = [(97, 131), (64, 70)]


@pytest.mark.parametrize("name", FEW)
def test_dino_learns_with_a_model_of_timm_on_images_of_any_size(name, make_batch):
    model = train_one_step(timm_cfg(name), make_batch(2, 0, sizes=ODD))
    with torch.no_grad():
        results = model.eval()(make_batch(0, 0, sizes=ODD))
    assert [x["instances"].image_size for x in results] == ODD


@pytest.mark.slow
@pytest.mark.parametrize("config", ["dino_ConvNeXt_T_384_4scale_12ep", "dino_ViTDet_B_4scale_12ep"])
def test_a_backbone_computed_again_learns_the_same(config, make_batch):
    small = {"C": ["model.backbone.name=test_convnext"], "V": VITDET}[config[5]]
    batch, gradients = make_batch(2, 1, sizes=ODD), []
    for stages in ("[]", "[backbone]"):
        torch.manual_seed(0)
        model = instantiate(
            make_cfg(config, *small, f"model.activation_checkpointing={stages}").model
        )
        torch.manual_seed(1)  # which paths are dropped, what is noised
        sum(model(batch).values()).backward()
        gradients.append({name: x.grad for name, x in model.backbone.named_parameters()})
    kept, again = gradients
    assert [name for name, x in kept.items() if not torch.equal(x, again[name])] == []


@pytest.mark.parametrize("name", FEW)
def test_maps_of_timm_are_those_that_are_announced(name):
    backbone = TimmBackbone(name=name, options=TIMM[name], out_features=["p5", "p2"])
    features = backbone(torch.zeros(2, 3, 64, 96))
    assert list(features) == list(backbone.output_shape()) == ["p2", "p5"]
    shapes = feature_shapes(name, TIMM[name])
    for (key, shape), stride in zip(backbone.output_shape().items(), (4, 32), strict=True):
        assert features[key].shape == (2, shape.channels, 64 // stride, 96 // stride)
        assert (shape.channels, shape.stride) == (shapes[key].channels, stride)


def test_all_parameters_of_timm_are_used_by_what_is_asked_for():
    coarse = TimmBackbone(name="test_resnet", out_features=["p4"])
    coarse(torch.zeros(1, 3, 32, 32))["p4"].sum().backward()
    assert all(x.grad is not None for x in coarse.parameters())


def test_norms_are_over_the_channels_of_each_map():
    image, options = torch.rand(1, 3, 32, 64), {"name": "test_convnext", "out_features": ["p3"]}
    torch.manual_seed(0)
    plain = TimmBackbone(**options)(image)["p3"]
    torch.manual_seed(0)
    normed = TimmBackbone(**options, norm=True)(image)["p3"]
    expected = (plain - plain.mean(1, True)) / (
        plain.var(1, correction=0, keepdim=True) + 1e-6
    ) ** 0.5
    assert torch.allclose(normed, expected, atol=1e-5)


def test_the_neck_takes_the_channels_of_whatever_model_is_named():
    model = instantiate(
        make_cfg("dino_FocalNet_T_4scale_12ep", "model.backbone.name=test_resnet").model
    )
    channels = [x.channels for x in model.backbone.output_shape().values()]
    assert [projection[0].in_channels for projection in model.neck.projections] == channels


def test_the_neck_takes_the_channels_that_an_option_changes():
    """Of the command line, as a list is there."""
    small = [f"+model.backbone.options.{x}" for x in ("dims=[8,12,16,24]", "depths=[1,1,1,1]")]
    model = instantiate(make_cfg("dino_ConvNeXt_T_384_4scale_12ep", *small).model)
    assert [projection[0].in_channels for projection in model.neck.projections] == [12, 16, 24]
    model.neck(model.backbone(torch.zeros(1, 3, 64, 64)))


def test_yaml_names_a_model_of_timm_and_its_options(make_batch):
    cfg = model_zoo.get_config("dino_FocalNet_T_4scale_12ep")
    assert cfg.MODEL.TIMM.OPTIONS == {"drop_path_rate": 0.1}
    cfg.merge_from_list([*SMALL_YAML, "MODEL.TIMM.NAME", "test_convnext"])
    cfg.merge_from_list(["MODEL.TIMM.OPTIONS.drop_path_rate", "0.5"])
    model = build_model(cfg)
    rates = [x.drop_prob for x in model.backbone.modules() if hasattr(x, "drop_prob")]
    assert max(rates) == 0.5 and len(model.backbone.norms) == 3
    sum(model(make_batch(1)).values()).backward()


# ---- ViTDet


def test_dino_learns_with_vitdet_on_images_of_any_size(make_batch):
    cfg = make_cfg("dino_ViTDet_B_4scale_12ep", *VITDET)
    model = train_one_step(cfg, make_batch(2, 0, sizes=ODD))
    with torch.no_grad():
        found = model.neck(model.backbone(torch.zeros(1, 3, 96, 160)))
    # strides 8, 16, 32 and 64, rounded up: the last one takes every second token
    assert [tuple(x.shape[-2:]) for x in found] == [(12, 20), (6, 10), (3, 5), (2, 3)]


@pytest.mark.parametrize(
    ("square", "expected"), [(0, (128, 160)), (160, (160, 160)), (150, (160, 160))]
)
def test_vitdet_pads_images_and_masks_what_is_padded(square, expected, make_batch):
    cfg = make_cfg("dino_ViTDet_B_4scale_12ep", *VITDET, f"+model.backbone.square_pad={square}")
    model = instantiate(cfg.model)
    images = model.preprocess_images(make_batch(0, 0, sizes=ODD))
    mask = padding_mask(images)
    assert images.tensor.shape[-2:] == mask.shape[1:] == expected
    for (height, width), padded in zip(ODD, mask, strict=True):
        assert padded.logical_not().sum() == height * width and not padded[:height, :width].any()


def test_images_for_timm_are_padded_to_the_coarsest_stride(make_batch):
    model = instantiate(timm_cfg("test_convnext", "model.backbone.out_features=[p3,p4]").model)
    assert model.preprocess_images(make_batch(0, 0, sizes=ODD)).tensor.shape[-2:] == (112, 144)


def test_blocks_of_vitdet_within_windows_see_nothing_beyond():
    options = {"embed_dim": 32, "num_heads": 2, "depth": 1, "img_size": 64, "window_size": 2}
    for windows, others_change in (([0], False), ([], True)):
        vit = ViT(**options, window_block_indexes=windows).eval()
        image = torch.rand(1, 3, 64, 64)
        changed = image.clone()
        changed[..., :16, :16] = 0  # one token of the first window
        before, after = (vit(x)["last_feat"] for x in (image, changed))
        beyond = (before != after)[..., 2:, 2:]
        assert beyond.any() == others_change


def test_the_large_vitdet_attends_to_all_of_the_image_in_four_blocks():
    net = model_zoo.get_config("dino_ViTDet_L_4scale_12ep.py").model.backbone.net
    assert sorted({*range(net.depth)} - {*net.window_block_indexes}) == [5, 11, 17, 23]


# ---- the sizes of the papers


SIZES = {  # in millions, of the papers' classifiers without the classifier
    "dino_ConvNeXt_T_384_4scale_12ep": 28.6 - 0.77,
    "dino_FocalNet_T_4scale_12ep": 28.6 - 0.77,
    "dino_ViTDet_B_4scale_12ep": 86 + 3,  # and the pyramid
}


@pytest.mark.parametrize("config", SIZES)
def test_backbones_have_the_papers_sizes(config, monkeypatch):
    monkeypatch.setattr(
        torch, "linspace", partial(torch.linspace, device="cpu")
    )  # rates of dropping
    with torch.device("meta"):
        backbone = instantiate(make_cfg(config).model.backbone)
    parameters = sum(x.numel() for x in backbone.parameters())
    assert parameters / 1e6 == pytest.approx(SIZES[config], rel=0.03)


@pytest.mark.nightly
@pytest.mark.parametrize("config", SIZES)
def test_dino_learns_with_backbones_of_the_papers_sizes(config, make_batch):
    train_one_step(make_cfg(config), make_batch(1, 0, sizes=[(64, 70), (64, 64)]))


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "convnext_tinny"}, "no model 'convnext_tinny'; did you mean: convnext_tiny"),
        ({"name": ""}, "no model ''; available: "),
        (
            {"name": "test_convnext", "out_features": ["res3"]},
            "timm's test_convnext has no feature map 'res3'; it has p2, p3, p4, p5",
        ),
        ({"name": "test_vit"}, "has no feature map 'p3'; it has p4$"),
        ({"name": "swin_tiny_patch4_window7_224"}, "images of a single size.*strict_img_size"),
        ({"name": "hiera_tiny_224"}, "images of a single size.*another model"),
    ],
)
def test_what_timm_does_not_have_is_said(options, sentence):
    with torch.device("meta"), pytest.raises(BackboneError, match=sentence):
        TimmBackbone(**options)


@pytest.mark.parametrize(
    "build", [lambda: TimmBackbone(name="test_convnext"), ViT, lambda: feature_shapes("test_vit")]
)
def test_without_timm_the_sentence_says_what_to_install(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BackboneError, match="pip install timm"):
        build()


def test_vitdet_announces_its_maps():
    vit = ViT(embed_dim=32, num_heads=2, depth=1, img_size=64)
    pyramid = ViTDet(vit, "last_feat", 32, [2.0, 1.0, 0.5])
    features = pyramid(torch.zeros(1, 3, 64, 96))
    assert pyramid.size_divisibility == 32
    for key, shape in pyramid.output_shape().items():
        assert features[key].shape == (1, 32, 64 // shape.stride, 96 // shape.stride)
