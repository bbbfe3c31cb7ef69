"""A small Mask DINO goes on giving what it once gave, in float64.

It stands in for the official one, as in `test_recorded.py`. To record anew, once the tests of
test_golden_mask.py pass:

    python -m tests.test_recorded_masks
"""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks
from test_recorded import NUM_CLASSES, SMALL, make_batch, named_noise, uniform, weight

from dino_d2.modeling import mask_loss
from dino_d2.weights import model_zoo

RECORDED = Path(__file__).parent / "recorded" / "small_mask_dino.pt"
OPTIONS = [*SMALL.split(), "MODEL.DINO.NUM_CLASSES", NUM_CLASSES]
OPTIONS += ["MODEL.DINO.ENCODER_FFN_DIM", 64, "MODEL.DINO.LOSS.NUM_POINTS", 100]


def small_mask_dino():
    cfg = model_zoo.get_config("MaskDINO/maskdino_R_50_50ep")
    cfg.merge_from_list(OPTIONS)
    model = build_model(cfg)
    state = {name: weight(name, x) for name, x in model.state_dict().items()}
    model.load_state_dict(state)
    return model.double()


def make_mask_batch():
    """An object's mask is its box without the upper right quarter."""
    batch = make_batch()
    for x in batch:
        instances = x["instances"]
        masks = torch.zeros(len(instances), *instances.image_size, dtype=torch.bool)
        for mask, box in zip(masks, instances.gt_boxes.tensor.round().int().tolist(), strict=True):
            left, top, right, bottom = box
            mask[top:bottom, left:right] = True
            mask[top : (top + bottom) // 2, (left + right) // 2 : right] = False
        instances.gt_masks = BitMasks(masks)
        instances.gt_boxes.tensor = instances.gt_boxes.tensor.double()
    return batch


def run():
    model, batch = small_mask_dino(), make_mask_batch()
    model.eval()
    with torch.no_grad():
        found = [x["instances"] for x in model(batch)]
    model.train()
    with named_noise(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_loss, "draw_points", named_points)
        losses = model(batch)
        sum(losses.values()).backward()  # makes maps and points again
    return {
        "scores": torch.stack([x.scores for x in found]),
        "classes": torch.stack([x.pred_classes for x in found]),
        "boxes": torch.stack([x.pred_boxes.tensor for x in found]),
        "areas": torch.stack([x.pred_masks.sum((1, 2)) for x in found]),
        "losses": {name: loss.item() for name, loss in losses.items()},
        "gradient_norms": {
            name: x.grad.norm().item() for name, x in model.named_parameters() if x.grad is not None
        },
    }


def named_points(masks, count, *, like):
    return uniform(f"points {count}", (1, count, 2)).to(like).expand(masks, -1, -1)


@pytest.fixture(scope="module")
def ours():
    return run()


@pytest.fixture(scope="module")
def recorded():
    return torch.load(RECORDED, weights_only=True)


def test_detections_are_the_recorded_ones(ours, recorded):
    torch.testing.assert_close(ours["scores"], recorded["scores"], atol=1e-8, rtol=0)
    torch.testing.assert_close(ours["boxes"], recorded["boxes"], atol=1e-5, rtol=0)
    assert torch.equal(ours["classes"], recorded["classes"])
    assert torch.equal(ours["areas"], recorded["areas"]) and recorded["areas"].any()


def test_losses_and_gradients_are_the_recorded_ones(ours, recorded):
    assert ours["losses"] == pytest.approx(recorded["losses"], rel=1e-8)
    assert ours["gradient_norms"] == pytest.approx(recorded["gradient_norms"], rel=1e-6, abs=1e-9)


if __name__ == "__main__":
    torch.save(run(), RECORDED)
