"""Without a GPU the kernels run in Triton's interpreter; what a GPU would run is compiled anyway.

Points are at least a tenth of a pixel away from lines on which gradients jump, unless said.
"""

import importlib.util
import math
import os
import re
import subprocess
from itertools import pairwise

import pytest
import torch

from dino_d2.ops import reference as definition

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dino_d2.ops import triton_kernels as compiled_kernels  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [3, 5, 1, 2, 4, 2]  # levels, not square; 25 tokens
KINDS = {"locations": 0, "points": 2, "boxes": 4}  # last dimension of the reference


@pytest.fixture
def kernels(monkeypatch):
    """The module under test, or a copy of it for the interpreter."""
    if DEVICE == "cuda":
        return compiled_kernels
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name, member in vars(tl.core).items():
        monkeypatch.setattr(tl.core, name, member)  # the interpreter leaves its own in place
    for name in ("cdiv", "max", "sum"):  # of Triton's library: what the kernels call
        monkeypatch.setattr(tl, name, triton.jit(getattr(tl, name).fn))
    spec = importlib.util.spec_from_file_location("interpreted", compiled_kernels.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def offset_unit(reference, shapes, points):
    """What an offset of one is in locations, (B, Q, 1, L, 1, 2)."""
    if reference.shape[-1] == 4:
        unit = reference[..., 2:] * (0.5 / points)
    else:
        unit = (1 / sizes(shapes).to(reference)).expand_as(reference)
    return unit[:, :, None, :, None]


def sizes(shapes):
    """(width, height) of levels, (L, 2)."""
    return torch.tensor([(w, h) for h, w in zip(shapes[::2], shapes[1::2], strict=True)])


def make_inputs(kind="locations", shapes=SHAPES, batch=1, queries=3, heads=1, dim=8, points=2):
    """Arguments of `forward` on the CPU; about a third of the points are outside the image."""
    size = sizes(shapes)[:, None].double()
    random = torch.rand(2, batch, queries, heads, len(size), points, 2, dtype=torch.float64)
    pixels = (random[0] * (size + 3)).floor() - 2 + 0.1 + 0.8 * random[1]  # [-2, size]
    locations = (pixels + 0.5) / size
    value = torch.randn(batch, int(size.prod(-1).sum()), heads, dim)
    weights = torch.randn(locations.shape[:-1])
    if not KINDS[kind]:
        return value, shapes, locations.float(), weights, None
    reference = 0.2 + 0.6 * torch.rand(batch, queries, len(shapes) // 2, KINDS[kind])
    centre = reference[:, :, None, :, None, :2].double()
    offsets = (locations - centre) / offset_unit(reference.double(), shapes, points)
    return value, shapes, offsets.float(), weights, reference


def expect(grad, value, shapes, points, weights, reference):
    """Output and gradients of value, locations and weights, in float64 by autograd."""
    value, locations, weights = (x.detach().double() for x in (value, points, weights))
    if reference is not None:
        reference = reference.double()
        locations = locations * offset_unit(reference, shapes, points.shape[4])
        locations = locations + reference[:, :, None, :, None, :2]
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    if reference is not None:
        weights = weights.flatten(-2).softmax(-1).view_as(weights)
    out = definition.forward(value, shapes, locations, weights)
    return out.detach(), *torch.autograd.grad(out, inputs, grad.double())


def run(kernels, grad, *inputs):
    """The same by the kernels, on the CPU."""
    inputs = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in inputs]
    outputs = (kernels.forward(*inputs), *kernels.backward(grad.to(DEVICE), *inputs))
    assert all(x.is_contiguous() for x in outputs)
    return [x.cpu() for x in outputs]


def compare(kernels, inputs, rtol=2e-5, atol=2e-5):
    """Output and gradients with what is expected; float32 rounds coordinates to 1e-6 pixels."""
    value, _, points, _, _ = inputs
    grad = torch.randn(*points.shape[:2], value[0, 0].numel()).to(value.dtype)
    actual = run(kernels, grad, *inputs)
    assert [x.dtype for x in actual] == [value.dtype, value.dtype, torch.float32, torch.float32]
    for x, y in zip(actual, expect(grad, *inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, check_dtype=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_definition_forward_and_backward(kernels, kind):
    compare(kernels, make_inputs(kind, batch=2, heads=2))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("boxes", {"dim": 32, "points": 4, "shapes": [3, 4, 2, 3, 1, 2, 1, 1]}),
        ("points", {"dim": 7, "points": 3, "heads": 3, "shapes": [3, 4]}),
        ("locations", {"dim": 48, "points": 1, "shapes": [2, 3] * 5}),
        ("points", {"dim": 64, "points": 8, "queries": 1, "shapes": [4, 3]}),
        ("locations", {"dim": 1, "points": 5}),
        ("boxes", {"dim": 8, "queries": 33, "shapes": [5, 4]}),  # more than one block
    ],
    ids=str,
)
@pytest.mark.slow
def test_any_sizes_are_fine(kernels, kind, sizes):
    compare(kernels, make_inputs(kind, **sizes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "dim", "kind"),
    [
        (torch.float16, 32, "locations"),
        (torch.float16, 6, "boxes"),
        (torch.bfloat16, 32, "boxes"),
        (torch.bfloat16, 6, "locations"),
    ],
    ids=str,
)
def test_a_narrow_value_costs_only_its_own_rounding(kernels, dtype, dim, kind):
    value, *others = make_inputs(kind, dim=dim)
    # computed in float32 and rounded once: half a unit in the last place
    rounding = torch.finfo(dtype).eps / 2
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        rounding *= 2  # Triton's interpreter cuts digits off
    compare(kernels, (value.to(dtype), *others), rtol=1.01 * rounding, atol=5e-5)


@pytest.mark.parametrize("shift", [-200, 200])
def test_logits_may_be_beyond_what_the_exponential_can_do(kernels, shift):
    value, shapes, offsets, logits, reference = make_inputs("points", dim=32, points=1)
    compare(kernels, (value, shapes, offsets, logits + shift, reference), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("queries", [1, 7])
def test_levels_of_one_row_or_column_are_interpolated_with_zero(kernels, queries):
    shapes = [1, 4, 1, 1, 2, 1]  # with seven queries these are the tokens
    compare(kernels, make_inputs(shapes=shapes, queries=queries, points=2))


@pytest.mark.slow
def test_points_far_outside_sample_zero_and_get_no_gradient(kernels):
    value, shapes, locations, weights, _ = make_inputs()
    for place in (-3.0, 4.0, -1e30):
        outputs = run(
            kernels, torch.ones(1, 3, 8), value, shapes, torch.full_like(locations, place), weights
        )
        assert not any(x.any() for x in outputs)


@pytest.mark.parametrize(
    ("kind", "strange"),
    [
        ("locations", float("nan")),
        ("boxes", float("nan")),
        ("points", float("inf")),
        ("locations", float("inf")),
        ("boxes", -3e38),
    ],
)
def test_strange_coordinates_stay_in_memory_and_with_their_query(kernels, strange, kind):
    # the last pixel of value is the only one of its level
    value, shapes, points, weights, reference = make_inputs(kind, [3, 5, 1, 1], points=1)
    # what is before and behind value is not a number: nor would be what reads it
    around = torch.full((3, *value.shape[1:]), float("nan"))
    around[1] = value
    points[:, 0], points[:, 2, ..., 1] = strange, strange
    inputs = (around[1:2], shapes, points, weights, reference)
    grad = torch.randn(1, 3, 8)
    grad[:, [0, 2]] = 0
    out, grad_value, grad_points, grad_weights = run(kernels, grad, *inputs)
    good = [x if x is None else x[:, 1:2] for x in (grad, points, weights, reference)]
    expected = expect(good[0], value, shapes, *good[1:])
    if math.isnan(strange):
        assert grad_value.isnan().any()
        grad_value = expected[1]
    elif reference is None:
        assert not out[:, [0, 2]].any()  # outside the image
    actual = (out[:, 1:2], grad_value, grad_points[:, 1:2], grad_weights[:, 1:2])
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5, check_dtype=False)


def test_a_location_that_is_nan_is_not_hidden(kernels):
    value, shapes, locations, weights, _ = make_inputs(heads=2)
    locations[0, 1, 0, 2, 1, 0] = float("nan")
    out, grad_value, _, _ = run(kernels, torch.ones(1, 3, 16), value, shapes, locations, weights)
    isnan = out.unflatten(-1, (2, 8)).isnan().all(-1)[0]
    assert isnan.tolist() == [[False] * 2, [True, False], [False] * 2]
    assert grad_value.isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_no_queries_give_an_empty_output_and_zero_gradients(kernels, kind):
    inputs = make_inputs(kind, queries=0)
    out, grad_value, grad_points, grad_weights = run(kernels, torch.zeros(1, 0, 8), *inputs)
    assert out.shape == (1, 0, 8)
    assert grad_value.shape == inputs[0].shape and not grad_value.any()
    assert grad_points.shape == inputs[2].shape and grad_weights.shape == inputs[3].shape


def test_no_images_give_an_empty_output(kernels):
    outputs = run(kernels, torch.zeros(0, 3, 8), *make_inputs(batch=0))
    assert [len(x) for x in outputs] == [0] * 4


def shuffle_memory(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def shift_memory(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("change", [shuffle_memory, shift_memory])
@pytest.mark.nightly
def test_inputs_may_be_anywhere_in_memory(kernels, change):
    value, _, *others = make_inputs("boxes", batch=2, heads=2, points=1)
    grad, value, *others = (x.to(DEVICE) for x in (torch.randn(2, 3, 16), value, *others))
    inputs = (value, SHAPES, *others)
    moved = (change(value), SHAPES, *map(change, others))
    assert not any(kernels.aligned(change(x)).data_ptr() % 16 for x in (grad, value, *others))
    for x, y in zip(run(kernels, change(grad), *moved), run(kernels, grad, *inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_inputs_are_left_alone(kernels):
    inputs = make_inputs("boxes")
    copies = [x.clone() for x in inputs if isinstance(x, torch.Tensor)]
    run(kernels, torch.randn(1, 3, 8), *inputs)
    assert all(map(torch.equal, copies, [x for x in inputs if isinstance(x, torch.Tensor)]))


def test_in_the_centre_of_a_pixel_the_gradient_is_the_one_from_the_right(kernels):
    value, shapes, _, weights, _ = make_inputs(shapes=[2, 3], queries=1, heads=1, dim=3, points=6)
    columns = torch.arange(-1.0, 5.0)  # three are inside
    locations = torch.stack([(columns + 0.5) / 3, torch.full((6,), 0.375)], -1)
    assert (locations[:, 0] * 3 - 0.5).tolist() == columns.tolist()  # no rounding
    locations = locations.view(1, 1, 1, 1, 6, 2)
    ones = torch.ones_like(weights)
    grad_locations = run(kernels, torch.ones(1, 1, 3), value, shapes, locations, ones)[2]
    rows = value.view(2, 3, 3).sum(-1)
    row = 0.75 * rows[0] + 0.25 * rows[1]  # at y = 0.25
    padded = torch.cat([torch.zeros(1), row, torch.zeros(3)])
    slopes = [float(right - left) * 3 for left, right in pairwise(padded)]
    torch.testing.assert_close(grad_locations[0, 0, 0, 0, :, 0], torch.tensor(slopes))


@pytest.mark.parametrize(
    ("value", "shapes", "message"),
    [
        (torch.zeros(1, 6, 1, 1, dtype=torch.float64), [2, 3], "float64.*convert"),
        (torch.zeros(1, 1).expand(1, 2**29).view(1, 2**29, 1, 1).expand(-1, -1, 4, -1), [1, 2**29],
         "2147483648 elements per image"),
        (torch.zeros(1, 6, 1, 1), [2, 3, 0, 4], "empty one"),
    ],
)  # fmt: skip
def test_what_the_kernels_cannot_do_is_said(kernels, value, shapes, message):
    points = torch.zeros(1, 1, value.shape[2], len(shapes) // 2, 1, 2)
    with pytest.raises(ValueError, match=message):
        kernels.forward(value, shapes, points, points[..., 0])
    with pytest.raises(ValueError, match=message):
        kernels.backward(points, value, shapes, points, points[..., 0])


# Triton 3.6 returns what is added to, which nobody wants, and spills a few registers.
needs_recent_triton = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
    reason=f"Triton {triton.__version__} compiles the same kernels to other instructions",
)


class Compiler:
    """Stands in for a kernel: compiles what would be launched for an H100."""

    TYPES = {
        torch.float32: "*fp32",
        torch.float16: "*fp16",
        torch.bfloat16: "*bf16",
        torch.int32: "*i32",
    }

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, **kwargs):
        names = self.kernel.arg_names
        constants = {name: kwargs.pop(name) for name in names if name in kwargs}
        signature, attributes = dict.fromkeys(constants, "constexpr"), {}
        for i, (name, x) in enumerate(zip(names, args, strict=False)):
            if isinstance(x, torch.Tensor):
                signature[name] = self.TYPES[x.dtype]
                attributes[i,] = [["tt.divisibility", 16]]  # `aligned`
            elif x is None:
                signature[name], constants[name] = "constexpr", None
            else:
                signature[name] = "i32"
        source = ASTSource(self.kernel, signature, constants, attributes)
        self.binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=kwargs)


@pytest.fixture(
    scope="module",
    params=[
        ("forward", torch.float32, "boxes"),
        ("forward", torch.bfloat16, "locations"),
        ("backward", torch.float32, "boxes"),
        ("backward", torch.float16, "locations"),
    ],
    ids=lambda case: "-".join(map(str, case)),
)
def h100_binary(request):
    """What is launched for the sizes of the model: 8 heads of 32, 4 levels, 4 points. With the
    direction."""
    direction, dtype, kind = request.param
    sizes = {"shapes": [4, 6, 3, 4, 2, 3, 1, 2], "heads": 8, "dim": 32, "points": 4}
    value, *others = make_inputs(kind, queries=20, **sizes)
    inputs = (value.to(dtype), *others)
    name = f"{direction}_kernel"
    compiler = Compiler(getattr(compiled_kernels, name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_kernels, name, compiler)
        if direction == "forward":
            compiled_kernels.forward(*inputs)
        else:
            compiled_kernels.backward(torch.zeros(1, 20, 256, dtype=dtype), *inputs)
    return direction, compiler.binary


def accesses(ptx, kind):
    """The widths of the accesses to global memory of a kind, such as "v4.b32"."""
    return re.findall(rf"\b{kind}\.global[.\w]*?\.((?:v\d\.)?[bf]\d+)\b", ptx)


def test_rows_of_value_are_read_in_vectors_on_an_h100(h100_binary):
    direction, binary = h100_binary
    loads = accesses(binary.asm["ptx"], "ld")
    rows = [x for x in loads if x.startswith("v")]
    # 4 corners of 4 points; else a point and a weight at a time, and numbers of a level
    assert len(rows) >= 16
    assert set(loads) <= {"v4.b32", "v2.b32", "b64", "b32"}
    if direction == "forward":
        assert set(rows) == {"v4.b32"}


@needs_recent_triton
def test_gradients_of_value_are_added_in_vectors_on_an_h100(h100_binary):
    direction, binary = h100_binary
    ptx = binary.asm["ptx"]
    assert "atom." not in ptx
    additions = accesses(ptx, "red")
    # 4 corners of 4 points
    assert additions == ["v4.f32"] * (0 if direction == "forward" else 16)


@needs_recent_triton
def test_a_thread_works_in_its_registers_on_an_h100(h100_binary, tmp_path):
    _, binary = h100_binary
    path = tmp_path / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    command = [tool, "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(count) for name, count in re.findall(r"([A-Z]+):(\d+)", text)}
    assert usage["SHARED"] == usage["STACK"] == usage["LOCAL"] == 0, usage
    assert usage["REG"] <= 80  # three programs of 256 threads share 65,536
