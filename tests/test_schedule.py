"""Learning rate and length for the batch and the data at hand."""

import copy

import pytest
import torch
from detectron2.config import LazyConfig, instantiate

from dino_d2.config.styles import get
from dino_d2.data import generate
from dino_d2.engine.plan import yaml_scheduler
from dino_d2.engine.schedule import scale_schedule
from dino_d2.weights import model_zoo

BATCH = {"yaml": "SOLVER.IMS_PER_BATCH", "py": "dataloader.train.total_batch_size"}
REFERENCE = {"yaml": "SOLVER.REFERENCE_BATCH", "py": "train.reference_batch"}
EPOCHS = {"yaml": "SOLVER.EPOCHS", "py": "train.epochs"}
LR = {"yaml": "SOLVER.BASE_LR", "py": "optimizer.lr"}
LENGTH = {"yaml": "SOLVER.MAX_ITER", "py": "train.max_iter"}
EVALUATION = {"yaml": "TEST.EVAL_PERIOD", "py": "train.eval_period"}
WARM_UP = {"yaml": "SOLVER.WARMUP_ITERS", "py": "lr_multiplier.warmup_length.iterations"}
SAVING = {"yaml": "SOLVER.CHECKPOINT_PERIOD", "py": "train.checkpointer.period"}
STYLES = ["yaml", "py"]


def config(style, values, name="dino_R_50_4scale_12ep"):
    cfg = model_zoo.get_config(f"{name}.{style}")
    if style == "py":
        return LazyConfig.apply_overrides(cfg, [f"{key}={x}" for key, x in values.items()])
    cfg.merge_from_list([x for pair in values.items() for x in pair])
    return cfg


@pytest.mark.parametrize("style", STYLES)
def test_a_config_for_its_own_batch_stays_as_it_is(style):
    cfg = config(style, {})
    before = copy.deepcopy(cfg)
    scale_schedule(cfg)
    assert cfg == before


def test_a_flat_rate_falls_by_a_cosine_in_yaml():
    cfg = config("yaml", {"SOLVER.LR_SCHEDULER_NAME": "WarmupFlatCosineLR"})
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.FLAT_SHARE = 100, 10, 0.4
    cfg.SOLVER.WARMUP_FACTOR, cfg.SOLVER.BASE_LR_END = 0.5, 0.2 * cfg.SOLVER.BASE_LR
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.SOLVER.BASE_LR)
    scheduler, rates = yaml_scheduler(cfg, optimizer), []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"] / cfg.SOLVER.BASE_LR)
        optimizer.step()
        scheduler.step()
    # warm-up from 0.5 to 1 in 10 steps; half of the cosine, from 1 to 0.2, at 40 + 60 / 2
    assert rates[0] == 0.5 and rates[5] == pytest.approx(0.75)
    assert rates[10:41] == [1] * 31
    assert rates[70] == pytest.approx(0.6) and 0.2 < rates[99] < 0.21


@pytest.mark.parametrize("style", STYLES)
def test_an_eighth_of_the_batch(style):
    cfg = config(style, {BATCH[style]: 2})
    scale_schedule(cfg)
    assert get(cfg, LR[style]) == pytest.approx(1e-4 / 8)
    assert get(cfg, LENGTH[style]) == 8 * 88716
    assert get(cfg, EVALUATION[style]) == get(cfg, SAVING[style]) == 8 * 7393
    if style == "yaml":
        assert cfg.SOLVER.STEPS == (8 * 81323,) and cfg.SOLVER.WARMUP_ITERS == 0


@pytest.mark.parametrize("style", STYLES)
def test_a_config_that_is_saved_is_not_scaled_again(style):
    cfg = config(style, {BATCH[style]: 4})
    scale_schedule(cfg)
    once = get(cfg, LR[style]), get(cfg, LENGTH[style])
    scale_schedule(cfg)
    assert (get(cfg, LR[style]), get(cfg, LENGTH[style])) == once


@pytest.mark.parametrize("style", STYLES)
def test_without_a_reference_nothing_is_scaled(style):
    cfg = config(style, {BATCH[style]: 2, REFERENCE[style]: 0})
    scale_schedule(cfg)
    assert (get(cfg, LR[style]), get(cfg, LENGTH[style])) == (1e-4, 88716)


@pytest.mark.parametrize("style", STYLES)
def test_what_is_given_stays(style):
    values = {BATCH[style]: 2, LR[style]: 3e-4, EVALUATION[style]: 10}
    cfg = config(style, values)
    scale_schedule(cfg, given=values)
    assert (get(cfg, LR[style]), get(cfg, EVALUATION[style])) == (3e-4, 10)
    assert get(cfg, LENGTH[style]) == 8 * 88716


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    generate(root, num_train=30, num_val=1)
    return f"{root}/train.json@{root}/images"


def on_dataset(style, dataset, values, **options):
    names = {"yaml": "DATASETS.TRAIN", "py": "dataloader.train.dataset.names"}
    value = (dataset,) if style == "yaml" else f"[{dataset}]"
    from dino_d2.data import register

    register([dataset])
    return config(style, values | {names[style]: value}, **options)


@pytest.mark.parametrize("style", STYLES)
def test_a_length_in_epochs_is_one_of_the_data_at_hand(style, dataset):
    cfg = on_dataset(style, dataset, {EPOCHS[style]: 24, BATCH[style]: 4})
    scale_schedule(cfg)
    assert get(cfg, LENGTH[style]) == 180  # 24 * 30 / 4
    assert get(cfg, EVALUATION[style]) == get(cfg, SAVING[style]) == 15  # a 12th, as before
    assert get(cfg, LR[style]) == pytest.approx(1e-4 / 4)
    if style == "yaml":
        assert cfg.SOLVER.STEPS == (165,)  # 11 of 12


@pytest.mark.parametrize("style", STYLES)
def test_what_happens_at_all_happens_in_a_short_training(style, dataset):
    cfg = on_dataset(style, dataset, {EPOCHS[style]: 0.2, BATCH[style]: 4})
    scale_schedule(cfg)
    assert get(cfg, LENGTH[style]) == 2  # of 1.5
    assert get(cfg, EVALUATION[style]) == get(cfg, SAVING[style]) == 1


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((400, 4, 100), 100),  # of 3000 iterations; 2400 in the config
        ((400, 2, 100), 200),  # as many images
        ((24, 4, 100), 9),  # of 180: 5 %
        ((24, 4, 480), 36),  # the 20 % that it was
        ((24, 4, 0), 0),
    ],
)
def test_a_warm_up_does_not_grow_and_shrink_with_the_data(style, values, expected, dataset):
    keys = EPOCHS[style], BATCH[style], WARM_UP[style]
    cfg = on_dataset(style, dataset, dict(zip(keys, values, strict=True)), name="quickstart")
    scale_schedule(cfg)
    assert get(cfg, WARM_UP[style]) == expected


def test_a_warm_up_in_iterations_is_one_whatever_the_length():
    cfg = config("py", {LENGTH["py"]: 500}, name="dino_ViTDet_L_4scale_12ep")  # 250 iterations
    multiplier = instantiate(cfg.lr_multiplier)
    rates = [multiplier(x) for x in (0, 0.25, 0.5, 0.9, 0.95)]
    assert rates == pytest.approx([0.001, 0.5, 1, 1, 0.1], abs=1e-3)
    cfg.train.max_iter = 100
    assert instantiate(cfg.lr_multiplier.warmup_length) == 1


def test_a_warm_up_that_is_a_share_stays_one(dataset):
    values = {EPOCHS["py"]: 24, "lr_multiplier.warmup_length": 0.05}
    cfg = on_dataset("py", dataset, values, name="quickstart")
    scale_schedule(cfg)
    assert cfg.lr_multiplier.warmup_length == 0.05


@pytest.mark.parametrize("style", STYLES)
def test_what_does_not_happen_stays_away(style, dataset):
    cfg = on_dataset(style, dataset, {EPOCHS[style]: 2, EVALUATION[style]: 0})
    scale_schedule(cfg)
    assert get(cfg, EVALUATION[style]) == 0


@pytest.mark.parametrize("style", STYLES)
def test_a_length_in_both_units_is_refused(style):
    values = {EPOCHS[style]: 2, LENGTH[style]: 100}
    with pytest.raises(ValueError, match=f"{EPOCHS[style]} and as {LENGTH[style]}"):
        scale_schedule(config(style, values), given=values)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("key", "value"), [(BATCH, 0), (BATCH, -2), (EPOCHS, -1), (EPOCHS, "abc"), (EPOCHS, 0)]
)
def test_numbers_that_cannot_be_are_one_sentence(style, key, value):
    with pytest.raises(ValueError, match=f"{key[style]} is .*{value}"):
        scale_schedule(config(style, {key[style]: value}))
