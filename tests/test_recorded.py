"""A small DINO goes on giving the tensors that it once gave.

They stand in for those of the official one, which not every clone has at hand. Record them anew
only when the tests of test_golden.py pass, and only for a change that is meant to change them:

    python -m tests.test_recorded
"""

import math
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from outputs import run_detector
from torch import Tensor

from dino_d2.boxes import cxcywh_to_xyxy
from dino_d2.structures import stack_predictions
from dino_d2.weights import model_zoo

RECORDED = Path(__file__).parent / "recorded" / "small_dino.pt"
NUM_CLASSES = 5
# Part of every name. With this one the scores of the selected tokens are far enough apart for
# their order to survive rounding, see record().
SALT = 279
# The published model with every width reduced, yet all of its parts.
SMALL = """
    MODEL.DEVICE                   cpu
    MODEL.RESNETS.STEM_OUT_CHANNELS  8
    MODEL.RESNETS.RES2_OUT_CHANNELS 16
    MODEL.RESNETS.WIDTH_PER_GROUP    4
    MODEL.DINO.EMBED_DIM            64
    MODEL.DINO.FFN_DIM              64
    MODEL.DINO.NUM_HEADS             4
    MODEL.DINO.NUM_POINTS            2
    MODEL.DINO.ENCODER_LAYERS        2
    MODEL.DINO.DECODER_LAYERS        3
    MODEL.DINO.NUM_QUERIES          30
    MODEL.DINO.DENOISING.BUDGET     10
    TEST.DETECTIONS_PER_IMAGE       50
"""
# Padded together; the second has slots without a box.
SIZES, COUNTS = [(96, 160), (128, 96)], [4, 2]


def uniform(name: str, shape) -> Tensor:
    """In [0, 1), a function of the name. In float64 the generator gives the same bits on every
    machine, which it does not promise of normal numbers."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{SALT}/{name}".encode()))
    return torch.empty(tuple(shape), dtype=torch.float64).uniform_(generator=generator)


def weight(name: str, like: Tensor) -> Tensor:
    x = 2 * uniform(name, like.shape) - 1
    if name.endswith("running_var") or (name.endswith("weight") and x.dim() == 1):
        x = 1 + x / 2
    elif x.dim() == 1:
        x = x / 10
        if "class_head" in name:
            x = x - 2  # objects are rare
    elif "embed" not in name and "content" not in name:
        x = x * math.sqrt(3 / like[0].numel())  # deviation 1 / sqrt(inputs)
    return x.to(like.dtype)


def small_dino():
    cfg = model_zoo.get_config("dino_R_50_4scale_12ep")
    cfg.merge_from_list([*SMALL.split(), "MODEL.DINO.NUM_CLASSES", NUM_CLASSES])
    model = build_model(cfg)
    state = {name: weight(name, x) for name, x in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def make_batch():
    batch = []
    for i, ((height, width), count) in enumerate(zip(SIZES, COUNTS, strict=True)):
        # blocks of 16 pixels under noise: something to see on every level
        blocks = uniform(f"blocks {i}", (3, height // 16, width // 16))
        blocks = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)
        image = (192 * blocks + 64 * uniform(f"image {i}", blocks.shape)).to(torch.uint8)
        size = 0.1 + 0.4 * uniform(f"size {i}", (count, 2))
        size[0] = 1  # the whole image: noise takes it to where boxes are clamped
        center = size / 2 + (1 - size) * uniform(f"center {i}", (count, 2))
        corners = cxcywh_to_xyxy(torch.cat([center, size], 1)) * torch.tensor([width, height] * 2)
        instances = Instances((height, width), gt_boxes=Boxes(corners.float()))
        instances.gt_classes = (NUM_CLASSES * uniform(f"label {i}", (count,))).long()
        batch.append({"image": image, "instances": instances})
    return batch


@contextmanager
def named_noise():
    """Has torch draw denoising noise from names, whatever is drawn first."""

    def rand(shape, **_):
        return uniform("rand", shape).float()

    def rand_like(x):
        return uniform("rand_like", x.shape).to(x.dtype)

    def randint_like(x, high):
        return (high * uniform(f"randint_like {high}", x.shape)).floor().to(x.dtype)

    with pytest.MonkeyPatch.context() as patch:
        for draw in (rand, rand_like, randint_like):
            patch.setattr(torch, draw.__name__, draw)
        yield


def run() -> dict[str, Tensor | dict[str, float]]:
    """All that is compared, in float32 on the CPU."""
    model, batch, scores = small_dino(), make_batch(), []
    model.eval()
    hook = model.query_selection.class_head.register_forward_hook(
        lambda module, inputs, logits: scores.append(logits.amax(-1))
    )
    with torch.no_grad():
        output = run_detector(model, model.preprocess_images(batch))
        hook.remove()
        detections = [x["instances"] for x in model(batch)]
    best = output.result.proposals.logits.amax(-1)
    layers = stack_predictions(output.result.layers)

    model.train()
    with named_noise():
        losses = model(batch)
    sum(losses.values()).backward()
    return {
        "logits": layers.logits,
        "boxes": layers.boxes,
        "proposal_logits": output.result.proposals.logits,
        "proposal_boxes": output.result.proposals.boxes,
        "scores": scores[0],
        "tokens": (best[..., None] == scores[0][:, None]).int().argmax(-1),
        "detected_scores": torch.stack([x.scores for x in detections]),
        "detected_classes": torch.stack([x.pred_classes for x in detections]),
        "detected_boxes": torch.stack([x.pred_boxes.tensor for x in detections]),
        "losses": {name: loss.item() for name, loss in losses.items()},
        "gradient_norms": {
            name: x.grad.norm().item() for name, x in model.named_parameters() if x.grad is not None
        },
    }


@pytest.fixture(scope="module")
def ours():
    return run()


@pytest.fixture(scope="module")
def recorded():
    return torch.load(RECORDED, weights_only=True)


def assert_close(ours, recorded, *names, tolerance=1e-4):
    for name in names:
        torch.testing.assert_close(ours[name], recorded[name], atol=tolerance, rtol=0)


def test_the_recorded_tokens_are_selected(ours, recorded):
    assert_close(ours, recorded, "scores")
    assert torch.equal(ours["tokens"], recorded["tokens"])


def test_proposals_are_the_recorded_ones(ours, recorded):
    assert_close(ours, recorded, "proposal_logits", "proposal_boxes")


def test_boxes_and_logits_of_every_layer_are_the_recorded_ones(ours, recorded):
    assert_close(ours, recorded, "logits", "boxes")


def test_detections_are_the_recorded_ones(ours, recorded):
    assert_close(ours, recorded, "detected_scores")
    assert_close(ours, recorded, "detected_boxes", tolerance=1e-2)  # of a pixel
    assert torch.equal(ours["detected_classes"], recorded["detected_classes"])


def test_losses_are_the_recorded_ones(ours, recorded):
    assert ours["losses"] == pytest.approx(recorded["losses"], rel=1e-4)


def test_gradient_norms_are_the_recorded_ones(ours, recorded):
    assert ours["gradient_norms"] == pytest.approx(recorded["gradient_norms"], rel=1e-3)


def record() -> None:
    tensors = run()
    count = tensors["tokens"].shape[1]
    best = tensors["scores"].sort(1, descending=True).values[:, : count + 1]
    gap = best.diff(dim=1).abs().min().item()
    if gap < 5e-4:
        raise ValueError(f"two tokens are as close as {gap} in score: choose another SALT")
    RECORDED.parent.mkdir(exist_ok=True)
    torch.save(tensors, RECORDED)


if __name__ == "__main__":
    record()
