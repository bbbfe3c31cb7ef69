"""From the backbone's features to predictions everything is one graph for torch.compile."""

import pytest
import torch
from outputs import run_detector

from dino_d2 import modeling
from dino_d2.modeling.branches import decode
from dino_d2.modeling.dino import padding_mask
from dino_d2.structures import Branch

SHAPES = [(8, 8), (4, 4), (2, 2)]


@pytest.fixture(autouse=True)
def forget_graphs():
    yield
    torch.compiler.reset()


@pytest.fixture
def make_inputs():
    """Features of two images of 64 x 64 pixels, the second padded."""

    def make(model):
        channels = {name: x.channels for name, x in model.backbone.output_shape().items()}
        features = {
            name: torch.randn(2, count, *shape)
            for (name, count), shape in zip(channels.items(), SHAPES, strict=True)
        }
        padding = torch.zeros(2, 64, 64, dtype=torch.bool)
        padding[1, 48:] = True
        return features, padding

    return make


def detect(model, features, padding):
    memory = model.encoder(model.neck(features), padding)
    queries, proposals = model.query_selection(memory)
    return model.decoder(queries, memory), proposals


def compiled(function):
    """Fails where the graph breaks."""
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(
            {"query_selection": modeling.StaticQueries, "look_forward": 1, "final_norm": False},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["DINO", "static queries, no final norm"],
)
def test_inference_is_one_graph(make_dino, make_inputs, randomise, options):
    model = randomise(make_dino(denoising=None, **options), std=0.1).eval()
    features, padding = make_inputs(model)
    with torch.no_grad():
        expected = detect(model, features, padding)
        torch.testing.assert_close(compiled(detect)(model, features, padding), expected)


@pytest.mark.slow
def test_training_on_denoising_queries_is_one_graph(
    make_dino, make_inputs, make_targets, randomise
):
    model = randomise(make_dino(), std=0.1)
    features, padding = make_inputs(model)
    memory = model.encoder(model.neck(features), padding)
    result = Branch("", model.query_selection(memory)[0])
    noised = model.denoising(make_targets(3, 1))
    results = []
    for decoder in (model.decoder, compiled(model.decoder)):
        layers = [x for branch in decode(decoder, memory, result, [noised]) for x in branch.layers]
        loss = sum(layer.logits.sum() + layer.boxes.sum() for layer in layers)
        inputs = [*model.decoder.parameters(), result.queries.content, memory.tokens]
        results.append((layers, torch.autograd.grad(loss, inputs, retain_graph=True)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_the_whole_detector_is_one_graph(make_dino, make_batch, training):
    model, batch = make_dino().train(training), make_batch(2)
    images = model.preprocess_images(batch)
    targets = model.prepare_targets(batch) if training else None
    compiled = torch.compile(model.detect, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    expected = run_detector(model, images, targets)
    torch.manual_seed(1)
    actual = compiled(images.tensor, padding_mask(images), targets)
    for found, wanted in zip(actual.branches, expected.branches, strict=True):
        torch.testing.assert_close(found.layers, wanted.layers)
