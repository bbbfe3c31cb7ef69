from functools import partial

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling.backbone import swin
from torch import nn
from torch.export import Dim

from dino_d2.modeling.swin import SwinTransformer, window_reverse
from dino_d2.weights import model_zoo

SMALL_DETECTOR = [
    *("model.encoder.embed_dim=64", "model.encoder.num_heads=2", "model.encoder.ffn_dim=32"),
    *("model.encoder.num_layers=1", "model.decoder.num_layers=1"),
    *("model.query_selection.num_queries=10", "model.num_classes=3"),
]
SMALL = [
    *("model.backbone.embed_dim=24", "model.backbone.depths=[1,1,1,1]"),
    *("model.backbone.num_heads=[1,2,3,6]", "model.backbone.window_size=4"),
    *(f"model.neck.input_shape.p{i}.channels={24 * 2**i}" for i in range(4)),
    *SMALL_DETECTOR,
]


@pytest.mark.parametrize("levels", [4, 5])
def test_dino_learns_with_a_swin_transformer(levels, make_batch):
    cfg = model_zoo.get_config(f"dino_Swin_L_384_{levels}scale_12ep.py")
    model = instantiate(LazyConfig.apply_overrides(cfg, SMALL).model)
    losses = model(make_batch(2, 0, sizes=[(70, 90), (64, 64)]))
    sum(losses.values()).backward()
    idle = [name for name, x in model.named_parameters() if x.grad is None]
    assert not idle and all(x.isfinite() for x in losses.values())
    # strides 8, 16 and 32 of 70 x 90 pixels, rounded up, and half of the last; 5 scales: 4 as well
    shapes = [(9, 12), (5, 6), (3, 3), (2, 2)]
    with torch.no_grad():
        found = model.neck(model.backbone(torch.zeros(1, 3, 70, 90)))
    assert [tuple(x.shape[-2:]) for x in found][levels - 4 :] == shapes


# Parameters of the paper's classifiers in millions, and the channels of their last stage.
SIZES = {"T_224": (29, 768), "S_224": (50, 768), "B_384": (88, 1024), "L_384": (197, 1536)}


@pytest.mark.parametrize("size", SIZES)
def test_backbones_have_the_papers_sizes(size, monkeypatch):
    monkeypatch.setattr(
        torch, "linspace", partial(torch.linspace, device="cpu")
    )  # rates of dropping
    cfg = model_zoo.get_config(f"dino_Swin_{size}_4scale_12ep.py")
    with torch.device("meta"):
        backbone = instantiate(cfg.model.backbone)
    millions, channels = SIZES[size]
    classifier = 1000 * (channels + 1)
    total = sum(x.numel() for x in backbone.parameters()) + classifier
    assert total / 1e6 == pytest.approx(millions, abs=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize(
    "size", [x if x.startswith("T") else pytest.param(x, marks=pytest.mark.nightly) for x in SIZES]
)
def test_dino_learns_with_each_size_of_the_paper(size, make_batch, monkeypatch):
    monkeypatch.setattr(nn.init, "trunc_normal_", nn.init.normal_)  # much faster
    cfg = model_zoo.get_config(f"dino_Swin_{size}_4scale_12ep.py")
    model = instantiate(LazyConfig.apply_overrides(cfg, SMALL_DETECTOR).model)
    sum(model(make_batch(1, sizes=[(65, 67)])).values()).backward()
    assert [name for name, x in model.named_parameters() if x.grad is None] == []
    first = model.backbone.patch_embed.proj.weight
    assert first.grad.isfinite().all() and first.grad.any()


def test_images_are_not_padded_for_it(make_dino, make_batch):
    model = make_dino()
    model.backbone = SwinTransformer(embed_dim=24, depths=[1], num_heads=[1], out_indices=[0])
    image = model.preprocess_images(make_batch(0, sizes=[(65, 67)])).tensor
    assert image.shape[-2:] == (65, 67)
    assert model.backbone(image)["p0"].shape[-2:] == (17, 17)  # windows of 4 pixels, rounded up


def test_later_blocks_are_left_out_more_often():
    model = SwinTransformer(
        embed_dim=24, depths=[1, 2], num_heads=[1, 1], out_indices=[1], drop_path_rate=0.3
    )
    rates = [block.drop_path.p for layer in model.layers for block in layer.blocks]
    assert rates == pytest.approx([0, 0.15, 0.3])


def test_windows_are_put_together_as_they_were_taken_apart():
    image = torch.rand(2, 12, 20, 3)
    windows = swin.window_partition(image, 4)
    assert len(windows) == 2 * 3 * 5
    assert window_reverse(windows, 4, 12, 20).equal(image)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_its_graph_is_for_any_number_of_images():
    model = SwinTransformer(
        embed_dim=8, depths=[2, 1], num_heads=[1, 1], window_size=4, out_indices=[0, 1]
    ).eval()
    images = torch.rand(3, 3, 30, 44)
    graph = torch.export.export(model, (images[:2],), dynamic_shapes=({0: Dim("batch", min=1)},))
    for count in (1, 3):
        torch.testing.assert_close(graph.module()(images[:count]), model(images[:count]))


def test_a_feature_map_of_another_backbone_is_one_sentence():
    cfg = model_zoo.get_config("dino_R_50_4scale_12ep")
    cfg.MODEL.BACKBONE.NAME = "SwinTransformer"
    with pytest.raises(ValueError, match=r"no feature map 'res3': name those .* of p0, p1, p2, p3"):
        model_zoo.build(cfg, 3, "cpu")
