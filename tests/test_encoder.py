import pytest
import torch

from dino_d2.layers import encode_pixels
from dino_d2.modeling import Encoder
from dino_d2.modeling.tokens import flatten, token_centers, valid_ratio

SHAPES = ((8, 8), (4, 4), (2, 2))


@pytest.fixture
def padding():
    """Of 64 x 64 images, the first of which is 32 wide and the second 48 high."""
    padding = torch.zeros(2, 64, 64, dtype=torch.bool)
    padding[0, :, 32:] = True
    padding[1, 48:] = True
    return padding


@pytest.fixture
def encoder(randomise):
    encoder = Encoder(
        num_layers=2, embed_dim=32, num_heads=4, ffn_dim=16, num_levels=3, num_points=2
    )
    return randomise(encoder)


def make_levels(shapes=SHAPES, batch=2):
    return [torch.randn(batch, 32, *shape) for shape in shapes]


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (1, 6), (4, 2), (3, 5)])
def test_valid_ratios_are_shares_of_width_and_height(rows, columns):
    padding = torch.ones(1, 4, 6, dtype=torch.bool)
    padding[:, :rows, :columns] = False
    torch.testing.assert_close(valid_ratio(padding), torch.tensor([[columns / 6, rows / 4]]))


def test_tokens_are_the_pixels_row_by_row_finest_level_first():
    levels = [
        torch.arange(12.0).view(1, 1, 3, 4).expand(2, 32, 3, 4),
        torch.arange(12.0, 14.0).view(1, 1, 1, 2).expand(2, 32, 1, 2),
    ]
    pyramid = flatten(levels, torch.zeros(2, 24, 32, dtype=torch.bool), torch.zeros(2, 32))
    assert pyramid.shapes == ((3, 4), (1, 2))
    assert all(type(side) is int for shape in pyramid.shapes for side in shape)
    assert pyramid.tokens[1, :, 5].tolist() == list(range(14))


def test_padding_of_a_level_is_that_of_the_image_below_it(padding):
    pyramid = flatten(make_levels(), padding, torch.zeros(3, 32))
    fine, middle, coarse = pyramid.padding.split([64, 16, 4], 1)
    assert fine[0].view(8, 8)[:, :4].logical_not().all() and fine[0].view(8, 8)[:, 4:].all()
    assert fine[1].view(8, 8)[:6].logical_not().all() and fine[1].view(8, 8)[6:].all()
    assert middle[0].view(4, 4)[0].tolist() == [False, False, True, True]
    # 48 of 64 rows: the second of two coarse rows begins at 32, inside
    assert coarse.tolist() == [[False, True, False, True], [False] * 4]
    # (width, height)
    assert pyramid.valid_ratios[0].tolist() == [[0.5, 1]] * 3
    assert pyramid.valid_ratios[1].tolist() == [[1, 0.75], [1, 0.75], [1, 1]]


def test_the_level_embedding_goes_to_the_position_only(padding):
    levels, embed = make_levels(), torch.randn(3, 32)
    plain, embedded = (flatten(levels, padding, e) for e in (torch.zeros(3, 32), embed))
    assert torch.equal(embedded.tokens, plain.tokens)
    added = torch.cat([embed[0].expand(64, -1), embed[1].expand(16, -1), embed[2].expand(4, -1)])
    torch.testing.assert_close(embedded.position, plain.position + added)
    middle = encode_pixels(plain.padding[:, 64:80].view(2, 4, 4), 32)
    torch.testing.assert_close(plain.position[:, 64:80], middle.flatten(1, 2))


def test_token_centres_are_relative_to_the_image_without_padding(padding):
    centers = token_centers(flatten(make_levels(), padding, torch.zeros(3, 32)))
    # the third column of eight is at 2.5 / 8 of the padded, 2.5 / 4 of the narrow image
    third = torch.tensor([[2.5 / 4, 0.5 / 8], [2.5 / 8, 0.5 / 6]])
    torch.testing.assert_close(centers[:, 2], third)
    # token 64 + 4 * 1 + 3: second row and last column of the middle level; beyond the narrow image
    assert centers[0, 71].tolist() == [3.5 / 2, 1.5 / 4]
    torch.testing.assert_close(centers[1, 71], torch.tensor([3.5 / 4, 1.5 / 3]))
    # last token of the coarse level
    assert centers[1, 83].tolist() == [0.75, 0.75]


def test_an_encoder_without_layers_is_refused():
    with pytest.raises(ValueError, match="num_layers of the encoder is 0"):
        Encoder(num_layers=0)


def test_what_is_on_the_padding_does_not_change_other_tokens(encoder, padding):
    levels = make_levels()
    memory = encoder(levels, padding)
    masks = [padding[:, None, ::stride, ::stride] for stride in (8, 16, 32)]
    noisy = [x + 100 * torch.randn_like(x) * mask for x, mask in zip(levels, masks, strict=True)]
    valid = ~memory.padding
    assert not torch.equal(encoder(noisy, padding).tokens, memory.tokens)
    assert torch.equal(encoder(noisy, padding).tokens[valid], memory.tokens[valid])


def test_a_padded_image_is_encoded_like_the_image_alone(encoder, padding):
    levels = make_levels()
    memory = encoder(levels, padding)
    narrow = encoder([x[:1, :, :, : x.shape[3] // 2] for x in levels], padding[:1, :, :32])
    assert narrow.shapes == ((8, 4), (4, 2), (2, 1))
    torch.testing.assert_close(
        memory.tokens[0][~memory.padding[0]], narrow.tokens[0], rtol=1e-4, atol=1e-4
    )


def test_every_layer_asks_with_the_position_added(encoder, padding):
    asked = []
    for layer in encoder.layers:
        layer.self_attn.register_forward_pre_hook(lambda _, args: asked.append(args))
    encoder(make_levels(), padding)
    for query, _, pyramid in asked:
        assert torch.equal(query, pyramid.tokens + pyramid.position)
    assert torch.equal(asked[0][2].position, asked[1][2].position)  # tokens do not carry it on


def test_pixels_are_encoded_as_the_encoder_is_told(padding, randomise):
    sizes = {"embed_dim": 32, "num_heads": 4, "ffn_dim": 16, "num_levels": 3}
    encoder = Encoder(num_layers=1, position_temperature=10000.0, position_offset=-0.5, **sizes)
    memory = randomise(encoder)(make_levels(), padding)
    middle = encode_pixels(memory.padding[:, 64:80].view(2, 4, 4), 32, 10000.0, -0.5)
    expected = middle.flatten(1, 2) + encoder.level_embed.weight[1]
    torch.testing.assert_close(memory.position[:, 64:80], expected)


def test_a_layer_that_adds_nothing_leaves_normalised_features(padding):
    encoder = Encoder(num_layers=1, embed_dim=32, num_heads=4, ffn_dim=16, num_levels=3)
    torch.nn.init.zeros_(encoder.layers[0].self_attn.output_proj.weight)
    torch.nn.init.zeros_(encoder.layers[0].ffn.layers[1].weight)
    torch.nn.init.zeros_(encoder.layers[0].ffn.layers[1].bias)
    tokens = encoder(levels := make_levels(), padding).tokens
    x = torch.cat([x.flatten(2).mT for x in levels], 1)
    expected = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, unbiased=False)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
