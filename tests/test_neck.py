import pytest
import torch
from detectron2.layers import ShapeSpec
from torch.nn import functional as F

from dino_d2.modeling import ChannelMapper

CHANNELS = {"res2": 4, "res3": 8, "res4": 16, "res5": 24}


def make_neck(in_features=("res3", "res4", "res5"), num_levels=4):
    shape = {name: ShapeSpec(channels=channels) for name, channels in CHANNELS.items()}
    return ChannelMapper(
        input_shape=shape, in_features=in_features, out_channels=64, num_levels=num_levels
    )


@pytest.fixture
def features():
    """Of a 76 x 100 image: sides that are not multiples of the strides."""
    sides = [(19, 25), (10, 13), (5, 7), (3, 4)]
    return {
        name: torch.randn(2, channels, *side)
        for (name, channels), side in zip(CHANNELS.items(), sides, strict=True)
    }


@pytest.mark.parametrize(
    ("in_features", "num_levels", "sides"),
    [
        (("res3", "res4", "res5"), 3, [(10, 13), (5, 7), (3, 4)]),
        (("res3", "res4", "res5"), 4, [(10, 13), (5, 7), (3, 4), (2, 2)]),
        (("res2", "res3", "res4", "res5"), 5, [(19, 25), (10, 13), (5, 7), (3, 4), (2, 2)]),
        (("res4",), 4, [(5, 7), (3, 4), (2, 2), (1, 1)]),
    ],
)
def test_levels_have_the_sides_of_their_features_and_then_halve(
    features, in_features, num_levels, sides
):
    levels = make_neck(in_features, num_levels)(features)
    assert [tuple(x.shape) for x in levels] == [(2, 64, *side) for side in sides]


def conv_norm(x, module, stride=1):
    """A convolution that pads to keep sides, and GroupNorm of 32 groups without affine part."""
    conv, _ = module
    y = F.conv2d(x, conv.weight, conv.bias, stride=stride, padding=conv.weight.shape[-1] // 2)
    groups = y.view(len(y), 32, -1)
    mean, var = groups.mean(-1, keepdim=True), groups.var(-1, keepdim=True, unbiased=False)
    return ((groups - mean) / (var + 1e-5).sqrt()).view_as(y)


def test_levels_are_normalised_convolutions_and_the_coarse_ones_a_chain(features):
    neck = make_neck(("res4", "res5"), 4)
    levels = neck(features)
    expected = [
        conv_norm(features[name], module)
        for name, module in zip(("res4", "res5"), neck.projections, strict=True)
    ]
    x = features["res5"]  # the backbone's feature, not its projection
    for module in neck.downsamples:
        assert module[0].weight.shape[-2:] == (3, 3)
        x = conv_norm(x, module, stride=2)
        expected.append(x)
    torch.testing.assert_close(levels, expected, rtol=1e-4, atol=1e-4)


def test_more_features_than_levels_are_refused():
    with pytest.raises(ValueError, match=r"2 levels cannot hold .*'res3', 'res4', 'res5'"):
        make_neck(num_levels=2)


def test_channels_that_do_not_divide_into_groups_are_refused():
    with pytest.raises(ValueError, match="48 channels"):
        ChannelMapper(input_shape={"x": ShapeSpec(channels=3)}, in_features=["x"], out_channels=48)


def test_a_feature_that_the_backbone_has_not_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="'res9', which the backbone does not have; did you mean"):
        ChannelMapper(input_shape={"res3": ShapeSpec(channels=3)}, in_features=["res9"])
