"""Many workers: real processes that talk through gloo, or a process group of one where that is
enough.

Two workers with an image each have to do what one does with both. Images are of one size, so that
padding plays no role.
"""

import copy
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from PIL import Image
from test_training_only import PARTS, add
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dino_d2.data import register
from dino_d2.distributed.launch import WORKER_VARIABLES, launch, world_size
from dino_d2.distributed.sharing import (
    distribute,
    gather,
    load_optimizer,
    local_shard,
    mean_over_workers,
    scatter,
    share_buffers,
    suspend_sync,
    unsharded,
    unwrap,
)
from dino_d2.engine import EMA, NonFiniteLoss, Trainer
from dino_d2.engine.evaluator import ErrorAnalysisEvaluator
from dino_d2.modeling import ChannelMapper, ContrastiveDenoising, HungarianMatcher, mask_loss
from dino_d2.modeling.criterion import BoxesOnly, average_over_workers
from dino_d2.modeling.swin import SwinTransformer
from dino_d2.solver import ClippedAdamW, parameter_groups
from dino_d2.weights.files import read

WORLD = 2
# What workers need is imported once, by the process that they are forked from.
multiprocessing.set_forkserver_preload(
    ["dino_d2.distributed", "dino_d2.modeling.predecessors", "torch._dynamo", "pytest"]
)


def work(rank, folder, job):
    """One worker: its result goes to a file."""
    faulthandler.enable()  # says where, if it aborts
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    comm.create_local_process_group(WORLD)
    inputs = torch.load(folder / "inputs.pt", weights_only=False)
    torch.save(job(rank, **inputs), folder / f"{rank}.pt")
    distributed.barrier()  # none leaves while another still talks to it
    distributed.destroy_process_group()


@pytest.fixture
def run(tmp_path):
    """Runs `job(rank, **inputs)` in two workers, and gives the two results."""

    def run(job, timeout=600, **inputs):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        torch.save(inputs, folder / "inputs.pt")
        workers = multiprocessing.start_processes(
            work, (folder, job), nprocs=WORLD, join=False, start_method="forkserver"
        )
        end = time.monotonic() + timeout
        while not workers.join(timeout=1):
            if time.monotonic() > end:
                for process in workers.processes:
                    process.kill()
                pytest.fail(f"workers were not done after {timeout} s")
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]

    return run


@pytest.fixture
def make_deterministic(make_dino, randomise):
    """A tiny DINO without noise, or without denoising."""

    def make(denoising=True, criterion=None, **options):
        model = make_dino(denoising=ContrastiveDenoising if denoising else None, **options)
        model.criterion = criterion or model.criterion
        if denoising:
            model.denoising.label_noise = model.denoising.box_noise = 0.0
        return randomise(model, std=0.1)

    return make


@pytest.fixture
def make_supervised(make_deterministic, randomise):
    """With every part that only training has, but for auxiliary detectors, unless they are asked
    for: these draw what they learn from, and divide by it."""

    def make(auxiliary=False, **options):
        model = make_deterministic(**options)
        for name in PARTS:
            if auxiliary or not name.startswith("Auxiliary"):
                add(model, name)
        return randomise(model, std=0.1)

    return make


def step(model, batch):
    """Losses and gradients, on every worker those of all."""
    model.zero_grad()
    losses = model(batch)
    sum(losses.values()).backward()
    losses = {name: mean_over_workers(loss.detach()) for name, loss in losses.items()}
    grads = {name: p.grad for name, p in unwrap(model).named_parameters()}
    return losses, gather(grads)


def assert_close(actual, expected, rtol=1e-4, atol=1e-7):
    """Dicts of tensors, each to a part of its own largest value."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        limit = rtol * x.abs().max().item() + atol
        torch.testing.assert_close(actual[name], x, rtol=0, atol=limit, msg=lambda m, n=name: n + m)


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    assert [name for name, x in expected.items() if not torch.equal(actual[name], x)] == []


# ---- two workers are one with a larger batch


def replicated_steps(rank, cases):
    """Two steps each: the second fails if a parameter took no part in the first."""
    results = []
    for model, batch in cases:
        replica = distribute(model)
        step(replica, batch[rank : rank + 1])
        results.append(step(replica, batch[rank : rank + 1]))
    return results


@pytest.mark.slow
def test_two_workers_with_an_image_each_do_what_one_does_with_both(
    run, make_deterministic, make_supervised, make_batch
):
    # Empty slots of denoising are supervised as background, and a worker has as many as its own
    # images need: with other numbers of boxes the sum is the same without denoising or, if no
    # boxes are on one side, where empty slots are not supervised (DN-DETR).
    cases = {
        "as many boxes": (make_deterministic(), make_batch(2, 2)),
        "boxes on one, slots unsupervised": (
            make_deterministic(criterion=BoxesOnly(matcher=HungarianMatcher())),
            make_batch(2, 0),
        ),
        "boxes on one, no denoising": (make_deterministic(denoising=False), make_batch(2, 0)),
        "more on one, no denoising": (make_deterministic(denoising=False), make_batch(3, 1)),
        "no boxes": (make_deterministic(), make_batch(0, 0)),
        "more on one, further supervision": (make_supervised(denoising=False), make_batch(3, 1)),
    }
    results = zip(*run(replicated_steps, cases=list(cases.values())), strict=True)
    for (name, (model, batch)), workers in zip(cases.items(), results, strict=True):
        expected_losses, expected_grads = step(model, batch)
        # Losses are divided by the boxes per worker, by 1 if there are fewer: where there are none,
        # each of two workers divides by what one would divide by for both.
        share = 0.5 if name == "no boxes" else 1.0
        for losses, grads in workers:
            assert_close(losses, {k: share * x for k, x in expected_losses.items()}, rtol=1e-5)
            assert_close(grads, {k: share * x for k, x in expected_grads.items()})


def same_points(masks, count, *, like):
    """In place of `mask_loss.draw_points`."""
    return torch.linspace(0.02, 0.98, 2 * count).view(1, count, 2).to(like).expand(masks, -1, -1)


def masked_steps(rank, model, batch, fsdp):
    """Two steps with masks at the same points."""
    mask_loss.draw_points = same_points
    model = distribute(model, fsdp=fsdp)
    step(model, batch[rank : rank + 1])
    return step(model, batch[rank : rank + 1])


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_workers_do_with_masks_what_one_does(
    run, make_mask_dino, make_mask_batch, randomise, monkeypatch, fsdp
):
    model, batch = randomise(make_mask_dino(), std=0.1), make_mask_batch(2, 2)
    model.denoising.label_noise = model.denoising.box_noise = 0.0
    monkeypatch.setattr(mask_loss, "draw_points", same_points)
    expected_losses, expected_grads = step(model, batch)
    for losses, grads in run(masked_steps, model=model, batch=batch, fsdp=fsdp):
        assert_close(losses, expected_losses, rtol=1e-5)
        assert_close(grads, expected_grads)


def means(rank, counts):
    x = torch.tensor([float(rank), 10.0 + rank])
    own = [torch.tensor(pair[rank]) for pair in counts]
    averages = [average_over_workers(count).item() for count in own]
    return mean_over_workers(x).tolist(), averages, x.tolist(), [count.item() for count in own]


@pytest.mark.slow
def test_means_over_workers_leave_what_they_are_of_as_it_is(run):
    counts = [(2.0, 5.0), (0.0, 1.0), (0.0, 0.0)]  # of boxes; a mean is at least one
    results = run(means, counts=counts)
    for rank, (mean, averages, x, own) in enumerate(results):
        assert mean == [0.5, 10.5] and x == [rank, 10.0 + rank]
        assert averages == [3.5, 1.0, 1.0] and own == [pair[rank] for pair in counts]


def accumulated_gradients(rank, model, batches, fsdp):
    """Of two batches by themselves, and added up."""
    model = distribute(model, fsdp=fsdp)
    apart = [step(model, batch[rank : rank + 1])[1] for batch in batches]
    model.zero_grad()
    with suspend_sync(model):
        sum(model(batches[0][rank : rank + 1]).values()).backward()
    before = [p.grad.clone() for p in unwrap(model).parameters() if p.grad is not None]
    sum(model(batches[1][rank : rank + 1]).values()).backward()
    together = gather({name: p.grad for name, p in unwrap(model).named_parameters()})
    return apart, before, together


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_gradients_that_are_added_up_are_averaged_over_workers_once(
    run, make_deterministic, make_batch, fsdp
):
    batches = make_batch(2, 1), make_batch(1, 2)
    results = run(accumulated_gradients, model=make_deterministic(), batches=batches, fsdp=fsdp)
    for (first, second), _, together in results:
        assert_close(together, {name: x + second[name] for name, x in first.items()})
    # Nothing had been exchanged after the first batch.
    here, there = (before for _, before, _ in results)
    assert not any(map(torch.equal, here, there))
    assert len(here) == (0 if fsdp else len(first))


# ---- activation checkpointing


def recomputed(rank, model, batch, fsdp):
    """Losses and gradients without and with checkpointing of all stages."""
    model = distribute(model, fsdp=fsdp)
    results = []
    for checkpoint in (False, True):
        plain = unwrap(model)
        plain.recompute_backbone = checkpoint
        plain.encoder.recompute = plain.decoder.recompute = checkpoint
        torch.manual_seed(7)
        losses, grads = step(model, batch[rank : rank + 1])
        results.append((losses, {name: x.clone() for name, x in grads.items()}))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_checkpointed_stages_change_no_loss_and_no_gradient_of_many_workers(
    run, make_dino, randomise, make_batch, fsdp
):
    inputs = {"model": randomise(make_dino(dropout=0.1), std=0.1), "batch": make_batch(2, 1)}
    for kept, again in run(recomputed, **inputs, fsdp=fsdp):
        assert_equal(again[0], kept[0])
        assert_equal(again[1], kept[1])
        assert any(x.any() for x in kept[1].values())


# ---- sharding


def make_optimizer(model):
    # Of gradients close to zero Adam keeps the sign alone, which is that of rounding: hence eps.
    return ClippedAdamW(parameter_groups(unwrap(model), lr=1e-3), max_norm=0.1, eps=1e-4)


def train(model, optimizer, batch):
    """A step; gives its losses and the norm of the gradient."""
    losses, _ = step(model, batch)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    return losses | {"norm": gather(norm)}


def whole_state(model, optimizer):
    return gather({"model": unwrap(model).state_dict(), "optimizer": optimizer.state_dict()})


def load(model, optimizer, state):
    """As a training that is resumed does, sharded or not."""
    plain = unwrap(model)
    plain.load_state_dict(scatter(state["model"], plain.state_dict()))
    load_optimizer(optimizer, state["optimizer"])


def trained(rank, model, batch, fsdp, steps, state=None):
    """A few steps, from a state on if there is one, and the state after."""
    model = distribute(model, fsdp=fsdp)
    optimizer = make_optimizer(model)
    if state:
        load(model, optimizer, state)
    history = [train(model, optimizer, batch[rank : rank + 1]) for _ in range(steps)]
    return history, whole_state(model, optimizer)


def assert_same_training(actual, expected):
    for (history, state), (expected_history, expected_state) in zip(actual, expected, strict=True):
        for x, y in zip(history, expected_history, strict=True):
            assert_close(x, y, rtol=1e-5)
        assert_same_state(state, expected_state, rtol=5e-4)


def assert_same_state(actual, expected, rtol=0.0):
    assert_close(actual["model"], expected["model"], rtol)
    actual, expected = actual["optimizer"], expected["optimizer"]
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"].keys() == expected["state"].keys()
    for index, moments in expected["state"].items():
        assert_close(actual["state"][index], moments, rtol, atol=rtol * 2e-3)


@pytest.fixture
def inputs(make_deterministic, make_batch):
    return {"model": make_deterministic(), "batch": make_batch(2, 2)}


@pytest.mark.slow
def test_a_sharded_model_learns_what_a_replicated_one_does(run, inputs):
    replicated, sharded = (run(trained, **inputs, fsdp=x, steps=2) for x in (False, True))
    assert_same_training(sharded, replicated)


@pytest.mark.slow
def test_further_supervision_is_sharded_as_it_is_replicated(run, make_supervised, make_batch):
    inputs = {"model": make_supervised(auxiliary=True), "batch": make_batch(2, 2)}
    replicated, sharded = (run(trained, **inputs, fsdp=x, steps=2) for x in (False, True))
    assert_same_training(sharded, replicated)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_training_goes_on_the_same_sharded_or_not(run, inputs, fsdp):
    _, state = run(trained, **inputs, fsdp=fsdp, steps=1)[0]
    results = [run(trained, **inputs, fsdp=x, steps=1, state=state) for x in (False, True)]
    assert_same_training(*results)
    assert results[0][0][1]["optimizer"]["state"][0]["step"] == 2


def reloaded(rank, model, state):
    model = distribute(model, fsdp=True)
    optimizer = make_optimizer(model)
    load(model, optimizer, state)
    moments = [
        x for values in optimizer.state.values() for name, x in values.items() if name != "step"
    ]
    own = [x for x in [*model.parameters(), *moments] if isinstance(x, DTensor)]
    return len(own), sum(x.to_local().numel() for x in own), whole_state(model, optimizer)


@pytest.mark.slow
def test_a_state_of_one_worker_is_shared_among_two_and_comes_back(run, inputs):
    model, batch = inputs["model"], inputs["batch"]
    optimizer = make_optimizer(model)
    train(model, optimizer, batch)
    state = whole_state(model, optimizer)
    results = run(reloaded, model=model, state=state)
    parameters = list(model.parameters())
    # itself and two moments of each; together the workers have each number once
    assert [count for count, _, _ in results] == [3 * len(parameters)] * WORLD
    assert sum(size for _, size, _ in results) == 3 * sum(p.numel() for p in parameters)
    for _, _, again in results:
        assert_same_state(again, state)


def detections(rank, model, shares):
    """Every worker detects in its shares of images, which may be empty, between two steps."""
    model = distribute(model, fsdp=True)
    is_sharded = []  # a layer, after each forward pass
    layer = model.decoder.layers[0]
    layer.register_forward_hook(
        lambda *_: is_sharded.append(any(isinstance(p, DTensor) for p in layer.parameters()))
    )
    step(model, shares[0][0][:1])
    results = []
    for share in shares:
        with torch.no_grad(), unsharded(model.eval()):
            results += model(share[rank])
    all_sharded = all(isinstance(p, DTensor) for p in model.parameters())
    step(model.train(), shares[0][0][:1])
    return [x["instances"].pred_boxes.tensor for x in results], all_sharded, is_sharded


@pytest.mark.slow
def test_workers_detect_in_as_many_passes_as_each_has_sizes_of_images(
    run, make_deterministic, make_batch
):
    model = make_deterministic()
    sizes = [(64, 64), (48, 80), (64, 40), (48, 80), (64, 64)]
    a, b, c, d, e = make_batch(1, 1, 1, 1, 1, sizes=sizes)
    shares = [([a, b, c], [d]), ([], [e])]  # of three passes and one, then of none and one
    results = run(detections, model=model, shares=shares)
    model.eval()
    with torch.no_grad():
        expected = [x["instances"].pred_boxes.tensor for x in model([a, b, c, d, e])]
    boxes = [x for worker, _, _ in results for x in worker]
    for x, y in zip(boxes, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-3)
    # Otherwise the parts are put together only where they are needed.
    assert [all_sharded for _, all_sharded, _ in results] == [True, True]
    passes = [layer for _, _, layer in results]
    assert passes == [[True, *[False] * 3, True], [True, *[False] * 2, True]]


def parts_of(rank, models, batch):
    """The names of what is sharded by itself, and whether a step of it is that of replicas."""
    results = []
    for model in models:
        replica, sharded = distribute(copy.deepcopy(model)), distribute(model, fsdp=True)
        names = [name for name, x in sharded.named_modules() if isinstance(x, FSDPModule)]
        results.append((names, [step(x, batch[rank : rank + 1]) for x in (replica, sharded)]))
    return results


@pytest.fixture
def make_resnet_dino(make_deterministic):
    """ResNet-18 with frozen norms, stem and first stage."""

    def make():
        norm = {"norm": "FrozenBN"}
        stages = ResNet.make_default_stages(18, BasicBlock, **norm)
        backbone = ResNet(BasicStem(**norm), stages, out_features=["res3", "res4", "res5"])
        return with_backbone(make_deterministic(), backbone.freeze(2), ["res3", "res4", "res5"])

    return make


@pytest.fixture
def make_swin_dino(make_deterministic):
    def make():
        sizes = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
        backbone = SwinTransformer(
            window_size=2, drop_path_rate=0.0, out_indices=(1, 2, 3), **sizes
        )
        return with_backbone(make_deterministic(), backbone, ["p1", "p2", "p3"])

    return make


def with_backbone(model, backbone, features):
    model.backbone = backbone.to(memory_format=torch.channels_last)
    model.neck = ChannelMapper(
        input_shape=backbone.output_shape(), in_features=features, out_channels=64
    )
    return model


LAYERS = ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"]
RESNET = [f"backbone.{name}" for name in ("stem", "res2", "res3", "res4", "res5")]
SWIN = [
    *("backbone.patch_embed", "backbone.pos_drop"),
    *(f"backbone.layers.{i}" for i in range(4)),
    *(f"backbone.norm{i}" for i in (1, 2, 3)),
]


@pytest.mark.slow
def test_stages_of_any_backbone_are_sharded_one_by_one(
    run, make_resnet_dino, make_swin_dino, make_batch
):
    models = make_resnet_dino(), make_swin_dino()
    for results in run(parts_of, models=models, batch=make_batch(2, 2)):
        assert [names for names, _ in results] == [["", *RESNET, *LAYERS], ["", *SWIN, *LAYERS]]
        for _, ((losses, grads), (sharded_losses, sharded_grads)) in results:
            assert_close(sharded_losses, losses, rtol=1e-5)
            frozen = [name for name, x in grads.items() if x is None]
            assert frozen == [name for name, x in sharded_grads.items() if x is None]
            trained = grads.keys() - frozen
            pair = ({name: x[name] for name in trained} for x in (sharded_grads, grads))
            assert_close(*pair, rtol=1e-3)


# ---- one worker


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_model_of_one_worker_stays_as_it_is(make_dino, fsdp):
    model = make_dino()
    kinds = [type(p) for p in model.parameters()]
    assert distribute(model, fsdp=fsdp, fp16_compression=True) is model is unwrap(model)
    assert [type(p) for p in model.parameters()] == kinds


def test_one_worker_exchanges_nothing(make_dino, make_batch):
    model, x = make_dino(), torch.randn(3)
    assert mean_over_workers(x) is x
    with suspend_sync(model), unsharded(model):
        sum(model(make_batch(1)).values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_state_without_shards_stays_as_it_is():
    state = {"a": [torch.ones(2), {"b": 3}], "c": None}
    again = scatter(gather(state), state)
    assert again == state and again["a"][0] is state["a"][0]


def test_an_optimizer_of_other_parameters_is_refused(make_dino):
    model = make_dino()
    optimizer, other = make_optimizer(model), torch.optim.AdamW(model.neck.parameters())
    with pytest.raises(ValueError, match="parameter group"):
        load_optimizer(optimizer, other.state_dict())


# ---- a process group of one, in which what is for many runs here


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A process group of this process, which takes itself for one of two workers."""
    store = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    monkeypatch.setattr(comm, "get_world_size", lambda: WORLD)
    yield
    distributed.destroy_process_group()


def test_options_of_replicas_are_taken_and_have_defaults(alone, make_dino):
    replica = distribute(make_dino())
    assert isinstance(replica, nn.parallel.DistributedDataParallel)
    assert not replica.broadcast_buffers and not replica.find_unused_parameters
    options = {"broadcast_buffers": True, "find_unused_parameters": True}
    replica = distribute(make_dino(), **options)
    assert replica.broadcast_buffers and replica.find_unused_parameters


def test_gradients_can_travel_as_float16(alone, make_dino, make_batch):
    torch.manual_seed(0)
    batch, plain = make_batch(2), make_dino(denoising=None)
    replicas = [distribute(copy.deepcopy(plain), fp16_compression=x) for x in (False, True)]
    (_, expected), (_, rounded) = (step(replica, batch) for replica in replicas)
    assert_equal(rounded, {name: x.half().float() for name, x in expected.items()})


def test_options_of_replicas_are_refused_for_a_sharded_model(alone, make_dino):
    with pytest.raises(ValueError, match=r"find_unused_parameters is an option of replicated"):
        distribute(make_dino(), fsdp=True, broadcast_buffers=False, find_unused_parameters=True)


def test_shards_of_one_worker_are_a_training(alone, inputs, recwarn):
    model = inputs["model"]
    expected = gather(model.state_dict())
    sharded = distribute(model, fsdp=True, find_unused_parameters=False)
    optimizer = make_optimizer(sharded)
    with suspend_sync(sharded):
        sum(sharded(inputs["batch"]).values()).backward()
    train(sharded, optimizer, inputs["batch"])
    state = whole_state(sharded, optimizer)
    assert not torch.equal(state["model"]["decoder.norm.weight"], expected["decoder.norm.weight"])
    load(sharded, optimizer, state)
    assert_same_state(whole_state(sharded, optimizer), state)
    with torch.no_grad(), unsharded(sharded.eval()):
        assert len(sharded(inputs["batch"])) == 2
    assert not [warning for warning in recwarn if "FSDP" in str(warning.message)]


def test_buffers_of_the_first_worker_are_its_own(alone):
    norm = torch.nn.BatchNorm1d(1)
    norm.running_mean.fill_(3)
    share_buffers(norm)
    assert norm.running_mean == 3


def test_replicas_take_part_in_adding_up(alone, make_dino, make_batch):
    replica = distribute(make_dino())
    with suspend_sync(replica):
        assert not replica.require_backward_grad_sync
        sum(replica(make_batch(1)).values()).backward()
    assert replica.require_backward_grad_sync


def test_the_part_of_a_worker_shares_its_memory(alone, make_dino):
    (parameter, *_), plain = distribute(make_dino(), fsdp=True).parameters(), torch.ones(2)
    assert local_shard(plain) is plain
    with torch.no_grad():
        local_shard(parameter).fill_(7.0)
    assert not isinstance(local_shard(parameter), DTensor) and (gather(parameter) == 7).all()


# ---- what workers do together in a training


def run_non_finite_step(rank, model, batches, output):
    """What one of the workers could not compute ends both, with its image and not the other's."""
    optimizer = make_optimizer(model)
    trainer = Trainer(distribute(model), Once(batches[rank]), optimizer, output_dir=output)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with EventStorage() as trainer.storage:
        try:
            trainer.run_step()
        except NonFiniteLoss as error:
            sentence = str(error)
    return sentence, all(torch.equal(x, before[k]) for k, x in model.state_dict().items())


class Once:
    """A stream of one batch."""

    seed = 0

    def __init__(self, *batch):
        self.batch = list(batch)

    def __iter__(self):
        return iter([self.batch])


@pytest.mark.slow
def test_a_loss_of_one_worker_that_is_not_finite_ends_all(run, make_dino, make_batch, tmp_path):
    good, bad = (x | {"file_name": name} for x, name in zip(make_batch(2, 1), "ab", strict=True))
    bad["image"] = torch.full((3, 64, 64), torch.nan)
    inputs = {"model": make_dino(), "batches": [good, bad], "output": str(tmp_path)}
    results = run(run_non_finite_step, **inputs)
    for sentence, unharmed in results:
        assert "with images b;" in sentence and unharmed
    saved = [read(str(tmp_path / "non_finite" / f"0000000_worker_{rank}.pth")) for rank in (0, 1)]
    assert [x["images"][0]["file_name"] for x in saved] == ["a", "b"]
    assert ["model" in x for x in saved] == [True, False]


def averaged(rank, model, batch, fsdp):
    """An average of weights over two steps, saved, loaded into another and applied."""
    model = distribute(model, fsdp=fsdp)
    optimizer, ema = make_optimizer(model), EMA(model, 0.5)
    for _ in range(2):
        train(model, optimizer, batch[rank : rank + 1])
        ema.update()
    state = gather(ema.state_dict())
    other = EMA(model, 0.5)
    other.load_state_dict(state)
    with other.applied():
        applied = gather(unwrap(model).state_dict())
    return state["weights"], applied


@pytest.mark.slow
def test_averaged_weights_of_a_sharded_model_are_those_of_a_replicated_one(run, inputs):
    replicated, _ = run(averaged, fsdp=False, **inputs)
    for weights, applied in run(averaged, fsdp=True, **inputs):
        assert_equal(applied, weights)
        for name, x in replicated[0].items():
            torch.testing.assert_close(weights[name], x, rtol=0, atol=5e-4)


def statistics(rank):
    norm = torch.nn.BatchNorm1d(1)
    norm.running_mean.fill_(rank + 1)
    share_buffers(norm)
    return norm.running_mean


@pytest.mark.slow
def test_workers_evaluate_with_the_statistics_that_are_saved(run):
    assert run(statistics) == [torch.ones(1)] * 2


def evaluated(rank, name):
    """A worker has an image each: NMS has kept what is wrong and removed what is right."""
    register(name)
    evaluator = ErrorAnalysisEvaluator(name)
    evaluator.reset()
    parts = {}
    for part, x, score in (("instances", 50, 0.9), ("suppressed", 10, 0.8)):
        boxes = Boxes(torch.tensor([[x, 10.0, x + 20, 30]]))
        parts[part] = Instances((80, 100), pred_boxes=boxes, scores=torch.tensor([score]))
        parts[part].pred_classes = torch.tensor([1])
    evaluator.process([{"image_id": rank}], [parts])
    return evaluator.evaluate()


@pytest.mark.slow
def test_what_nms_removed_comes_from_all_workers(run, tmp_path):
    images = [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 80} for i in range(WORLD)]
    box = {"category_id": 7, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0}
    boxes = [box | {"id": 1 + i, "image_id": i} for i in range(WORLD)]
    names = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    (tmp_path / "val.json").write_text(
        json.dumps({"images": images, "annotations": boxes, "categories": names})
    )
    for i in range(WORLD):
        Image.new("RGB", (100, 80)).save(tmp_path / f"{i}.png")
    results, other = run(evaluated, name=f"{tmp_path}/val.json@{tmp_path}")
    assert results["bbox"]["AP"] == 0 and "F1" not in results  # no threshold, as nothing is found
    # Both boxes are found, after what is wrong in both images: precision is 2/4 at every recall.
    assert results["without_nms"]["AP"] == pytest.approx(50)
    assert other == {}


# ---- starting workers

PROGRAM = """
import sys
from pathlib import Path

import torch
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from dino_d2.distributed import launch, mean_over_workers, world_size

def main(args):
    rank = comm.get_rank()
    if "fail" in args.opts and rank == 1:
        raise RuntimeError("the second worker fails")
    mean = mean_over_workers(torch.tensor(float(rank))).item()  # waits for the others
    local = comm.get_local_rank(), comm.get_local_size()
    found = rank, comm.get_world_size(), world_size(args), *local, mean
    Path(args.opts[0], str(rank)).write_text(" ".join(map(str, found)))

if __name__ == "__main__":
    launch(main, default_argument_parser().parse_args())
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    (tmp_path / "found").mkdir()
    return path


def begin(*words):
    """A process without the variables of a worker and without GPUs, which may be fewer than two."""
    environment = {k: x for k, x in os.environ.items() if k not in WORKER_VARIABLES}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def finish(*processes, timeout=600):
    """Their exit codes and what they said; all have to end in time."""
    end = time.monotonic() + timeout
    try:
        said = [x.communicate(timeout=max(0.0, end - time.monotonic()))[0] for x in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], "".join(said)


def found(program):
    """What workers say: rank, number of workers, the number known before, rank and number on their
    machine, mean of all ranks."""
    files = (program.parent / "found").iterdir()
    return sorted([float(x) for x in file.read_text().split()] for file in files)


TORCHRUN = "-m", "torch.distributed.run"
LAUNCHERS = {
    "detectron2": lambda file: [file, "--num-gpus", 2, "--dist-url", "auto"],
    "torchrun": lambda file: [*TORCHRUN, "--standalone", "--nproc-per-node", 2, file],
}


@pytest.mark.slow
def test_detectron2_starts_workers_who_know_each_other(program):
    codes, said = finish(begin(*LAUNCHERS["detectron2"](program), program.parent / "found"))
    assert codes == [0], said
    assert found(program) == [[0, 2, 2, 0, 2, 0.5], [1, 2, 2, 1, 2, 0.5]]


def test_a_worker_leaves_the_others_before_its_process_ends(alone_outside, tmp_path):
    # Threads of an open group could abort it then: one launch in ten, by Detectron2's launcher.
    open_at = []
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    launch(lambda args: open_at.append(distributed.is_initialized()), arguments())
    assert open_at == [True] and not distributed.is_initialized()


@pytest.mark.slow
def test_torchrun_starts_workers_on_two_machines(program):
    # The machines are two agents that meet at a store of ours, on a port that is free.
    store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{store.port}"]
    meet += ["--rdzv-id", "test", "--rdzv-conf", "is_host=0", "--nnodes", 2]
    words = [*TORCHRUN, *meet, "--nproc-per-node", 1, program, program.parent / "found"]
    codes, said = finish(begin(*words), begin(*words))
    assert codes == [0, 0], said
    assert found(program) == [[0, 2, 2, 0, 1, 0.5], [1, 2, 2, 0, 1, 0.5]]


# test_run.py has it of a training, which one image that cannot be read ends.
@pytest.mark.nightly
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_worker_that_fails_ends_all(program, launcher):
    words = [*LAUNCHERS[launcher](program), program.parent / "found", "fail"]
    codes, said = finish(begin(*words))  # workers wait for each other for 30 minutes
    assert codes == [1] and "RuntimeError: the second worker fails" in said
    assert found(program) == []


def arguments(*words):
    return default_argument_parser().parse_args(list(words))


def set_worker(monkeypatch, **values):
    """The environment of the only worker, with other values."""
    one = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    one |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    for name, value in (one | values).items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def alone_outside(monkeypatch):
    """No variables of workers, and no group of a machine, whatever ran before."""
    for name in WORKER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(comm, "_LOCAL_PROCESS_GROUP", None)
    comm.create_local_process_group.cache_clear()


def test_a_single_worker_runs_here(alone_outside):
    args, seen = arguments("--num-gpus", "1"), []
    launch(lambda args: seen.append((args, distributed.is_initialized())), args)
    assert seen == [(args, False)]
    assert world_size(args) == 1


def test_a_worker_joins_its_group_and_leaves_it(alone_outside, monkeypatch):
    set_worker(monkeypatch)
    args, seen = arguments("--num-gpus", "4"), []

    def main(args):
        seen.append((args, distributed.get_backend(), comm.get_local_size()))

    launch(main, args)
    assert seen == [(args, "nccl" if torch.cuda.is_available() else "gloo", 1)]
    assert not distributed.is_initialized()


def test_the_number_of_workers_is_known_before_they_start(alone_outside, monkeypatch):
    args = arguments("--num-gpus", "4", "--num-machines", "3")
    assert world_size(args) == 12
    set_worker(monkeypatch, WORLD_SIZE=6)
    assert world_size(args) == 6


def test_more_workers_than_gpus_are_refused_before_they_start(alone_outside, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="3 workers were requested .* which has 2 GPUs"):
        launch(pytest.fail, arguments("--num-gpus", "3"))
    set_worker(monkeypatch, LOCAL_WORLD_SIZE=3)
    with pytest.raises(ValueError, match="3 workers were requested .* which has 2 GPUs"):
        launch(pytest.fail, arguments())


@pytest.mark.parametrize(("gpus", "local_rank", "chosen"), [(1, 3, 0), (4, 3, 3)])
def test_a_worker_takes_its_own_gpu_or_the_only_one_it_sees(
    alone_outside, monkeypatch, gpus, local_rank, chosen
):
    set_worker(monkeypatch, LOCAL_RANK=local_rank, LOCAL_WORLD_SIZE=4)
    devices, backends = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(distributed, "init_process_group", lambda x, **_: backends.append(x))
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(comm, "create_local_process_group", lambda size: None)
    launch(lambda args: None, arguments())
    assert devices == [chosen] and backends == ["nccl"]


def test_an_incomplete_environment_of_a_worker_is_refused(alone_outside, monkeypatch):
    set_worker(monkeypatch)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ValueError, match="has RANK, .* but not LOCAL_RANK: start workers with"):
        launch(pytest.fail, arguments())
