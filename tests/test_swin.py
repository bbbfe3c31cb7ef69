import pytest
import torch
from detectron2.config import LazyConfig, instantiate

from dino_d2 import model_zoo
from dino_d2.modeling.swin import SwinTransformer

SMALL = [
    *("model.backbone.embed_dim=24", "model.backbone.depths=[1,1,1,1]"),
    *("model.backbone.num_heads=[1,2,3,6]", "model.backbone.window_size=4"),
    *(f"model.neck.input_shape.p{i}.channels={24 * 2**i}" for i in range(4)),
    *("model.encoder.embed_dim=32", "model.encoder.num_heads=2", "model.encoder.ffn_dim=32"),
    *("model.encoder.num_layers=1", "model.decoder.num_layers=1"),
    *("model.query_selection.num_queries=10", "model.num_classes=3"),
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


def test_images_are_not_padded_for_it():
    assert (
        SwinTransformer(embed_dim=24, depths=[1], num_heads=[1], out_indices=[0]).size_divisibility
        == 0
    )


def test_later_blocks_are_left_out_more_often():
    model = SwinTransformer(
        embed_dim=24, depths=[1, 2], num_heads=[1, 1], out_indices=[1], drop_path_rate=0.3
    )
    rates = [block.drop_path.p for layer in model.layers for block in layer.blocks]
    assert rates == pytest.approx([0, 0.15, 0.3])
