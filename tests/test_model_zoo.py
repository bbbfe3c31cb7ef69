"""Names of published checkpoints: what config, weights and settings belong together."""

import os
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.modeling import build_model

from dino_d2.config.keys import add_dino_config
from dino_d2.config.styles import LAZY, get, keys_for
from dino_d2.layouts.dino import to_official
from dino_d2.layouts.renaming import CheckpointError
from dino_d2.weights import download as download_module
from dino_d2.weights import files, model_zoo, releases
from dino_d2.weights.checkpointer import Checkpointer
from dino_d2.weights.files import write
from dino_d2.weights.releases import RELEASES, Release

ROOT = Path(__file__).parents[1]


SWINS = {(96, 6): "T", (96, 18): "S", (128, 18): "B", (192, 18): "L"}


def describe(cfg):
    """What both styles of config say about the things that belong to weights."""
    if isinstance(cfg, CfgNode):
        c, swin = cfg.MODEL.DINO, cfg.MODEL.SWIN
        backbone = f"R_{cfg.MODEL.RESNETS.DEPTH}"
        if cfg.MODEL.BACKBONE.NAME == "SwinTransformer":
            backbone = f"Swin_{SWINS[swin.EMBED_DIM, swin.DEPTHS[2]]}_{swin.PRETRAIN_IMG_SIZE}"
        return {
            "weights": cfg.MODEL.WEIGHTS,
            "classes": c.NUM_CLASSES,
            "encoding": (c.POSITION_TEMPERATURE, c.POSITION_OFFSET),
            "shared_heads": c.SHARED_HEADS,
            "levels": c.NUM_LEVELS,
            "mean": list(cfg.MODEL.PIXEL_MEAN),
            "backbone": backbone,
        }
    backbone = cfg.model.backbone
    if "net" in backbone:
        backbone = f"ViTDet_{ {768: 'B', 1024: 'L'}[backbone.net.embed_dim] }".replace(" ", "")
    elif "depths" in backbone:
        size = SWINS[backbone.embed_dim, backbone.depths[2]]
        backbone = f"Swin_{size}_{backbone.pretrain_img_size}"
    else:
        family, size, *levels = backbone.name.split("_")  # of tiny, small, base, large
        family = {"convnext": "ConvNeXt", "focalnet": "FocalNet"}[family]
        backbone = "_".join([family, size[0].upper(), "384", *(x for x in levels if x != "fl3")])
    return {
        "weights": cfg.train.init_checkpoint,
        "classes": cfg.model.num_classes,
        "encoding": (
            cfg.model.encoder.position_temperature,
            cfg.model.encoder.position_offset,
        ),
        "shared_heads": cfg.model.decoder.shared_heads,
        "levels": cfg.model.encoder.num_levels,
        "mean": list(cfg.model.pixel_mean),
        "backbone": backbone,
    }


# ---- the table


DINOS = [name for name in RELEASES if "/dino_" in name]
PREDECESSORS = [name for name in RELEASES if name not in DINOS]


@pytest.mark.parametrize("name", DINOS)
def test_the_config_of_a_published_checkpoint_is_made_for_it(name):
    release = RELEASES[name]
    found = describe(model_zoo.get_config(name, trained=True))
    assert found["weights"] == f"dino_d2://{name}" and found["classes"] == 80
    assert found["encoding"] == release.encoding
    assert found["shared_heads"] == name.startswith("official/")
    assert found["mean"] == [123.675, 116.28, 103.53]
    assert found["levels"] == int(re.search(r"(\d)scale", name)[1])
    assert f"dino_{found['backbone']}_" in name


@pytest.mark.parametrize("name", RELEASES)
def test_a_published_checkpoint_is_named_after_its_training(name):
    release = RELEASES[name]
    assert release.name == name
    # semantic models are named after their iterations
    assert f"_{release.epochs}ep" in name or (release.metric == "mIoU" and "0k_" in name)
    assert 42 <= release.ap <= (59 if release.metric == "AP" else 80)
    assert release.url.startswith("https://")
    assert release.file.endswith((".pth", ".safetensors"))
    encodings = [(20.0, 0.0), (10000.0, -0.5)] if name in DINOS else [None]
    assert release.encoding in encodings


@pytest.mark.parametrize("name", PREDECESSORS)
def test_another_model_has_the_config_of_its_name(name):
    cfg = model_zoo.get_config(name, trained=True)
    folder = "MaskDINO" if name.startswith("maskdino/") else "Predecessors"
    stem, number = name.split("/")[1].removesuffix("_new"), RELEASES[name].num_classes
    keys = keys_for(cfg)
    assert RELEASES[name].config == f"{folder}/{stem}" + (".py" if keys is LAZY else "")
    assert get(cfg, keys.weights) == f"dino_d2://{name}" and get(cfg, keys.num_classes) == number
    classes = {"panoptic": 133, "ade20k": 150, "cityscapes": 19}
    assert number == classes.get(name.rpartition("_")[2], 80)


def test_a_file_name_tells_which_published_checkpoint_it_is():
    """Where no tensor tells the encoding of pixels."""
    files = [release.file for release in RELEASES.values() if release.encoding]
    assert len(set(files)) == len(files) == 49
    assert len(RELEASES) == 49 + 25


def test_official_files_lie_in_a_folder_unless_there_is_a_mirror():
    in_folder = {x.name for x in RELEASES.values() if x.in_folder}
    official = {name for name in RELEASES if name.startswith("official/")}
    mirrored = ("R_50_4scale_12ep", "R_50_5scale_12ep", "Swin_L_384_5scale_36ep")
    assert in_folder == official - {f"official/dino_{x}" for x in mirrored}
    assert all(x.sha256 for x in RELEASES.values() if x.name in official - in_folder)


def test_figures_are_those_that_their_authors_state():
    stated = {
        "official/dino_R_50_4scale_12ep": 49.0,
        "official/dino_R_50_5scale_24ep": 51.3,
        "official/dino_Swin_L_384_5scale_36ep": 58.5,
        "detrex/dino_R_50_4scale_12ep": 49.2,
        "detrex/dino_Swin_T_224_4scale_12ep": 51.3,
        "mmdet/dino_R_50_4scale_12ep": 49.0,
    }
    assert {name: RELEASES[name].ap for name in stated} == stated


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(FileNotFoundError, match="detrex/dino_R_101_4scale_12ep"):
        releases.find("detrex/dino_R101_4scale_12ep")


def test_a_name_like_no_other_is_answered_with_what_there_is():
    with pytest.raises(FileNotFoundError) as caught:
        releases.find("?")
    listed = [name for name in RELEASES if f" {name}" in str(caught.value)]
    assert listed == list(RELEASES)[: len(listed)]
    assert f"and {len(RELEASES) - len(listed)} more" in str(caught.value)


# ---- configs by name


def test_a_published_name_stands_for_its_config():
    for name, release in RELEASES.items():
        assert model_zoo.get_config_file(name) == model_zoo.get_config_file(release.config)
        assert os.path.isfile(model_zoo.get_config_file(name))


@pytest.mark.parametrize("name", ["mine.yaml", "mine.txt", "quickstart.yaml"])
def test_a_file_that_exists_is_its_own_config(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    assert model_zoo.get_config_file(name) == name
    assert model_zoo.get_config_file("https://host/a.yaml") == "https://host/a.yaml"


def test_a_file_keeps_the_weights_that_it_names(tmp_path):
    (tmp_path / "a.yaml").write_text("MODEL: {WEIGHTS: mine.pth, DINO: {NUM_CLASSES: 7}}")
    cfg = model_zoo.get_config(str(tmp_path / "a.yaml"), trained=True)
    assert model_zoo.weights_of(cfg) == "mine.pth" and cfg.MODEL.DINO.NUM_CLASSES == 7


@pytest.mark.parametrize(
    "name", ["detrex/dino_R_50_4scale_12ep", "detrex/dino_Swin_B_384_4scale_12ep"]
)
def test_without_its_weights_a_config_starts_from_imagenet(name):
    cfg = describe(model_zoo.get_config(name))
    assert not cfg["weights"].startswith("dino_d2://") and cfg["weights"]
    assert cfg["classes"] != 80


@pytest.mark.parametrize("name", ["dino_R_101_4scale_12ep", "quickstart.py"])
def test_a_config_without_published_weights_is_not_trained(name):
    with pytest.raises(FileNotFoundError, match="no published checkpoint"):
        model_zoo.get_config(name, trained=True)


@pytest.mark.parametrize("name", [x for x in RELEASES if x.startswith("official/")])
def test_without_a_prefix_a_name_means_the_checkpoint_of_the_papers_authors(name):
    bare = name.removeprefix("official/")
    assert releases.find(bare).name == name
    bare, full = (describe(model_zoo.get_config(x, trained=True)) for x in (bare, name))
    assert bare == full and full["weights"] == f"dino_d2://{name}"


def test_what_cannot_be_downloaded_has_alternatives_of_its_family_that_can():
    found = releases.alternatives("dino_Swin_L_384_5scale_12ep")
    assert found[0] == "official/dino_Swin_L_384_5scale_36ep"  # which has a mirror
    assert all("Swin_L_384_5scale" in name and not RELEASES[name].in_folder for name in found)
    assert releases.alternatives("detrex/dino_R_50_4scale_24ep") == []
    assert releases.alternatives("nowhere") == []


def test_a_misspelt_file_is_answered_with_the_nearest_file(tmp_path):
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(FileNotFoundError, match=f"mean: {tmp_path}/mine.yaml$"):
        model_zoo.get_config_file(str(tmp_path / "mime.yaml"))


def test_weights_that_are_like_nothing_are_said_not_to_be_there():
    with pytest.raises(CheckpointError, match="^'nowhere/at/all.pth' is not a file$"):
        model_zoo.fetch_weights("nowhere/at/all.pth")


def test_a_config_that_is_not_there_is_answered_with_all():
    with pytest.raises(FileNotFoundError, match="quickstart, "):
        model_zoo.get_config_file("?")


# ---- models by name


@pytest.fixture(params=["quickstart", "quickstart.py"])
def published(request, monkeypatch, tmp_path):
    """A small checkpoint as if it were published: its name, and the file at the other end."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    url = "https://example.com/releases/tiny.pth"
    release = Release(
        "detrex/tiny", request.param, 12, 0.0, (20.0, 0.0), url, "tiny.pth", "", "MIT"
    )
    monkeypatch.setitem(RELEASES, release.name, release)

    def download(url, path, sha256):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.replace(tmp_path / "there.pth", path)

    for module in (files, download_module):
        monkeypatch.setattr(module, "download", download)
    return release.name, tmp_path / "there.pth"


@pytest.fixture
def trained():
    """The small model, of COCO's classes."""
    cfg = model_zoo.get_config("quickstart.py")
    cfg.model.num_classes = 80
    return instantiate(cfg.model)


def test_one_name_gives_a_model_with_its_weights(published, trained):
    name, there = published
    write({"model": trained.state_dict()} | Checkpointer(trained).description(), str(there))
    model = model_zoo.get(name, device="cpu")
    assert not model.training and model.num_classes == 80
    for key, x in model.state_dict().items():
        assert torch.equal(x, trained.state_dict()[key]), key
    assert not there.exists()  # downloaded once
    model_zoo.get(name, device="cpu")


def test_one_name_gives_config_and_weights_to_whoever_builds_them(published, trained):
    name, there = published
    write({"model": trained.state_dict()}, str(there))
    cfg = model_zoo.get_config(name, trained=True)
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE = "cpu"
        model, weights = build_model(cfg), cfg.MODEL.WEIGHTS
    else:
        model, weights = instantiate(cfg.model), cfg.train.init_checkpoint
    Checkpointer(model, complete=True).load(weights)
    key = "decoder.class_heads.0.weight"
    assert torch.equal(model.state_dict()[key], trained.state_dict()[key])


@pytest.mark.parametrize("available", [True, False])
def test_the_device_is_the_gpu_if_there_is_one(published, trained, monkeypatch, available):
    name, there = published
    write({"model": trained.state_dict()}, str(there))
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(
        model_zoo, "build_model", lambda cfg: asked.append(cfg.MODEL.DEVICE) or trained
    )
    monkeypatch.setattr(type(trained), "to", lambda self, device: asked.append(device) or self)
    model_zoo.get(name)
    assert asked[0] == ("cuda" if available else "cpu")


@pytest.mark.parametrize("config", ["quickstart", "quickstart.py"])
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_one_sentence(monkeypatch, config, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no GPU") as caught:
        model_zoo.build(model_zoo.get_config(config), 3, device)
    assert f"'{device}'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("config", ["quickstart", "quickstart.py"])
def test_a_device_that_pytorch_does_not_know_is_one_sentence(config):
    with pytest.raises(ValueError, match="'foo'") as caught:
        model_zoo.build(model_zoo.get_config(config), 3, "foo")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", ["quickstart", "quickstart.py"])
def test_a_model_is_built_for_as_many_classes_as_asked_for(config):
    model = model_zoo.build(model_zoo.get_config(config), 7, "cpu")
    assert len(model.decoder.class_heads[0].bias) == model.num_classes == 7


def test_a_config_of_another_model_is_one_sentence():
    cfg = get_cfg()
    add_dino_config(cfg)
    with pytest.raises(ValueError, match=r"that of a GeneralizedRCNN, not of a DINO"):
        model_zoo.build(cfg, 3, "cpu")


def test_weights_of_a_config_are_those_that_it_names():
    yaml, lazy = (model_zoo.get_config(name) for name in ("quickstart", "quickstart.py"))
    yaml.MODEL.WEIGHTS = lazy.train.init_checkpoint = "a.pth"
    assert model_zoo.weights_of(yaml) == model_zoo.weights_of(lazy) == "a.pth"


def test_an_official_checkpoint_downloaded_by_hand_becomes_a_model(monkeypatch, tmp_path):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    release = RELEASES["official/dino_R_50_4scale_12ep"]
    cfg = model_zoo.get_config(release.name)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.DINO.NUM_CLASSES", 91])
    trained = build_model(cfg)
    (tmp_path / "dino_d2").mkdir()
    # the name that the downloaded file has
    write({"model": to_official(trained.state_dict())}, str(tmp_path / "dino_d2" / release.file))
    model = model_zoo.get(release.name, device="cpu")
    key = "decoder.layers.5.cross_attn.value_proj.weight"
    assert torch.equal(model.state_dict()[key], trained.state_dict()[key])
    # toothbrush is the last of both
    classes = [x.decoder.class_heads[0].weight[-1] for x in (model, trained)]
    assert torch.equal(*classes) and model.num_classes == 80


def test_published_weights_that_do_not_fill_the_model_are_refused(published, trained):
    name, there = published
    state = trained.state_dict()
    state["encoder.level_embed.weight"] = torch.ones(1, 128)
    write({"model": state}, str(there))
    with pytest.raises(CheckpointError, match="level_embed.weight would be random"):
        model_zoo.get(name, device="cpu")


def test_without_a_network_one_sentence_says_what_to_do(published, monkeypatch):
    def fail(*args, **options):
        raise urllib.error.URLError("Name or service not known")

    for module in (files, download_module):
        monkeypatch.setattr(module, "download", fail)
    with pytest.raises(CheckpointError) as caught:
        model_zoo.get(published[0], device="cpu")
    message = str(caught.value)
    assert published[0] in message and "Name or service not known" in message
    assert "copy the file here" in message and "\n" not in message
