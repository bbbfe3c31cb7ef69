"""Loading weights into a model: what came from where, what does not fit, and what it has to be."""

import logging
import os
import pickle
import re
from pathlib import Path

import conftest
import layouts
import numpy as np
import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import SwinTransformer, build_model
from torch import nn

from dino_d2.data.coco_classes import COCO_80, COCO_91
from dino_d2.data.objects365 import OBJECTS365
from dino_d2.engine.ema import EMA
from dino_d2.layouts.renaming import CheckpointError
from dino_d2.names import plural
from dino_d2.weights import model_zoo
from dino_d2.weights.checkpointer import BEST, Checkpointer
from dino_d2.weights.releases import RELEASES
from dino_d2.weights.settings import MSRA, TORCHVISION

LAYOUTS = {"official": layouts.official, "detrex": layouts.detrex, "mmdet": layouts.mmdet}
ONLY_DINO = {
    "official": "transformer.tgt_embed.weight",
    "detrex": "transformer.tgt_embed.weight",
    "mmdet": "memory_trans_fc.weight",
}
R_50 = Path(__file__).parents[2] / "shared" / "weights" / "R-50_msra_fp16.pkl"
NAMES = ["cat", "dog", "bird"]  # of the three classes of `make_dino`
UNNAMED = ["class 0", "class 1", "class 2"]
CLASS_TENSORS = {
    *("query_selection.class_head.weight", "query_selection.class_head.bias"),
    *("decoder.class_heads.0.weight", "decoder.class_heads.0.bias"),
    "denoising.label_embed.weight",
}


@pytest.fixture(autouse=True)
def log(caplog, monkeypatch):
    """What dino_d2 says; programs that ran before may have turned that to a file."""
    monkeypatch.setattr(logging.getLogger("dino_d2"), "propagate", True)
    caplog.set_level(logging.INFO, "dino_d2")
    return caplog


def messages(log, level=logging.INFO):
    records = log.get_records("call")
    return [x.getMessage() for x in records if x.name.startswith("dino_d2") and x.levelno >= level]


@pytest.fixture
def make_model(make_dino, randomise, monkeypatch):
    """Trained, as it were: every tensor is another. Prepared for the weights of everybody."""

    def make(number=3, **options):
        monkeypatch.setattr(conftest, "NUM_CLASSES", number)
        model = randomise(make_dino(**options))
        model.denoising.label_embed.weight.data[-1] = 0
        for part in (*model.neck.projections, *model.neck.downsamples):
            nn.init.zeros_(part[0].bias)  # mmdetection has none
        pixels(model, TORCHVISION)
        return model

    return make


def pixels(model, expected):
    for name in ("pixel_mean", "pixel_std"):
        getattr(model, name).copy_(torch.tensor(expected[name]).view(-1, 1, 1))


@pytest.fixture
def file(tmp_path):
    """Saves what is given, and returns the path."""

    def save(data, name="weights.pth"):
        path = str(tmp_path / name)
        if name.endswith(".pkl"):
            with open(path, "wb") as opened:
                pickle.dump(data, opened)
        else:
            torch.save(data, path)
        return path

    return save


def copied(model):
    return {key: x.clone() for key, x in model.state_dict().items()}


def assert_same(actual, expected, without=()):
    assert actual.keys() == expected.keys()
    assert {key for key, x in expected.items() if not torch.equal(actual[key], x)} == set(without)


def detections(model, batch):
    with torch.no_grad():
        return [x["instances"] for x in model.eval()(batch)]


def assert_one_sentence(error, *parts):
    message = str(error.value)
    assert [part for part in parts if str(part) not in message] == [], message
    assert "\n" not in message


# ---- every layout, detected


def test_what_other_tools_wrap_around_weights_is_taken_off_and_logged(make_model, file, log):
    trained, model = make_model(), make_model()
    state = {f"model._orig_mod.{key}": x for key, x in trained.state_dict().items()}
    path = file({"state_dict": state, "ema": {"module": state}})
    Checkpointer(model, complete=True, ema=EMA(model, 0.9)).load(path, checkpointables=[])
    assert_same(model.state_dict(), trained.state_dict())
    said = "the model's weights are those under 'state_dict', not 'ema.module'"
    assert any(said in x and "'_orig_mod.' and 'model.' removed" in x for x in messages(log))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("key", ["model", "state_dict", None])
def test_every_layout_fills_the_model(make_model, file, layout, key, log):
    trained, model = make_model(shared_heads=False), make_model(shared_heads=False)
    state = LAYOUTS[layout](trained.state_dict())
    path = file({key: state, "epoch": 11} if key else state)
    Checkpointer(model, complete=True).load(path)
    assert_same(model.state_dict(), trained.state_dict())
    (line,) = [x for x in messages(log) if "tensors are from" in x]
    total = len(model.state_dict())
    assert line.startswith(f"{total} of {total} tensors are from '{path}' ({layout}), 0 keep")
    assert "0 were not expected, 0 have another shape" in line


def test_one_head_for_all_layers_becomes_one_for_each(make_model, file):
    trained, model = make_model(), make_model(shared_heads=False)
    Checkpointer(model, complete=True).load(file(layouts.official(trained.state_dict())))
    for head in model.decoder.class_heads:
        assert torch.equal(head.weight, trained.decoder.class_heads[0].weight)
    for head in model.decoder.box_heads:
        assert torch.equal(head.layers[2].bias, trained.decoder.box_heads[0].layers[2].bias)
    assert len(model.decoder.box_heads) == 2


def test_a_head_for_each_layer_does_not_become_one_for_all(make_model, file):
    path = file(layouts.detrex(make_model(shared_heads=False).state_dict()))
    model = make_model()
    before = copied(model)
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(model).load(path)
    assert_one_sentence(caught, path, "2 decoder layers", "SHARED_HEADS", "shared_heads")
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize(("layout", "key"), ONLY_DINO.items())
def test_another_model_with_the_names_of_one_of_the_layouts_is_refused(
    make_model, file, layout, key
):
    """As published for Deformable DETR, of which encoder and backbone would fit."""
    state = LAYOUTS[layout](make_model(shared_heads=False).state_dict())
    del state[key]
    model = make_model(shared_heads=False)
    before = copied(model)
    path = file({"model": state})
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(model).load(path)
    assert_one_sentence(caught, path, "this is neither DINO nor", layout)
    assert_same(model.state_dict(), before)


# ---- what is reported, and what is refused


def test_the_log_counts_what_is_missing_unexpected_and_of_another_shape(make_model, file, log):
    state = copied(make_model())
    del state["encoder.layers.0.norm1.bias"], state["encoder.layers.0.norm1.weight"]
    state["query_selection.content.weight"] = torch.ones(7, 64)
    state |= {f"mask_head.{i}.weight": torch.ones(1) for i in range(4)}
    path, model = file({"model": state, "dino_d2": {"position_offset": 0.0}}), make_model()
    before = copied(model)
    Checkpointer(model).load(path)
    total = len(before)
    (line,) = messages(log)
    assert line.startswith(f"{total - 3} of {total} tensors are from '{path}' (dino_d2), 3 keep")
    shapes = "(7, 64) in the file, (20, 64) in the model"
    assert line.endswith(
        "4 were not expected, 1 have another shape, such as query_selection.content.weight: "
        + shapes
    )
    content = "query_selection.content.weight"
    assert torch.equal(model.state_dict()[content], before[content])


def lines_of_detectron2(log):
    """Its warnings, by their records."""
    records = log.get_records("call")
    return [x.getMessage() for x in records if x.name.startswith("fvcore") and x.levelno > 20]


@pytest.fixture
def fvcore(log, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fvcore"), "propagate", True)


def test_a_checkpoint_of_another_model_is_one_warning(make_model, file, log, fvcore):
    """And none for each of its tensors, nor for its classes."""
    state = copied(make_model())
    other = {k: torch.cat([x, x], -1) if x.dim() else x for k, x in state.items()}
    other |= {"neck.projections.0.1.bias": state["neck.projections.0.1.bias"]}
    other |= {f"backbone.stages.{i}.weight": torch.ones(1) for i in range(4)}
    path = file({"model": other, "dino_d2": {"classes": NAMES}})
    Checkpointer(make_model(), classes=NAMES).load(path)
    (line,) = messages(log, logging.WARNING)
    assert "use the config that they were trained with" in line and "\n" not in line
    assert lines_of_detectron2(log) == []


def test_a_few_tensors_of_another_model_are_listed_and_other_shapes_are_one_warning(
    make_model, file, log, fvcore
):
    state = copied(make_model())
    del state["encoder.layers.0.norm1.bias"]
    for name in ("weight", "bias"):
        state[f"neck.projections.0.0.{name}"] = torch.ones(7)
    path = file({"model": state, "dino_d2": {"classes": NAMES}})
    Checkpointer(make_model(), classes=NAMES).load(path)
    (line,) = messages(log, logging.WARNING)
    assert "2 have another shape" in line and "another model" not in line
    (listed,) = lines_of_detectron2(log)
    assert "encoder.layers.0.norm1.bias" in listed


def test_weights_of_a_backbone_are_of_no_other_model(make_model, file, log):
    state = {k: x for k, x in copied(make_model()).items() if k.startswith("backbone.")}
    Checkpointer(make_model()).load(file(state))
    assert messages(log, logging.WARNING) == []


@pytest.mark.parametrize("state", [{"foo.weight": torch.ones(3)}, {"bias": torch.ones(16)}])
def test_weights_of_which_nothing_fits_are_an_error(make_model, file, state):
    """The second name is the end of several of the backbone's: it could be any of them."""
    model = make_model()
    before = copied(model)
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(model).load(path := file(state))
    assert_one_sentence(caught, f"no tensor of '{path}' fits")
    assert_same(model.state_dict(), before)


def test_the_running_statistics_that_a_resnet_sets_by_itself_are_not_taken_for_loaded(
    make_resnet_dino, file
):
    with pytest.raises(CheckpointError, match="no tensor of"):
        Checkpointer(make_resnet_dino()).load(file({"foo.weight": torch.ones(3)}))


def test_after_an_error_another_file_can_be_tried(make_model, file):
    trained, model = make_model(), make_model()
    checkpointer = Checkpointer(model)
    with pytest.raises(CheckpointError):
        checkpointer.load(file({"foo": torch.ones(1)}))
    checkpointer.load(file(trained.state_dict()))
    assert_same(model.state_dict(), trained.state_dict())


def test_a_file_that_is_not_there_is_an_error(make_model):
    with pytest.raises(CheckpointError, match="nowhere.pth"):
        Checkpointer(make_model()).load("nowhere.pth")


def test_training_starts_without_a_checkpoint_and_evaluation_does_not(make_model):
    assert Checkpointer(make_model()).load("") == {}
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Checkpointer(make_model(), complete=True).load("")


@pytest.mark.parametrize("key", ["encoder.layers.1.norm2.bias", "decoder.class_heads.0.weight"])
def test_what_leaves_something_random_trains_but_is_not_evaluated(make_model, file, key):
    state = copied(make_model())
    del state[key]
    path = file({"model": state})
    Checkpointer(make_model()).load(path)
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(make_model(), complete=True).load(path)
    assert_one_sentence(caught, path, key, "random")


def test_a_backbone_alone_is_not_evaluated(make_model, file):
    state = {k: x for k, x in make_model().state_dict().items() if k.startswith("backbone.")}
    with pytest.raises(CheckpointError, match="would be random"):
        Checkpointer(make_model(), complete=True).load(file(state))


def test_evaluation_needs_no_weights_of_denoising(make_model, file):
    trained, model = make_model(), make_model()
    state = {k: x for k, x in trained.state_dict().items() if not k.startswith("denoising.")}
    Checkpointer(model, complete=True).load(file(state))
    labels = "denoising.label_embed.weight"
    assert_same(model.state_dict(), trained.state_dict(), without=[labels])


@pytest.mark.parametrize("layout", [*LAYOUTS, "ours"])
@pytest.mark.parametrize("rows", [2, 92])
def test_a_label_embedding_of_another_number_of_classes_costs_no_class_head(
    make_model, file, layout, rows, log
):
    """The official dn_labelbook_size is 91 whatever the classes are; its last row is for nothing,
    unless the classes need it."""
    trained, model = make_model(), make_model()
    given, initial = copied(trained), model.denoising.label_embed.weight[:3].clone()
    labels = torch.rand(rows, 64)
    given["denoising.label_embed.weight"] = labels
    given = LAYOUTS[layout](given) if layout in LAYOUTS else given
    Checkpointer(model, complete=True).load(file({"model": given}))
    assert_same(model.state_dict(), trained.state_dict(), {"denoising.label_embed.weight"})
    if layout == "official" and rows < 3:
        labels = torch.cat([given["label_enc.weight"], labels[:1]])
    found = model.denoising.label_embed.weight
    assert torch.equal(found[:3], torch.cat([labels[:-1][:3], initial[len(labels) - 1 :]]))
    assert not found[3].any()
    said = [x for x in messages(log) if "label embedding" in x]
    assert (
        len(said) == 1
        and f"for {plural(len(labels) - 1, 'class')} and its class heads for 3" in said[0]
    )


def test_a_model_without_denoising_evaluates_weights_with_it(make_model, file):
    model = make_model()
    path = file(layouts.official(model.state_dict()))
    model.denoising = None
    Checkpointer(model, complete=True).load(path)


def test_weights_of_another_width_are_reported_and_not_mixed(make_model, file, log):
    """The classes are known by name, but their rows have another length."""
    state = copied(make_model())
    for key in CLASS_TENSORS:
        if key.endswith("weight"):
            state[key] = state[key][:, :32]
    model = make_model()
    Checkpointer(model, classes=NAMES).load(
        file({"model": state, "dino_d2": {"classes": NAMES[::-1]}})
    )
    assert any("3 have another shape" in line for line in messages(log))


def test_a_training_may_begin_with_less_than_all(make_model, file, tmp_path):
    state = {k: x for k, x in make_model().state_dict().items() if k.startswith("backbone.")}
    path = file(state)
    for resume in (True, False):  # there is nothing to go on with
        model = make_model()
        Checkpointer(model, str(tmp_path)).resume_or_load(path, resume=resume)
        assert_same(model.backbone.state_dict(), {k[9:]: x for k, x in state.items()})


# ---- backbones


@pytest.fixture
def make_resnet_dino():
    """The smallest DINO on a ResNet, by default of 50 narrow layers, for torchvision's weights."""

    def make(*overrides):
        cfg = model_zoo.get_config("quickstart")
        small = [
            *("DEPTH", 50, "RES2_OUT_CHANNELS", 256, "WIDTH_PER_GROUP", 8, "NORM", "FrozenBN"),
            *("OUT_FEATURES", ["res3", "res4", "res5"]),
        ]
        for key, value in zip(small[::2], small[1::2], strict=True):
            cfg.MODEL.RESNETS[key] = value
        cfg.MODEL.DINO.IN_FEATURES, cfg.MODEL.DINO.NUM_LEVELS = ["res3", "res4", "res5"], 4
        cfg.MODEL.DINO.ENCODER_LAYERS = cfg.MODEL.DINO.DECODER_LAYERS = 1
        cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.DINO.NUM_CLASSES", 3, *overrides])
        return build_model(cfg)

    return make


# of Detectron2's configs for MSRA's weights
FOR_MSRA = (
    *("MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]", "MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"),
    *("MODEL.RESNETS.STRIDE_IN_1X1", "True"),
)


@pytest.fixture
def torchvision_state():
    resnet = torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [3, 4, 6, 3], num_classes=10, width_per_group=8
    )
    for x in resnet.buffers():
        if x.dim():
            nn.init.uniform_(x, 0.5, 1.5)
    return resnet.state_dict()


def to_detectron2(state):
    """torchvision's names as tools/convert-torchvision-to-d2.py changes them, as arrays."""
    arrays = {}
    for key, x in state.items():
        if "layer" not in key:
            key = "stem." + key
        for i in (1, 2, 3, 4):
            key = key.replace(f"layer{i}", f"res{i + 1}")
        for i in (1, 2, 3):
            key = key.replace(f"bn{i}", f"conv{i}.norm")
        key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        arrays[key] = x.numpy()
    return arrays


def to_caffe2(arrays):
    """Detectron2's names as Caffe2 has them, without the statistics that it folds into the norm."""
    blobs = {}
    for key, x in arrays.items():
        key = key.replace("stem.conv1.norm", "res_conv1_bn").replace("stem.", "").replace(".", "_")
        key = key.replace("_shortcut", "_branch1").replace("_norm_", "_bn_")
        for number, letter in enumerate("abc", 1):
            key = re.sub(rf"(res\d_\d)_conv{number}", rf"\1_branch2{letter}", key)
        key = re.sub("_bn_weight$", "_bn_s", key)
        key = re.sub("_weight$", "_w", re.sub("_bias$", "_b", key))
        if "running" not in key and "num_batches" not in key:
            blobs[key] = x
    return blobs


def msra(state):
    """As trained with pixels that nobody divided: its first layer answers weakly."""
    return state | {"conv1.weight": 0.1 * state["conv1.weight"]}


def assert_backbone(model, expected, without=()):
    """The backbone is that of torchvision's state dict."""
    for key, x in to_detectron2(expected).items():
        if not re.search("stem.fc|num_batches", key) and not any(w in key for w in without):
            assert torch.equal(model.backbone.state_dict()[key], torch.as_tensor(x)), key


def test_torchvisions_own_file_fills_the_backbone(make_resnet_dino, file, torchvision_state, log):
    Checkpointer(model := make_resnet_dino()).load(file(torchvision_state))
    assert_backbone(model, torchvision_state)
    (line,) = messages(log)
    # 53 convolutions of weight, bias, mean and variance of the norm
    assert line.startswith("265 of ") and "(torchvision)" in line
    assert "0 were not expected" in line


def test_torchvisions_weights_in_detectron2s_file_fill_the_backbone(
    make_resnet_dino, file, torchvision_state, log
):
    checkpoint = {
        "model": to_detectron2(torchvision_state),
        "__author__": "torchvision",
        "matching_heuristics": True,
    }
    Checkpointer(model := make_resnet_dino()).load(file(checkpoint, "R-50.pkl"))
    assert_backbone(model, torchvision_state)
    assert "265 of " in messages(log)[0] and "(a backbone)" in messages(log)[0]
    assert len(messages(log)) == 1


def test_msras_weights_by_detectron2s_names_fill_the_backbone(
    make_resnet_dino, file, torchvision_state, log
):
    state = msra(torchvision_state)
    path = file({"model": to_detectron2(state), "__author__": "MSRA"}, "R-50.pkl")
    Checkpointer(model := make_resnet_dino(*FOR_MSRA)).load(path)
    assert_backbone(model, state)
    assert "265 of " in messages(log)[0] and len(messages(log)) == 1


@pytest.mark.parametrize("blobs", [True, False])
def test_msras_weights_by_caffe2s_names_fill_the_backbone(
    make_resnet_dino, file, torchvision_state, log, blobs
):
    arrays = to_caffe2(to_detectron2(msra(torchvision_state)))
    assert {
        "conv1_w",
        "res_conv1_bn_s",
        "res2_0_branch1_w",
        "res4_5_branch2c_bn_b",
    } <= arrays.keys()
    path = file({"blobs": arrays} if blobs else arrays, "R-50.pkl")
    Checkpointer(model := make_resnet_dino(*FOR_MSRA)).load(path)
    assert_backbone(model, msra(torchvision_state), without=["running"])
    # 53 convolutions of weight and bias and weight of the norm
    assert "159 of " in messages(log)[0] and len(messages(log)) == 1
    norm = model.backbone.stem.conv1.norm
    assert not norm.running_mean.any() and torch.allclose(norm.running_var, torch.tensor(1.0))


def test_a_detector_of_the_model_zoo_fills_the_backbone(
    make_resnet_dino, file, torchvision_state, log
):
    state = {f"backbone.bottom_up.{k}": x for k, x in to_detectron2(torchvision_state).items()}
    state |= {"backbone.fpn_lateral3.weight": np.ones(1), "roi_heads.box_head.fc1.bias": np.ones(1)}
    path = file({"model": state, "__author__": "Detectron2 Model Zoo"}, "model_final.pkl")
    Checkpointer(model := make_resnet_dino()).load(path)
    assert_backbone(model, torchvision_state)
    assert "265 of " in messages(log)[0] and "(model_zoo)" in messages(log)[0]


def test_a_backbone_reaches_nothing_but_the_backbone(make_model, file, log):
    """Detectron2 would take the second name for the end of one of the decoder's."""
    model = make_model()
    before = copied(model)
    weight = torch.rand(16, 3, 1, 1)
    state = {"convs.res3.weight": weight, "norm.weight": torch.rand(64)}
    Checkpointer(model).load(file({"model": state, "matching_heuristics": True}))
    key = "backbone.convs.res3.weight"
    assert_same(model.state_dict(), before | {key: weight})
    assert "1 of " in messages(log)[0] and "1 were not expected" in messages(log)[0]


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_the_weights_of_a_swin_transformer_fill_the_backbone(make_model, file, log):
    model = make_model()
    model.backbone = SwinTransformer(
        embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, drop_path_rate=0
    )
    expected = {
        key: torch.randint(9, x.shape).to(x.dtype) for key, x in model.backbone.state_dict().items()
    }
    # its authors' file: one norm more, a classifier, masks; none for the single stages
    state = {key: x for key, x in expected.items() if not re.match(r"norm\d", key)}
    state |= {"norm.weight": torch.ones(64), "head.weight": torch.ones(5, 64)}
    Checkpointer(model).load(file({"model": state}))
    for key, x in model.backbone.state_dict().items():
        assert torch.equal(x, expected[key]) or key not in state, key
    assert f"{len(state) - 2} of " in messages(log)[0]
    assert "2 were not expected" in messages(log)[0]


def test_a_backbone_with_group_norm_is_loaded(make_resnet_dino, file):
    options = ("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.NORM", "GN")
    options += ("MODEL.RESNETS.RES2_OUT_CHANNELS", 64)
    trained, model = make_resnet_dino(*options), make_resnet_dino(*options)
    Checkpointer(model).load(file(trained.backbone.state_dict()))
    assert_same(model.backbone.state_dict(), trained.backbone.state_dict())


def test_statistics_of_a_norm_are_weights_and_counters_are_not(make_resnet_dino, file):
    model = make_resnet_dino("MODEL.RESNETS.NORM", "BN")
    state = {k: x for k, x in model.state_dict().items() if "num_batches_tracked" not in k}
    Checkpointer(model, complete=True).load(file(state))
    for norm in ("BN", "FrozenBN"):  # which would set them without a word
        without = {k: x for k, x in state.items() if k != "backbone.stem.conv1.norm.running_var"}
        model = make_resnet_dino("MODEL.RESNETS.NORM", norm)
        with pytest.raises(CheckpointError, match="stem.conv1.norm.running_var"):
            Checkpointer(model, complete=True).load(file(without))


# ---- settings that belong to weights


@pytest.mark.parametrize(
    ("weights", "overrides", "named"),
    [
        (msra, (), ["pixel_mean", "pixel_std", "stride_in_1x1"]),
        (msra, FOR_MSRA[4:], ["pixel_mean", "pixel_std"]),
        (msra, FOR_MSRA, []),
        (dict, FOR_MSRA, ["pixel_std"]),  # their colour order and stride, nothing tells
        (dict, (), []),
        (dict, FOR_MSRA[:2], []),
        (dict, FOR_MSRA[4:], []),
    ],
)
def test_pixels_that_an_imagenet_backbone_does_not_know_are_named(
    make_resnet_dino, file, torchvision_state, log, weights, overrides, named
):
    """How strongly its first layer answers tells with which it was trained."""
    path = file(weights(torchvision_state))
    Checkpointer(make_resnet_dino(*overrides)).load(path)
    warnings = messages(log, logging.WARNING)
    assert len(warnings) == len(named)
    for line, name in zip(warnings, named, strict=True):
        assert name in line and path in line and "\n" not in line


@pytest.mark.skipif(not R_50.is_file(), reason=f"there is no {R_50}")
@pytest.mark.parametrize(("overrides", "warnings"), [((), 3), (FOR_MSRA, 0)])
def test_the_real_weights_of_msra_are_told_by_their_first_layer(log, overrides, warnings):
    cfg = model_zoo.get_config("dino_R_50_4scale_12ep")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.DINO.NUM_CLASSES", 3, *overrides])
    cfg.MODEL.DINO.ENCODER_LAYERS = cfg.MODEL.DINO.DECODER_LAYERS = 1
    Checkpointer(build_model(cfg)).load(str(R_50))
    assert "265 of " in messages(log)[0]
    assert len(messages(log, logging.WARNING)) == warnings


def test_only_a_backbone_whose_first_layer_was_loaded_is_judged(
    make_resnet_dino, file, torchvision_state, log
):
    state = {key: x for key, x in torchvision_state.items() if key.startswith("layer")}
    Checkpointer(make_resnet_dino(*FOR_MSRA)).load(file(state))
    assert messages(log, logging.WARNING) == []


def test_only_a_backbone_that_does_not_say_it_is_judged(make_resnet_dino, file, log):
    trained = make_resnet_dino()
    trained.backbone.stem.conv1.weight.data *= 0.1
    checkpoint = {"model": trained.state_dict()} | Checkpointer(trained).description()
    Checkpointer(make_resnet_dino()).load(file(checkpoint))
    assert messages(log, logging.WARNING) == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("position_temperature", lambda model: setattr(model.encoder, "position_temperature", 21)),
        ("position_offset", lambda model: setattr(model.encoder, "position_offset", -0.5)),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_another_encoding_of_pixels_is_an_error(make_model, file, name, change, complete):
    path = file(layouts.official(make_model().state_dict()))
    model = make_model()
    change(model)
    before = copied(model)
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(model, complete=complete).load(path)
    assert_one_sentence(caught, path, name, f"MODEL.DINO.{name.upper()}", f"model.encoder.{name}")
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["pixel_mean", "pixel_std"])
def test_other_pixels_are_an_error_in_evaluation_and_a_warning_in_training(
    make_model, file, log, layout, name
):
    path = file(LAYOUTS[layout](make_model(shared_heads=False).state_dict()))
    model = make_model(shared_heads=False)
    getattr(model, name).copy_(torch.tensor(MSRA[name]).view(-1, 1, 1))
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(model, complete=True).load(path)
    assert_one_sentence(caught, path, name, f"MODEL.{name.upper()}", str(MSRA[name]))
    log.clear()
    Checkpointer(model).load(path)
    assert any(name in line for line in messages(log, logging.WARNING))


def test_another_stride_is_an_error_in_evaluation(make_resnet_dino, file):
    trained = make_resnet_dino()
    checkpoint = {"model": trained.state_dict()} | Checkpointer(trained).description()
    model = make_resnet_dino("MODEL.RESNETS.STRIDE_IN_1X1", True)
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(model, complete=True).load(file(checkpoint))
    assert_one_sentence(caught, "stride_in_1x1", "STRIDE_IN_1X1")


ENCODINGS = [(20.0, 0.0), (10000.0, -0.5)]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("write", "usual"),
    [(layouts.detrex, ENCODINGS[1]), (layouts.mmdet, ENCODINGS[0]), (dict, ENCODINGS[0])],
)
def test_an_unknown_encoding_is_a_warning_where_the_model_has_not_the_usual_one(
    make_model, file, log, write, usual, encoding
):
    path = file(write(make_model(shared_heads=False).state_dict()))
    model = make_model(shared_heads=False)
    model.encoder.position_temperature, model.encoder.position_offset = encoding
    Checkpointer(model).load(path)
    lines = [x for x in messages(log, logging.WARNING) if "position encoding" in x]
    assert len(lines) == (encoding != usual)
    for line in lines:
        assert path in line and f"has temperature and offset {encoding}" in line
        assert line.endswith(f"have {usual}") and "\n" not in line


def test_the_encoding_of_a_backbone_is_no_matter(make_model, file, log):
    model = make_model()
    path = file({k: x for k, x in model.state_dict().items() if k.startswith("backbone.")})
    model.encoder.position_temperature = 77.0
    Checkpointer(model).load(path)
    assert messages(log, logging.WARNING) == []


@pytest.mark.parametrize("name", ["detrex/dino_R_50_4scale_12ep", "detrex/dino_R_50_4scale_24ep"])
def test_the_encoding_of_a_published_file_is_known_by_its_name(make_model, file, log, name):
    release = RELEASES[name]
    state = layouts.detrex(make_model(shared_heads=False).state_dict())
    path = file({"model": state}, release.file)
    model = make_model(shared_heads=False)
    model.encoder.position_temperature, model.encoder.position_offset = release.encoding
    Checkpointer(model, complete=True).load(path)
    assert not any("encoding of pixels" in line for line in messages(log, logging.WARNING))
    other = {20.0: (10000.0, -0.5), 10000.0: (20.0, 0.0)}[release.encoding[0]]
    model.encoder.position_temperature, model.encoder.position_offset = other
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(model).load(path)
    assert_one_sentence(caught, release.file, "position_temperature", str(release.encoding[0]))


# ---- classes


def test_the_official_91_classes_become_the_80(make_model, file, make_batch, log):
    trained, model = make_model(91), make_model(80)
    Checkpointer(model, complete=True).load(file(layouts.official(trained.state_dict())))
    assert messages(log, logging.WARNING) == []

    by_hand = make_model(80)
    state = copied(trained)
    absent = {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # ids of COCO that stand for nothing
    rows = [i for i in range(91) if i not in absent]
    for key in CLASS_TENSORS - {"denoising.label_embed.weight"}:
        state[key] = state[key][rows]
    state["denoising.label_embed.weight"] = state["denoising.label_embed.weight"][[*rows, 91]]
    by_hand.load_state_dict(state)
    assert_same(model.state_dict(), by_hand.state_dict())

    batch = make_batch(0, 0)
    for a, b in zip(detections(model, batch), detections(by_hand, batch), strict=True):
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


def test_the_80_classes_in_the_order_of_category_ids_become_the_91(make_model, file, log):
    trained, model = make_model(80), make_model(91)
    Checkpointer(model).load(file(layouts.official(trained.state_dict())))
    assert messages(log, logging.WARNING) == []  # the other 11 stand for nothing
    ours = model.decoder.class_heads[0].weight[COCO_91.index("zebra")]
    theirs = trained.decoder.class_heads[0].weight[COCO_80.index("zebra")]
    assert torch.equal(ours, theirs)


def test_fine_tuning_with_other_classes_keeps_all_but_what_depends_on_them(make_model, file, log):
    trained, model = make_model(80), make_model(3)
    before = copied(model)
    path = file(layouts.official(trained.state_dict()))
    Checkpointer(model, classes=["RBC", "WBC", "platelets"]).load(path)
    expected = copied(trained) | {key: before[key] for key in CLASS_TENSORS}
    assert_same(model.state_dict(), expected)
    (line,) = messages(log, logging.WARNING)
    assert line.startswith(f"3 of 3 classes are new to '{path}' and initialised in ")
    assert line.endswith(": RBC, WBC, platelets")


# ids of Objects365 of COCO's classes with another name there
OTHER_NAMES = {
    **{"bird": 57, "handbag": 14, "suitcase": 121, "skis": 120, "sports ball": 157, "bowl": 27},
    **{"orange": 105, "dining table": 99, "tv": 38, "teddy bear": 71, "hair drier": 329},
}


@pytest.mark.parametrize("rows", [365, 366])  # by index, or by id
def test_weights_of_objects365_give_every_class_of_coco_its_row(make_model, file, log, rows):
    trained, model = make_model(rows), make_model(80)
    path = file(layouts.official(trained.state_dict()))
    Checkpointer(model, classes=COCO_80).load(path)
    folded = [name.casefold() for name in OBJECTS365]
    ids = [OTHER_NAMES.get(x) or folded.index(x) + 1 for x in COCO_80]
    for key in CLASS_TENSORS:
        given = trained.state_dict()[key][[i - (rows == 365) for i in ids]]
        assert torch.equal(model.state_dict()[key][:80], given)
    (said,) = [x for x in messages(log) if "other names" in x]
    assert "bird (Wild Bird), handbag (Handbag/Satchel)" in said
    assert said.count(" (") == len(OTHER_NAMES)
    assert messages(log, logging.WARNING) == []  # none is new


def test_classes_without_a_counterpart_in_objects365_are_said(make_model, file, log):
    trained, model = make_model(365), make_model(4)
    path = file(layouts.official(trained.state_dict()))
    Checkpointer(model, classes=["Wild Bird", "bird", "TV", "tv"]).load(path)
    given = trained.decoder.class_heads[0].bias
    assert torch.equal(model.decoder.class_heads[0].bias[[0, 3]], given[[56, 37]])
    (line,) = messages(log, logging.WARNING)
    assert line.startswith("2 of 4 classes are new to ") and line.endswith(": bird, TV")


def test_fine_tuning_keeps_the_rows_of_classes_of_the_same_name(make_model, file, log):
    trained, model = make_model(80), make_model(3)
    before = copied(model)
    classes = ["robot", "Person", "dog"]
    Checkpointer(model, classes=classes).load(file(layouts.official(trained.state_dict())))
    rows = [COCO_80.index("person"), COCO_80.index("dog")]
    for key in CLASS_TENSORS:
        x = model.state_dict()[key]
        assert torch.equal(x[0], before[key][0]) and not torch.equal(x[0], x[1])
        assert torch.equal(x[1:3], trained.state_dict()[key][rows])
    (line,) = messages(log, logging.WARNING)
    assert line.startswith("1 of 3 classes are new to ") and line.endswith(": robot")


def test_classes_that_a_file_does_not_name_are_said_to_be_taken_in_order(make_model, file, log):
    trained, model = make_model(), make_model()
    Checkpointer(model, classes=NAMES, complete=True).load(path := file(trained.state_dict()))
    assert_same(model.state_dict(), trained.state_dict())
    (line,) = messages(log, logging.WARNING)
    assert line == (
        f"'{path}' does not name its classes: they are assumed to be, in this order, cat, dog, bird"
    )


def test_classes_that_a_file_of_another_number_does_not_name_are_all_new(make_model, file, log):
    state, model = make_model(5).state_dict(), make_model(3)
    before = copied(model)
    Checkpointer(model, classes=NAMES).load(path := file(state))
    assert_same(
        model.state_dict(), {k: before[k] if k in CLASS_TENSORS else state[k] for k in before}
    )
    (line,) = messages(log, logging.WARNING)
    assert line.startswith(f"3 of 3 classes are new to '{path}'") and "cat, dog, bird" in line


def test_some_unknown_classes_are_enough_to_refuse_an_evaluation(make_model, file):
    path = file(layouts.official(make_model(80).state_dict()))
    with pytest.raises(
        CheckpointError, match="does not fill the model: the class robot would be random"
    ):
        Checkpointer(make_model(), classes=["cat", "dog", "robot"], complete=True).load(path)


def test_classes_that_are_all_among_those_of_the_weights_are_evaluated(make_model, file):
    trained, model = make_model(80), make_model()
    path = file(layouts.official(trained.state_dict()))
    Checkpointer(model, classes=["dog", "zebra", "cat"], complete=True).load(path)
    rows = [COCO_80.index(name) for name in ("dog", "zebra", "cat")]
    expected = trained.decoder.class_heads[0].bias[rows]
    assert torch.equal(model.decoder.class_heads[0].bias, expected)


# ---- checkpoints of our own


def test_a_checkpoint_says_what_belongs_to_it(make_model, tmp_path):
    Checkpointer(make_model(), str(tmp_path), classes=NAMES).save("a", iteration=7)
    checkpoint = torch.load(tmp_path / "a.pth", weights_only=True)
    assert checkpoint["iteration"] == 7
    assert checkpoint["dino_d2"] == {
        "classes": NAMES,
        "pixel_mean": [123.675, 116.28, 103.53],
        "pixel_std": [58.395, 57.12, 57.375],
        "position_temperature": 20.0,
        "position_offset": 0.0,
    }


def test_a_checkpoint_of_a_resnet_says_where_its_stride_is(make_resnet_dino):
    for stride in (True, False):
        model = make_resnet_dino("MODEL.RESNETS.STRIDE_IN_1X1", stride)
        assert Checkpointer(model).description()["dino_d2"]["stride_in_1x1"] is stride


@pytest.mark.parametrize(("number", "expected"), [(80, COCO_80), (91, COCO_91), (3, UNNAMED)])
def test_classes_without_names_are_those_of_coco_by_their_number(make_model, number, expected):
    checkpointer = Checkpointer(make_model(number))
    assert list(checkpointer.classes) == list(expected)
    saved = checkpointer.description()["dino_d2"]["classes"]
    assert saved == (None if expected is UNNAMED else list(expected))  # numbers are no names


def test_weights_saved_without_names_are_taken_in_their_order(make_model, file):
    bare = make_model(3)
    checkpoint = {"model": bare.state_dict()} | Checkpointer(bare).description()
    model = make_model(3)
    Checkpointer(model, classes=["a", "b", "c"], complete=True).load(file(checkpoint))
    ours, theirs = (x.decoder.class_heads[0].weight for x in (model, bare))
    assert torch.equal(ours, theirs)


def test_without_a_folder_nothing_is_saved(make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Checkpointer(make_model()).save("a")
    Checkpointer(make_model(), str(tmp_path), save_to_disk=False).save("a")
    assert list(tmp_path.iterdir()) == []


def test_a_saved_model_is_evaluated(make_model, tmp_path):
    trained, model = make_model(), make_model()
    Checkpointer(trained, str(tmp_path), classes=NAMES).save("a", iteration=7)
    path = str(tmp_path / "a.pth")
    extra = Checkpointer(model, classes=NAMES, complete=True).load(path)
    assert_same(model.state_dict(), trained.state_dict())
    assert extra["iteration"] == 7 and "model" not in extra


def test_classes_in_another_order_are_detected_as_what_they_are(make_model, tmp_path, make_batch):
    trained, model = make_model(), make_model()
    Checkpointer(trained, str(tmp_path), classes=NAMES).save("a")
    order = ["bird", "cat", "dog"]
    Checkpointer(model, classes=order, complete=True).load(str(tmp_path / "a.pth"))
    batch = make_batch(0)
    (theirs,), (ours,) = detections(trained, batch), detections(model, batch)
    named = [
        sorted(zip(map(names.__getitem__, x.pred_classes), x.scores.tolist(), strict=True))
        for names, x in ((NAMES, theirs), (order, ours))
    ]
    assert [name for name, _ in named[0]] == [name for name, _ in named[1]]
    assert [score for _, score in named[0]] == pytest.approx([score for _, score in named[1]])
    assert {name for name, _ in named[0]} == set(NAMES)
    assert not torch.equal(ours.pred_classes, theirs.pred_classes)


def test_a_saved_models_settings_are_checked(make_model, tmp_path):
    trained, model = make_model(), make_model()
    trained.encoder.position_offset = -0.5
    Checkpointer(trained, str(tmp_path), classes=NAMES).save("a")
    with pytest.raises(CheckpointError, match="position_offset -0.5, but the model has 0.0"):
        Checkpointer(model, classes=NAMES).load(str(tmp_path / "a.pth"))


def test_a_failure_while_saving_leaves_what_was_saved_before(make_model, tmp_path, monkeypatch):
    checkpointer = Checkpointer(make_model(), str(tmp_path))
    checkpointer.save("model_1", iteration=1)
    write = torch.save

    def fail(data, file):
        write(data, file)
        file.truncate(1000)
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    before = (tmp_path / "model_1.pth").read_bytes()
    for name in ("model_1", "model_2"):
        with pytest.raises(CheckpointError, match="no space.*make room"):
            checkpointer.save(name, iteration=2)
    assert (tmp_path / "model_1.pth").read_bytes() == before
    assert not (tmp_path / "model_2.pth").exists()
    assert (tmp_path / "last_checkpoint").read_text() == "model_1.pth"
    model = make_model()
    assert Checkpointer(model, str(tmp_path)).resume_or_load("")["iteration"] == 1


def test_a_training_goes_on_where_it_was(make_model, tmp_path, file):
    trained, model = make_model(), make_model()
    optimizers = [torch.optim.AdamW(x.parameters(), lr=0.1) for x in (trained, model)]
    trained.encoder.level_embed.weight.sum().backward()
    optimizers[0].step()
    Checkpointer(trained, str(tmp_path), optimizer=optimizers[0]).save("a", iteration=7)
    checkpointer = Checkpointer(model, str(tmp_path), optimizer=optimizers[1])
    start = file(make_model().state_dict())  # is not loaded
    assert checkpointer.resume_or_load(start, resume=True)["iteration"] == 7
    assert_same(model.state_dict(), trained.state_dict())
    moments = [
        optimizer.state[x.encoder.level_embed.weight]["exp_avg"]
        for optimizer, x in zip(optimizers, (trained, model), strict=True)
    ]
    assert torch.equal(*moments) and moments[0].any()


def test_a_training_starts_anew_from_weights_where_it_is_not_to_go_on(make_model, tmp_path, file):
    trained, model = make_model(), make_model()
    Checkpointer(make_model(), str(tmp_path)).save("a", iteration=7)
    path = file(layouts.official(trained.state_dict()))
    Checkpointer(model, str(tmp_path)).resume_or_load(path, resume=False)
    assert_same(model.state_dict(), trained.state_dict())


def test_a_training_goes_on_with_all_of_its_weights_only(make_model, tmp_path):
    trained = make_model()
    Checkpointer(trained, str(tmp_path), classes=NAMES).save("a")
    checkpointer = Checkpointer(make_model(), str(tmp_path), classes=["cat", "dog", "robot"])
    with pytest.raises(
        CheckpointError, match="does not fill the model: the class robot would be random"
    ):
        checkpointer.resume_or_load("", resume=True)


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\x00\xfe", b"b.pth", b"."])
def test_a_record_of_the_last_checkpoint_that_names_none_is_one_sentence(
    make_model, tmp_path, content
):
    Checkpointer(make_model(), str(tmp_path)).save("a")
    (tmp_path / "last_checkpoint").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(make_model(), str(tmp_path)).resume_or_load("", resume=True)
    name = repr(content.decode(errors="replace").strip())
    assert_one_sentence(caught, tmp_path / "last_checkpoint", name, "not a file there")


def test_the_checkpoint_to_go_on_from_that_is_gone_is_named(make_model, tmp_path):
    Checkpointer(make_model(), str(tmp_path)).save("a")
    (tmp_path / "a.pth").unlink()
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(make_model(), str(tmp_path)).resume_or_load("", resume=True)
    assert_one_sentence(caught, tmp_path / "last_checkpoint", "'a.pth'")


def test_a_record_written_by_hand_may_end_its_line(make_model, tmp_path):
    checkpointer = Checkpointer(make_model(), str(tmp_path))
    checkpointer.save("a")
    (tmp_path / "last_checkpoint").write_text("a.pth\n")
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "a.pth")


def test_a_failure_while_recording_the_last_checkpoint_leaves_the_one_before(
    make_model, tmp_path, monkeypatch
):
    checkpointer = Checkpointer(make_model(), str(tmp_path))
    checkpointer.tag_last_checkpoint("a.pth")

    def fail(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        checkpointer.tag_last_checkpoint("b.pth")
    assert [x.name for x in tmp_path.iterdir()] == ["last_checkpoint"]
    assert (tmp_path / "last_checkpoint").read_text() == "a.pth"


# ---- Detectron2's own checkpointer


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("key", ["model", None])
def test_detectron2s_checkpointer_refuses_what_only_ours_knows(make_model, file, layout, key):
    state = LAYOUTS[layout](make_model(shared_heads=False).state_dict())
    model = make_model(shared_heads=False)
    before = copied(model)
    with pytest.raises(CheckpointError) as caught:
        DetectionCheckpointer(model).load(file({key: state} if key else state))
    assert_one_sentence(caught, f"layout of {layout}", "dino_d2.Checkpointer")
    with pytest.raises(CheckpointError):
        model.load_state_dict(state, strict=False)
    assert_same(model.state_dict(), before)


def test_detectron2s_checkpointer_loads_our_own(make_model, tmp_path):
    trained, model = make_model(), make_model()
    Checkpointer(trained, str(tmp_path)).save("a")
    DetectionCheckpointer(model).load(str(tmp_path / "a.pth"))
    assert_same(model.state_dict(), trained.state_dict())


# ---- a last checkpoint that is damaged


def truncate(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


class Progress:
    """What a training saves beside the model."""

    def __init__(self, iteration=-1):
        self.iteration = iteration

    def state_dict(self):
        return {"iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


@pytest.fixture
def trained(make_model, tmp_path):
    """A folder with the checkpoints of iterations 1, 2 and 3, and the best; bias = iteration."""
    model, progress = make_model(), Progress()
    checkpointer = Checkpointer(model, str(tmp_path), trainer=progress)
    for progress.iteration in (1, 2, 3):
        model.decoder.norm.bias.data.fill_(progress.iteration)
        checkpointer.save(f"model_{progress.iteration:07d}")
    progress.iteration = 9
    checkpointer.save(BEST)
    return tmp_path


@pytest.mark.parametrize(
    ("damaged", "expected"), [([], 3), ([3], 2), ([3, 2], 1), ([2], 3), ([3, 1], 2)]
)
def test_a_training_goes_on_from_the_last_checkpoint_that_is_whole(
    trained, make_model, damaged, expected, caplog
):
    for iteration in damaged:
        truncate(trained / f"model_{iteration:07d}.pth", share=0.9 / iteration)
    model, progress = make_model(), Progress()
    with caplog.at_level(logging.WARNING, "dino_d2"):
        Checkpointer(model, str(trained), trainer=progress).resume_or_load("")
    assert progress.iteration == expected
    assert (model.decoder.norm.bias == expected).all()
    sentences = [
        x.message for x in caplog.records if "resumes from the checkpoint before" in x.message
    ]
    passed_over = [i for i in damaged if i > expected]
    assert len(sentences) == len(passed_over)
    for sentence, iteration in zip(sentences, sorted(passed_over, reverse=True), strict=True):
        assert f"model_{iteration:07d}.pth' is damaged" in sentence and "\n" not in sentence


def test_a_training_whose_checkpoints_are_all_damaged_does_not_begin_anew(trained, make_model):
    for path in trained.glob("model_0*.pth"):
        truncate(path)
    checkpointer = Checkpointer(make_model(), str(trained), trainer=Progress())
    with pytest.raises(CheckpointError, match="model_0000001.pth' is damaged"):
        checkpointer.resume_or_load("")


def test_a_checkpoint_that_does_not_fit_is_not_passed_over(trained, make_dino):
    checkpointer = Checkpointer(make_dino(num_queries=7), str(trained), trainer=Progress())
    with pytest.raises(CheckpointError, match="model_0000003.pth' does not fill the model"):
        checkpointer.resume_or_load("")


def test_the_best_checkpoint_is_not_what_a_training_goes_on_from(trained):
    assert (trained / f"{BEST}.pth").is_file()
    assert (trained / "last_checkpoint").read_text() == "model_0000003.pth"


@pytest.mark.parametrize("place", ["last_checkpoint", "model_0000003.pth"])
def test_a_training_is_found_without_the_note_which_file_is_the_last(trained, make_model, place):
    (trained / "last_checkpoint").unlink()
    (trained / "model_0000002.pth").rename(trained / "model_0000002.txt")
    (trained / place).unlink(missing_ok=True)
    progress = Progress()
    Checkpointer(make_model(), str(trained), trainer=progress).resume_or_load("")
    assert progress.iteration == (1 if place == "model_0000003.pth" else 3)


def test_thresholds_are_saved_with_the_weights_that_they_are_of(make_model, tmp_path):
    def saved():
        files = {x.stem: torch.load(x)["dino_d2"] for x in tmp_path.glob("*.pth")}
        return {name: x.get("thresholds") for name, x in files.items()}

    model, first, second = make_model(), {"thresholds": {"": 0.1}}, {"thresholds": {"": 0.2}}
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save("model_0000001", iteration=1)
    checkpointer.add_thresholds(1, first)
    checkpointer.save("model_0000002", iteration=2)
    for name in ("model_0000003", "model_final"):
        checkpointer.save(name, iteration=3)
    expected = {"model_0000001": {"": 0.1}} | dict.fromkeys(["model_0000002", "model_0000003"])
    assert saved() == expected | {"model_final": None}
    again = Checkpointer(model, str(tmp_path))  # the evaluation is made up for
    again.resume_or_load("", resume=True)
    again.add_thresholds(3, second)
    again.save(BEST, iteration=3)
    assert saved() == expected | {"model_final": {"": 0.2}, BEST: {"": 0.2}}
    checkpointer.add_thresholds(3, second)
    assert saved() == expected | dict.fromkeys(["model_0000003", "model_final", BEST], {"": 0.2})
