"""From images to predictions everything is one graph for torch.compile."""

import pytest
import torch

from dino_d2 import modeling
from dino_d2.modeling.dino import padding_mask

pytestmark = pytest.mark.slow
STATIC = {"query_selection": modeling.StaticQueries, "look_forward": 1, "final_norm": False}


@pytest.fixture(autouse=True)
def forget_graphs():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("training", "options"),
    [
        (False, {}),
        pytest.param(False, STATIC | {"denoising": None}, marks=pytest.mark.nightly),
        (True, {}),
    ],
    ids=["inference", "static queries, no final norm", "training"],
)
def test_the_whole_detector_is_one_graph(make_dino, make_batch, randomise, training, options):
    model = randomise(make_dino(**options), std=0.1).train(training)
    batch = make_batch(3, 1, sizes=[(64, 64), (48, 64)])  # the second is padded
    images = model.preprocess_images(batch)
    targets = model.prepare_targets(batch) if training else None
    compiled = torch.compile(model.detect, fullgraph=True, backend="aot_eager")
    results = []
    for detect in (model.detect, compiled):
        torch.manual_seed(1)
        with torch.set_grad_enabled(training):
            output = detect(images.tensor, padding_mask(images), targets)
        layers = [x for branch in output.branches for x in branch.layers]
        results.append([layers])
        if training:
            loss = sum(x.logits.sum() + x.boxes.sum() for x in layers)
            results[-1] += torch.autograd.grad(loss, trained(model))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def trained(model):
    """What layers depend on; the selection of queries learns from its proposals."""
    return [x for name, x in model.named_parameters() if "query_selection" not in name]
