"""Whole models on a GPU, beside the same models on the CPU.

Its kernels have test_ms_deform_attn.py and test_triton_kernels.py, its waiting test_syncs.py.
"""

import copy

import pytest
import torch

from dino_d2.modeling import mask_loss
from dino_d2.weights import model_zoo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MODELS = {"boxes": ("make_dino", "make_batch"), "masks": ("make_mask_dino", "make_mask_batch")}
SIZES = [(64, 64), (48, 80)]


@pytest.fixture(params=MODELS)
def both(request):
    """A model on the CPU and on the GPU, and a function that makes batches for it."""
    make_model, make_batch = map(request.getfixturevalue, MODELS[request.param])
    model = make_model()
    return model, copy.deepcopy(model).cuda(), make_batch


def test_detections_are_those_of_the_cpu(both):
    model, on_gpu, make_batch = both
    batch = make_batch(1, 2, sizes=SIZES)
    with torch.no_grad():
        for expected, found in zip(model.eval()(batch), on_gpu.eval()(batch), strict=True):
            expected, found = expected["instances"], found["instances"]
            assert found.scores.is_cuda
            torch.testing.assert_close(found.scores.cpu(), expected.scores, rtol=1e-3, atol=1e-4)
            sides = (x.pred_boxes.tensor.cpu().sort(0).values for x in (found, expected))
            torch.testing.assert_close(*sides, rtol=1e-3, atol=1e-2)  # equal scores in any order


def test_losses_and_gradients_are_those_of_the_cpu(both, randomise, monkeypatch):
    def draw_points(masks, count, *, like):  # the same on every device
        return torch.rand(masks, count, 2).to(like)

    monkeypatch.setattr(mask_loss, "draw_points", draw_points)
    model, on_gpu, make_batch = both
    for layer in (*model.encoder.layers, *model.decoder.layers):
        randomise(layer)  # initially, points are where gradients jump
    on_gpu.load_state_dict(model.state_dict())
    batch = make_batch(2, 0, sizes=SIZES)
    for x in (model, on_gpu):
        x.denoising = None  # noise is drawn on the device
        torch.manual_seed(1)
        sum(x(batch).values()).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {name: p.grad.cpu() for name, p in on_gpu.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    norms = (torch.stack([grad.norm() for grad in x.values()]) for x in (found, expected))
    torch.testing.assert_close(*norms, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_trains(both, dtype):
    _, model, make_batch = both
    batch = make_batch(2, 1, sizes=SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    totals = []
    for _ in range(20):
        with torch.autocast("cuda", dtype):
            loss = sum(model(batch).values())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        totals.append(loss.detach())
    totals = torch.stack(totals)
    assert totals.isfinite().all()
    assert totals[-5:].mean() < 0.9 * totals[:3].mean()


@pytest.mark.parametrize("name", ["dino_R_50_4scale_12ep", "detr/detr_R_50_500ep"])
def test_published_models_detect_the_same(name, make_batch):
    """Of their real size, with random weights."""
    model = model_zoo.build(model_zoo.get_config(name), 80, "cpu").eval()
    batch = make_batch(1, sizes=[(256, 320)])
    with torch.no_grad():
        expected, found = (model.to(device)(batch)[0]["instances"] for device in ("cpu", "cuda"))
    torch.testing.assert_close(found.scores.cpu(), expected.scores, rtol=1e-2, atol=1e-3)
