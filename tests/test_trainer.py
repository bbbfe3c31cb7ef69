"""A step of training: precision, accumulation, losses that are not finite, going on."""

import copy
import itertools
import logging
from contextlib import nullcontext

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from dino_d2.engine.trainer import MAX_SKIPPED, NonFiniteLoss, Trainer
from dino_d2.layouts.renaming import CheckpointError
from dino_d2.modeling import Denoising
from dino_d2.solver import ClippedAdamW, parameter_groups
from dino_d2.weights.files import read


class Stream:
    """Batches over and over again."""

    def __init__(self, *batches, seed=5):
        self.batches, self.seed, self.start = batches, seed, 0

    def __iter__(self):
        return itertools.islice(itertools.cycle(self.batches), self.start, None)


@pytest.fixture
def make_trainer(make_dino, tmp_path):
    def make(*batches, model=None, optimizer=None, **options):
        model = model or make_dino()
        optimizer = optimizer or ClippedAdamW(parameter_groups(model, lr=1e-3))
        return Trainer(model, Stream(*batches), optimizer, output_dir=str(tmp_path), **options)

    return make


def run(trainer, steps, start=0):
    """The metrics of each step."""
    metrics = []
    with EventStorage(start) as trainer.storage:
        for trainer.iter in range(start, start + steps):
            trainer.storage.iter = trainer.iter
            trainer.run_step()
            metrics.append({k: v for k, (v, _) in trainer.storage.latest().items()})
    return metrics


def weights(trainer):
    return {key: x.clone() for key, x in trainer.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, b[key]) for key, x in a.items())


def test_a_step_is_that_of_a_loop_written_by_hand(make_trainer, make_batch):
    batch = make_batch(2, 0)
    trainer = make_trainer(batch)
    by_hand = copy.deepcopy(trainer.model)
    optimizer = ClippedAdamW(parameter_groups(by_hand, lr=1e-3))
    (metrics,) = run(trainer, 1)

    from detectron2.utils.env import seed_all_rng

    from dino_d2.data.stream import seed_for

    seed_all_rng(seed_for(5, 0, 0))  # seed of the stream, iteration, worker
    losses = by_hand(batch)
    sum(losses.values()).backward()
    norm = torch.stack([p.grad.norm() for p in by_hand.parameters()]).norm()
    optimizer.step()
    assert metrics["total_loss"] == pytest.approx(sum(losses.values()).item(), rel=1e-6)
    assert {k: metrics[k] for k in losses} == pytest.approx(
        {k: x.item() for k, x in losses.items()}, rel=1e-6
    )
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert 0 <= metrics["data_time"] < 60
    theirs = by_hand.state_dict()
    for key, x in weights(trainer).items():
        torch.testing.assert_close(x, theirs[key], rtol=0, atol=1e-6)


# ---- precision


@pytest.fixture
def dtypes(make_trainer, make_batch):
    """What a training step computes in: {name of a module: dtype of what it returns}."""

    def inspect(precision):
        trainer = make_trainer(make_batch(2), precision=precision)
        seen = {}

        def remember(name):
            def hook(module, args, output):
                seen[name] = output.dtype if isinstance(output, torch.Tensor) else None

            return hook

        for name, module in trainer.model.named_modules():
            module.register_forward_hook(remember(name))
        inside = {}
        trainer.model.criterion.register_forward_pre_hook(
            lambda module, args: inside.update(output=args[0])
        )
        run(trainer, 1)
        return seen, inside["output"], trainer

    return inspect


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
def test_mixed_precision_is_what_layers_compute_in(dtypes, precision):
    seen, _, trainer = dtypes(precision)
    expected = precision or torch.float32
    layers = [x for x in seen if "linear" in x or x.endswith("value_proj") or "convs" in x]
    assert len(layers) > 5 and {seen[x] for x in layers} == {expected}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_boxes_and_losses_are_never_of_half_precision(dtypes, precision):
    _, output, _ = dtypes(precision)
    predictions = [*output.result.layers, output.result.proposals, *output.named("dn").layers]
    assert {x.boxes.dtype for x in predictions} == {torch.float32}
    assert output.named("dn").queries.reference.dtype == torch.float32


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_costs_and_losses_are_computed_in_float32(make_trainer, make_batch, monkeypatch, precision):
    trainer = make_trainer(make_batch(2), precision=precision)
    criterion, costs = trainer.model.criterion, []
    compute = criterion.matcher.costs
    monkeypatch.setattr(
        criterion.matcher, "costs", lambda *args: costs.append(compute(*args)) or costs[-1]
    )
    with torch.autocast("cpu", precision):
        losses = trainer.model(make_batch(2))
    assert {x.dtype for x in costs} == {x.dtype for x in losses.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision_learns_about_the_same(make_trainer, make_batch, precision):
    batch, torch_seed = make_batch(3), torch.get_rng_state()
    exact = make_trainer(batch)
    rounded = make_trainer(batch, model=copy.deepcopy(exact.model), precision=precision)
    torch.set_rng_state(torch_seed)
    first, second = run(exact, 8), run(rounded, 8)
    assert first[0]["total_loss"] == pytest.approx(second[0]["total_loss"], rel=0.02)
    assert second[-1]["total_loss"] < second[0]["total_loss"] * 0.97


def test_only_float16_scales_its_losses(make_trainer, make_batch):
    scalers = {
        precision: make_trainer(make_batch(1), precision=precision).scaler
        for precision in (None, torch.bfloat16, torch.float16)
    }
    assert [x.is_enabled() for x in scalers.values()] == [False, False, True]


def test_gradients_that_overflow_in_float16_lower_the_scale(make_trainer, make_batch):
    trainer = make_trainer(make_batch(1), precision=torch.float16)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    before = weights(trainer)
    run(trainer, 1)
    assert same(weights(trainer), before) and trainer.scaler.get_scale() == 2.0**125


# ---- accumulation


def make_single_batches(make_batch, *counts):
    batch = make_batch(*counts)
    return batch, [[x] for x in batch]


@pytest.mark.parametrize("counts", [(3, 1), (0, 4), (2, 2, 5), (0, 0)])
def test_accumulated_batches_are_one_batch(make_trainer, make_dino, make_batch, counts):
    """Without denoising, whose noise and groups are those of a batch."""
    batch, parts = make_single_batches(make_batch, *counts)
    model = make_dino(denoising=None)
    whole = make_trainer(batch, model=copy.deepcopy(model))
    accumulated = make_trainer(*parts, model=model, accumulate=len(parts))
    (expected,), (metrics,) = run(whole, 1), run(accumulated, 1)
    # What is measured or logged per batch is not one.
    expected, metrics = (
        {k: x for k, x in m.items() if k != "data_time" and not k.startswith("matching/")}
        for m in (expected, metrics)
    )
    assert metrics == pytest.approx(expected, rel=1e-5)
    grads = [x.grad for x in whole.model.parameters()]
    scale = max(grad.abs().max() for grad in grads)
    for grad, parameter in zip(grads, accumulated.model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5 * scale.item())


def test_denoising_groups_are_made_per_batch(make_trainer, make_dino, make_batch):
    """With as many boxes in each and no noise, accumulation is exact for them too."""
    batch, parts = make_single_batches(make_batch, 2, 2)
    model = make_dino(denoising=Denoising)
    model.denoising.label_noise = model.denoising.box_noise = 0.0
    whole = make_trainer(batch, model=copy.deepcopy(model))
    accumulated = make_trainer(*parts, model=model, accumulate=2)
    (expected,), (metrics,) = run(whole, 1), run(accumulated, 1)
    assert metrics["loss_class_dn"] > 0.1
    for name in ("data_time", "grad_norm"):  # without noise |x - y| is where it has no slope
        del expected[name], metrics[name]
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-5)


class OtherModel(nn.Module):
    """Its loss is the mean of what its images say."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return {"loss": self.weight * sum(x["value"] for x in batch) / len(batch)}


def test_other_models_average_over_batches(make_trainer):
    model = OtherModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batches = [{"value": 1.0}], [{"value": 5.0}]
    trainer = make_trainer(*batches, model=model, optimizer=optimizer, accumulate=2)
    (metrics,) = run(trainer, 1)
    assert metrics["loss"] == metrics["total_loss"] == metrics["grad_norm"] == 3
    assert model.weight.item() == 1 - 0.5 * 3


# ---- what is not finite


def make_bad(batch, what=torch.nan):
    """A batch whose first image has a pixel that is no number."""
    image = batch[0]["image"].float()
    image[0, 3, 3] = what
    return [batch[0] | {"image": image, "file_name": "bad.png"}, *batch[1:]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_ends_training_with_one_sentence(
    make_trainer, make_batch, tmp_path, value
):
    trainer = make_trainer(make_batch(1), make_bad(make_batch(2, 1), value))
    run(trainer, 1)
    before, state = weights(trainer), copy.deepcopy(trainer.optimizer.state_dict())
    with pytest.raises(NonFiniteLoss) as error:
        run(trainer, 1, start=1)
    message = str(error.value)
    assert "iteration 1" in message and "loss_class_enc" in message and "bad.png" in message
    assert "an image" in message  # the other one, which has no name
    assert "\n" not in message and "total_loss" not in message
    assert same(weights(trainer), before)
    now = trainer.optimizer.state_dict()["state"]
    assert all(same(x, now[i]) for i, x in state["state"].items())


def test_what_led_to_it_is_saved(make_trainer, make_batch, make_dino, tmp_path):
    bad = make_bad(make_batch(2))
    bad[0] |= {"image_id": 7, "height": 64, "width": 64}
    trainer = make_trainer(bad)
    with pytest.raises(NonFiniteLoss, match="non_finite"):
        run(trainer, 1)
    (file,) = (tmp_path / "non_finite").iterdir()
    saved = read(str(file))
    assert (saved["iteration"], saved["seed"]) == (0, 5)
    assert saved["losses"]["loss_class"] != saved["losses"]["loss_class"]
    (image,) = saved["images"]
    assert torch.equal(image["image"].isnan(), bad[0]["image"].isnan())
    assert torch.equal(image["boxes"], bad[0]["instances"].gt_boxes.tensor)
    assert torch.equal(image["classes"], bad[0]["instances"].gt_classes)
    assert (image["file_name"], image["image_id"], image["height"]) == ("bad.png", 7, 64)
    make_dino().load_state_dict(saved["model"])


class Fragile(OtherModel):
    """A finite loss with a gradient that is not: the square root of 0."""

    def forward(self, batch):
        return {"loss": (self.weight * batch[0]["value"]).sqrt()}


def test_a_gradient_that_is_not_finite_ends_training(make_trainer, tmp_path):
    image = {"value": 0.0, "image": torch.zeros(3, 1, 1)}
    model = Fragile()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = make_trainer([image], model=model, optimizer=optimizer)
    with pytest.raises(NonFiniteLoss, match="NaN or infinite grad_norm, with images an image;"):
        run(trainer, 1)
    assert model.weight.item() == 1


def test_steps_that_are_not_finite_can_be_skipped(make_trainer, make_batch, caplog, tmp_path):
    bad, good = make_bad(make_batch(2)), make_batch(1)
    trainer = make_trainer(bad, good, skip_non_finite=True)
    before = weights(trainer)
    with caplog.at_level(logging.WARNING, "dino_d2"):
        run(trainer, 1)
    assert "iteration 0" in caplog.text and "is skipped" in caplog.text and "bad.png" in caplog.text
    assert same(weights(trainer), before)
    (file,) = (tmp_path / "non_finite").iterdir()
    assert "model" not in read(str(file))  # the training has them still
    run(trainer, 1, start=1)
    assert not same(weights(trainer), before)


@pytest.fixture
def make_skipping(make_trainer):
    def make(*values):
        """A trainer that skips what is not finite, and a batch for each of the values."""
        model = OtherModel()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        batches = [[{"value": value}] for value in values]
        return make_trainer(*batches, model=model, optimizer=optimizer, skip_non_finite=True)

    return make


def test_weights_that_are_broken_are_not_skipped_for_ever(make_skipping):
    good, bad = 1.0, torch.nan
    trainer = make_skipping(good, *[bad] * MAX_SKIPPED, good, bad)
    run(trainer, 1 + MAX_SKIPPED + 2)  # a good step among them begins the count anew
    trainer = make_skipping(bad)
    with pytest.raises(NonFiniteLoss):
        run(trainer, MAX_SKIPPED + 1)
    assert trainer.iter == MAX_SKIPPED


def test_of_steps_that_are_skipped_the_first_are_saved(make_skipping, tmp_path):
    run(make_skipping(torch.nan, 1.0), 2 * MAX_SKIPPED + 4)
    files = sorted(path.name for path in (tmp_path / "non_finite").iterdir())
    assert files == [f"{2 * i:07d}_worker_0.pth" for i in range(MAX_SKIPPED)]


def test_gradients_that_never_fit_float16_end_training(make_trainer):
    model = Fragile()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    options = {"model": model, "optimizer": optimizer, "precision": torch.float16}
    trainer = make_trainer([{"value": 0.0, "image": torch.zeros(3, 1, 1)}], **options)
    with pytest.raises(NonFiniteLoss, match="grad_norm"):
        run(trainer, MAX_SKIPPED + 1)
    assert trainer.iter == MAX_SKIPPED and model.weight.item() == 1


def test_workers_draw_different_noise(make_trainer, make_batch, monkeypatch):
    batch = make_batch(2)
    trainers = [make_trainer(batch)]
    trainers.append(make_trainer(batch, model=copy.deepcopy(trainers[0].model)))
    (first,) = run(trainers[0], 1)
    monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: 1)
    (second,) = run(trainers[1], 1)
    assert first["loss_class"] == second["loss_class"]
    assert first["loss_bbox_dn"] != second["loss_bbox_dn"]


def test_float16_clips_gradients_that_are_not_scaled(make_trainer, make_batch):
    """Of a first step the average of gradients is a tenth of them; their norm is 0.1."""
    trainer = make_trainer(make_batch(3), precision=torch.float16)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    run(trainer, 1)
    averages = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    norm = torch.stack([x.norm() for x in averages]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


# ---- going on


@pytest.mark.parametrize("options", [{}, {"precision": torch.float16}, {"accumulate": 2}])
def test_training_goes_on_from_its_state_bit_for_bit(make_trainer, make_batch, options):
    batches = [make_batch(n) for n in (2, 0, 3, 1, 1)]
    straight = make_trainer(*batches, **options)
    resumed = make_trainer(*batches, model=copy.deepcopy(straight.model), **options)
    run(straight, 5)

    run(resumed, 2)
    state, model = copy.deepcopy(resumed.state_dict()), copy.deepcopy(resumed.model)
    torch.manual_seed(99)  # another process has other random numbers
    resumed = make_trainer(*batches, model=model, **options)
    resumed.data_loader.seed = 99
    resumed.load_state_dict(state)
    run(resumed, 3, start=resumed.iter + 1)
    assert same(weights(straight), weights(resumed))
    assert straight.scaler.state_dict() == resumed.scaler.state_dict()


def test_a_state_of_another_precision_can_be_taken_up(make_trainer, make_batch):
    half = make_trainer(make_batch(1), precision=torch.float16)
    full = make_trainer(make_batch(1), model=copy.deepcopy(half.model))
    run(half, 1)
    full.load_state_dict(half.state_dict())
    run(full, 1, start=1)
    half.load_state_dict(full.state_dict())
    run(half, 1, start=2)


class Normalised(nn.Module):
    """Running statistics that a forward pass changes before its loss is known."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, batch):
        return {"loss": self.norm(batch[0]["image"]).square().mean()}


@pytest.mark.parametrize("skip", [False, True])
def test_a_step_that_is_left_out_leaves_running_statistics_alone(make_trainer, tmp_path, skip):
    good, bad = torch.randn(4, 1), torch.full((4, 1), torch.nan)
    model = Normalised()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [[{"image": good}], [{"image": bad}]]
    trainer = make_trainer(*batches, model=model, optimizer=optimizer, skip_non_finite=skip)
    run(trainer, 1)
    before = weights(trainer)
    with nullcontext() if skip else pytest.raises(NonFiniteLoss):
        run(trainer, 1, start=1)
    assert same(weights(trainer), before)
    if not skip:
        (file,) = (tmp_path / "non_finite").iterdir()
        assert same(read(str(file))["model"], before)


def test_a_state_of_another_optimizer_is_one_sentence(make_trainer, make_batch):
    trainer = make_trainer(make_batch(1))
    run(trainer, 1)
    state = trainer.state_dict()
    model = trainer.model
    optimizer = torch.optim.SGD(model.backbone.parameters(), lr=0.1)
    other = make_trainer(make_batch(1), model=model, optimizer=optimizer)
    with pytest.raises(CheckpointError, match="another optimizer.*without --resume"):
        other.load_state_dict(state)
