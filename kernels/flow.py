"""Flows in Triton: what genfuse.reference.flow defines, forward and backward.

Arguments and results of the functions are those of the registered operators ``genfuse::...`` in csrc/library.cpp.
Everything is computed in float32, whatever the inputs' dtype, and nothing is read on the host. Tensors are planes of
rows and columns, as in sampling.py: the rows are kept, and the logarithm of the determinant is summed over the columns.

A spline's thread holds one element. The K numbers of each element are read side by side, as rows of a tile, which
coalesces, and then handed over to the elements' threads (`_apart`): sums and searches over bins are then plain code
over a tuple of K numbers, without a word between threads. Of the slopes only the two at the ends of the element's bin
are read. Backward computes everything anew from the inputs and writes each gradient once.

Couplings and actnorm see ``[B, C, *S]`` as a volume, and cut it into blocks by channel and by place in space, so that
no element needs a division to know its channel. All sums are added in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .likelihood import _log1p, _tanh
from .sampling import (
    _add_up,
    _columns,
    _like,
    _load,
    _noise_tile,
    _one_stride,
    _or_none,
    _Plane,
    _power_of_two,
    _sizes,
    _store,
    _Tiling,
)

# ruff: noqa: RUF005  (Triton has no unpacking into tuples)
__all__ = [
    "actnorm",
    "actnorm_backward",
    "additive_coupling",
    "additive_coupling_backward",
    "affine_coupling",
    "affine_coupling_backward",
    "dequantize_logit",
    "dequantize_logit_backward",
    "logit_quantize",
    "spline",
    "spline_backward",
]

# ---------------------------------------------------------------------------------------------------------------------
# Rational-quadratic splines
# ---------------------------------------------------------------------------------------------------------------------

_BLOCK = 128  # elements to a program, each a thread's
_MOST_BINS = 32  # of which a thread can hold the numbers
_PROGRAMS = 2048  # enough to fill a device: with more, a program sums more than one block

_KINDS = ("rational_quadratic", "linear", "quadratic", "cubic")
_IDENTITY, _ZUKO, _NONE = (tl.constexpr(index) for index in (1, 2, 3))
_ONE, _WRAP = (tl.constexpr(index) for index in (0, 1))
_UNIFORM = tl.constexpr(1)
_CLIP = tl.constexpr(1.0 / math.log(1e3))  # of zuko's slopes, by its least slope of 1e-3; twice that of its logits


@triton.jit
def _places(first, BR: tl.constexpr, BC: tl.constexpr, row, R, C):
    """Row and column of each element of a block, which begins at the row `row` and the column `first`."""
    index = tl.arange(0, BR * BC)
    row = row + index // BC
    col = first + index % BC
    return row, col, (row < R) & (col < C)


@triton.jit
def _cut(col, inner, CUT: tl.constexpr):
    """The columns as two dimensions, where they have two strides."""
    outer = col * 0
    if CUT:
        outer = col // inner
        col = col - outer * inner
    return outer, col


@triton.jit
def _address(row, outer, col, by_row, by_outer, by_inner, CUT: tl.constexpr):
    """Where an element's parameters begin."""
    place = row * by_row + col * by_inner
    if CUT:
        place += outer * by_outer
    return place


@triton.jit
def _apart(tile, N: tl.constexpr):
    """The N columns of a tile, which puts a row's numbers into one thread."""
    B: tl.constexpr = tile.shape[0]
    if N == 1:
        columns = (tl.reshape(tile, (B,)),)
    else:
        even, odd = tl.split(tl.reshape(tile, (B, N // 2, 2)))
        evens = _apart(even, N // 2)
        odds = _apart(odd, N // 2)
        columns = ()
        for j in tl.static_range(N // 2):
            columns = columns + (evens[j], odds[j])
    return columns


@triton.jit
def _together(columns, N: tl.constexpr):
    """The tile of N columns."""
    B: tl.constexpr = columns[0].shape[0]
    if N == 1:
        tile = tl.reshape(columns[0], (B, 1))
    else:
        evens, odds = (), ()
        for j in tl.static_range(N // 2):
            evens = evens + (columns[2 * j],)
            odds = odds + (columns[2 * j + 1],)
        tile = tl.reshape(tl.join(_together(evens, N // 2), _together(odds, N // 2)), (B, N))
    return tile


@triton.jit
def _numbers(pointer, place, stride, ok, K: tl.constexpr, KP: tl.constexpr):
    """The K numbers of each element, read side by side."""
    j = tl.arange(0, KP)[None, :]
    tile = tl.load(pointer + place[:, None] + j * stride, mask=ok[:, None] & (j < K), other=0.0).to(tl.float32)
    return _apart(tile, KP)


@triton.jit
def _total(numbers, K: tl.constexpr):
    """Their sum, in four parts, which rounds less than one and waits less."""
    parts = (numbers[0],)
    for j in tl.static_range(1, 4):
        if j < K:
            part = numbers[j]
            for i in tl.static_range(j + 4, K, 4):
                part += numbers[i]
            parts = parts + (part,)
    first = parts[0]
    for i in tl.static_range(4, K, 4):
        first += numbers[i]
    if K > 2:
        first += parts[2]
    if K > 1:
        second = parts[1]
        if K > 3:
            second += parts[3]
        first += second
    return first


@triton.jit
def _scaled(logits, scale, K: tl.constexpr):
    if scale is not None:
        scaled = ()
        for j in tl.static_range(K):
            scaled = scaled + (logits[j] * scale,)
        logits = scaled
    return logits


@triton.jit
def _weights(logits, K: tl.constexpr, NORMALIZER: tl.constexpr):
    """Weights of the bins, and 1 / their sum: the product of the two is a bin's share of what the least sizes leave."""
    inverse = tl.full(logits[0].shape, 1.0, tl.float32)
    if NORMALIZER == _ZUKO:
        clipped = ()
        for j in tl.static_range(K):
            clipped = clipped + (logits[j] / (1.0 + tl.abs(logits[j]) * (2.0 * _CLIP)),)
        logits = clipped
    weights = logits
    if NORMALIZER != _NONE:
        top = logits[0]
        for j in tl.static_range(1, K):
            top = tl.maximum(top, logits[j])
        weights = ()
        for j in tl.static_range(K):
            weights = weights + (tl.exp(logits[j] - top),)
        inverse = 1.0 / _total(weights, K)
    return weights, inverse


@triton.jit
def _affine_of(inverse, least, span, K: tl.constexpr, NORMALIZER: tl.constexpr):
    """a and b of a bin's width or height, a + b weight."""
    if NORMALIZER == _ZUKO:
        a, b = 0.0, span * inverse
    else:
        a, b = span * least, span * (1.0 - least * K) * inverse
    return a, b


@triton.jit
def _find(x, weights, inverse, least, low, high, K: tl.constexpr, NORMALIZER: tl.constexpr):
    """The bin of x, its left border, what rounding has taken from that, and its size. A border belongs to the bin on
    its right."""
    k = tl.zeros(x.shape, tl.int32)
    length = tl.zeros(x.shape, tl.float32)  # of all bins before
    lost = length
    a, b = _affine_of(inverse, least, high - low, K, NORMALIZER)
    size = a + b * weights[0]
    before, missing, chosen = length, lost, size
    for j in tl.static_range(1, K):
        length, lost = _lengthen(length, lost, size)
        size = a + b * weights[j]
        here = x >= low + length
        k = tl.where(here, j, k)
        before, missing = tl.where(here, length, before), tl.where(here, lost, missing)
        chosen = tl.where(here, size, chosen)
    begin, rest, size = _bin(k, before, missing, chosen, low, high, K)
    return k, begin, rest, size


@triton.jit
def _pick(k, weights, inverse, least, low, high, K: tl.constexpr, NORMALIZER: tl.constexpr):
    """The same of bin k."""
    length = tl.zeros(k.shape, tl.float32)
    lost = length
    a, b = _affine_of(inverse, least, high - low, K, NORMALIZER)
    size = a + b * weights[0]
    before, missing, chosen = length, lost, size
    for j in tl.static_range(1, K):
        length, lost = _lengthen(length, lost, size)
        size = a + b * weights[j]
        here = k >= j
        before, missing = tl.where(here, length, before), tl.where(here, lost, missing)
        chosen = tl.where(here, size, chosen)
    return _bin(k, before, missing, chosen, low, high, K)


@triton.jit
def _lengthen(length, lost, size):
    """A sum, and what its roundings have taken away: in a narrow bin the place of x is a difference of what is left."""
    longer = length + size
    return longer, lost + (size - (longer - length))


@triton.jit
def _bin(k, before, missing, size, low, high, K: tl.constexpr):
    """Left border, what rounding has taken from it, and size. The last bin ends exactly at `high`."""
    begin = low + before
    rest = (before - (begin - low)) + missing
    return begin, rest, tl.where(k == K - 1, (high - begin) - rest, size)


@triton.jit
def _slope(u, least, NORMALIZER: tl.constexpr):
    """The slope at a knot, of its parameter."""
    if NORMALIZER == _NONE:
        d = least + u
    elif NORMALIZER == _ZUKO:
        d = tl.exp(u / (1.0 + tl.abs(u) * _CLIP))
    else:
        beta = 1.0
        if NORMALIZER == _IDENTITY:
            beta = 0.6931471805599453 / (1.0 - least)
        z = beta * u
        d = least + (tl.where(z > 0.0, z, 0.0) + _log1p(tl.exp(-tl.abs(z)))) / beta
    # A comparison takes no NaN for the larger: u is added where it is none.
    return tl.where(u == u, d, u)


@triton.jit
def _slope_gradient(u, d, least, NORMALIZER: tl.constexpr):
    """The derivative of `_slope` by u; d is its value."""
    if NORMALIZER == _NONE:
        by = tl.full(u.shape, 1.0, tl.float32)
    elif NORMALIZER == _ZUKO:
        rest = 1.0 + tl.abs(u) * _CLIP
        by = d / (rest * rest)
    else:
        z = u
        if NORMALIZER == _IDENTITY:
            z = u * (0.6931471805599453 / (1.0 - least))
        small = tl.exp(-tl.abs(z))
        by = tl.where(z > 0.0, 1.0, small) / (1.0 + small)
    return by


@triton.jit
def _knots_of(k, K: tl.constexpr, ENDS: tl.constexpr):
    """The places of the parameters of the slopes at both ends of bin k; -1 and K - 1 have none where ENDS is _ONE."""
    first = k
    second = k + 1
    if ENDS == _ONE:
        first = k - 1
        second = k
    elif ENDS == _WRAP:
        second = tl.where(k == K - 1, 0, k + 1)
    return first, second


@triton.jit
def _slopes_at(
    derivatives, place, stride, ok, k, least, K: tl.constexpr, ENDS: tl.constexpr, NORMALIZER: tl.constexpr,
):  # fmt: skip
    """The slopes at both ends of bin k, and their parameters."""
    first, second = _knots_of(k, K, ENDS)
    if ENDS == _ONE:
        left, right = k > 0, k < K - 1
    else:
        left, right = k >= 0, k >= 0
    u_0 = tl.zeros(k.shape, tl.float32)
    u_1 = tl.zeros(k.shape, tl.float32)
    if derivatives is not None:
        u_0 = tl.load(derivatives + place + first * stride, mask=ok & left, other=0.0).to(tl.float32)
        u_1 = tl.load(derivatives + place + second * stride, mask=ok & right, other=0.0).to(tl.float32)
    d_0 = tl.where(left, _slope(u_0, least, NORMALIZER), 1.0)
    d_1 = tl.where(right, _slope(u_1, least, NORMALIZER), 1.0)
    return d_0, d_1, u_0, u_1


@triton.jit
def _position(x, x_k, x_rest, w, y_k, y_rest, h, s, d_0, d_1, INVERSE: tl.constexpr):
    """Where in its bin, from 0 to 1, the element lies (Durkan et al. 2019, eq. 6 to 8 for the inverse)."""
    if INVERSE:
        up = (x - y_k) - y_rest
        above = up * (d_0 + d_1 - 2.0 * s)
        a, b, c = h * (s - d_0) + above, h * d_0 - above, -s * up
        discriminant = b * b - 4.0 * a * c
        discriminant = tl.where(discriminant <= 0.0, 0.0, discriminant)  # rounding may make it negative
        theta = 2.0 * c / (-b - tl.sqrt(discriminant))
        # Rounding may put it beyond the bin, where a steep slope would turn negative; NaN stays.
        theta = tl.where(theta > 1.0, 1.0, tl.where(theta < 0.0, 0.0, theta))
    else:
        theta = ((x - x_k) - x_rest) / w
    return theta


@triton.jit
def _held(value, low, high):
    """Within the interval, which rounding may leave by an ulp; NaN stays."""
    return tl.where(value > high, high, tl.where(value < low, low, value))


@triton.jit(do_not_specialize=["R", "C", "chunks", "tiles", "inner"])
def _spline_kernel(
    x, widths, heights, derivatives, y, log_slope, parts, R, C, chunks, tiles, inner, x_row,
    widths_row, widths_outer, widths_inner, widths_k, heights_row, heights_outer, heights_inner, heights_k,
    derivatives_row, derivatives_outer, derivatives_inner, derivatives_k,
    left, right, bottom, top, min_width, min_height, min_derivative, scale,
    X_COL: tl.constexpr, CUT: tl.constexpr, NORMALIZER: tl.constexpr, ENDS: tl.constexpr, TAILS: tl.constexpr,
    INVERSE: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y, and of the logarithm of the slope each element or, where there is `parts`, each row's part."""
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BR * BC,), tl.float32)
    for tile in range(tiles):
        first = (program % chunks * tiles + tile) * BC
        row, col, ok = _places(first, BR, BC, program // chunks * BR, R, C)
        value = tl.load(x + row * x_row + col * X_COL, mask=ok, other=0.0).to(tl.float32)
        if INVERSE:
            low, high = bottom, top
        else:
            low, high = left, right
        inside = (value >= low) & (value <= high)
        at = tl.where(inside, value, low)

        outer, within = _cut(col, inner, CUT)
        place = _address(row, outer, within, widths_row, widths_outer, widths_inner, CUT)
        xs, x_inverse = _weights(_scaled(_numbers(widths, place, widths_k, ok, K, KP), scale, K), K, NORMALIZER)
        place = _address(row, outer, within, heights_row, heights_outer, heights_inner, CUT)
        ys, y_inverse = _weights(_scaled(_numbers(heights, place, heights_k, ok, K, KP), scale, K), K, NORMALIZER)
        if INVERSE:
            k, y_k, y_rest, h = _find(at, ys, y_inverse, min_height, bottom, top, K, NORMALIZER)
            x_k, x_rest, w = _pick(k, xs, x_inverse, min_width, left, right, K, NORMALIZER)
        else:
            k, x_k, x_rest, w = _find(at, xs, x_inverse, min_width, left, right, K, NORMALIZER)
            y_k, y_rest, h = _pick(k, ys, y_inverse, min_height, bottom, top, K, NORMALIZER)
        place = _address(row, outer, within, derivatives_row, derivatives_outer, derivatives_inner, CUT)
        d_0, d_1, _, _ = _slopes_at(
            derivatives, place, derivatives_k, ok, k, min_derivative, K, ENDS, NORMALIZER
        )  # fmt: skip

        s = h / w
        theta = _position(at, x_k, x_rest, w, y_k, y_rest, h, s, d_0, d_1, INVERSE)
        between = theta * (1.0 - theta)
        denominator = s + (d_0 + d_1 - 2.0 * s) * between
        numerator = d_1 * theta * theta + 2.0 * s * between + d_0 * (1.0 - theta) * (1.0 - theta)
        found_log = tl.log(numerator) + 2.0 * tl.log(s / denominator)
        if INVERSE:
            found = _held(x_k + (x_rest + theta * w), left, right)
            found_log = -found_log
        else:
            found = _held(y_k + (y_rest + h * (s * theta * theta + d_0 * between) / denominator), bottom, top)
        if TAILS:
            found = tl.where(inside, found, value)
            found_log = tl.where(inside, found_log, tl.where(value == value, 0.0, float("nan")))
        else:
            found = tl.where(inside, found, float("nan"))
            found_log = tl.where(inside, found_log, float("nan"))
        tl.store(y + row * C + col, found.to(y.dtype.element_ty), mask=ok)
        if log_slope is not None:
            tl.store(log_slope + row * C + col, found_log.to(log_slope.dtype.element_ty), mask=ok)
        total += tl.where(ok, found_log, 0.0)
    if parts is not None:
        row = program // chunks * BR + tl.arange(0, BR)
        tl.store(parts + program % chunks * R + row, tl.sum(tl.reshape(total, (BR, BC)), 1), mask=row < R)


@triton.jit
def _sizes_gradient(
    logits, weights, inverse, k, by_begin, by_size, span, least, scale, K: tl.constexpr, KP: tl.constexpr,
    NORMALIZER: tl.constexpr,
):  # fmt: skip
    """The gradient of what was scaled to `logits`, of those of the left border of bin k and of its size."""
    last = k == K - 1
    if scale is not None:
        span *= scale
    if NORMALIZER != _ZUKO:
        span *= 1.0 - least * K
    # A bin before k moves both borders, unless the right one is the end of the interval; bin k moves the right one.
    before = span * tl.where(last, by_begin - by_size, by_begin)
    there = span * tl.where(last, 0.0, by_size)
    gradient = ()
    for j in tl.static_range(K):
        gradient = gradient + (tl.where(k > j, before, tl.where(k == j, there, 0.0)),)
    if NORMALIZER != _NONE:
        shares = ()
        by = ()
        for j in tl.static_range(K):
            shares = shares + (weights[j] * inverse,)
            by = by + (shares[j] * gradient[j],)
        mean = _total(by, K)
        by = ()
        for j in tl.static_range(K):
            by = by + (shares[j] * (gradient[j] - mean),)
        gradient = by
        if NORMALIZER == _ZUKO:
            by = ()
            for j in tl.static_range(K):
                rest = 1.0 + tl.abs(logits[j]) * (2.0 * _CLIP)
                by = by + (gradient[j] / (rest * rest),)
            gradient = by
    for _ in tl.static_range(K, KP):
        gradient = gradient + (gradient[0],)
    return _together(gradient, KP)


@triton.jit
def _store_tile(pointer, place, stride, ok, value, K: tl.constexpr, KP: tl.constexpr):
    j = tl.arange(0, KP)[None, :]
    tl.store(pointer + place[:, None] + j * stride, value.to(pointer.dtype.element_ty), mask=ok[:, None] & (j < K))


@triton.jit(do_not_specialize=["R", "C", "chunks", "inner", "grad_log_row"])
def _spline_backward_kernel(
    grad_y, grad_log, x, widths, heights, derivatives, grad_x, grad_widths, grad_heights, grad_derivatives,
    R, C, chunks, inner, grad_y_row, grad_log_row, x_row,
    widths_row, widths_outer, widths_inner, widths_k, heights_row, heights_outer, heights_inner, heights_k,
    derivatives_row, derivatives_outer, derivatives_inner, derivatives_k,
    grad_widths_each, grad_heights_each, grad_derivatives_each,
    left, right, bottom, top, min_width, min_height, min_derivative, scale,
    GRAD_Y_COL: tl.constexpr, GRAD_LOG_COL: tl.constexpr, X_COL: tl.constexpr, CUT: tl.constexpr,
    NORMALIZER: tl.constexpr, ENDS: tl.constexpr, TAILS: tl.constexpr, INVERSE: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, SLOPES: tl.constexpr, SP: tl.constexpr, SAME: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradients of x and of all parameters; those of the inverse by implicit differentiation.

    The parameters' gradients lie as the parameters do (SAME), or contiguously.
    """
    program = tl.program_id(0).to(tl.int64)
    row, col, ok = _places(program % chunks * BC, BR, BC, program // chunks * BR, R, C)
    element = row * C + col
    value = tl.load(x + row * x_row + col * X_COL, mask=ok, other=0.0).to(tl.float32)
    if INVERSE:
        low, high = bottom, top
    else:
        low, high = left, right
    inside = (value >= low) & (value <= high)
    at = tl.where(inside, value, low)
    g = tl.zeros((BR * BC,), tl.float32)
    if grad_y is not None:
        g += tl.load(grad_y + row * grad_y_row + col * GRAD_Y_COL, mask=ok, other=0.0).to(tl.float32)
    g_log = tl.zeros((BR * BC,), tl.float32)
    if grad_log is not None:
        g_log += tl.load(grad_log + row * grad_log_row + col * GRAD_LOG_COL, mask=ok, other=0.0).to(tl.float32)
    by_tail = g if TAILS else tl.zeros((BR * BC,), tl.float32)
    g = tl.where(inside, g, 0.0)
    g_log = tl.where(inside, g_log, 0.0)

    outer, within = _cut(col, inner, CUT)
    widths_at = _address(row, outer, within, widths_row, widths_outer, widths_inner, CUT)
    heights_at = _address(row, outer, within, heights_row, heights_outer, heights_inner, CUT)
    derivatives_at = _address(row, outer, within, derivatives_row, derivatives_outer, derivatives_inner, CUT)
    width_logits = _scaled(_numbers(widths, widths_at, widths_k, ok, K, KP), scale, K)
    height_logits = _scaled(_numbers(heights, heights_at, heights_k, ok, K, KP), scale, K)
    xs, x_inverse = _weights(width_logits, K, NORMALIZER)
    ys, y_inverse = _weights(height_logits, K, NORMALIZER)
    if INVERSE:
        k, y_k, y_rest, h = _find(at, ys, y_inverse, min_height, bottom, top, K, NORMALIZER)
        x_k, x_rest, w = _pick(k, xs, x_inverse, min_width, left, right, K, NORMALIZER)
    else:
        k, x_k, x_rest, w = _find(at, xs, x_inverse, min_width, left, right, K, NORMALIZER)
        y_k, y_rest, h = _pick(k, ys, y_inverse, min_height, bottom, top, K, NORMALIZER)
    d_0, d_1, u_0, u_1 = _slopes_at(
        derivatives, derivatives_at, derivatives_k, ok, k, min_derivative, K, ENDS, NORMALIZER
    )  # fmt: skip
    if not SAME:
        widths_at, widths_k = element * grad_widths_each, 1
        heights_at, heights_k = element * grad_heights_each, 1
        derivatives_at, derivatives_k = element * grad_derivatives_each, 1

    # With t = theta (1 - theta): y = y_k + h N / D and log y' = 2 ln s + ln M - 2 ln D.
    s = h / w
    theta = _position(at, x_k, x_rest, w, y_k, y_rest, h, s, d_0, d_1, INVERSE)
    rest = 1.0 - theta
    t = theta * rest
    E = d_0 + d_1 - 2.0 * s
    N = s * theta * theta + d_0 * t
    inverse_D = 1.0 / (s + E * t)
    inverse_M = 1.0 / (d_1 * theta * theta + 2.0 * s * t + d_0 * rest * rest)
    y_part = N * inverse_D
    by_theta = w * s * s * inverse_D * inverse_D / inverse_M
    log_by_theta = 2.0 * (d_1 * theta + s * (rest - theta) - d_0 * rest) * inverse_M
    log_by_theta -= 2.0 * E * (rest - theta) * inverse_D
    if INVERSE:
        # At the solution: x moves against what the forward direction moves, over its slope.
        g_log = -g_log
        g = (g + g_log * log_by_theta / w) * w / by_theta
        _store_vector(grad_x, element, ok, tl.where(inside, g, by_tail))
        g = -g
        g_theta = g * by_theta + g_log * log_by_theta
    else:
        g_theta = g * by_theta + g_log * log_by_theta
        _store_vector(grad_x, element, ok, tl.where(inside, g_theta / w, by_tail))
    g_h = g * h * inverse_D
    g_s = g_h * (theta * theta - y_part * (1.0 - 2.0 * t))
    g_s += 2.0 * g_log * (1.0 / s + t * inverse_M - (1.0 - 2.0 * t) * inverse_D)
    if grad_widths is not None:
        by = _sizes_gradient(
            width_logits, xs, x_inverse, k, -g_theta / w, -(g_theta * theta + g_s * s) / w, right - left, min_width,
            scale, K, KP, NORMALIZER,
        )  # fmt: skip
        _store_tile(grad_widths, widths_at, widths_k, ok, by, K, KP)
    if grad_heights is not None:
        by = _sizes_gradient(
            height_logits, ys, y_inverse, k, g, g * y_part + g_s / w, top - bottom, min_height, scale, K, KP,
            NORMALIZER,
        )  # fmt: skip
        _store_tile(grad_heights, heights_at, heights_k, ok, by, K, KP)
    if grad_derivatives is not None:
        first, second = _knots_of(k, K, ENDS)
        by_0 = g_h * t * (1.0 - y_part) + g_log * (rest * rest * inverse_M - 2.0 * t * inverse_D)
        by_1 = -g_h * t * y_part + g_log * (theta * theta * inverse_M - 2.0 * t * inverse_D)
        by_0 *= _slope_gradient(u_0, d_0, min_derivative, NORMALIZER)
        by_1 *= _slope_gradient(u_1, d_1, min_derivative, NORMALIZER)
        j = tl.arange(0, SP)[None, :]
        by = tl.where(j == first[:, None], by_0[:, None], 0.0) + tl.where(j == second[:, None], by_1[:, None], 0.0)
        _store_tile(grad_derivatives, derivatives_at, derivatives_k, ok, by, SLOPES, SP)


@triton.jit
def _store_vector(pointer, element, ok, value):
    if pointer is not None:
        tl.store(pointer + element, value.to(pointer.dtype.element_ty), mask=ok)


def _strides(tensor: Tensor, split: int, cut: int) -> tuple[int, int, int, int] | None:
    """Strides of the rows, of the outer and the inner columns and of an element's own parameters, if each has one."""
    shape, strides = tensor.shape[:-1], tensor.stride()[:-1]
    found = [
        _one_stride(shape[begin:end], strides[begin:end])
        for begin, end in ((0, split), (split, cut), (cut, len(shape)))
    ]
    if any(stride is None for stride in found):
        return None
    rows, outer, inner = (stride or 0 for stride in found)
    return rows, outer, inner, tensor.stride(-1)


class _Parameters:
    """Widths, heights and slopes of a spline's elements, packed or each a tensor, as a kernel addresses them.

    Attributes:
        given: the tensors, or contiguous copies where they cannot be addressed.
        split: how many dimensions are rows.
        counts: how many widths, heights and slopes an element has.
        data: widths, heights and slopes, None for no slopes.
        strides: of each: rows, outer columns, inner columns, the element's own.
        inner: how many inner columns there are.
        cut: whether there are outer ones.
    """

    __slots__ = ("counts", "cut", "data", "given", "inner", "split", "strides")

    def __init__(
        self, x: Tensor, tensors: Sequence[Tensor | None], bins: int, ends: int, splits: Sequence[int]
    ) -> None:
        self.counts = (bins, bins, (bins - 1, bins, bins + 1)[ends])
        self.given = [tensor for tensor in tensors if tensor is not None]
        self.split, cut = splits[0], splits[0]
        places = [(split, cut) for split in splits for cut in range(split, max(x.dim(), split + 1))]
        for place in sorted(places, key=lambda place: place[0] < place[1]):  # a cut costs a division
            if all(_strides(tensor, *place) is not None for tensor in self.given):
                self.split, cut = place
                break
        else:
            self.given = [tensor.contiguous() for tensor in self.given]
        self.inner, self.cut = math.prod(x.shape[cut:]), cut > self.split
        self.data = self.parts(self.given)
        self.strides: list[int] = []
        for part in self.data:
            self.strides += (0, 0, 0, 0) if part is None else _strides(part, self.split, cut) or ()

    def parts(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Widths, heights and slopes in tensors that are packed as the parameters are."""
        if len(self.given) == 1:
            parts = [None] * 3 if tensors[0] is None else list(tensors[0].split(self.counts, -1))
        else:
            parts = [*tensors, None][:3]
        return parts if self.counts[2] > 0 else [*parts[:2], None]


def _blocks(rows: int, columns: int, sums: bool) -> tuple[tuple[int], int, int, dict[str, int]]:
    """Grid, programs to a row, blocks to a program, and a block's rows and columns."""
    BC = min(_BLOCK, _power_of_two(columns))
    BR = min(_BLOCK // BC, _power_of_two(rows))
    row_blocks, column_blocks = triton.cdiv(rows, BR), triton.cdiv(columns, BC)
    tiles = min(max(row_blocks * column_blocks // _PROGRAMS, 1), column_blocks) if sums else 1
    chunks = triton.cdiv(column_blocks, tiles)
    return (row_blocks * chunks,), chunks, tiles, {"BR": BR, "BC": BC}


def _splits(x: Tensor, batch_dims: int) -> list[int]:
    """Where dimensions may be cut into rows and columns: after the batch, or anywhere if nothing is summed."""
    return list(range(x.dim() + 1)) if batch_dims == x.dim() else [batch_dims]


def _unless_1(scale: float) -> float | None:
    """A factor that a kernel need not be given, which then is compiled without it."""
    return None if scale == 1.0 else float(scale)


def _check_spline(kind: int, bins: int) -> None:
    if kind != 0:
        raise NotImplementedError(f"the Triton kernel is of rational_quadratic splines, got kind {_KINDS[kind]}")
    if bins > _MOST_BINS:
        raise NotImplementedError(f"the Triton spline takes up to {_MOST_BINS} bins, got {bins}")


def spline(
    x: Tensor,
    params: Tensor,
    heights: Tensor | None,
    derivatives: Tensor | None,
    kind: int,
    normalizer: int,
    ends: int,
    tails: bool,
    inverse: bool,
    left: float,
    right: float,
    bottom: float,
    top: float,
    min_width: float,
    min_height: float,
    min_derivative: float,
    logit_scale: float,
    bins: int,
    batch_dims: int,
) -> tuple[Tensor, Tensor]:
    """``genfuse::spline``: (y, log_slope), for rational-quadratic splines."""
    _check_spline(kind, bins)
    sums, batch = batch_dims < x.dim(), x.shape[:batch_dims]
    y = x.new_empty(x.shape)
    if x.numel() == 0:
        return y, x.new_zeros(batch, dtype=torch.float32) if sums else y.clone()
    p = _Parameters(x, (params, heights, derivatives), bins, ends, _splits(x, batch_dims))
    rows, columns = _sizes(x.shape, p.split)
    values, KP = _Plane(x, p.split), _power_of_two(bins)
    grid, chunks, tiles, shape = _blocks(rows, columns, sums)
    log_slope = None if sums else x.new_empty(x.shape)
    parts = x.new_empty((chunks, rows), dtype=torch.float32) if sums else None
    _spline_kernel[grid](
        values.data, *p.data, y, log_slope, parts, rows, columns, chunks, tiles, p.inner, values.row, *p.strides,
        *map(float, (left, right, bottom, top, min_width, min_height, min_derivative)), _unless_1(logit_scale),
        X_COL=values.col, CUT=p.cut, NORMALIZER=normalizer, ENDS=ends, TAILS=tails, INVERSE=inverse, K=bins, KP=KP,
        **shape,
    )  # fmt: skip
    return y, _add_up(parts).view(batch) if parts is not None else log_slope  # type: ignore[return-value]


def spline_backward(
    grad_y: Tensor | None,
    grad_log_slope: Tensor | None,
    x: Tensor,
    params: Tensor,
    heights: Tensor | None,
    derivatives: Tensor | None,
    kind: int,
    normalizer: int,
    ends: int,
    tails: bool,
    inverse: bool,
    left: float,
    right: float,
    bottom: float,
    top: float,
    min_width: float,
    min_height: float,
    min_derivative: float,
    logit_scale: float,
    bins: int,
    batch_dims: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``genfuse::spline_backward``: the gradients of x, params, heights and derivatives."""
    _check_spline(kind, bins)
    inputs = (x, params, heights, derivatives)
    gradients = [
        x.new_empty(0)
        if tensor is None or not needs >> index & 1
        else torch.empty_like(tensor)  # where the parameters are a transposed view, the gradient is one
        if index > 0
        else x.new_empty(x.shape)
        for index, tensor in enumerate(inputs)
    ]
    if grad_y is None and grad_log_slope is None:
        for gradient in gradients:
            gradient.zero_()
    elif any(gradient.numel() > 0 for gradient in gradients):
        p = _Parameters(x, inputs[1:], bins, ends, _splits(x, batch_dims))
        rows, columns = _sizes(x.shape, p.split)
        values, g, KP = _Plane(x, p.split), _Plane(grad_y, p.split), _power_of_two(bins)
        if batch_dims < x.dim():
            logs, log_col = None if grad_log_slope is None else grad_log_slope.reshape(-1), 0
            log_row = 0 if logs is None else logs.stride(0)
        else:
            plane = _Plane(grad_log_slope, p.split)
            logs, log_row, log_col = plane.data, plane.row, plane.col
        wanted = [_or_none(gradient) for gradient in gradients[1 : 1 + len(p.given)]]
        same = all(o is None or o.stride() == t.stride() for o, t in zip(wanted, p.given, strict=True))
        filled = [o if o is None or same or o.is_contiguous() else o.new_empty(o.shape) for o in wanted]
        each = [sum(p.counts)] * 3 if len(p.given) == 1 else p.counts
        grid, chunks, _, shape = _blocks(rows, columns, False)
        _spline_backward_kernel[grid](
            g.data, logs, values.data, *p.data, _or_none(gradients[0]), *p.parts(filled), rows, columns, chunks,
            p.inner, g.row, log_row, values.row, *p.strides, *each,
            *map(float, (left, right, bottom, top, min_width, min_height, min_derivative)), _unless_1(logit_scale),
            GRAD_Y_COL=g.col, GRAD_LOG_COL=log_col, X_COL=values.col, CUT=p.cut, NORMALIZER=normalizer, ENDS=ends,
            TAILS=tails, INVERSE=inverse, K=bins, KP=KP, SLOPES=p.counts[2], SP=_power_of_two(max(p.counts[2], 1)),
            SAME=same, **shape,
        )  # fmt: skip
        for gradient, found in zip(wanted, filled, strict=True):
            if gradient is not None and found is not None and gradient is not found:
                gradient.copy_(found)
    return gradients[0], gradients[1], gradients[2], gradients[3]


# ---------------------------------------------------------------------------------------------------------------------
# Affine couplings
# ---------------------------------------------------------------------------------------------------------------------

_TILE = 1024  # numbers of a volume to a block
_EXP, _SIGMOID, _INVERSE_SIGMOID, _SOFTPLUS, _TANH, _ATAN, _SIGMOID_CLAMP, _SOFTCLIP, _CLIPPED, _ADDITIVE = (
    tl.constexpr(index) for index in range(10)
)
_LARGEST = tl.constexpr(0.9999 * math.log(torch.finfo(torch.float32).max))


@triton.jit
def _positions(first, spaces, BP: tl.constexpr, BS: tl.constexpr):
    """Channel and place in space of the BP x BS positions of block `first`, of a grid of blocks `spaces` wide."""
    index = tl.arange(0, BP * BS)
    channel = (first // spaces * BP + index // BS)[None, :]
    space = (first % spaces * BS + index % BS)[None, :]
    return channel, space


@triton.jit
def _atan(x):
    """Within 2 units in the last place: by its series after the argument is halved twice."""
    size = tl.abs(x)
    large = size > 1.0
    t = tl.where(large, 1.0 / size, size)
    # tan(a / 2) = t / (1 + sqrt(1 + t^2)); from [0, 1] to [0, tan(pi / 8)].
    t = t / (1.0 + tl.sqrt(1.0 + t * t))
    s = t * t
    series = 0.1111111111111111 + s * (-0.09090909090909091 + s * (0.07692307692307693 - s * 0.06666666666666667))
    series = -0.3333333333333333 + s * (0.2 + s * (-0.14285714285714285 + s * series))
    a = 2.0 * (t + t * s * series)
    a = tl.where(large, 1.5707963267948966 - a, a)
    return tl.where(x < 0.0, -a, a)


@triton.jit
def _log_sigmoid(z):
    return tl.where(z < 0.0, z, 0.0) - _log1p(tl.exp(-tl.abs(z)))


@triton.jit
def _sigmoid(z):
    small = tl.exp(-tl.abs(z))
    return tl.where(z < 0.0, small, 1.0) / (1.0 + small)


@triton.jit
def _times_exp(x, exponent):
    """x e^exponent in two halves: right wherever the product is a number, also where x is 0 and the power is none."""
    half = 0.5 * exponent
    half = tl.exp(tl.where(half > _LARGEST, _LARGEST, half))
    return x * half * half


@triton.jit
def _log_scale(r, offset, eps, low, clamp, SCALE: tl.constexpr, EPS: tl.constexpr):
    """ln s of the raw scale, and its derivative by it. (genfuse.reference.flow.coupling has the table.)"""
    by = tl.full(r.shape, 1.0, tl.float32)
    if SCALE == _EXP:
        log_s = r
    elif SCALE == _SIGMOID:
        if EPS:
            sigmoid = _sigmoid(r + offset)
            s = sigmoid + eps
            log_s = tl.log(s)
            by = sigmoid * _sigmoid(-r - offset) / s
        else:
            log_s = _log_sigmoid(r + offset)
            by = _sigmoid(-r - offset)
    elif SCALE == _INVERSE_SIGMOID:
        log_s = -_log_sigmoid(r + offset)
        by = -_sigmoid(-r - offset)
    elif SCALE == _SOFTPLUS:
        s = tl.where(r > 0.0, r, 0.0) + _log1p(tl.exp(-tl.abs(r)))
        if EPS:
            s += eps
            above = s > clamp
            by = tl.where(above, 0.0, _sigmoid(r) / s)
            log_s = tl.log(tl.where(above, clamp, s))
        else:
            # ln softplus(r) = r - e^r / 2 + ..., also where softplus(r) is 0.
            small = r < -20.0
            power = tl.exp(tl.where(small, r, -20.0))
            s = tl.where(small, 1.0, s)
            log_s = tl.where(small, r - 0.5 * power, tl.log(s))
            by = tl.where(small, 1.0 - 0.5 * power, _sigmoid(r) / s)
            above = log_s > low
            log_s = tl.where(above, low, log_s)
            by = tl.where(above, 0.0, by)
    elif SCALE == _TANH:
        t, by = _tanh(r)
        log_s = clamp * t
        by *= clamp
    elif SCALE == _ATAN:
        log_s = clamp * (0.636 * _atan(r))
        by = clamp * 0.636 / (1.0 + r * r)
    elif SCALE == _SIGMOID_CLAMP:
        t, by = _tanh(0.5 * r)
        log_s = clamp * t
        by *= 0.5 * clamp
    elif SCALE == _SOFTCLIP:
        rest = 1.0 + tl.abs(r) / clamp
        log_s = r / rest
        by = 1.0 / (rest * rest)
    else:
        log_s = tl.where(r < low, low, tl.where(r > clamp, clamp, r))
    return log_s, by


@triton.jit
def _times_scale(x, r, log_s, offset, eps, SCALE: tl.constexpr, EPS: tl.constexpr, INVERSE: tl.constexpr):
    """x s, or x / s."""
    if SCALE == _SIGMOID and EPS:
        s = _sigmoid(r + offset) + eps
        scaled = x / s if INVERSE else x * s
    elif SCALE == _SIGMOID:  # 1 / sigmoid(z) = 1 + e^-z
        scaled = x + _times_exp(x, -(r + offset)) if INVERSE else x * _sigmoid(r + offset)
    elif SCALE == _INVERSE_SIGMOID:
        scaled = x * _sigmoid(r + offset) if INVERSE else x + _times_exp(x, -(r + offset))
    else:
        scaled = _times_exp(x, -log_s if INVERSE else log_s)
    return scaled


@triton.jit
def _moved(channel, space, ok, places, mask, C, S, begin, count, STEP: tl.constexpr):
    """Which positions are transformed, and their channels in the parameters."""
    if mask is not None:
        moved = ok & (tl.load(mask + channel * S + space, mask=(channel < C) & (space < S), other=0) != 0)
        ordinal = channel
    elif places is not None:
        ordinal = tl.load(places + channel, mask=channel < C, other=-1)
        moved = ok & (ordinal >= 0)
    else:
        ordinal = (channel - begin) // STEP
        moved = ok & (channel >= begin) & ((channel - begin) % STEP == 0) & (ordinal < count)
    return moved, ordinal


@triton.jit
def _read(pointer, row, channel, space, by_row, by_channel, SPACE: tl.constexpr, ok):
    place = (row * by_row)[:, None] + channel * by_channel + space * SPACE
    return tl.load(pointer + place, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _write(pointer, row, channel, space, by_row, by_channel, ok, value):
    if pointer is not None:
        place = (row * by_row)[:, None] + channel * by_channel + space
        tl.store(pointer + place, value.to(pointer.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["B", "C", "chunks", "tiles", "spaces", "begin", "count"])
def _coupling_kernel(
    x, raw, shift, places, mask, y, each, parts, B, C, S, chunks, tiles, spaces, begin, count, x_row, x_channel,
    raw_row, raw_channel, shift_row, shift_channel, y_row, offset, eps, low, clamp, X_SPACE: tl.constexpr,
    RAW_SPACE: tl.constexpr, SHIFT_SPACE: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr,
    INVERSE: tl.constexpr, STEP: tl.constexpr, BB: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """y of all channels; and ln s, of each element or, where there is `parts`, each row's part. ADD: t comes first."""
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks * BB + tl.arange(0, BB)
    total = tl.zeros((BB, BP * BS), tl.float32)
    for tile in range(tiles):
        channel, space = _positions(program % chunks * tiles + tile, spaces, BP, BS)
        ok = (row < B)[:, None] & (channel < C) & (space < S)
        moved, ordinal = _moved(channel, space, ok, places, mask, C, S, begin, count, STEP)
        value = _read(x, row, channel, space, x_row, x_channel, X_SPACE, ok)
        t = _read(shift, row, ordinal, space, shift_row, shift_channel, SHIFT_SPACE, moved)
        t = -t if INVERSE else t
        new = value + t
        if SCALE != _ADDITIVE:
            r = _read(raw, row, ordinal, space, raw_row, raw_channel, RAW_SPACE, moved)
            log_s, _ = _log_scale(r, offset, eps, low, clamp, SCALE, EPS)
            if ADD:
                new = _times_scale(new, r, log_s, offset, eps, SCALE, EPS, INVERSE)
            else:
                new = _times_scale(value, r, log_s, offset, eps, SCALE, EPS, INVERSE) + t
            log_s = tl.where(moved, -log_s if INVERSE else log_s, 0.0)
            total += log_s
            _write(each, row, channel, space, y_row, S, ok, log_s)
        _write(y, row, channel, space, y_row, S, ok, tl.where(moved, new, value))
    if parts is not None:
        tl.store(parts + program % chunks * B + row, tl.sum(total, 1), mask=row < B)


@triton.jit(do_not_specialize=["B", "C", "chunks", "spaces", "begin", "count", "grad_log_row"])
def _coupling_backward_kernel(
    grad_y, grad_log, x, raw, shift, places, mask, grad_x, grad_raw, grad_shift, B, C, S, chunks, spaces, begin, count,
    grad_y_row, grad_y_channel, grad_log_row, grad_log_channel, x_row, x_channel, raw_row, raw_channel, shift_row,
    shift_channel, grad_x_row, grad_raw_row, grad_raw_channel, grad_shift_row, grad_shift_channel, offset, eps, low,
    clamp, GRAD_Y_SPACE: tl.constexpr, GRAD_LOG_SPACE: tl.constexpr, X_SPACE: tl.constexpr, RAW_SPACE: tl.constexpr,
    SHIFT_SPACE: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr, INVERSE: tl.constexpr,
    STEP: tl.constexpr, BB: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """With v = u s (or u / s): the gradient of u is v's times s, and that of ln s is v's times v (or minus that)."""
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks * BB + tl.arange(0, BB)
    channel, space = _positions(program % chunks, spaces, BP, BS)
    ok = (row < B)[:, None] & (channel < C) & (space < S)
    moved, ordinal = _moved(channel, space, ok, places, mask, C, S, begin, count, STEP)
    g = tl.zeros((BB, BP * BS), tl.float32)
    if grad_y is not None:
        g += _read(grad_y, row, channel, space, grad_y_row, grad_y_channel, GRAD_Y_SPACE, ok)
    by_u = g
    if SCALE != _ADDITIVE:
        r = _read(raw, row, ordinal, space, raw_row, raw_channel, RAW_SPACE, moved)
        log_s, by_r = _log_scale(r, offset, eps, low, clamp, SCALE, EPS)
        if grad_y is not None:
            by_u = _times_scale(g, r, log_s, offset, eps, SCALE, EPS, INVERSE)
        if grad_raw is not None:
            by_log = tl.zeros((BB, BP * BS), tl.float32)
            if grad_y is not None:
                u = _read(x, row, channel, space, x_row, x_channel, X_SPACE, ok)
                if ADD:
                    t = _read(shift, row, ordinal, space, shift_row, shift_channel, SHIFT_SPACE, moved)
                    u += -t if INVERSE else t
                by_log += u * by_u
            if grad_log is not None:
                by_log += _read(grad_log, row, channel, space, grad_log_row, grad_log_channel, GRAD_LOG_SPACE, ok)
            by_log = by_log * by_r
            by_log = tl.where(moved, -by_log if INVERSE else by_log, 0.0)
            # With a mask all channels have parameters, and those of what is not transformed have a gradient of 0.
            _write(
                grad_raw, row, ordinal, space, grad_raw_row, grad_raw_channel, ok if mask is not None else moved, by_log
            )  # fmt: skip
    _write(grad_x, row, channel, space, grad_x_row, S, ok, tl.where(moved, by_u, g))
    if grad_shift is not None:
        by_t = by_u if ADD else g
        by_t = tl.where(moved, -by_t if INVERSE else by_t, 0.0)
        _write(
            grad_shift, row, ordinal, space, grad_shift_row, grad_shift_channel, ok if mask is not None else moved, by_t
        )  # fmt: skip


class _Volume:
    """A tensor ``[B, C, *S]`` as a kernel addresses it; None for no tensor.

    Attributes:
        data: the tensor, or a contiguous copy where its space has more than one stride.
        strides: of rows and channels.
        space: stride of the space, 0 or 1.
    """

    __slots__ = ("data", "space", "strides")

    def __init__(self, tensor: Tensor | None) -> None:
        self.data = tensor
        self.strides, self.space = (0, 0), 0
        if tensor is None:
            return
        space = _one_stride(tensor.shape[2:], tensor.stride()[2:])
        if space not in (0, 1):
            self.data = tensor = tensor.contiguous()
            space = 1
        self.strides, self.space = (tensor.stride(0), tensor.stride(1)), space or 0


class _Cut:
    """How a volume is cut into blocks of rows, channels and space.

    Attributes:
        sizes: rows, channels, space.
        grid: programs, those of a row side by side.
        chunks: programs to a row.
        tiles: blocks to a program.
        spaces: blocks to a channel.
        shape: BB, BP and BS.
    """

    __slots__ = ("chunks", "grid", "shape", "sizes", "spaces", "tiles")

    def __init__(self, x: Tensor, sums: bool = False) -> None:
        self.sizes = B, C, S = x.size(0), x.size(1), math.prod(x.shape[2:])
        BS = min(_power_of_two(S), _TILE)
        BP = min(_power_of_two(C), _TILE // BS)
        BB = min(_power_of_two(B), _TILE // (BS * BP))
        self.spaces = triton.cdiv(S, BS)
        rows, blocks = triton.cdiv(B, BB), triton.cdiv(C, BP) * self.spaces
        self.tiles = min(max(rows * blocks // _PROGRAMS, 1), blocks) if sums else 1
        self.chunks = triton.cdiv(blocks, self.tiles)
        self.grid = (rows * self.chunks,)
        self.shape = {"BB": BB, "BP": BP, "BS": BS}


_ALL, _FIRST, _SECOND, _EVEN, _ODD, _LIST, _MASK = range(7)


def _channels(x: Tensor, channels: Tensor | None, split: int) -> tuple[Tensor | None, Tensor | None, int, int, int]:
    """What `_moved` is to know: each channel's place in the parameters, or a mask, or the first channel, how many and
    by what step."""
    C = x.size(1)
    middle = (C + 1) // 2
    if split == _LIST:
        assert channels is not None
        chosen = channels.to(x.device)
        places = torch.full((C,), -1, dtype=torch.int64, device=x.device)
        places.scatter_(0, chosen, torch.arange(chosen.numel(), device=x.device))
        return places, None, 0, chosen.numel(), 1
    if split == _MASK:
        assert channels is not None
        return None, channels.to(x.device).contiguous().view(torch.uint8), 0, C, 1
    begin, count, step = {
        _ALL: (0, C, 1),
        _FIRST: (0, middle, 1),
        _SECOND: (middle, C - middle, 1),
        _EVEN: (0, middle, 2),
        _ODD: (1, C - middle, 2),
    }[split]
    return None, None, begin, count, step


def _raw_and_shift(
    params: Tensor | None, shift: Tensor | None, scale: int, layout: int, packed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Views of the raw scale and the shift in the parameters."""
    if scale == _ADDITIVE.value:
        return None, params
    if not packed:
        return params, shift
    if params is None:
        return None, None
    if layout >= 2:
        halves = params[:, 0::2], params[:, 1::2]
    else:
        halves = params[:, : params.size(1) // 2], params[:, params.size(1) // 2 :]
    return halves if layout % 2 == 1 else halves[::-1]


def _numbers_of(scale: int, offset: float, eps: float, low: float, clamp: float) -> tuple[float, float, float, float]:
    """The numbers that a kernel takes: of "softclip" clamp is |ln slope|, of "softplus" low is ln clamp."""
    if scale == _SOFTCLIP.value:
        clamp = abs(math.log(clamp))
    elif scale == _SOFTPLUS.value:
        low = math.log(clamp)
    return float(offset), float(eps), float(low), float(clamp)


def _couple(
    x: Tensor, params: Tensor, shift: Tensor | None, channels: Tensor | None, scale: int, layout: int, split: int,
    add_first: bool, inverse: bool, numbers: tuple[float, float, float, float], reduce: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = x.new_empty(x.shape)
    log_abs_det = x.new_empty(x.shape[:1] if reduce else x.shape, dtype=torch.float32)
    if x.numel() == 0:
        return y, log_abs_det.zero_()
    additive = scale == _ADDITIVE.value
    parts = _raw_and_shift(params, shift, scale, layout, not additive and shift is None)
    values, raw, moved_by = _Volume(x), _Volume(parts[0]), _Volume(parts[1])
    places, mask, begin, count, step = _channels(x, channels, split)
    cut = _Cut(x, sums=reduce and not additive)
    sums = x.new_empty((cut.chunks, cut.sizes[0]), dtype=torch.float32) if reduce and not additive else None
    _coupling_kernel[cut.grid](
        values.data, raw.data, moved_by.data, places, mask, y, None if reduce or additive else log_abs_det, sums,
        *cut.sizes, cut.chunks, cut.tiles, cut.spaces, begin, count, *values.strides, *raw.strides, *moved_by.strides,
        y.stride(0), *_numbers_of(scale, *numbers), X_SPACE=values.space, RAW_SPACE=raw.space,
        SHIFT_SPACE=moved_by.space, SCALE=scale, EPS=numbers[1] > 0.0, ADD=add_first != inverse, INVERSE=inverse,
        STEP=step, **cut.shape,
    )  # fmt: skip
    return y, log_abs_det if sums is None else _add_up(sums)


def _couple_backward(
    grad_y: Tensor | None, grad_log: Tensor | None, x: Tensor, params: Tensor, shift: Tensor | None,
    channels: Tensor | None, scale: int, layout: int, split: int, add_first: bool, inverse: bool,
    numbers: tuple[float, float, float, float], reduce: bool, needs: int,
) -> list[Tensor]:  # fmt: skip
    gradients = [_like(tensor, bool(needs >> index & 1), x) for index, tensor in enumerate((x, params, shift))]
    if grad_y is None and grad_log is None:
        return [gradient.zero_() for gradient in gradients]
    if all(gradient.numel() == 0 for gradient in gradients) or x.numel() == 0:
        return gradients
    packed = scale != _ADDITIVE.value and shift is None
    parts = _raw_and_shift(params, shift, scale, layout, packed)
    outputs = _raw_and_shift(_or_none(gradients[1]), _or_none(gradients[2]), scale, layout, packed)
    values, raw, moved_by, g = (_Volume(tensor) for tensor in (x, *parts, grad_y))
    to_raw, to_shift = (_Volume(tensor) for tensor in outputs)
    if reduce and grad_log is not None:
        logs = _Volume(grad_log.view(-1, 1))
        logs.strides = (grad_log.stride(0), 0)
    else:
        logs = _Volume(grad_log)
    places, mask, begin, count, step = _channels(x, channels, split)
    cut = _Cut(x)
    _coupling_backward_kernel[cut.grid](
        g.data, logs.data, values.data, raw.data, moved_by.data, places, mask, _or_none(gradients[0]), to_raw.data,
        to_shift.data, *cut.sizes, cut.chunks, cut.spaces, begin, count, *g.strides, *logs.strides, *values.strides,
        *raw.strides, *moved_by.strides, math.prod(x.shape[1:]), *to_raw.strides, *to_shift.strides,
        *_numbers_of(scale, *numbers), GRAD_Y_SPACE=g.space, GRAD_LOG_SPACE=logs.space, X_SPACE=values.space,
        RAW_SPACE=raw.space, SHIFT_SPACE=moved_by.space, SCALE=scale, EPS=numbers[1] > 0.0, ADD=add_first != inverse,
        INVERSE=inverse, STEP=step, **cut.shape,
    )  # fmt: skip
    return gradients


def affine_coupling(
    x: Tensor,
    params: Tensor,
    shift: Tensor | None,
    channels: Tensor | None,
    scale: int,
    layout: int,
    split: int,
    add_first: bool,
    inverse: bool,
    offset: float,
    eps: float,
    low: float,
    clamp: float,
    reduce: bool,
) -> tuple[Tensor, Tensor]:
    """``genfuse::affine_coupling``: (y, log_abs_det)."""
    numbers = offset, eps, low, clamp
    return _couple(x, params, shift, channels, scale, layout, split, add_first, inverse, numbers, reduce)


def affine_coupling_backward(
    grad_y: Tensor | None,
    grad_log_abs_det: Tensor | None,
    x: Tensor,
    params: Tensor,
    shift: Tensor | None,
    channels: Tensor | None,
    scale: int,
    layout: int,
    split: int,
    add_first: bool,
    inverse: bool,
    offset: float,
    eps: float,
    low: float,
    clamp: float,
    reduce: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``genfuse::affine_coupling_backward``: the gradients of x, params and shift."""
    numbers = offset, eps, low, clamp
    gradients = _couple_backward(
        grad_y, grad_log_abs_det, x, params, shift, channels, scale, layout, split, add_first, inverse, numbers, reduce,
        needs,
    )  # fmt: skip
    return gradients[0], gradients[1], gradients[2]


def additive_coupling(x: Tensor, shift: Tensor, channels: Tensor | None, split: int, inverse: bool) -> Tensor:
    """``genfuse::additive_coupling``."""
    return _couple(x, shift, None, channels, _ADDITIVE.value, 0, split, False, inverse, (0.0, 0.0, 0.0, 0.0), True)[0]


def additive_coupling_backward(
    grad_y: Tensor | None, x: Tensor, shift: Tensor, channels: Tensor | None, split: int, inverse: bool, needs: int
) -> tuple[Tensor, Tensor]:
    """``genfuse::additive_coupling_backward``: the gradients of x and shift."""
    numbers = 0.0, 0.0, 0.0, 0.0
    gradients = _couple_backward(
        grad_y, None, x, shift, None, channels, _ADDITIVE.value, 0, split, False, inverse, numbers, True, needs
    )
    return gradients[0], gradients[1]


# ---------------------------------------------------------------------------------------------------------------------
# Actnorm
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["B", "C", "chunks", "spaces"])
def _actnorm_kernel(
    x, log_scale, bias, y, log_abs_det, B, C, S, chunks, spaces, x_row, x_channel, y_row, log_scale_each, bias_each,
    X_SPACE: tl.constexpr, ADD: tl.constexpr, INVERSE: tl.constexpr, BB: tl.constexpr, BP: tl.constexpr,
    BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The program of a row's first block also adds up its log-determinant."""
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks * BB + tl.arange(0, BB)
    channel, space = _positions(program % chunks, spaces, BP, BS)
    ok = (row < B)[:, None] & (channel < C) & (space < S)
    log_s = tl.load(log_scale + channel * log_scale_each, mask=channel < C, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel * bias_each, mask=channel < C, other=0.0).to(tl.float32)
    value = _read(x, row, channel, space, x_row, x_channel, X_SPACE, ok)
    if INVERSE:
        log_s, shift = -log_s, -shift
    if ADD:
        value = _times_exp(value + shift, log_s)
    else:
        value = _times_exp(value, log_s) + shift
    _write(y, row, channel, space, y_row, S, ok, value)
    if program % chunks == 0:
        total = tl.zeros((BC,), tl.float32)
        for first in range(0, C, BC):
            c = first + tl.arange(0, BC)
            total += tl.load(log_scale + c * log_scale_each, mask=c < C, other=0.0).to(tl.float32)
        whole = tl.sum(total, 0) * S
        tl.store(log_abs_det + row, tl.zeros((BB,), tl.float32) + (-whole if INVERSE else whole), mask=row < B)


@triton.jit(do_not_specialize=["B", "C", "chunks", "tiles", "spaces"])
def _actnorm_backward_kernel(
    grad_y, x, log_scale, bias, grad_x, parts, B, C, S, chunks, tiles, spaces, grad_y_row, grad_y_channel, x_row,
    x_channel, grad_x_row, log_scale_each, bias_each, GRAD_Y_SPACE: tl.constexpr, X_SPACE: tl.constexpr,
    ADD: tl.constexpr, INVERSE: tl.constexpr, BP: tl.constexpr, BB: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The gradient of x; and, where there is `parts`, the channels' sums over `tiles` blocks of rows and space: of what
    goes to the logarithm of the scale, and of what goes to the bias."""
    program = tl.program_id(0).to(tl.int64)
    channel = (program // chunks * BP + tl.arange(0, BP))[:, None]
    log_s = tl.load(log_scale + channel * log_scale_each, mask=channel < C, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel * bias_each, mask=channel < C, other=0.0).to(tl.float32)
    if INVERSE:
        log_s, shift = -log_s, -shift
    index = tl.arange(0, BB * BS)
    to_log_scale = tl.zeros((BP, BB * BS), tl.float32)
    to_bias = tl.zeros((BP, BB * BS), tl.float32)
    for tile in range(tiles):
        block = program % chunks * tiles + tile
        row = (block // spaces * BB + index // BS)[None, :]
        space = (block % spaces * BS + index % BS)[None, :]
        ok = (channel < C) & (row < B) & (space < S)
        place = row * grad_y_row + channel * grad_y_channel + space * GRAD_Y_SPACE
        g = tl.load(grad_y + place, mask=ok, other=0.0).to(tl.float32)
        by_u = _times_exp(g, log_s)
        if grad_x is not None:
            place = row * grad_x_row + channel * S + space
            tl.store(grad_x + place, by_u.to(grad_x.dtype.element_ty), mask=ok)
        if parts is not None:
            u = tl.load(x + row * x_row + channel * x_channel + space * X_SPACE, mask=ok, other=0.0).to(tl.float32)
            if ADD:
                u += shift
            to_log_scale += tl.where(ok, u * by_u, 0.0)
            to_bias += by_u if ADD else g
    if parts is not None:
        channel = program // chunks * BP + tl.arange(0, BP)
        place = parts + program % chunks * C + channel
        tl.store(place, tl.sum(to_log_scale, 1), mask=channel < C)
        tl.store(place + C * chunks, tl.sum(to_bias, 1), mask=channel < C)


@triton.jit(do_not_specialize=["B", "C", "chunks", "space", "grad_log_row"])
def _actnorm_sums_kernel(
    parts, grad_log, grad_log_scale, grad_bias, B, C, chunks, space, grad_log_row,
    INVERSE: tl.constexpr, BC: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """The channels' sums of all chunks, and what comes to the logarithm of the scale from the log-determinants."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    ok = channel < C
    to_log_scale = tl.zeros((BC,), tl.float32)
    to_bias = tl.zeros((BC,), tl.float32)
    if parts is not None:
        for chunk in range(chunks):
            place = parts + chunk * C + channel
            to_log_scale += tl.load(place, mask=ok, other=0.0)
            to_bias += tl.load(place + C * chunks, mask=ok, other=0.0)
    if grad_log is not None:
        total = tl.zeros((BB,), tl.float32)
        for first in range(0, B, BB):
            row = first + tl.arange(0, BB)
            total += tl.load(grad_log + row * grad_log_row, mask=row < B, other=0.0).to(tl.float32)
        to_log_scale += tl.sum(total, 0) * space
    if INVERSE:
        to_log_scale, to_bias = -to_log_scale, -to_bias
    if grad_log_scale is not None:
        tl.store(grad_log_scale + channel, to_log_scale.to(grad_log_scale.dtype.element_ty), mask=ok)
    if grad_bias is not None:
        tl.store(grad_bias + channel, to_bias.to(grad_bias.dtype.element_ty), mask=ok)


def actnorm(x: Tensor, log_scale: Tensor, bias: Tensor, inverse: bool, add_first: bool) -> tuple[Tensor, Tensor]:
    """``genfuse::actnorm``: (y, log_abs_det)."""
    y, log_abs_det = x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=torch.float32)
    if x.numel() == 0:
        return y, log_abs_det.zero_()
    values, cut = _Volume(x), _Cut(x)
    _actnorm_kernel[cut.grid](
        values.data, log_scale, bias, y, log_abs_det, *cut.sizes, cut.chunks, cut.spaces, *values.strides, y.stride(0),
        log_scale.stride(0), bias.stride(0), X_SPACE=values.space, ADD=add_first != inverse, INVERSE=inverse,
        BC=min(_power_of_two(x.size(1)), 256), **cut.shape,
    )  # fmt: skip
    return y, log_abs_det


def actnorm_backward(
    grad_y: Tensor | None,
    grad_log_abs_det: Tensor | None,
    x: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    inverse: bool,
    add_first: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``genfuse::actnorm_backward``: the gradients of x, log_scale and bias."""
    gradients = [_like(tensor, bool(needs >> index & 1), x) for index, tensor in enumerate((x, log_scale, bias))]
    if x.numel() == 0 or (grad_y is None and grad_log_abs_det is None):
        return gradients[0].zero_(), gradients[1].zero_(), gradients[2].zero_()
    to_x, to_log_scale, to_bias = map(_or_none, gradients)
    sums = to_log_scale is not None or to_bias is not None
    B, C, S = x.size(0), x.size(1), math.prod(x.shape[2:])
    parts, chunks = None, 0
    if grad_y is None:
        gradients[0].zero_()
    elif sums or to_x is not None:
        BS = min(_power_of_two(S), _TILE)
        BP = min(_power_of_two(C), max(_TILE // 16 // BS, 1))
        BB = min(_power_of_two(B), max(_TILE // (BS * BP), 1))
        spaces, groups = triton.cdiv(S, BS), triton.cdiv(C, BP)
        blocks = triton.cdiv(B, BB) * spaces
        tiles = min(max(groups * blocks // _PROGRAMS, 1), blocks)
        chunks = triton.cdiv(blocks, tiles)
        parts = x.new_empty((2, chunks, C), dtype=torch.float32) if sums else None
        values, g = _Volume(x), _Volume(grad_y)
        _actnorm_backward_kernel[(groups * chunks,)](
            g.data, values.data, log_scale, bias, to_x, parts, B, C, S, chunks, tiles, spaces, *g.strides,
            *values.strides, math.prod(x.shape[1:]), log_scale.stride(0), bias.stride(0), GRAD_Y_SPACE=g.space,
            X_SPACE=values.space, ADD=add_first != inverse, INVERSE=inverse, BP=BP, BB=BB, BS=BS,
        )  # fmt: skip
    if sums:
        BC = min(_power_of_two(C), 64)
        _actnorm_sums_kernel[(triton.cdiv(C, BC),)](
            parts, grad_log_abs_det, to_log_scale, to_bias, B, C, chunks, S,
            0 if grad_log_abs_det is None else grad_log_abs_det.stride(0), INVERSE=inverse, BC=BC,
            BB=min(_power_of_two(B), 1024), num_warps=2,
        )  # fmt: skip
    return gradients[0], gradients[1], gradients[2]


# ---------------------------------------------------------------------------------------------------------------------
# Dequantisation and the logit
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _shrunk(
    x, u, rng, row, first, col, ok, C, x_row, u_row, levels, alpha, X_COL: tl.constexpr, U_COL: tl.constexpr,
    SHIFT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """p and 1 - p, which is not taken from p: that has lost the digits of a small difference."""
    value = _load(x, row, x_row, col, ok, X_COL)
    if u is not None:
        noise = _load(u, row, u_row, col, ok, U_COL)
    else:
        noise = _noise_tile(rng, row, first, C, _UNIFORM, SHIFT, BR, BC)
    rest = 1.0 - 2.0 * alpha
    return alpha + rest * ((value + noise) / levels), alpha + rest * (((levels - value) - noise) / levels)


@triton.jit(do_not_specialize=["R", "chunks", "tiles"])
def _dequantize_kernel(
    x, u, rng, y, parts, R, C, chunks, tiles, x_row, u_row, levels, alpha, slope,
    X_COL: tl.constexpr, U_COL: tl.constexpr, SHIFT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y = ln p - ln(1 - p), and each row's part of the sum of ln slope - ln p - ln(1 - p); `slope` is its logarithm."""
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks * BR + tl.arange(0, BR)
    total = tl.zeros((BR, BC), tl.float32)
    for tile in range(tiles):
        first = (program % chunks * tiles + tile) * BC
        col, ok = _columns(row, first, R, C, SHIFT, BC)
        p, q = _shrunk(x, u, rng, row, first, col, ok, C, x_row, u_row, levels, alpha, X_COL, U_COL, SHIFT, BR, BC)
        log_p, log_q = tl.log(p), tl.log(q)
        _store(y, row, col, C, ok, log_p - log_q)
        total += tl.where(ok, slope - log_p - log_q, 0.0)
    tl.store(parts + program % chunks * R + row, tl.sum(total, 1), mask=row < R)


@triton.jit(do_not_specialize=["R", "chunks", "grad_log_row"])
def _dequantize_backward_kernel(
    grad_y, grad_log, x, u, rng, grad_x, grad_u, R, C, chunks, grad_y_row, grad_log_row, x_row, u_row, levels, alpha,
    GRAD_Y_COL: tl.constexpr, X_COL: tl.constexpr, U_COL: tl.constexpr, SHIFT: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """x and u are added, so one gradient is both."""
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks * BR + tl.arange(0, BR)
    first = program % chunks * BC
    col, ok = _columns(row, first, R, C, SHIFT, BC)
    p, q = _shrunk(x, u, rng, row, first, col, ok, C, x_row, u_row, levels, alpha, X_COL, U_COL, SHIFT, BR, BC)
    by = tl.zeros((BR, BC), tl.float32)
    if grad_y is not None:
        by += _load(grad_y, row, grad_y_row, col, ok, GRAD_Y_COL) * (1.0 / p + 1.0 / q)
    if grad_log is not None:
        g = tl.load(grad_log + row * grad_log_row, mask=row < R, other=0.0).to(tl.float32)[:, None]
        by += g * (1.0 / q - 1.0 / p)
    by *= (1.0 - 2.0 * alpha) / levels
    _store(grad_x, row, col, C, ok, by)
    _store(grad_u, row, col, C, ok, by)


@triton.jit(do_not_specialize=["count"])
def _logit_quantize_kernel(y, x, count, levels, alpha, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(y + element, mask=element < count, other=0.0).to(tl.float32)
    level = tl.floor((_sigmoid(value) - alpha) / (1.0 - 2.0 * alpha) * levels)
    level = tl.where(level < 0.0, 0.0, tl.where(level > levels - 1.0, levels - 1.0, level))
    tl.store(x + element, level.to(x.dtype.element_ty), mask=element < count)


def dequantize_logit(
    x: Tensor, u: Tensor | None, rng: Tensor | None, levels: int, alpha: float
) -> tuple[Tensor, Tensor]:
    """``genfuse::dequantize_logit``: (y, log_abs_det)."""
    dtype = x.dtype if x.is_floating_point() else torch.float32 if u is None else u.dtype
    y = x.new_empty(x.shape, dtype=dtype)
    if x.numel() == 0:
        return y, x.new_zeros(x.shape[:1], dtype=torch.float32)
    rows, columns = _sizes(x.shape, 1)
    values, noise = _Plane(x, 1), _Plane(u, 1)
    tiling = _Tiling(rows, columns, drawn=u is None, sums=True)
    parts = tiling.parts(rows, x)
    _dequantize_kernel[tiling.grid](
        values.data, noise.data, rng if u is None else None, y, parts, rows, columns, tiling.chunks, tiling.tiles,
        values.row, noise.row, float(levels), float(alpha), math.log((1.0 - 2.0 * alpha) / levels), X_COL=values.col,
        U_COL=noise.col, **tiling.shape,
    )  # fmt: skip
    return y, _add_up(parts)


def dequantize_logit_backward(
    grad_y: Tensor | None,
    grad_log_abs_det: Tensor | None,
    x: Tensor,
    u: Tensor | None,
    rng: Tensor | None,
    levels: int,
    alpha: float,
    needs: int,
) -> tuple[Tensor, Tensor]:
    """``genfuse::dequantize_logit_backward``: the gradients of x, if it is floating, and u."""
    to_x = _like(x if x.is_floating_point() else None, bool(needs & 1), x)
    to_u = _like(u, bool(needs & 2), x)
    if grad_y is None and grad_log_abs_det is None:
        return to_x.zero_(), to_u.zero_()
    if to_x.numel() > 0 or to_u.numel() > 0:
        rows, columns = _sizes(x.shape, 1)
        values, noise, g = _Plane(x, 1), _Plane(u, 1), _Plane(grad_y, 1)
        tiling = _Tiling(rows, columns, drawn=u is None)
        _dequantize_backward_kernel[tiling.grid](
            g.data, grad_log_abs_det, values.data, noise.data, rng if u is None else None, _or_none(to_x),
            _or_none(to_u), rows, columns, tiling.chunks, g.row,
            0 if grad_log_abs_det is None else grad_log_abs_det.stride(0), values.row, noise.row, float(levels),
            float(alpha), GRAD_Y_COL=g.col, X_COL=values.col, U_COL=noise.col, **tiling.shape,
        )  # fmt: skip
    return to_x, to_u


def logit_quantize(y: Tensor, levels: int, alpha: float) -> Tensor:
    """``genfuse::logit_quantize``."""
    x = y.new_empty(y.shape)
    if y.numel() > 0:
        _logit_quantize_kernel[(triton.cdiv(y.numel(), _TILE),)](
            y.contiguous(), x, y.numel(), float(levels), float(alpha), BLOCK=_TILE
        )
    return x
