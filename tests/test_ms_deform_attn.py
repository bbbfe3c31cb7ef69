from itertools import product
from math import floor

import pytest
import torch

from dino_d2.ops import ms_deform_attn

SHAPES = ((3, 5), (1, 2), (4, 2))  # not square; 25 tokens
FLAT_SHAPES = [side for shape in SHAPES for side in shape]
FORWARD, BACKWARD = (
    getattr(torch.ops.dino_d2, name).default
    for name in ("ms_deform_attn", "ms_deform_attn_backward")
)


def make_inputs(device="cpu", dtype=torch.float32, batch=2, queries=3, heads=2, dim=4, points=2):
    """Value, locations and weights; about a third of the points are outside the image, and none
    is within a tenth of a pixel of a line on which the gradient jumps."""
    pixel = torch.cat(
        [torch.randint(-2, side + 1, (batch, queries, heads, 1, points, 2)) for side in (3, 1, 4)],
        dim=3,
    )
    pixel = pixel + 0.1 + 0.8 * torch.rand(pixel.shape, dtype=torch.float64)
    size = torch.tensor([(w, h) for h, w in SHAPES])[:, None]
    value = torch.randn(batch, 25, heads, dim, dtype=torch.float64)
    weights = torch.rand(pixel.shape[:-1], dtype=torch.float64)
    inputs = (value, (pixel + 0.5) / size, weights)
    return [x.to(device, dtype).requires_grad_() for x in inputs]


def scalar_loop(value, shapes, locations, weights):
    """Equation 3 of Deformable DETR, one corner of one sampling point at a time."""
    batch, queries, heads, levels, points, _ = locations.shape
    out = [[[0] * heads for _ in range(queries)] for _ in range(batch)]
    for b, q, h, lv, p in product(*map(range, (batch, queries, heads, levels, points))):
        (height, width), start = shapes[lv], sum(m * n for m, n in shapes[:lv])
        x, y = locations[b, q, h, lv, p] * locations.new_tensor([width, height]) - 0.5
        top, left = floor(y.detach()), floor(x.detach())
        for row, column in product((top, top + 1), (left, left + 1)):
            if 0 <= row < height and 0 <= column < width:
                share = (1 - abs(x - column)) * (1 - abs(y - row)) * weights[b, q, h, lv, p]
                out[b][q][h] = out[b][q][h] + share * value[b, start + row * width + column, h]
    zero = value.new_zeros(value.shape[-1])
    return torch.stack(
        [torch.stack([torch.cat([zero + x for x in head]) for head in image]) for image in out]
    )


def compare_with_scalar_loop(inputs, rtol, atol):
    """Outputs and all gradients; what is expected is computed in the dtype of the locations."""
    value, locations, weights = inputs
    out = ms_deform_attn(value, SHAPES, locations, weights)
    assert out.dtype == value.dtype
    exact = [x.detach().cpu().to(locations.dtype).requires_grad_() for x in inputs]
    expected = scalar_loop(exact[0], SHAPES, exact[1], exact[2])
    grad = torch.randn(out.shape).to(value.dtype)
    out.backward(grad.to(out.device))
    expected.backward(grad.to(expected.dtype))
    pairs = [(out, expected)]
    for x, reference in zip(inputs, exact, strict=True):
        assert x.grad.dtype == x.dtype
        pairs.append((x.grad, reference.grad))
    for actual, reference in pairs:
        torch.testing.assert_close(actual.cpu(), reference, rtol=rtol, atol=atol, check_dtype=False)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str
)
def test_it_is_the_scalar_loop_forward_and_backward(device, dtype, tolerance):
    compare_with_scalar_loop(make_inputs(device, dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_narrow_value_costs_only_its_own_rounding(device, dtype):
    value, locations, weights = make_inputs(device)
    value = value.detach().to(dtype).requires_grad_()
    # computed in float32 and rounded once: half a unit in the last place
    rounding = torch.finfo(dtype).eps / 2
    compare_with_scalar_loop([value, locations, weights], rtol=1.01 * rounding, atol=2e-5)


@pytest.mark.parametrize("sizes", [{"batch": 1, "queries": 1, "heads": 1, "points": 1}, {"dim": 7}])
def test_odd_sizes_are_fine(device, sizes):
    compare_with_scalar_loop(make_inputs(device, **sizes), rtol=1e-5, atol=1e-5)


def test_non_contiguous_inputs_give_the_same(device):
    inputs = make_inputs(device)
    strided = [
        x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in inputs
    ]
    assert not any(x.is_contiguous() for x in strided)
    compare_with_scalar_loop(strided, rtol=1e-5, atol=1e-5)


def test_an_expanded_gradient_is_fine(device):
    value, locations, weights = make_inputs(device)
    ms_deform_attn(value, SHAPES, locations, weights).sum().backward()
    expected = torch.autograd.grad(
        scalar_loop(value.cpu(), SHAPES, locations.cpu(), weights.cpu()).sum(), value
    )
    torch.testing.assert_close(value.grad, expected[0], rtol=1e-5, atol=1e-5)


def test_points_far_outside_sample_zero_and_get_no_gradient(device):
    value, locations, weights = make_inputs(device)
    for place in (-3.0, 4.0, 1e6):
        far = torch.full_like(locations, place).requires_grad_()
        out = ms_deform_attn(value, SHAPES, far, weights)
        grads = torch.autograd.grad(out.sum(), (value, far, weights))
        assert not any(x.any() for x in (out, *grads))


def test_the_centre_of_a_pixel_samples_exactly_that_pixel(device):
    value, _, _ = make_inputs(device, batch=1, heads=1)
    # levels (3, 5), (1, 2), (4, 2): tokens 15 and 17 are where the second and third begin
    centers = [((2 + 0.5) / 5, (1 + 0.5) / 3), (0.75, 0.5), (0.25, 3.5 / 4)]
    locations = torch.tensor(centers, device=device).view(1, 1, 1, 3, 1, 2)
    weights = torch.tensor([1.0, 10.0, 100.0], device=device).view(1, 1, 1, 3, 1)
    out = ms_deform_attn(value, SHAPES, locations, weights)
    expected = value[0, 1 * 5 + 2] + 10 * value[0, 15 + 1] + 100 * value[0, 17 + 3 * 2]
    torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-4)


def test_no_queries_give_an_empty_output_and_zero_gradients(device):
    value, locations, weights = make_inputs(device, queries=0)
    out = ms_deform_attn(value, SHAPES, locations, weights)
    assert out.shape == (2, 0, 8)
    out.sum().backward()
    assert value.grad.shape == value.shape and not value.grad.any()
    assert locations.grad.shape == locations.shape


def test_gradcheck(device):
    value, locations, weights = make_inputs(device, torch.float64, queries=2, dim=2)
    torch.autograd.gradcheck(
        lambda v, loc, w: ms_deform_attn(v, SHAPES, loc, w),
        (value, locations, weights),
        nondet_tol=1e-9,  # a GPU adds the gradient of the value up in any order
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_forward_operator(device, dtype):
    value, locations, weights = make_inputs(device)
    value = value.detach().to(dtype).requires_grad_()
    torch.library.opcheck(FORWARD, (value, FLAT_SHAPES, locations, weights), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_backward_operator(device, dtype):
    value, locations, weights = (x.detach() for x in make_inputs(device))
    grad = torch.randn(2, 3, 8, device=device, dtype=dtype)
    args = (grad, value.to(dtype), FLAT_SHAPES, locations, weights)
    torch.library.opcheck(BACKWARD, args)


@pytest.mark.parametrize("narrow", ["value", "weights"])
def test_fake_tensors_have_the_dtypes_of_real_ones(narrow):
    # CPU autocast leaves softmax in bfloat16: weights can be narrower than the locations
    inputs = dict(zip(("value", "locations", "weights"), make_inputs(), strict=True))
    inputs = {name: x.detach() for name, x in inputs.items()}
    inputs[narrow] = inputs[narrow].bfloat16()
    value, locations, weights = inputs.values()
    grad = torch.randn(2, 3, 8, dtype=value.dtype)
    torch.library.opcheck(FORWARD, (value, FLAT_SHAPES, locations, weights))
    torch.library.opcheck(BACKWARD, (grad, value, FLAT_SHAPES, locations, weights))


def test_it_compiles_to_one_graph(device):
    def loss(value, locations, weights):
        return ms_deform_attn(value * 2, SHAPES, locations, weights).square().sum()

    inputs = make_inputs(device)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*inputs), inputs)
    for x, y in zip(actual, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, s, loc, w: (v, s[:2], loc, w), r"\(\(3, 5\), \(1, 2\)\).* 25 tokens"),
        (lambda v, s, loc, w: (v[:, 1:], s, loc, w), "24 tokens"),
        (lambda v, s, loc, w: (v, s, loc[:1], w), r"\(1, 3, 2, 3, 2, 2\) should be \(2, 3, 2, 3,"),
        (lambda v, s, loc, w: (v[:, :, :1], s, loc, w), r"should be \(2, 3, 1, 3, 2, 2\)"),
        (lambda v, s, loc, w: (v, s, loc[:, :, :, :2], w), r"3 levels.*\(2, 3, 2, 2, 2, 2\)"),
        (lambda v, s, loc, w: (v, s, loc[..., :1], w), r"\(2, 3, 2, 3, 2, 1\) should be"),
        (lambda v, s, loc, w: (v, s, loc, w[:, :2]), r"weights \(2, 2, 2, 3, 2\) should be"),
        (lambda v, s, loc, w: (v, s, loc, w[..., :1]), r"weights \(2, 3, 2, 3, 1\) should be"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, message):
    value, locations, weights = make_inputs()
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(*change(value, SHAPES, locations, weights))
