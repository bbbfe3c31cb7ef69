"""Multi-scale deformable attention for NVIDIA GPUs, in Triton.

A program computes one head of a block of queries. A thread owns a vector of channels of a query:
it reads rows of `value` in vectors and computes each sampling point once. Coordinates, weights and
sums are float32 whatever the dtype of `value`.

Shapes in the kernels: BLOCK queries; the channels of a head are LANES x VECTOR. Lanes are the
neighbouring threads that share a query. Values of a query or of one of its points are
(BLOCK, LANES), equal in all lanes, so that little moves through shared memory.
"""

from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_ELEMENTS = 2**31  # offsets inside an image are int32
BLOCK = 32  # queries of a program; few, as the queries of a decoder have to occupy a GPU
KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)


def forward(
    value: Tensor,
    shapes: list[int],
    points: Tensor,
    weights: Tensor,
    reference: Tensor | None = None,
) -> Tensor:
    """As `reference.forward`, for a value in one of `DTYPES` and the others in float32.

    A NaN location makes its query NaN. A value that is not finite may also make queries NaN that
    sample within two pixels of it.

    Raises:
        ValueError: value has another dtype, 2**31 elements per image or more, or an empty level
    """
    check_supported(value, shapes)
    batch, _, heads, channels = value.shape
    out = value.new_empty(batch, points.shape[1], heads * channels)
    if out.numel():
        inputs = (value, shapes, points, weights, reference)
        launch(forward_kernel, *inputs, out, vector=16 // value.itemsize)
    return out


def backward(
    grad: Tensor,
    value: Tensor,
    shapes: list[int],
    points: Tensor,
    weights: Tensor,
    reference: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.backward`, for the same dtypes.

    Float32 atomics add up the gradient of value in any order, so its last bits vary between runs.

    Raises:
        ValueError: as `forward`
    """
    check_supported(value, shapes)
    grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    grad_points, grad_weights = (
        torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (points, weights)
    )
    if grad.numel():
        inputs = (value, shapes, points, weights, reference)
        grads = (aligned(grad), grad_value, grad_points, grad_weights)
        launch(backward_kernel, *inputs, *grads, vector=4)  # the gradient of value is float32
    return grad_value.to(value.dtype), grad_points, grad_weights


def check_supported(value: Tensor, shapes: list[int]) -> None:
    """Raise a ValueError for inputs that the kernels do not support."""
    if value.dtype not in DTYPES:
        raise ValueError(f"value is {value.dtype}; convert it to one of {DTYPES}")
    if value[:1].numel() >= MAX_ELEMENTS:
        raise ValueError(
            f"value {tuple(value.shape)} has {value[:1].numel()} elements per image; "
            f"the GPU kernels take fewer than {MAX_ELEMENTS}: use smaller images"
        )
    if min(shapes) < 1:
        raise ValueError(f"levels of height and width {shapes} include an empty one: leave it out")


def launch(
    kernel: triton.JITFunction,
    value: Tensor,
    shapes: list[int],
    points: Tensor,
    weights: Tensor,
    reference: Tensor | None,
    *others: Tensor,
    vector: int,
) -> None:
    """Start a program for every block of queries, head and image.

    `others` are aligned; `vector` channels are one memory access.
    """
    tensors = [x if x is None else aligned(x) for x in (points, weights, reference)]
    table = level_table(value.device, *shapes)
    sizes = points.shape[1], value.shape[1]
    grid, constants = plan(value, points, reference, vector)
    with torch.cuda.device_of(value):
        kernel[grid](aligned(value), table, *tensors, *others, *sizes, **constants)


def aligned(x: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes, which vector accesses need."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


@lru_cache(maxsize=1024)
def level_table(device: torch.device, *shapes: int) -> Tensor:
    """(L, 3) int32: height, width and first token of each level.

    Cached, as the copy would synchronise, and is impossible while a CUDA graph is captured.
    """
    heights, widths = shapes[::2], shapes[1::2]
    starts = accumulate((h * w for h, w in zip(heights, widths, strict=True)), initial=0)
    table = zip(heights, widths, starts, strict=False)
    return torch.tensor(list(table), dtype=torch.int32, device=device)


def plan(
    value: Tensor, points: Tensor, reference: Tensor | None, vector: int
) -> tuple[tuple[int, int, int], dict[str, int | bool]]:
    """The grid of programs, and the constants of the kernel."""
    batch, _, heads, channels = value.shape
    _, queries, _, levels, num_points, _ = points.shape
    lanes = triton.cdiv(triton.next_power_of_2(channels), vector)
    constants = {
        "HEADS": heads,
        "CHANNELS": channels,
        "LEVELS": levels,
        "POINTS": num_points,
        "REFERENCE": 0 if reference is None else reference.shape[-1],
        "BLOCK": BLOCK,
        "LANES": lanes,
        "VECTOR": vector,
        "num_warps": min(BLOCK * lanes // 32, 16),
        "enable_fp_fusion": True,
    }
    return (triton.cdiv(queries, BLOCK), heads, batch), constants


@triton.jit
def queries_of_program(num_queries, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """(BLOCK, LANES): indices of queries in the batch, and which of them exist.

    Queries that do not exist repeat the last one, and their results are not stored.
    """
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = query < num_queries
    query = tl.minimum(query, num_queries - 1) + tl.program_id(2).to(tl.int64) * num_queries
    shape: tl.constexpr = [BLOCK, LANES]
    return tl.broadcast_to(query[:, None], shape), tl.broadcast_to(exists[:, None], shape)


@triton.jit
def channels_of_row(CHANNELS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """(1, LANES, VECTOR): channels, and which of them exist."""
    lane = tl.arange(0, LANES)[None, :, None]
    channel = lane * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    return channel, channel < CHANNELS


@triton.jit
def per_channel(x):
    """(BLOCK, LANES) as (BLOCK, LANES, 1)."""
    return x[:, :, None]


@triton.jit
def softmax_terms(logits, COUNT: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Largest of COUNT logits and the sum of exponentials relative to it, (BLOCK, 1)."""
    lane = tl.arange(0, LANES)[None, :]
    peaks = tl.full([BLOCK, LANES], float("-inf"), tl.float32)
    for i in tl.static_range(0, COUNT, LANES):
        logit = tl.load(logits + lane + i, mask=lane + i < COUNT, other=float("-inf"))
        peaks = tl.maximum(peaks, logit)
    peak = tl.max(peaks, 1, keep_dims=True)
    totals = tl.full([BLOCK, LANES], 0.0, tl.float32)
    for i in tl.static_range(0, COUNT, LANES):
        logit = tl.load(logits + lane + i, mask=lane + i < COUNT, other=float("-inf"))
        totals += tl.exp(logit - peak)
    return peak, tl.sum(totals, 1, keep_dims=True)


@triton.jit
def subtract_mean(
    products, logits, peak, total, mean, exists, COUNT: tl.constexpr, LANES: tl.constexpr
):
    """The gradient of softmax: weight * (gradient - mean of gradients).

    `products` holds weight * gradient, written by any thread of the program.
    """
    tl.debug_barrier()
    lane = tl.arange(0, LANES)[None, :]
    for i in tl.static_range(0, COUNT, LANES):
        mask = exists & (lane + i < COUNT)
        weight = tl.exp(tl.load(logits + lane + i, mask=mask) - peak) / total
        product = tl.load(products + lane + i, mask=mask)
        tl.store(products + lane + i, product - weight * mean, mask=mask)


@triton.jit
def open_level(levels, level, reference, POINTS: tl.constexpr, REFERENCE: tl.constexpr):
    """Height, width, token steps to the next pixel right and down, and the frame for `sample`.

    A step is 0 on levels of a single column or row. Along x and y, a point is at
    origin + unit * point, in pixels.
    """
    rows, columns = tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1)
    right, down = tl.minimum(columns - 1, 1), tl.minimum(rows - 1, 1) * columns
    height, width = rows.to(tl.float32), columns.to(tl.float32)
    x_origin, y_origin, x_unit, y_unit = -0.5, -0.5, width, height
    if REFERENCE != 0:
        reference += level * REFERENCE
        x_origin += tl.load(reference) * width
        y_origin += tl.load(reference + 1) * height
        x_unit, y_unit = 1.0, 1.0
    if REFERENCE == 4:
        x_unit = tl.load(reference + 2) * width * (0.5 / POINTS)
        y_unit = tl.load(reference + 3) * height * (0.5 / POINTS)
    first_token = tl.load(levels + 3 * level + 2)
    return height, width, right, down, (first_token, columns, x_origin, y_origin, x_unit, y_unit)


@triton.jit
def sample(pair, height, width, frame):
    """The token of the upper left pixel around a point, and the point's signed distances in pixels
    from the columns and rows of the four pixels: token, x0, x1, y0, y1."""
    first_token, columns, x_origin, y_origin, x_unit, y_unit = frame
    both = tl.load(pair)  # two floats by one access
    x = both.to(tl.int32).to(tl.float32, bitcast=True)
    y = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    column, x0, x1 = neighbours(x_origin + x_unit * x, width)
    row, y0, y1 = neighbours(y_origin + y_unit * y, height)
    return first_token + row * columns + column, x0, x1, y0, y1


@triton.jit
def pack_pair(first, second):
    """Two floats for one access."""
    first, second = first.to(tl.int32, bitcast=True), second.to(tl.int32, bitcast=True)
    return (first.to(tl.int64) & 0xFFFFFFFF) | (second.to(tl.int64) << 32)


@triton.jit
def neighbours(pixel, size):
    """The first of two pixels to interpolate between along an axis, and signed distances to both.

    Both are inside the image for any point, also NaN. If an axis has only one pixel, the second
    distance is infinite.
    """
    first = tl.maximum(tl.minimum(tl.floor(pixel), size - 2.0), 0.0)
    distance = pixel - first
    return first.to(tl.int32), distance, tl.where(size > 1.0, distance - 1.0, float("inf"))


@triton.jit
def hat(distance):
    """The weight of a pixel in the interpolation: 1 - |distance|, but at least 0."""
    return tl.maximum(1.0 - tl.abs(distance), 0.0, propagate_nan=KEEP_NAN)


@triton.jit
def hat_slope(distance):
    """The derivative of `hat`; at its three kinks the one from the right."""
    rising = tl.where(distance >= -1.0, 1.0, 0.0)
    falling = tl.where(distance < 1.0, -1.0, 0.0)
    return tl.where(distance < 0.0, rising, falling)


@triton.jit
def dot(x, y):
    """(BLOCK, LANES): sums over the channels of each lane, see `sum_lanes`."""
    return tl.sum(x * y, 2)


@triton.jit
def sum_lanes(x):
    """(BLOCK, LANES): the sum over all lanes, in every lane."""
    return tl.broadcast_to(tl.sum(x, 1, keep_dims=True), x.shape)


@triton.jit
def point_gradients(dot00, dot01, dot10, dot11, x0, x1, y0, y1):
    """Derivatives along x and y, and value, of the interpolation between four corners."""
    upper_dot = hat(x0) * dot00 + hat(x1) * dot01
    lower_dot = hat(x0) * dot10 + hat(x1) * dot11
    left_dot = hat(y0) * dot00 + hat(y1) * dot10
    right_dot = hat(y0) * dot01 + hat(y1) * dot11
    along_x = hat_slope(x0) * left_dot + hat_slope(x1) * right_dot
    along_y = hat_slope(y0) * upper_dot + hat_slope(y1) * lower_dot
    result = hat(y0) * upper_dot + hat(y1) * lower_dot
    return sum_lanes(along_x), sum_lanes(along_y), sum_lanes(result)


@triton.jit
def load_rows(rows, is_channel):
    """(BLOCK, LANES, VECTOR) float32, zero in channels that do not exist."""
    return tl.load(rows, mask=is_channel, other=0.0).to(tl.float32)


@triton.jit
def add_rows(rows, share, grad, exists, is_channel):
    """Add the gradient of a corner to that of value."""
    # Skip corners outside of the image: adding zeros would cause contention on border pixels.
    mask = per_channel(exists & (share != 0.0)) & is_channel
    tl.atomic_add(rows, per_channel(share) * grad, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["num_queries", "num_tokens"])
def forward_kernel(
    value,
    levels,
    points,
    weights,
    reference,
    out,
    num_queries,
    num_tokens,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    REFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    TOKEN: tl.constexpr = HEADS * CHANNELS
    query, exists = queries_of_program(num_queries, BLOCK, LANES)
    item = query * HEADS + tl.program_id(1)
    channel, is_channel = channels_of_row(CHANNELS, LANES, VECTOR)
    value += tl.program_id(2).to(tl.int64) * num_tokens * TOKEN + tl.program_id(1) * CHANNELS
    pairs = points.to(tl.pointer_type(tl.int64)) + item * (LEVELS * POINTS)
    weights += item * (LEVELS * POINTS)
    if REFERENCE != 0:
        reference += query * (LEVELS * REFERENCE)
        peak, total = softmax_terms(weights, LEVELS * POINTS, BLOCK, LANES)

    result = tl.full([BLOCK, LANES, VECTOR], 0.0, tl.float32)
    for level in range(LEVELS):
        height, width, right, down, frame = open_level(levels, level, reference, POINTS, REFERENCE)
        for point in tl.static_range(POINTS):
            index = level * POINTS + point
            weight = tl.load(weights + index)
            if REFERENCE != 0:
                weight = tl.exp(weight - peak)
            token, x0, x1, y0, y1 = sample(pairs + index, height, width, frame)
            upper = per_channel(value + token * TOKEN) + channel
            lower = upper + down * TOKEN
            y0, y1 = weight * hat(y0), weight * hat(y1)
            result += per_channel(y0 * hat(x0)) * load_rows(upper, is_channel)
            result += per_channel(y0 * hat(x1)) * load_rows(upper + right * TOKEN, is_channel)
            result += per_channel(y1 * hat(x0)) * load_rows(lower, is_channel)
            result += per_channel(y1 * hat(x1)) * load_rows(lower + right * TOKEN, is_channel)
    if REFERENCE != 0:
        result *= per_channel(1.0 / total)
    out = per_channel(out + item * CHANNELS) + channel
    tl.store(out, result.to(out.dtype.element_ty), mask=per_channel(exists) & is_channel)


@triton.jit(do_not_specialize=["num_queries", "num_tokens"])
def backward_kernel(
    value,
    levels,
    points,
    weights,
    reference,
    grad,
    grad_value,
    grad_points,
    grad_weights,
    num_queries,
    num_tokens,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    REFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    TOKEN: tl.constexpr = HEADS * CHANNELS
    query, exists = queries_of_program(num_queries, BLOCK, LANES)
    item = query * HEADS + tl.program_id(1)
    first_lane = exists & (tl.arange(0, LANES)[None, :] == 0)
    channel, is_channel = channels_of_row(CHANNELS, LANES, VECTOR)
    start = tl.program_id(2).to(tl.int64) * num_tokens * TOKEN + tl.program_id(1) * CHANNELS
    value += start
    grad_value += start
    pairs = points.to(tl.pointer_type(tl.int64)) + item * (LEVELS * POINTS)
    grad_pairs = grad_points.to(tl.pointer_type(tl.int64)) + item * (LEVELS * POINTS)
    weights += item * (LEVELS * POINTS)
    grad_weights += item * (LEVELS * POINTS)
    grad = load_rows(per_channel(grad + item * CHANNELS) + channel, is_channel)
    if REFERENCE != 0:
        reference += query * (LEVELS * REFERENCE)
        peak, total = softmax_terms(weights, LEVELS * POINTS, BLOCK, LANES)
        grad *= per_channel(1.0 / total)  # once, rather than every weight
        mean = tl.full([BLOCK, LANES], 0.0, tl.float32)

    for level in range(LEVELS):
        height, width, right, down, frame = open_level(levels, level, reference, POINTS, REFERENCE)
        for point in tl.static_range(POINTS):
            index = level * POINTS + point
            weight = tl.load(weights + index)
            if REFERENCE != 0:
                weight = tl.exp(weight - peak)
            token, x0, x1, y0, y1 = sample(pairs + index, height, width, frame)
            upper = per_channel(value + token * TOKEN) + channel
            lower = upper + down * TOKEN
            dot00 = dot(grad, load_rows(upper, is_channel))
            dot01 = dot(grad, load_rows(upper + right * TOKEN, is_channel))
            dot10 = dot(grad, load_rows(lower, is_channel))
            dot11 = dot(grad, load_rows(lower + right * TOKEN, is_channel))
            grad_x, grad_y, grad_weight = point_gradients(
                dot00, dot01, dot10, dot11, x0, x1, y0, y1
            )
            pair = pack_pair(weight * width * grad_x, weight * height * grad_y)
            tl.store(grad_pairs + index, pair, mask=first_lane)
            if REFERENCE != 0:
                grad_weight *= weight
                mean += grad_weight
            tl.store(grad_weights + index, grad_weight, mask=first_lane)
            upper = per_channel(grad_value + token * TOKEN) + channel
            lower = upper + down * TOKEN
            y0, y1 = weight * hat(y0), weight * hat(y1)
            add_rows(upper, y0 * hat(x0), grad, exists, is_channel)
            add_rows(upper + right * TOKEN, y0 * hat(x1), grad, exists, is_channel)
            add_rows(lower, y1 * hat(x0), grad, exists, is_channel)
            add_rows(lower + right * TOKEN, y1 * hat(x1), grad, exists, is_channel)
    if REFERENCE != 0:
        subtract_mean(grad_weights, weights, peak, total, mean, exists, LEVELS * POINTS, LANES)
