import math

import pytest
import torch

from dino_d2.layers import (
    MLP,
    DeformableAttention,
    box_head,
    class_head,
    deformable_attention,
    encode_boxes,
    encode_pixels,
)
from dino_d2.layers.position import encode
from dino_d2.ops.reference import resolve


def test_mlp_has_relu_between_its_layers_and_none_at_the_end():
    mlp = MLP(2, 2, 1)
    with torch.no_grad():
        for parameter, value in zip(
            mlp.parameters(),
            ([[1.0, 0.0], [0.0, 1.0]], [0.0, 1.0], [[-2.0, -3.0]], [0.5]),
            strict=True,
        ):
            parameter.copy_(torch.tensor(value))
    # hidden relu(-4, 2 + 1) = (0, 3), out 0 - 9 + 0.5; without relu 8 - 9 + 0.5
    assert mlp(torch.tensor([-4.0, 2.0])).item() == -8.5


def test_mlp_drops_hidden_values_in_training_only():
    mlp = MLP(4, 1000, 1, dropout=0.5)
    x = torch.ones(4)
    assert not torch.equal(mlp(x), mlp(x))
    mlp.eval()
    assert torch.equal(mlp(x), mlp(x))


@pytest.mark.parametrize("prior", [0.01, 0.2])
def test_a_new_class_head_gives_every_class_its_prior(prior):
    head = class_head(8, 5, prior=prior)
    torch.testing.assert_close(head(torch.zeros(8)).sigmoid(), torch.full((5,), prior))


def test_a_new_box_head_moves_nothing():
    assert not box_head(8)(torch.randn(3, 8)).any()


# ---- positions


def test_a_position_is_encoded_as_sines_and_cosines():
    # x = 1/8, 4 channels: frequencies 1 and 100^-(2/4) = 1/10 of 2 pi
    expected = [f(math.pi / 4 / k) for k in (1, 10) for f in (math.sin, math.cos)]
    torch.testing.assert_close(encode(torch.tensor(1 / 8), 4, 100.0), torch.tensor(expected))


def test_boxes_are_encoded_in_the_order_y_x_w_h():
    encoded = encode_boxes(torch.tensor([0.1, 0.2, 0.3, 0.4]), 6)
    parts = [encode(torch.tensor(v), 6, 10000.0) for v in (0.2, 0.1, 0.3, 0.4)]
    torch.testing.assert_close(encoded, torch.cat(parts))


@pytest.mark.parametrize(("temperature", "offset"), [(7.0, 0.0), (10000.0, -0.5)])
def test_pixels_are_encoded_relative_to_the_image_without_padding(temperature, offset):
    padding = torch.ones(2, 3, 4, dtype=torch.bool)
    padding[0, :2, :3] = False  # 2 x 3 pixels
    padding[1] = False
    encoded = encode_pixels(padding, 8, temperature, offset)
    assert encoded.shape == (2, 3, 4, 8)
    for image, (height, width) in enumerate([(2, 3), (3, 4)]):
        for row in range(height):
            for column in range(width):
                # counted from 1, and y first; an offset of -0.5 makes it the pixel's centre
                y, x = (row + 1 + offset) / height, (column + 1 + offset) / width
                expected = torch.cat([encode(torch.tensor(v), 4, temperature) for v in (y, x)])
                torch.testing.assert_close(encoded[image, row, column], expected, atol=2e-5, rtol=0)


def test_the_temperature_of_pixels_is_that_of_the_published_weights():
    encoded = encode_pixels(torch.zeros(1, 1, 2, dtype=torch.bool), 8)
    # channel 6 is x's second sine: at x = 1/2 it is sin(pi / 20^(2/4))
    assert encoded[0, 0, 0, 6].item() == pytest.approx(math.sin(math.pi / math.sqrt(20)), abs=1e-5)


# ---- deformable attention


@pytest.fixture
def attention():
    return DeformableAttention(embed_dim=32, num_heads=4, num_levels=2, num_points=2)


@pytest.fixture
def sampled(monkeypatch):
    """The locations and weights of every call of the operator."""
    calls = []

    def record(value, shapes, places, offsets, logits):
        flat_shapes = [side for shape in shapes for side in shape]
        calls.append(resolve(flat_shapes, offsets, logits, places))
        return value.new_zeros(*offsets.shape[:2], value.shape[2] * value.shape[3])

    monkeypatch.setattr(deformable_attention, "ms_deform_attn_from_offsets", record)
    return calls


def test_channels_that_cannot_be_divided_among_heads_are_refused():
    with pytest.raises(ValueError, match="embed_dim 30 is not a multiple of num_heads 4"):
        DeformableAttention(embed_dim=30, num_heads=4)


def test_heads_start_out_looking_into_different_directions(make_memory, sampled):
    attention = DeformableAttention(embed_dim=32, num_heads=8, num_levels=2, num_points=3)
    memory = make_memory(shapes=((4, 8), (2, 5)), batch=1)
    attention(torch.randn(1, 1, 32), torch.full((1, 1, 2, 2), 0.5), memory)
    locations, weights = sampled[0]
    around = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, direction in enumerate(around):
        for level, size in enumerate([(8, 4), (5, 2)]):
            for point in range(3):
                # point p is p + 1 pixels away
                expected = [0.5 + (point + 1) * d / s for d, s in zip(direction, size, strict=True)]
                actual = locations[0, 0, head, level, point]
                torch.testing.assert_close(actual, torch.tensor(expected))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 6))


def test_a_box_gives_its_points_half_its_size_to_share(attention, make_memory, sampled):
    box = torch.tensor([0.5, 0.4, 0.2, 0.1]).expand(1, 1, 2, 4)
    attention(torch.randn(1, 1, 32), box, make_memory(batch=1))
    locations, _ = sampled[0]
    # head 0 looks to the right: the points are at 1/2 and 2/2 of half the width
    expected = torch.tensor([[0.55, 0.4], [0.6, 0.4]])
    torch.testing.assert_close(locations[0, 0, 0, 0], expected)
    torch.testing.assert_close(locations[0, 0, 0, 1], expected)
    # head 1 looks down
    torch.testing.assert_close(locations[0, 0, 1, 1, 1], torch.tensor([0.5, 0.45]))


def test_weights_add_up_to_one_over_levels_and_points(attention, make_memory, randomise, sampled):
    randomise(attention)(torch.randn(2, 7, 32), torch.rand(2, 7, 2, 2), make_memory())
    _, weights = sampled[0]
    torch.testing.assert_close(weights.sum((-2, -1)), torch.ones(2, 7, 4))
    assert weights.std() > 0.01


def test_levels_have_references_of_their_own(attention, make_memory, sampled):
    reference = torch.tensor([[0.2, 0.3], [0.7, 0.8]]).view(1, 1, 2, 2)
    attention(torch.randn(1, 1, 32), reference, make_memory(batch=1))
    locations, _ = sampled[0]
    # opposite heads look into opposite directions
    torch.testing.assert_close(locations.mean((2, 4))[0, 0], reference[0, 0])


def test_a_constant_memory_is_projected_twice(attention, make_memory):
    token = torch.randn(32)
    memory = make_memory(shapes=((8, 8), (7, 9)))
    memory = memory._replace(tokens=token.expand_as(memory.tokens))
    out = attention(torch.randn(2, 1, 32), torch.full((2, 1, 2, 2), 0.5), memory)
    expected = attention.output_proj(attention.value_proj(token))
    torch.testing.assert_close(out, expected.expand_as(out))


def test_what_is_on_the_padding_is_never_read(attention, make_memory, randomise):
    padding = torch.zeros(2, 48, 40, dtype=torch.bool)
    padding[0, 24:] = padding[1, :, 16:] = True
    memory = make_memory(padding=padding)
    noise = 1e3 * torch.randn_like(memory.tokens) * memory.padding[..., None]
    queries = torch.randn(2, 9, 32), torch.rand(2, 9, 2, 2)
    randomise(attention)
    out = attention(*queries, memory)
    assert noise.any()
    assert torch.equal(out, attention(*queries, memory._replace(tokens=memory.tokens + noise)))
    assert not torch.equal(out, attention(*queries, memory._replace(tokens=memory.tokens + 1)))
