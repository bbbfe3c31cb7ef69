import pytest
import torch
from torch import nn

from dino_d2.boxes import refine
from dino_d2.layers import SelfAttention, encode_boxes
from dino_d2.modeling import Decoder
from dino_d2.modeling.branches import group_attn_mask
from dino_d2.modeling.positions import AnchorPosition, LearnedPosition
from dino_d2.modeling.tokens import scale_to_levels
from dino_d2.structures import FeaturePyramid, Queries, join_queries, split_predictions

NUM_LAYERS = 3
LOOKS = pytest.mark.parametrize("look_forward", [1, 2])
HEADS = pytest.mark.parametrize("shared_heads", [True, False])


@pytest.fixture
def make_decoder(randomise):
    def make(**options):
        sizes = {"embed_dim": 32, "num_heads": 4, "ffn_dim": 16, "num_levels": 2, "num_points": 2}
        return randomise(Decoder(num_classes=3, num_layers=NUM_LAYERS, **sizes, **options))

    return make


def make_queries(count):
    return Queries(torch.randn(2, count, 32), 0.2 + 0.6 * torch.rand(2, count, 4))


def make_points(count):
    """Queries that look at points; their positions are learned."""
    content, reference, _ = make_queries(count)
    return Queries(content, reference[..., :2], torch.randn_like(content))


@pytest.fixture
def memory(make_memory):
    padding = torch.zeros(2, 48, 40, dtype=torch.bool)
    padding[1, 32:] = True
    return make_memory(padding=padding)


def assert_same(stages, others):
    torch.testing.assert_close(stages, others, rtol=1e-4, atol=1e-5)


def changed(stages, others):
    """Which queries have other logits in the last layer, in any image."""
    return (stages[-1].logits - others[-1].logits).abs().amax((0, 2)) > 1e-5


# ---- who sees whom


def test_matching_queries_do_not_depend_on_denoising_queries(make_decoder, memory):
    decoder, matching, noised = make_decoder(), make_queries(5), make_queries(4)
    mask = group_attn_mask(torch.tensor([1, 1, 2, 2] + [0] * 5))
    together = decoder(join_queries([noised, matching]), memory, mask)
    assert_same([split_predictions(x, [4, 5])[1] for x in together], decoder(matching, memory))


@pytest.mark.parametrize("perturbed", range(9))
def test_groups_do_not_see_each_other_but_themselves_and_the_matching_queries(
    make_decoder, memory, perturbed
):
    decoder, queries = make_decoder(), make_queries(9)
    # two groups of a positive and a negative each, then five matching queries
    groups = torch.tensor([1, 1, 2, 2] + [0] * 5)
    mask = group_attn_mask(groups)
    content = queries.content.clone()
    content[:, perturbed] += 3 * torch.randn(32)
    seen = changed(
        decoder(queries, memory, mask), decoder(queries._replace(content=content), memory, mask)
    )
    if perturbed < 4:
        assert torch.equal(seen, groups == groups[perturbed])
    else:
        assert seen.all()


def test_without_a_mask_the_order_of_queries_does_not_matter(make_decoder, memory):
    decoder, queries, order = make_decoder(), make_queries(5), torch.randperm(5)
    shuffled = decoder(Queries(*(x[:, order] for x in queries[:2])), memory)
    for stage, other in zip(decoder(queries, memory), shuffled, strict=True):
        assert_same([x[:, order] for x in stage], list(other))


def test_images_of_a_batch_do_not_see_each_other(make_decoder, memory):
    decoder, queries = make_decoder(), make_queries(5)
    first = memory._replace(**{k: v[:1] for k, v in memory._asdict().items() if k != "shapes"})
    alone = decoder(Queries(*(x[:1] for x in queries[:2])), first)
    for stage, other in zip(decoder(queries, memory), alone, strict=True):
        assert_same([x[:1] for x in stage], list(other))


# ---- references


def test_boxes_are_scaled_to_the_padded_levels():
    boxes = torch.tensor([[[0.5, 0.4, 0.2, 0.1]]])
    ratios = torch.tensor([[[0.5, 1.0], [0.8, 0.9]]])
    expected = torch.tensor([[0.25, 0.4, 0.1, 0.1], [0.4, 0.36, 0.16, 0.09]])
    torch.testing.assert_close(scale_to_levels(boxes, ratios), expected[None, None])


@HEADS
def test_new_heads_leave_boxes_at_their_anchors(make_decoder, memory, shared_heads):
    decoder, queries = make_decoder(shared_heads=shared_heads), make_queries(5)
    for head in decoder.box_heads:
        nn.init.zeros_(head.layers[-1].weight)
        nn.init.zeros_(head.layers[-1].bias)
    for stage in decoder(queries, memory):
        torch.testing.assert_close(stage.boxes, queries.reference)


@pytest.fixture
def traced(make_decoder, memory):
    """A run with everything that the heads and the layers of the decoder were given."""

    def trace(queries=None, **options):
        decoder, queries = make_decoder(**options), queries or make_queries(5)
        calls = {"layers": [], "outputs": [], "box_heads": []}

        def record_layer(module, args, output):
            calls["layers"].append(args)
            calls["outputs"].append(output)

        for layer in decoder.layers:
            layer.register_forward_hook(record_layer)
        for head in decoder.box_heads:
            head.register_forward_hook(lambda _, args, out: calls["box_heads"].append((args, out)))
        return decoder, queries, decoder(queries, memory), calls

    return trace


@LOOKS
@HEADS
def test_predictions_come_after_the_norm_and_refinements_before(traced, look_forward, shared_heads):
    options = {"look_forward": look_forward, "shared_heads": shared_heads}
    decoder, queries, stages, calls = traced(**options)
    reference = queries.reference
    for i, (stage, x) in enumerate(zip(stages, calls["outputs"], strict=True)):
        class_head, box_head = (
            heads[0 if shared_heads else i] for heads in (decoder.class_heads, decoder.box_heads)
        )
        torch.testing.assert_close(stage.logits, class_head(decoder.norm(x)))
        torch.testing.assert_close(stage.boxes, refine(reference, box_head(decoder.norm(x))))
        reference = refine(reference, box_head(x))


@LOOKS
def test_every_layer_looks_where_the_one_before_refined_to(traced, memory, look_forward):
    decoder, queries, _, calls = traced(look_forward=look_forward)
    reference, content = queries.reference, queries.content
    for i, (args, output) in enumerate(zip(calls["layers"], calls["outputs"], strict=True)):
        x, position, seen, *_ = args
        torch.testing.assert_close(x, content)
        torch.testing.assert_close(seen, reference)
        expected = decoder.position_head(Queries(x, seen), memory, i)
        torch.testing.assert_close(position, expected)
        reference, content = refine(reference, decoder.box_heads[0](output)), output
    # what attention sees after the first layer is a constant to autograd
    assert not any(args[2].requires_grad for args in calls["layers"])


@HEADS
def test_without_refinement_every_layer_starts_from_the_first_reference(
    traced, memory, shared_heads
):
    decoder, queries, stages, calls = traced(look_forward=0, shared_heads=shared_heads)
    for i, (stage, x) in enumerate(zip(stages, calls["outputs"], strict=True)):
        assert torch.equal(calls["layers"][i][2], queries.reference)
        moved = decoder.box_heads[0 if shared_heads else i](decoder.norm(x))
        torch.testing.assert_close(stage.boxes, refine(queries.reference, moved))
    assert not torch.allclose(stages[0].boxes, stages[1].boxes, atol=1e-2)


@pytest.mark.parametrize(
    ("look_forward", "sizes"), [(0, [2, 2, 2]), (1, [2, 4, 4]), (2, [2, 4, 4])]
)
def test_refinement_turns_points_into_boxes(traced, look_forward, sizes):
    _, queries, stages, calls = traced(
        make_points(5), look_forward=look_forward, position_head=LearnedPosition()
    )
    assert [args[2].shape[-1] for args in calls["layers"]] == sizes
    assert all(stage.boxes.shape == (2, 5, 4) for stage in stages)


def test_the_position_head_is_told_what_enters_the_layer(traced, memory):
    class Recorder(nn.Module):
        calls = []

        def forward(self, queries, memory, layer):
            self.calls.append((queries, layer))
            return queries.position + layer

    queries = make_points(5)
    *_, calls = traced(queries, look_forward=1, position_head=Recorder())
    assert [layer for _, layer in Recorder.calls] == [0, 1, 2]
    for (seen, layer), (x, position, reference, *_) in zip(
        Recorder.calls, calls["layers"], strict=True
    ):
        assert torch.equal(seen.content, x) and torch.equal(seen.position, queries.position)
        assert torch.equal(seen.reference, reference)
        assert torch.equal(position, queries.position + layer)


def test_positions_are_added_to_queries_and_keys_but_not_to_values(make_decoder, memory):
    layer, (x, reference, _) = make_decoder().layers[0], make_queries(5)
    position, asked = torch.randn_like(x), []
    for attention in (layer.self_attn, layer.cross_attn):
        attention.register_forward_hook(lambda *call: asked.append(call[1:]))
    layer(x, position, reference, memory)
    (_, found), ((cross_query, *_), _) = asked
    query = x + position
    expected, _ = nn.MultiheadAttention.forward(layer.self_attn, query, query, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cross_query, layer.norm1(x + found) + position)


@pytest.mark.parametrize("of_heads", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_masks_of_self_attention_are_those_of_pytorch(randomise, of_heads, dtype):
    attention = randomise(SelfAttention(embed_dim=16, num_heads=4))
    x, position = torch.randn(2, 2, 5, 16)
    mask = torch.rand(8, 5, 5) if of_heads else torch.rand(5, 5)
    if dtype == torch.bool:
        mask = (mask > 0.5) & ~torch.eye(5, dtype=torch.bool)
    query = x + position
    expected, weights = nn.MultiheadAttention.forward(
        attention, query, query, x, attn_mask=mask, average_attn_weights=True
    )
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(attention(x, position, mask), expected, **close)
    torch.testing.assert_close(attention.weights(x, position, mask), weights, **close)


def test_the_position_of_a_query_is_made_of_sines_of_its_anchor(randomise):
    head, anchors = randomise(AnchorPosition(embed_dim=8)), torch.rand(1, 3, 4)
    first, second = head.mlp.layers
    # relative to the finest padded level, of which half is image in x and a quarter in y
    ratios = torch.tensor([[[0.5, 0.25], [0.6, 0.3]]])
    memory = FeaturePyramid(*[None] * 3, ratios, ())
    padded = anchors * torch.tensor([0.5, 0.25, 0.5, 0.25])
    # four coordinates of 8 / 2 channels each
    expected = second(first(encode_boxes(padded, 4)).relu())
    for layer in range(2):
        queries = Queries(torch.randn(1, 3, 8), anchors)
        torch.testing.assert_close(head(queries, memory, layer), expected)


# ---- look forward


def trained_box_heads(decoder, stage):
    """Numbers of the box heads to which the boxes of a stage give a gradient."""
    grads = torch.autograd.grad(
        stage.boxes.sum(),
        [head.layers[0].weight for head in decoder.box_heads],
        retain_graph=True,
        allow_unused=True,
    )
    return [i for i, grad in enumerate(grads) if grad is not None and grad.any()]


def test_look_forward_once_stops_the_gradient_at_the_layer(make_decoder, memory):
    decoder = make_decoder(look_forward=1, shared_heads=False)
    stages = decoder(make_queries(5), memory)
    assert [trained_box_heads(decoder, stage) for stage in stages] == [[0], [1], [2]]


def test_look_forward_twice_trains_the_layer_before_and_no_further(make_decoder, memory):
    decoder = make_decoder(look_forward=2, shared_heads=False)
    stages = decoder(make_queries(5), memory)
    assert [trained_box_heads(decoder, stage) for stage in stages] == [[0], [0, 1], [1, 2]]


def test_without_refinement_the_boxes_of_a_layer_train_its_own_head(make_decoder, memory):
    decoder = make_decoder(look_forward=0, shared_heads=False)
    stages = decoder(make_queries(5), memory)
    assert [trained_box_heads(decoder, stage) for stage in stages] == [[0], [1], [2]]


@HEADS
def test_looking_forward_changes_gradients_only(make_decoder, memory, shared_heads):
    once, twice = (make_decoder(look_forward=n, shared_heads=shared_heads) for n in (1, 2))
    twice.load_state_dict(once.state_dict())
    queries = make_queries(5)
    assert_same(once(queries, memory), twice(queries, memory))


@pytest.mark.parametrize("look_forward", [0, 1, 2])
def test_learned_anchors_get_a_gradient(make_decoder, memory, look_forward):
    queries = make_queries(5)
    queries.reference.requires_grad_()
    first, *_ = make_decoder(look_forward=look_forward)(queries, memory)
    assert torch.autograd.grad(first.boxes.sum(), queries.reference)[0].all()


@pytest.mark.parametrize("look_forward", [-1, 3, "twice"])
def test_other_ways_to_look_are_refused(make_decoder, look_forward):
    with pytest.raises(ValueError, match=f"look_forward is {look_forward!r}"):
        make_decoder(look_forward=look_forward)


# ---- heads


def test_a_layers_own_class_head_is_its_alone(make_decoder, memory):
    decoder, queries = make_decoder(shared_heads=False), make_queries(5)
    before = decoder(queries, memory)
    nn.init.constant_(decoder.class_heads[1].bias, 7.0)
    after = decoder(queries, memory)
    assert [not torch.equal(a.logits, b.logits) for a, b in zip(after, before, strict=True)] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(("shared_heads", "count"), [(True, 1), (False, NUM_LAYERS)])
def test_heads_are_shared_or_one_per_layer(make_decoder, shared_heads, count):
    decoder = make_decoder(shared_heads=shared_heads)
    assert len(decoder.class_heads) == len(decoder.box_heads) == count


@pytest.mark.parametrize(("shared_heads", "count"), [(True, 1), (False, NUM_LAYERS)])
def test_only_the_first_box_head_starts_with_a_size(shared_heads, count):
    decoder = Decoder(
        num_classes=3, num_layers=NUM_LAYERS, shared_heads=shared_heads, size_bias=-2.0
    )
    biases = [head.layers[-1].bias.tolist() for head in decoder.box_heads]
    assert biases == [[0, 0, -2, -2]] + [[0, 0, 0, 0]] * (count - 1)


def test_without_a_final_norm_predictions_see_what_the_layer_put_out(traced):
    decoder, queries, stages, calls = traced(final_norm=False)
    assert not any(name.startswith("norm") for name in decoder.state_dict())
    reference = queries.reference
    for stage, x in zip(stages, calls["outputs"], strict=True):
        assert torch.equal(stage.logits, decoder.class_heads[0](x))
        reference = refine(reference, decoder.box_heads[0](x))
        torch.testing.assert_close(stage.boxes, reference)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 2 * NUM_LAYERS - 1),
        ({"final_norm": False}, NUM_LAYERS),
        ({"look_forward": 0}, NUM_LAYERS),
    ],
)
def test_box_heads_compute_nothing_twice_and_nothing_for_nobody(traced, options, count):
    """Per layer a prediction and, but for the last, a refinement; without norm they are one."""
    *_, calls = traced(**options)
    assert len(calls["box_heads"]) == count


def test_a_decoder_without_layers_is_refused():
    with pytest.raises(ValueError, match="num_layers of the decoder is 0"):
        Decoder(num_classes=3, num_layers=0)
