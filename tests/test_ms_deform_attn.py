"""Every kernel against a scalar loop and against each other, through the operator."""

from itertools import product
from math import floor

import pytest
import torch

from dino_d2.ops import (
    compiled,
    dispatch,
    embedding_bag,
    ms_deform_attn,
    ms_deform_attn_from_offsets,
    reference,
)

SHAPES = ((3, 5), (1, 2), (4, 2))  # not square; 25 tokens
FLAT_SHAPES = [side for shape in SHAPES for side in shape]
FORWARD, BACKWARD = (
    getattr(torch.ops.dino_d2, name).default
    for name in ("ms_deform_attn", "ms_deform_attn_backward")
)

CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]
SUPPORTED = CAPABILITIES[: 1 + CAPABILITIES.index(compiled.CAPABILITY)]


@pytest.fixture(params=["chosen", "reference", "embedding_bag", *CAPABILITIES])
def device(request, monkeypatch):
    """The device to compute on, with the kernels of the parameter: those that are chosen there, or
    others on the CPU."""
    if request.param == "chosen":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels = {"reference": reference, "embedding_bag": embedding_bag}.get(request.param, compiled)
    if kernels is compiled:
        if dispatch.WHY_NOT_COMPILED:
            pytest.skip(f"no compiled CPU kernels: {dispatch.WHY_NOT_COMPILED}")
        if request.param not in SUPPORTED:
            pytest.skip(f"this processor has no {request.param}")
        monkeypatch.setattr(compiled, "CAPABILITY", request.param)

    def kernels_for(value, points):
        exact = value.dtype == torch.float64 or points.dtype == torch.float64
        unsupported = kernels is compiled and value.dtype not in compiled.DTYPES
        return reference if exact or unsupported else kernels

    monkeypatch.setattr(dispatch, "kernels_for", kernels_for)
    return torch.device("cpu")


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
    for x, y in zip(inputs, exact, strict=True):
        assert x.grad.dtype == x.dtype
        pairs.append((x.grad, y.grad))
    for x, y in pairs:
        torch.testing.assert_close(x.cpu(), y, rtol=rtol, atol=atol, check_dtype=False)


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


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 1, "queries": 1, "heads": 1, "points": 1},
        {"dim": 7},
        {"dim": 32},
        {"dim": 32, "queries": 20},  # enough points that kernels copy the value first
        {"dim": 40, "heads": 1},
        {"dim": 64, "points": 5, "batch": 1},
    ],
    ids=str,
)
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


@pytest.mark.slow
def test_gradcheck(device):
    value, locations, weights = make_inputs(device, torch.float64, queries=2, dim=2)
    torch.autograd.gradcheck(
        lambda v, loc, w: ms_deform_attn(v, SHAPES, loc, w),
        (value, locations, weights),
        nondet_tol=1e-9,  # a GPU adds the gradient of the value up in any order
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_forward_operator(device, dtype):
    value, locations, weights = make_inputs(device)
    value = value.detach().to(dtype).requires_grad_()
    args = value, FLAT_SHAPES, locations, weights, None
    torch.library.opcheck(FORWARD, args, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_backward_operator(device, dtype):
    value, locations, weights = (x.detach() for x in make_inputs(device))
    grad = torch.randn(2, 3, 8, device=device, dtype=dtype)
    args = (grad, value.to(dtype), FLAT_SHAPES, locations, weights, None)
    torch.library.opcheck(BACKWARD, args)


@pytest.mark.slow
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
        (lambda v, s, loc, w: (v, [*s, (0, 4)], loc, w), "include an empty one"),
        (lambda v, s, loc, w: (v, [*s, (-1, -1)], loc, w), "include an empty one"),
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


# ---- from offsets, logits and a reference


def make_raw_inputs(device, size, dtype=torch.float32, **sizes):
    """Value, reference, offsets and logits; points are well inside the pixels, as above."""
    value, locations, weights = (x.detach() for x in make_inputs(device, torch.float64, **sizes))
    batch, queries, _, levels, points, _ = locations.shape
    places = 0.3 + 0.4 * torch.rand(batch, queries, levels, size, dtype=torch.float64)
    places = places.to(device)
    unit = reference.offset_unit(FLAT_SHAPES, places, points)[:, :, None, :, None]
    offsets = (locations - places[:, :, None, :, None, :2]) / unit
    logits = 3 * torch.randn(weights.shape, dtype=torch.float64).to(device)
    return [x.to(dtype).requires_grad_() for x in (value, places, offsets, logits)]


def in_plain_torch(value, places, offsets, logits):
    """The definition: softmax, arithmetic of locations, and then the other entry."""
    num_points = offsets.shape[-2]
    weights = logits.flatten(-2).softmax(-1).view_as(logits)
    if places.shape[-1] == 4:
        unit = places[..., 2:] * 0.5 / num_points
    else:
        unit = 1 / places.new_tensor([(w, h) for h, w in SHAPES]).expand_as(places)
    locations = places[:, :, None, :, None, :2] + offsets * unit[:, :, None, :, None]
    return ms_deform_attn(value, SHAPES, locations, weights)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "sizes", [{}, {"dim": 32, "points": 4}, {"heads": 3, "points": 1}], ids=str
)
def test_offsets_and_logits_give_what_plain_torch_does(device, size, sizes):
    inputs = make_raw_inputs(device, size, **sizes)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    value, *others = inputs
    out = ms_deform_attn_from_offsets(value, SHAPES, *others)
    expected = in_plain_torch(*exact)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    for x, y in zip(inputs, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [2, 4])
def test_gradcheck_of_offsets_and_logits(size):
    value, *others = make_raw_inputs("cpu", size, torch.float64, queries=2, dim=2)
    torch.autograd.gradcheck(
        lambda v, *rest: ms_deform_attn_from_offsets(v, SHAPES, *rest), (value, *others)
    )


@pytest.mark.slow
def test_opcheck_with_a_reference(device):
    value, places, offsets, logits = make_raw_inputs(device, 4)
    args = value, FLAT_SHAPES, offsets, logits, places
    torch.library.opcheck(FORWARD, args, rtol=1e-4, atol=1e-4)
    grad = torch.randn(2, 3, 8, device=device)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    torch.library.opcheck(BACKWARD, (grad, *detached))


def test_large_logits_are_no_problem(device):
    value, places, offsets, logits = (x.detach() for x in make_raw_inputs(device, 2))
    logits = logits.clone()
    logits[..., 0, 0] = 1e4  # takes all the weight
    out = ms_deform_attn_from_offsets(value, SHAPES, places, offsets, logits)
    one = torch.zeros_like(logits)
    one[..., 0, 0] = 1
    locations, _ = reference.resolve(FLAT_SHAPES, offsets, logits, places)
    torch.testing.assert_close(
        out, ms_deform_attn(value, SHAPES, locations, one), rtol=1e-5, atol=1e-5
    )


def test_a_reference_that_does_not_fit_is_named():
    value, places, offsets, logits = make_raw_inputs("cpu", 4)
    with pytest.raises(ValueError, match=r"reference \(2, 3, 3, 3\) should be \(2, 3, 3, 4\) or"):
        ms_deform_attn_from_offsets(value, SHAPES, places[..., :3], offsets, logits)
    with pytest.raises(ValueError, match=r"offsets .* and logits \(2, 3, 2, 3, 1\) should be"):
        ms_deform_attn_from_offsets(value, SHAPES, places, offsets, logits[..., :1])


# ---- what else users do to it


def test_half_precision_offsets_are_widened(device):
    value, places, offsets, logits = (x.detach() for x in make_raw_inputs(device, 2))
    narrow = [x.bfloat16() for x in (places, offsets, logits)]
    out = ms_deform_attn_from_offsets(value, SHAPES, *narrow)
    expected = ms_deform_attn_from_offsets(value, SHAPES, *(x.float() for x in narrow))
    assert torch.equal(out, expected)


def test_autocast_narrows_the_value_and_nothing_else(device, monkeypatch):
    value, places, offsets, logits = make_raw_inputs(device, 4)
    expected = ms_deform_attn_from_offsets(value.bfloat16(), SHAPES, places, offsets, logits)
    with torch.autocast(device.type, torch.bfloat16):
        out = ms_deform_attn_from_offsets(value, SHAPES, places, offsets, logits)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    out.sum().backward()
    assert value.grad.dtype == places.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone():
    inputs = make_inputs(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = ms_deform_attn(inputs[0], SHAPES, *inputs[1:])
    assert out.dtype == torch.float64


def test_coordinates_that_are_not_finite_spoil_only_their_own_query(device):
    value, locations, weights = (x.detach() for x in make_inputs(device, queries=4))
    expected = ms_deform_attn(value, SHAPES, locations, weights)
    broken = locations.clone()
    broken[:, 1] = torch.nan
    broken[0, 2, 0, 0, 0] = torch.inf
    broken[1, 2, 0, 1, 0] = -1e30
    leaves = [x.clone().requires_grad_() for x in (value, broken, weights)]
    out = ms_deform_attn(leaves[0], SHAPES, *leaves[1:])
    torch.testing.assert_close(out[:, [0, 3]], expected[:, [0, 3]])
    assert out[:, 1].isnan().all()
    out.sum().backward()  # in bounds


@pytest.mark.parametrize("threads", [1, 3, 4])
def test_threads_share_the_work_and_agree(device, threads):
    # one head and image for all threads: its queries are split, and their gradients added up
    sizes = {"batch": 1, "heads": 1, "queries": 50, "dim": 32}
    inputs = [x.detach() for x in make_inputs(device, torch.float64, **sizes)]
    exact = reference.forward(inputs[0], FLAT_SHAPES, *inputs[1:])
    grad = torch.randn_like(exact)
    expected = reference.backward(grad, inputs[0], FLAT_SHAPES, *inputs[1:])
    leaves = [x.float().requires_grad_() for x in inputs]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = ms_deform_attn(leaves[0], SHAPES, *leaves[1:])
        grads = [torch.autograd.grad(out, leaves, grad.float(), True) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    for x, y in zip(grads[0], expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)
    assert device.type == "cuda" or all(map(torch.equal, *grads))


def test_it_can_be_differentiated_only_once():
    inputs = make_inputs()
    out = ms_deform_attn(inputs[0], SHAPES, *inputs[1:])
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="only once"):
        grad.sum().backward()


def test_it_is_exported_as_one_node():
    class Attention(torch.nn.Module):
        def forward(self, value, places, offsets, logits):
            return ms_deform_attn_from_offsets(value, SHAPES, places, offsets, logits)

    inputs = tuple(x.detach() for x in make_raw_inputs("cpu", 2))
    program = torch.export.export(Attention(), inputs)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.dino_d2.ms_deform_attn.default) == 1
    torch.testing.assert_close(program.module()(*inputs), Attention()(*inputs))
