import copy

import pytest
import torch
from torch import nn

from dino_d2.modeling.query_selection import PointQueries
from dino_d2.solver import ClippedAdamW, parameter_groups


def make_parameters(*grads):
    parameters = [nn.Parameter(torch.zeros(1)) for _ in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = torch.tensor([grad])
    return parameters


@pytest.mark.parametrize(
    ("grads", "max_norm", "expected"),
    [
        ((3.0, 4.0), 0.1, (0.06, 0.08)),  # norm 5 to 0.1; each by itself would become 0.1
        ((3.0, 4.0), 2.5, (1.5, 2.0)),
        ((3.0, 4.0), 5.1, (3.0, 4.0)),  # short enough
        ((3.0, 4.0), 0.0, (3.0, 4.0)),  # off
    ],
)
@pytest.mark.parametrize("split", [False, True])
def test_the_norm_over_all_parameters_of_all_groups_is_clipped(grads, max_norm, expected, split):
    first, second = make_parameters(*grads)
    groups = [{"params": [first]}, {"params": [second]}] if split else [first, second]
    ClippedAdamW(groups, max_norm=max_norm, lr=1e-3).step()
    assert (first.grad.item(), second.grad.item()) == pytest.approx(expected, rel=1e-5)


def test_parameters_without_a_gradient_are_left_alone():
    (trained,), unused = make_parameters(3.0), nn.Parameter(torch.ones(1))
    ClippedAdamW([trained, unused], lr=1e-3).step()
    assert trained.grad.item() == pytest.approx(0.1) and unused.item() == 1


def test_a_step_is_that_of_adamw():
    (parameter,) = make_parameters(3.0)
    nn.init.ones_(parameter)
    ClippedAdamW([parameter], lr=0.1, weight_decay=0.2).step()
    # decay by 0.1 * 0.2, then the first step of Adam is lr whatever the gradient
    assert parameter.item() == pytest.approx(0.98 - 0.1, rel=1e-5)


def test_the_gradient_of_a_closure_is_clipped():
    (parameter,) = make_parameters(0.0)
    optimizer = ClippedAdamW([parameter], lr=0.1, max_norm=0.1)

    def closure():
        optimizer.zero_grad()
        loss = 5 * parameter.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 0
    assert parameter.grad.item() == pytest.approx(0.1)


def test_a_scaler_takes_its_scale_back_before_gradients_are_clipped():
    """As in trainers that leave it to the scaler: the gradient of 3 is clipped to 0.5."""
    (parameter,) = make_parameters(0.0)
    optimizer = ClippedAdamW([parameter], lr=0.1, max_norm=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.zero_grad()
    scaler.scale(3 * parameter.sum()).backward()
    scaler.step(optimizer)
    # of a first step the average is a tenth of the gradient
    assert optimizer.state[parameter]["exp_avg"].item() == pytest.approx(0.05, rel=1e-4)


def test_a_copy_clips_as_well():
    (parameter,) = make_parameters(3.0)
    twin = copy.deepcopy(ClippedAdamW([parameter], lr=0.1, max_norm=0.2))
    twin.param_groups[0]["params"][0].grad = torch.tensor([3.0])
    twin.step()
    assert twin.param_groups[0]["params"][0].grad.item() == pytest.approx(0.2)


def run(optimizer, parameter, grads):
    for grad in grads:
        parameter.grad = torch.tensor([grad])
        optimizer.step()


def test_training_goes_on_from_a_state_dict_as_if_never_stopped():
    (whole,), (before,), (after,) = (make_parameters(0.0) for _ in range(3))
    options = {"lr": 0.1, "max_norm": 1.0}
    run(ClippedAdamW([whole], **options), whole, [3.0, -0.5, 2.0, 0.1])
    run(first := ClippedAdamW([before], **options), before, [3.0, -0.5])
    second = ClippedAdamW([after], **options)
    second.load_state_dict(first.state_dict())
    after.data.copy_(before.data)
    run(second, after, [2.0, 0.1])
    assert after.item() == whole.item() and second.defaults["max_norm"] == 1.0


# ---- parameter groups


@pytest.fixture
def model():
    parts = {name: nn.Linear(2, 2) for name in ("backbone", "decoder", "backbone_like")}
    return nn.ModuleDict(parts)


def test_the_backbone_has_a_learning_rate_of_its_own(model):
    backbone, others = parameter_groups(model, lr=1e-4, weight_decay=0, backbone_multiplier=0.1)
    assert others["lr"] == 1e-4 and backbone["lr"] == pytest.approx(1e-5)
    assert set(backbone["params"]) == set(model["backbone"].parameters())
    expected = {*model["decoder"].parameters(), *model["backbone_like"].parameters()}
    assert set(others["params"]) == expected


def rates(model, **options):
    """Learning rate of every parameter, and how many groups there are."""
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, **options)
    of = [(parameter, group["lr"]) for group in groups for parameter in group["params"]]
    assert len(of) == len(dict(of)) == len(list(model.parameters()))  # each in one group
    of = dict(of)
    return {name: of[parameter] for name, parameter in model.named_parameters()}, len(groups)


@pytest.mark.parametrize(
    ("backbone", "offsets", "count"),
    [(0.5, 0.1, 3), (0.1, 0.1, 2), (1.0, 0.1, 2), (0.1, 1.0, 2), (1.0, 1.0, 1)],
)
def test_linear_layers_that_say_where_to_look_have_a_learning_rate_of_their_own(
    make_dino, backbone, offsets, count
):
    model = make_dino()
    model.query_selection = PointQueries(num_queries=2, embed_dim=64)
    by_name, num_groups = rates(model, backbone_multiplier=backbone, offsets_multiplier=offsets)
    assert num_groups == count
    where = {"query_selection.reference_points"}
    where |= {f"encoder.layers.{i}.self_attn.sampling_offsets" for i in range(2)}
    where |= {f"decoder.layers.{i}.cross_attn.sampling_offsets" for i in range(2)}
    for name, rate in by_name.items():
        module = name.rpartition(".")[0]
        expected = offsets if module in where else backbone if name[:9] == "backbone." else 1.0
        assert rate == expected, name
    assert where < {name.rpartition(".")[0] for name in by_name}


def test_offsets_learn_like_the_rest_unless_told_otherwise(make_dino):
    by_name, _ = rates(make_dino())
    assert set(by_name.values()) == {1.0, 0.1}
    assert all((rate == 0.1) == name.startswith("backbone.") for name, rate in by_name.items())


def test_frozen_parameters_are_left_out(model):
    model["backbone"].weight.requires_grad_(False)
    model["decoder"].bias.requires_grad_(False)
    groups = parameter_groups(model, lr=1e-4, weight_decay=0)
    assert [len(group["params"]) for group in groups] == [1, 3]


def test_a_frozen_backbone_has_no_group(model):
    model["backbone"].requires_grad_(False)
    groups = parameter_groups(model, lr=1e-4, weight_decay=0)
    assert [group["lr"] for group in groups] == [1e-4]


@pytest.mark.parametrize(("given", "expected"), [(None, 0.1), (0.0, 0.0), (0.02, 0.02)])
def test_normalisation_layers_have_a_weight_decay_of_their_own(make_dino, given, expected):
    model = make_dino()
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, norm_weight_decay=given)
    of = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    norms = [x for x in model.modules() if isinstance(x, (nn.LayerNorm, nn.GroupNorm))]
    in_norms = {parameter for norm in norms for parameter in norm.parameters()}
    assert len(in_norms) > 20
    assert {of[parameter] for parameter in in_norms} == {expected}
    assert {of[parameter] for parameter in of.keys() - in_norms} == {0.1}
