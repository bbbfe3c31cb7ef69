"""ImageNet weights of a backbone alone, by their authors' names, reach every tensor of ours."""

import logging
import re
import sys
from functools import partial

import layouts
import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.config import instantiate

from dino_d2.layouts.adapt import resize_windows
from dino_d2.layouts.backbones import (
    convnext_of_timm,
    focalnet_of_timm,
    from_convnext,
    from_model_zoo,
    from_timm,
    from_torchvision,
)
from dino_d2.layouts.dino import detect_format, from_detrex
from dino_d2.layouts.renaming import CheckpointError, move
from dino_d2.modeling.backbones import TimmBackbone, ViT, ViTDet
from dino_d2.modeling.swin import SwinTransformer
from dino_d2.weights import model_zoo
from dino_d2.weights.checkpointer import Checkpointer
from dino_d2.weights.files import read

timm = pytest.importorskip("timm")


@pytest.fixture
def load(make_dino, tmp_path, monkeypatch, caplog):
    """Loads a file with the given content into a detector with the given backbone; returns what
    the log says."""
    monkeypatch.setattr(logging.getLogger("dino_d2"), "propagate", True)
    caplog.set_level(logging.INFO, "dino_d2")

    def run(backbone, content):
        model = make_dino()
        model.backbone = backbone
        torch.save(content, tmp_path / "weights.pth")
        Checkpointer(model).load(str(tmp_path / "weights.pth"))
        return caplog.text

    return run


# ---- torchvision and Detectron2's model zoo


def test_a_resnet_of_torchvision_fills_the_backbone():
    given = torchvision.models.resnet18().state_dict()
    backbone = from_torchvision(given)
    # 20 convolutions with weight, bias, mean and variance of their norms; fc and counters are not
    assert detect_format(given) == "torchvision" and len(backbone) == 20 * 5
    cfg = model_zoo.get_config("quickstart.py")
    cfg.model.backbone.out_features = ["res5"]
    ours = instantiate(cfg.model.backbone).state_dict()
    assert {key: x.shape for key, x in backbone.items()} == {
        f"backbone.{key}": x.shape for key, x in ours.items() if "num_batches" not in key
    }


def test_a_detector_of_the_model_zoo_gives_its_backbone_alone():
    given = {
        "backbone.bottom_up.res2.0.conv1.weight": torch.rand(1),
        "backbone.fpn_lateral3.weight": torch.rand(1),
        "roi_heads.box_head.fc1.weight": torch.rand(1),
    }
    assert detect_format(given) == "model_zoo"
    expected = {"backbone.res2.0.conv1.weight": given["backbone.bottom_up.res2.0.conv1.weight"]}
    assert from_model_zoo(given) == expected


# ---- timm

SWIN = {
    "depths": [1, 1, 2, 1],
    "embed_dim": 16,
    "num_heads": [1, 2, 2, 4],
    "window_size": 4,
    "strict_img_size": False,
}
QUICK = ["test_convnext", "test_resnet"]
TIMM = {
    "test_convnext": {},  # flattened: stages.0 becomes stages_0
    "test_resnet": {},  # torchvision's names
    "test_efficientnet": {},  # features are its own class
    "swin_tiny_patch4_window7_224": SWIN,
    "pvt_v2_b0": {"depths": [1, 1, 1, 1]},
}


@pytest.mark.parametrize(
    "name", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in TIMM]
)
def test_a_classifier_of_timm_fills_the_backbone(name, load):
    classifier = timm.create_model(name, **TIMM[name])
    for x in classifier.state_dict().values():
        x.copy_(torch.rand(x.shape).to(x.dtype) + 1)  # unlike any initial value
    backbone = TimmBackbone(name=name, options=TIMM[name])
    said = load(backbone, classifier.state_dict())
    given = {key.replace("_", "."): x for key, x in classifier.state_dict().items()}
    for key, x in backbone.state_dict().items():
        assert torch.equal(x, given[key.removeprefix("net.").replace("_", ".")]), key
    assert f"{len(backbone.state_dict())} of " in said


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet"])
def test_the_coarsest_map_is_what_the_classifier_of_timm_sees(name, load):
    classifier, image = timm.create_model(name).eval(), torch.rand(1, 3, 64, 96)
    backbone = TimmBackbone(name=name).eval()
    load(backbone, {"state_dict": classifier.state_dict()})
    assert torch.allclose(backbone(image)["p5"], classifier.forward_features(image), atol=1e-6)


def test_names_that_differ_in_dots_and_underscores_are_the_same_to_timm():
    state = {"stem.0.weight": torch.rand(1), "head.fc.bias": torch.rand(1)}
    names = ["backbone.net.stem_0.weight", "backbone.norms.p3.weight"]
    assert list(from_timm(state, names)) == ["backbone.net.stem_0.weight", "head.fc.bias"]
    assert list(from_timm(state, ["backbone.net.model.stem.0.weight"]))[0].startswith("backbone")


def test_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file

    state = {"stem.0.weight": torch.rand(2, 3)}
    save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(read(str(tmp_path / "model.safetensors"))["stem.0.weight"], *state.values())


def test_without_safetensors_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        read(str(tmp_path / "model.safetensors"))


# ---- ConvNeXt by its authors' names

CONVNEXT = {"depths": [1, 2, 1, 1], "dims": [8, 12, 16, 24]}


def convnext_state(depths=CONVNEXT["depths"], dims=CONVNEXT["dims"]):
    """Random weights of a ConvNeXt, with its authors' names."""
    state, before = {}, 3
    for i, (depth, width) in enumerate(zip(depths, dims, strict=True)):
        kernel, (conv, norm) = (2, (1, 0)) if i else (4, (0, 1))  # the stem's norm comes after
        down = f"downsample_layers.{i}"
        state |= linear(f"{down}.{conv}", width, before, kernel, kernel)
        state |= linear(f"{down}.{norm}", before if i else width)
        for j in range(depth):
            block = f"stages.{i}.{j}"
            state |= linear(f"{block}.dwconv", width, 1, 7, 7) | linear(f"{block}.norm", width)
            state |= linear(f"{block}.pwconv1", 4 * width, width)
            state |= linear(f"{block}.pwconv2", width, 4 * width)
            state[f"{block}.gamma"] = torch.rand(width)
        before = width
    return state


def linear(name, *shape):
    return {f"{name}.weight": 0.3 * torch.randn(shape), f"{name}.bias": torch.rand(shape[0])}


def convnext(state, x):
    """The feature maps of those weights: section 2 of the paper, written down."""

    def parameters(name):
        return state[f"{name}.weight"], state[f"{name}.bias"]

    def norm(x, name):
        x = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], *parameters(name), eps=1e-6)
        return x.permute(0, 3, 1, 2)

    features = {}
    for i, depth in enumerate(CONVNEXT["depths"]):
        down = f"downsample_layers.{i}"
        if i == 0:
            x = norm(F.conv2d(x, *parameters(f"{down}.0"), stride=4), f"{down}.1")
        else:
            x = F.conv2d(norm(x, f"{down}.0"), *parameters(f"{down}.1"), stride=2)
        for block in (f"stages.{i}.{j}" for j in range(depth)):
            inner = F.conv2d(x, *parameters(f"{block}.dwconv"), padding=3, groups=x.shape[1])
            inner = norm(inner, f"{block}.norm").permute(0, 2, 3, 1)
            inner = F.gelu(F.linear(inner, *parameters(f"{block}.pwconv1")))
            inner = state[f"{block}.gamma"] * F.linear(inner, *parameters(f"{block}.pwconv2"))
            x = x + inner.permute(0, 3, 1, 2)
        features[f"p{i + 2}"] = norm(x, f"norm{i}") if f"norm{i}.bias" in state else x
    return features


def test_a_convnext_by_its_authors_names_computes_the_same(load):
    state, image = convnext_state(), torch.rand(1, 3, 64, 96)
    backbone = TimmBackbone(name="convnext_tiny", options=CONVNEXT).eval()
    said = load(backbone, {"model": state | linear("norm", 24) | linear("head", 1000, 24)})
    assert f"{len(state)} of " in said and "(convnext)" in said and " 0 were not expected" in said
    expected = convnext(state, image)
    for key, x in backbone(image).items():
        assert torch.allclose(x, expected[key], rtol=1e-4, atol=1e-4), key


def test_a_convnext_in_a_detector_of_detrex_computes_the_same():
    """With its norms of the features, which come after the stages."""
    state, image = convnext_state(), torch.rand(1, 3, 64, 96)
    for i in (1, 2, 3):
        state |= linear(f"norm{i}", CONVNEXT["dims"][i])
    converted = from_detrex({f"backbone.{key}": x for key, x in state.items()})
    backbone = TimmBackbone(name="convnext_tiny", options=CONVNEXT, norm=True).eval()
    backbone.load_state_dict({k.removeprefix("backbone."): x for k, x in converted.items()})
    expected = convnext(state, image)
    for key, x in backbone(image).items():
        assert torch.allclose(x, expected[key], rtol=1e-4, atol=1e-4), key


def test_the_classifier_of_a_convnext_is_left_out():
    state = convnext_state()
    assert detect_format(state) == "convnext"
    assert len(from_convnext(state | linear("norm", 24) | linear("head", 5, 24))) == len(state)


def test_the_norms_of_a_swin_transformer_are_not_taken_for_those_of_a_convnext():
    state = {"backbone.norm1.weight": torch.rand(1)}
    assert convnext_of_timm(state) == state


# ---- FocalNet in a detector of detrex


def tiny_focalnet_large(pretrained=False, **options):
    """A FocalNet-L but for its size, of which timm has no option."""
    from timm.models.focalnet import _create_focalnet

    sizes = {"embed_dim": 8, "depths": [1, 2, 1, 1], "focal_levels": [3] * 4}
    sizes |= {"focal_windows": [5] * 4, "use_overlap_down": True}
    norms = {"use_post_norm": True, "layerscale_value": 1e-4}
    return _create_focalnet("focalnet_large_fl3", pretrained, **sizes, **norms, **options)


def test_a_focalnet_of_detrex_computes_what_timm_makes_of_its_authors_weights():
    from timm.models.focalnet import checkpoint_filter_fn

    timm.models.register_model(tiny_focalnet_large)
    name = "tiny_focalnet_large"
    backbone = TimmBackbone(name=name, out_features=("p2", "p5"), norm=True).eval()
    small = {"num_classes": 0}
    theirs = {}
    for key, x in timm.create_model(name, **small).state_dict().items():
        key = key.replace("stem", "patch_embed").replace("_post", "")
        key = re.sub(r"(?<=layers\.)(\d)(?=\.downsample)", lambda m: str(int(m[1]) - 1), key)
        key = re.sub(r"ls(\d)\.gamma", r"gamma_\1", key)
        is_linear = re.search(r"(modulation\.(f|proj)|mlp\.fc\d)\.weight", key)
        theirs[key] = torch.randn(x.shape[:2] if is_linear else x.shape) / 4
    del theirs["norm.weight"], theirs["norm.bias"]  # before the classifier
    norms = {f"norm{i}.{k}": torch.rand(8 * 2**i) for i in (0, 3) for k in ("weight", "bias")}
    state = {f"backbone.{key}": x for key, x in (theirs | norms).items()}
    backbone.load_state_dict(move(focalnet_of_timm(state), "backbone.", ""))

    expected = timm.create_model(name, **small).eval()
    expected.load_state_dict(checkpoint_filter_fn(theirs, expected), strict=False)
    image = torch.rand(1, 3, 64, 96)
    maps = expected.forward_intermediates(image, intermediates_only=True)
    for i, found in zip((0, 3), backbone(image).values(), strict=True):
        x = maps[i].permute(0, 2, 3, 1)
        affine = norms[f"norm{i}.weight"], norms[f"norm{i}.bias"]
        normed = F.layer_norm(x, x.shape[-1:], *affine, eps=1e-6)
        assert torch.allclose(found.permute(0, 2, 3, 1), normed, rtol=1e-4, atol=1e-4)


# ---- Swin transformers


def swin(window):
    sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "out_indices": [1]}
    return SwinTransformer(**sizes, window_size=window, drop_path_rate=0.0)


TABLE = "layers.1.blocks.0.attn.relative_position_bias_table"


@pytest.mark.parametrize("layout", ["authors", "ours"])
def test_weights_for_other_windows_are_interpolated(layout, load, make_dino):
    trained, model = swin(4), make_dino()
    for x in trained.parameters():
        torch.nn.init.normal_(x)
    model.backbone = trained
    content = {"authors": trained, "ours": model}[layout].state_dict()
    grown = swin(7)
    own_index = grown.layers[1].blocks[0].attn.relative_position_index.clone()
    said = load(grown, {"model": content})
    assert "windows of 4 x 4, that of the model has 7 x 7: 2 position biases are interp" in said
    table = grown.state_dict()[TABLE].reshape(13, 13, 2)
    before = trained.state_dict()[TABLE].reshape(7, 7, 2)
    # of the same offset, none, is the middle; the corners are the farthest in both
    assert torch.allclose(table[6, 6], before[3, 3], atol=1e-6)
    assert torch.equal(grown.layers[1].blocks[0].attn.relative_position_index, own_index)


@pytest.mark.parametrize("layout", ["authors", "ours"])
def test_interpolated_weights_are_not_complete(layout, make_dino, tmp_path):
    """With those of the same windows the detector is."""
    trained, model = make_dino(), make_dino()
    trained.backbone, model.backbone = swin(4), swin(7)
    file = str(tmp_path / "weights.pth")
    content = {"authors": trained.backbone, "ours": trained}[layout].state_dict()
    torch.save({"model": content}, file)
    with pytest.raises(CheckpointError, match="windows of 4 x 4.* 7 x 7: set .*window_size to 4"):
        Checkpointer(model, complete=True).load(file)
    if layout == "ours":
        Checkpointer(trained, complete=True).load(file)


def test_a_bias_that_grows_with_the_offset_still_does():
    ramp = torch.arange(7.0).repeat_interleave(7)[:, None].repeat(1, 3)  # (7 * 7, 3 heads)
    state, windows = resize_windows({TABLE: ramp}, {TABLE: torch.zeros(15 * 15, 3)})
    rows = state[TABLE].reshape(15, 15, 3)
    assert windows == {TABLE: (4, 8)}
    # pixels of 7/15: the centre of row i is at (i + 0.5) * 7 / 15 - 0.5, but at the borders
    expected = (torch.arange(15) + 0.5) * 7 / 15 - 0.5
    assert torch.allclose(rows[2:13, 0, 0], expected[2:13], atol=0.1)  # cubic, not linear
    assert (rows.diff(dim=0) > 0).all()
    assert torch.allclose(rows[:, :1], rows, atol=1e-5)  # across it nothing changes


def test_what_is_of_the_same_size_or_of_another_kind_is_not_resized():
    state = {TABLE: torch.rand(49, 3), "layers.0.weight": torch.rand(4, 4)}
    same = {TABLE: torch.zeros(49, 3), "layers.0.weight": torch.zeros(9, 9)}
    resized, windows = resize_windows(state, same)
    assert all(x is state[key] for key, x in resized.items()) and not windows
    resized, windows = resize_windows(state, {TABLE: torch.zeros(81, 4)})  # other heads
    assert resized[TABLE] is state[TABLE] and not windows


@pytest.mark.parametrize(
    ("before", "now"), [(13 * 27, 13 * 13), (15 * 15, 15 * 31)], ids=["from", "to"]
)
def test_biases_of_windows_that_are_not_square_stay_as_they_are(before, now):
    table = torch.rand(before, 3)
    resized, windows = resize_windows({TABLE: table}, {TABLE: torch.zeros(now, 3)})
    assert resized[TABLE] is table and not windows


# ---- ViT


def test_a_masked_autoencoder_fills_the_vit_of_vitdet(load):
    vit = ViT(embed_dim=32, num_heads=2, depth=2, img_size=64, use_rel_pos=True)
    pyramid = ViTDet(vit, "last_feat", 48, [2.0, 1.0, 0.5])
    state = {"cls_token": torch.rand(1, 1, 32), "pos_embed": torch.rand(1, 1 + 14 * 14, 32)}
    state |= linear("patch_embed.proj", 32, 3, 16, 16) | linear("norm", 32)
    for block in ("blocks.0", "blocks.1"):
        state |= linear(f"{block}.norm1", 32) | linear(f"{block}.norm2", 32)
        state |= linear(f"{block}.attn.qkv", 96, 32) | linear(f"{block}.attn.proj", 32, 32)
        state |= linear(f"{block}.mlp.fc1", 128, 32) | linear(f"{block}.mlp.fc2", 32, 128)
    neck = {key: x.clone() for key, x in pyramid.state_dict().items() if "simfp" in key}
    said = load(pyramid, {"model": state})
    assert f"{len(state) - 3} of " in said and "3 were not expected" in said
    for key, x in vit.state_dict().items():
        assert "rel_pos" in key or torch.equal(x, state[key]), key
    assert all(torch.equal(pyramid.state_dict()[key], x) for key, x in neck.items())


# ---- the detectors of detrex


def vitdet_state(dim=768, depth=12):
    """A ViTDet by the names of Detectron2, whose classes detrex takes; four blocks see it all."""
    state = {"net.pos_embed": torch.rand(1, 1 + 14 * 14, dim)}
    state |= linear("net.patch_embed.proj", dim, 3, 16, 16)
    for i in range(depth):
        block, offsets = f"net.blocks.{i}", 2 * (64 if i % 3 == 2 else 14) - 1
        state |= linear(f"{block}.norm1", dim) | linear(f"{block}.norm2", dim)
        state |= linear(f"{block}.attn.qkv", 3 * dim, dim)
        state |= linear(f"{block}.attn.proj", dim, dim)
        state |= {f"{block}.attn.rel_pos_{x}": torch.rand(offsets, 64) for x in "hw"}
        state |= linear(f"{block}.mlp.fc1", 4 * dim, dim) | linear(f"{block}.mlp.fc2", dim, 4 * dim)
    # twice, once and half as large: a transposed convolution, nothing, a max pooling come before
    before = {"simfp_3": (1, dim // 2), "simfp_4": (0, dim), "simfp_5": (1, dim)}
    for name, (first, width) in before.items():
        for i, shape in enumerate([(256, width, 1, 1), (256, 256, 3, 3)], start=first):
            state[f"{name}.{i}.weight"] = torch.rand(shape)
            state |= linear(f"{name}.{i}.norm", 256)
    upsampling = {"weight": torch.rand(dim, dim // 2, 2, 2), "bias": torch.rand(dim // 2)}
    return state | {f"simfp_3.0.{key}": x for key, x in upsampling.items()}


def convnext_of_detrex():
    state = convnext_state([3, 3, 9, 3], [96, 192, 384, 768])
    return state | linear("norm1", 192) | linear("norm2", 384) | linear("norm3", 768)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backbone"), [("ConvNeXt_T_384", convnext_of_detrex), ("ViTDet_B", vitdet_state)]
)
def test_a_detector_of_detrex_has_a_config_that_it_fills(name, backbone, monkeypatch):
    """Names are those of detrex's code, shapes those of the papers."""
    # ViT reads its rates from a tensor while it is built
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
    cfg = model_zoo.get_config(f"detrex/dino_{name}_4scale_12ep.py")
    cfg.model.num_classes = 80
    with torch.device("meta"):
        ours, theirs = instantiate(cfg.model).state_dict(), backbone()
    # each tensor is one number, another for each: heads that are equal would count as shared
    rest = {key: x for key, x in ours.items() if not key.startswith("backbone.")}
    rest = {key: torch.tensor(i).expand(x.shape) for i, (key, x) in enumerate(rest.items())}
    converted = from_detrex(
        layouts.detrex(rest) | {f"backbone.{key}": x for key, x in theirs.items()}
    )
    assert {k: x.shape for k, x in converted.items()} == {k: x.shape for k, x in ours.items()}
