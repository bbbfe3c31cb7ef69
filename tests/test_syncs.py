"""How often the program waits for the device: once in a training step, for the costs of matching.

Without a GPU one is pretended: its tensors say that they are on a CUDA device while they are
computed on the CPU, so that every copy between the two, and every question whose answer only the
device knows, can be seen. Where there is a GPU, CUDA is asked too.
"""

import itertools
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage
from outputs import run_detector
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from dino_d2 import modeling
from dino_d2.data.stream import TrainingStream
from dino_d2.engine import Trainer
from dino_d2.modeling import mask_loss
from dino_d2.modeling.criterion import BoxesOnly
from dino_d2.modeling.denoising import IndicatorDenoising
from dino_d2.modeling.postprocess import postprocess
from dino_d2.modeling.query_selection import IndicatorQueries
from dino_d2.structures import send_to_device

PACKAGE = Path(modeling.__file__).parents[1]
# Operators whose result, or its size, the program has to know; randperm draws on the CPU.
QUESTIONS = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::randperm",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "torchvision::nms",
}
COPIES = {"aten::_to_copy", "aten::copy_"}
INDEXING = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}


class PretendedTensor(Tensor):
    """On a CUDA device as far as anyone can tell."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: Tensor):
        strides, offset = data.stride(), data.storage_offset()
        return Tensor._make_wrapper_subclass(
            cls, data.shape, strides, offset, dtype=data.dtype, device="cuda:0"
        )

    def __init__(self, data: Tensor):
        self.on_cpu = data

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of PretendedDevice")


class PretendedDevice(TorchDispatchMode):
    """Computes on the CPU and notes in `waits` what a CUDA device would have been waited for."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.name().partition(".")[0]
        if name == "aten::is_pinned":
            return is_pinned(args[0])
        if name == "aten::_pin_memory":
            pinned = args[0].clone()
            pinned.is_pretended_pinned = True
            return pinned
        on_device = is_on_device(name, args, kwargs)
        if waits_for_device(name, args, kwargs, on_device):
            self.waits.append(f"{name} {place()}")
        result = func(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs))
        if not on_device:
            return result
        return return_and_correct_aliasing(func, args, kwargs, tree_map(to_device, result))


def is_on_device(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether the result of an operator is."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type == "cuda"
    inputs = args[:1] if name == "aten::copy_" else tree_leaves((args, kwargs))
    return any(isinstance(x, PretendedTensor) for x in inputs)


def waits_for_device(name: str, args: tuple, kwargs: dict, on_device: bool) -> bool:
    if name in COPIES:
        source = args[1] if name == "aten::copy_" else args[0]
        if isinstance(source, PretendedTensor):
            return not on_device
        return on_device and not (kwargs.get("non_blocking") and is_pinned(source))
    if name in INDEXING and on_device:
        return any(
            index.dtype == torch.bool or not isinstance(index, PretendedTensor)
            for index in args[1]
            if index is not None
        )
    return name in QUESTIONS and on_device


def place() -> str:
    """The line of the package that is being run, if any."""
    frames = [x for x in traceback.extract_stack() if Path(x.filename).is_relative_to(PACKAGE)]
    return "".join(f"{x.filename}:{x.lineno}: {x.line}" for x in frames[-1:])


def is_pinned(x: Tensor) -> bool:
    return getattr(x, "is_pretended_pinned", False)


def to_cpu(x):
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.on_cpu if isinstance(x, PretendedTensor) else x


def to_device(x):
    return PretendedTensor(x) if isinstance(x, Tensor) else x


@pytest.fixture
def waits(monkeypatch):
    """Pretends that there is a CUDA device; the list of operators that waited for it."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) copies visibly
    try:
        # Where there is a GPU, other kernels would be chosen, which a CPU does not have.
        with sdpa_kernel(SDPBackend.MATH), PretendedDevice() as device:
            yield device.waits
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


# ---- of the pretence


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: int(x[0]),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 1)[x > 0].zero_(),
        lambda x: x.__setitem__(x > 0, torch.zeros_like(x)),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x.repeat_interleave(torch.ones_like(x, dtype=torch.int64)),
        lambda x: torch.randperm(3, device=x.device),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x.new_tensor(1.0),
        lambda x: torch.zeros(3).to(x.device),
        lambda x: torch.zeros(3).to(x),
        lambda x: torch.zeros(3).to(x.device, non_blocking=True),
        lambda x: torch.zeros(3).pin_memory().to(x.device),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: torch.zeros(3).copy_(x),
        lambda x: x[torch.tensor([0, 2])],
    ],
)
def test_what_waits_is_seen(waits, wait):
    x = torch.rand(3, device="cuda")
    assert not waits
    wait(x)
    assert waits


@pytest.mark.parametrize(
    "go_on",
    [
        lambda x: torch.arange(3, device=x.device) + 1,
        lambda x: x.new_full((), 5),
        lambda x: x.where(x > 0, 0).clamp(min=0.5),
        lambda x: x.topk(2).values,
        lambda x: x[x.argsort()],
        lambda x: x[:2].fill_(1),
        lambda x: x.__setitem__(slice(2), 1),
        lambda x: x.double().to(x.device),
        lambda x: x.repeat_interleave(2),
        lambda x: torch.zeros(3).pin_memory().to(x.device, non_blocking=True),
        lambda x: torch.randperm(3).nonzero().sum().item(),  # all on the CPU
    ],
)
def test_what_does_not_wait_is_not(waits, go_on):
    go_on(torch.rand(3, device="cuda"))
    assert not waits


def test_a_pretended_device_computes_the_same(waits, make_dino, make_batch):
    batch, losses = make_batch(3, 2), []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        with torch.device(device):
            model = make_dino()
        losses.append({name: loss.detach().cpu() for name, loss in model(batch).items()})
    torch.testing.assert_close(*losses)


# ---- of the model


def make_dn(make_dino, **options):
    """DN-Deformable-DETR, which has its own denoising and criterion."""
    model = make_dino(IndicatorQueries, IndicatorDenoising, budget=10, **options)
    model.criterion = BoxesOnly(matcher=model.criterion.matcher)
    return model


VARIANTS = pytest.mark.parametrize(
    "build",
    [
        lambda make_dino: make_dino(),
        lambda make_dino: make_dino(modeling.PureQuerySelection, modeling.Denoising),
        lambda make_dino: make_dino(modeling.StaticQueries, None, look_forward=0),
        make_dn,
    ],
    ids=["DINO", "pure selection, DN", "Deformable DETR", "DN-Deformable-DETR"],
)


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(3, 2), (0, 0), (30, 1)], ids=str)
@VARIANTS
def test_a_training_step_waits_once_for_the_costs(waits, make_dino, make_batch, build, counts):
    with torch.device("cuda"):
        model = build(make_dino)
    batch = make_batch(*counts, sizes=[(64, 64), (48, 80)])  # padded
    waits.clear()  # of building
    losses = model(batch)
    (wait,) = waits
    assert "costs.cpu()" in wait
    assert all(loss.is_cuda for loss in losses.values())


@pytest.mark.parametrize("counts", [(3, 2), (0, 0)], ids=str)
def test_a_training_step_with_masks_waits_once_for_the_costs(
    waits, make_mask_dino, make_mask_batch, counts, monkeypatch
):
    monkeypatch.setattr(mask_loss, "recompute", lambda call, *args: call(*args))
    with torch.device("cuda"):
        model = make_mask_dino()
    batch = make_mask_batch(*counts, sizes=[(64, 64), (48, 80)])
    waits.clear()
    losses = model(batch)
    (wait,) = waits
    assert "costs.cpu()" in wait
    assert all(loss.is_cuda for loss in losses.values())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_trainers_step_waits_for_the_costs_of_each_batch_and_once_for_its_metrics(
    waits, make_dino, make_batch, accumulate, monkeypatch
):
    """Without what is below autograd, which takes a device that is one."""
    with torch.device("cuda"):
        model = make_dino()

    def backward(loss):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    stream = itertools.repeat(make_batch(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, foreach=False)
    trainer = Trainer(model, TrainingStream(lambda: stream, seed=0), optimizer)
    trainer.accumulate = accumulate
    with EventStorage() as trainer.storage:
        waits.clear()
        trainer.run_step()
    *costs, metrics = waits
    assert ["costs.cpu()" in x for x in costs] == [True] * accumulate
    assert "metrics.values()" in metrics


@VARIANTS
def test_inference_waits_for_nothing(waits, make_dino, make_batch, build):
    with torch.device("cuda"):
        model = build(make_dino).eval()
    batch = make_batch(1, 0)
    waits.clear()
    with torch.no_grad():
        images = model.preprocess_images(batch)
        last = run_detector(model, images).result.layers[-1]
        detections = postprocess(last, images.image_sizes, 50)
    assert not waits
    assert all(len(x) == 50 and x.scores.is_cuda for x in detections)


@pytest.mark.parametrize("with_targets", [False, True])
def test_distinct_queries_wait_once_for_each_selection(waits, make_dino, make_batch, with_targets):
    with torch.device("cuda"):
        model = make_dino(
            modeling.DistinctQuerySelection, relation=modeling.DistinctQueries, num_layers=3
        ).eval()
    batch = make_batch(1, 2)
    images = model.preprocess_images(batch)
    targets = model.prepare_targets(batch) if with_targets else None
    waits.clear()
    run_detector(model, images, targets)
    selections = [x for x in waits if "nms" in x]
    assert len(selections) == 1 + 3
    assert len(waits) - len(selections) == (3 if with_targets else 0)  # who the result is


def test_what_is_sent_arrives(waits):
    x = torch.rand(3)
    sent = send_to_device(x, like=torch.zeros((), device="cuda"))
    assert sent.is_cuda and not waits
    assert torch.equal(sent.cpu(), x)
    assert send_to_device(sent, like=sent) is sent


# ---- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("counts", [(3, 2), (0, 0), (30, 1)], ids=str)
def test_cuda_waits_once_in_a_training_step(make_dino, make_batch, counts):
    model, batch = make_dino().cuda(), make_batch(*counts, sizes=[(64, 64), (48, 80)])
    model(batch)  # libraries are loaded, memory is allocated
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(x.message) for x in caught)
    assert waits == any(counts)  # without boxes there are no costs to wait for
