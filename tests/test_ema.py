"""Averaged weights."""

import copy

import pytest
import torch
from torch import nn

from dino_d2.engine.ema import EMA


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def set_all(model, value):
    with torch.no_grad():
        for x in model.state_dict().values():
            x.fill_(value)


def test_the_decay_grows_with_the_updates(model):
    set_all(model, 0)
    ema = EMA(model, decay=0.999)
    set_all(model, 1)
    ema.update()  # keeps 2 / 11 of 0
    assert torch.allclose(ema.weights["0.weight"], torch.tensor(9 / 11))
    ema.update()  # keeps 3 / 12 of 9 / 11
    assert torch.allclose(ema.weights["0.weight"], torch.tensor(9 / 11 / 4 + 3 / 4))


def test_the_decay_ends_where_it_is_set(model):
    set_all(model, 0)
    ema = EMA(model, decay=0.1)  # below 2 / 11
    set_all(model, 1)
    ema.update()
    assert torch.allclose(ema.weights["0.bias"], torch.tensor(0.9))


def test_running_statistics_are_averaged_and_counters_copied(model):
    set_all(model, 0)
    ema = EMA(model, decay=0.1)
    set_all(model, 7)
    ema.update()
    assert torch.allclose(ema.weights["1.running_var"], torch.tensor(6.3))
    assert ema.weights["1.num_batches_tracked"] == 7


def test_the_model_has_the_averaged_weights_meanwhile(model):
    ema = EMA(model, decay=0.9)
    before = copy.deepcopy(ema.weights)
    set_all(model, 5)
    raw = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt), ema.applied():
        assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
        raise KeyboardInterrupt
    assert all(torch.equal(x, raw[key]) for key, x in model.state_dict().items())
    assert all(torch.equal(x, before[key]) for key, x in ema.weights.items())


def test_resetting_forgets(model):
    ema = EMA(model, decay=0.9)
    ema.update()
    set_all(model, 3)
    ema.reset()
    assert ema.updates == 0 and all((x == 3).all() for x in ema.weights.values())


def test_it_goes_on_from_its_state(model):
    ema = EMA(model, decay=0.99)
    ema.update()
    set_all(model, 2)
    other = EMA(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), decay=0.99)
    other.load_state_dict(copy.deepcopy(ema.state_dict()))
    other.model = model
    ema.update()
    other.update()
    assert all(torch.equal(x, other.weights[key]) for key, x in ema.weights.items())


def test_the_average_does_not_share_the_models_memory(model):
    ema = EMA(model, decay=0.9)
    before = copy.deepcopy(ema.weights)
    set_all(model, 9)
    assert all(torch.equal(x, before[key]) for key, x in ema.weights.items())


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_a_decay_that_is_none(model, decay):
    with pytest.raises(ValueError, match=r"has to be in \[0, 1\)"):
        EMA(model, decay)
