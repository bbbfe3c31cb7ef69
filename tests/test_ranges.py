"""Numbers that cannot be are refused where they are used, by their names."""

import pytest

from dino_d2 import modeling, ranges
from dino_d2.solver import ClippedAdamW, parameter_groups


@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, True, "3", None])
def test_what_is_no_number_of_things_is_refused(value):
    with pytest.raises(ValueError, match="^layers is .*; it has to be a whole number from 1 on$"):
        ranges.require_whole(heads=1, layers=value)


def test_a_number_of_things_may_be_allowed_to_be_nothing():
    ranges.require_whole(0, period=0)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "0.5", None, True])
def test_what_is_no_share_is_refused(value):
    with pytest.raises(ValueError, match="^dropout is .*; it has to be a number from 0 to 1$"):
        ranges.require_share(dropout=value)


@pytest.mark.parametrize("value", [-1, float("inf"), float("nan"), "1"])
def test_a_weight_is_finite_and_not_negative(value):
    with pytest.raises(ValueError, match="^weight is .*, not below 0$"):
        ranges.require_not_negative(weight=value)
    ranges.require_not_negative(weight=0)


@pytest.mark.parametrize("value", [0, -1.0, float("inf")])
def test_a_divisor_is_above_nothing(value):
    with pytest.raises(ValueError, match="^std is .* above 0$"):
        ranges.require_positive(std=value)


STAGES = [
    (modeling.MixedQuerySelection, "num_queries", 0, {"embed_dim": 32, "num_classes": 3}),
    (modeling.StaticQueries, "num_queries", -1, {"embed_dim": 32, "num_classes": 3}),
    (modeling.Encoder, "embed_dim", 0, {}),
    (modeling.Encoder, "ffn_dim", 0, {}),
    (modeling.Encoder, "num_heads", 0, {}),
    (modeling.Encoder, "num_points", 0, {}),
    (modeling.Encoder, "dropout", 1.5, {}),
    (modeling.Encoder, "position_temperature", 0.0, {}),
    (modeling.Decoder, "num_classes", 0, {}),
    (modeling.Decoder, "ffn_dim", 2.5, {"num_classes": 3}),
    (modeling.Denoising, "label_noise", -0.5, {"num_classes": 3, "embed_dim": 32}),
    (modeling.Denoising, "box_noise", -1.0, {"num_classes": 3, "embed_dim": 32}),
    (modeling.HungarianMatcher, "class_cost", -2.0, {}),
    (modeling.SetCriterion, "giou_weight", -2.0, {"matcher": None}),
    (modeling.SetCriterion, "denoising_class_weight", float("nan"), {"matcher": None}),
    (parameter_groups, "backbone_multiplier", -0.1, {"model": None, "lr": 0.1}),
    (parameter_groups, "norm_weight_decay", -0.1, {"model": None, "lr": 0.1}),
    (ClippedAdamW, "max_norm", -0.1, {"params": []}),
]


@pytest.mark.parametrize(("stage", "name", "value", "others"), STAGES)
def test_a_stage_refuses_a_number_that_it_cannot_work_with(stage, name, value, others):
    with pytest.raises(ValueError, match=f"^{name} is {value}; it has to be"):
        stage(**others, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("num_queries", 0), ("max_detections", 0), ("budget", 0)]
)
def test_a_detector_refuses_numbers_of_nothing(name, value, make_dino):
    with pytest.raises(ValueError, match=rf"{name}\b.* is 0; it has to be"):
        make_dino(**{name: value})
