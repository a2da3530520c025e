"""Negative log-likelihoods in Triton: what genfuse.reference.likelihood defines, forward and backward.

Arguments and results of the functions are those of the registered operators ``genfuse::...`` in csrc/library.cpp.
Everything is computed in float32, whatever the inputs' dtype. The likelihoods of rows see their tensors as planes of
rows and columns, as in sampling.py. Those of pixels see rows, channels and space with a stride each, and give a thread
a pixel: what a mixture has of a pixel, 100 numbers for ten components, is read once from memory, and once more from the
cache in backward. Levels under a softmax are read where they lie, in any view of the logits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sampling import (
    _add_up,
    _columns,
    _element,
    _excess,
    _like,
    _load,
    _or_none,
    _Plane,
    _power_of_two,
    _sizes,
    _store,
    _Strided,
    _Tiling,
    _words,
)

__all__ = [
    "bernoulli_nll",
    "bernoulli_nll_backward",
    "categorical_nll",
    "categorical_nll_backward",
    "discretized_gaussian_nll",
    "discretized_gaussian_nll_backward",
    "discretized_logistic_mixture_nll",
    "discretized_logistic_mixture_nll_backward",
    "discretized_logistic_mixture_sample",
    "gaussian_nll",
    "gaussian_nll_backward",
]

_HALF_LOG_2_PI = tl.constexpr(0.5 * math.log(2.0 * math.pi))
_DENSITY_AT_0 = tl.constexpr((2.0 * math.pi) ** -0.5)


@triton.jit
def _log1p(x):
    """ln(1 + x), x > -1: tl.math has none that every target knows."""
    s = 1.0 + x
    near = x * (1.0 + x * (-0.5 + x * (0.3333333333333333 - x * 0.25)))
    # With s = 1 + x rounded, ln(1 + x) = ln s + (the rest) / s.
    return tl.where(tl.abs(x) < 0.01, near, tl.log(s) + (x - (s - 1.0)) / s)


@triton.jit
def _tanh(x):
    """By a series near 0, where the difference would lose its digits; and its derivative."""
    size = tl.abs(x)
    small = tl.exp(-2.0 * size)
    far = (1.0 - small) / (1.0 + small)
    s = x * x
    near = 0.13333333333333333 + s * (-0.05396825396825397 + s * (0.021869488536155203 - s * 0.008863235529902197))
    near = x + x * s * (-0.3333333333333333 + s * near)
    return tl.where(size < 0.4, near, tl.where(x < 0.0, -far, far)), 4.0 * small / ((1.0 + small) * (1.0 + small))


# ---------------------------------------------------------------------------------------------------------------------
# Bernoulli
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R", "chunks", "tiles"])
def _bernoulli_kernel(
    logits, target, nll, R, C, chunks, tiles, logits_row, target_row,
    LOGITS_COL: tl.constexpr, TARGET_COL: tl.constexpr, SHIFT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """max(l, 0) - x l + ln(1 + e^-|l|) as |l| (1 - x, or x where l < 0) + ..., which keeps its digits where p is x."""
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks * BR + tl.arange(0, BR)
    total = tl.zeros((BR, BC), tl.float32)
    for tile in range(tiles):
        col, ok = _columns(row, (program % chunks * tiles + tile) * BC, R, C, SHIFT, BC)
        value = _load(logits, row, logits_row, col, ok, LOGITS_COL)
        x = _load(target, row, target_row, col, ok, TARGET_COL)
        size = tl.abs(value)
        each = size * tl.where(value > 0.0, 1.0 - x, x) + _log1p(tl.exp(-size))
        total += tl.where(ok, each, 0.0)
    tl.store(nll + program % chunks * R + row, tl.sum(total, 1), mask=row < R)


@triton.jit(do_not_specialize=["R", "chunks", "grad_row"])
def _bernoulli_backward_kernel(
    grad, logits, target, grad_logits, grad_target, R, C, chunks, grad_row, logits_row, target_row,
    LOGITS_COL: tl.constexpr, TARGET_COL: tl.constexpr, SHIFT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks * BR + tl.arange(0, BR)
    col, ok = _columns(row, program % chunks * BC, R, C, SHIFT, BC)
    g = tl.load(grad + row * grad_row, mask=row < R, other=0.0).to(tl.float32)[:, None]
    value = _load(logits, row, logits_row, col, ok, LOGITS_COL)
    if grad_logits is not None:
        x = _load(target, row, target_row, col, ok, TARGET_COL)
        # p - x by whichever of p and 1 - p is small.
        small = tl.exp(-tl.abs(value))
        small = small / (1.0 + small)
        _store(grad_logits, row, col, C, ok, g * tl.where(value > 0.0, (1.0 - x) - small, small - x))
    _store(grad_target, row, col, C, ok, -g * value)


def bernoulli_nll(logits: Tensor, target: Tensor, batch_dims: int) -> Tensor:
    """``genfuse::bernoulli_nll``."""
    batch = logits.shape[:batch_dims]
    if logits.numel() == 0:
        return logits.new_zeros(batch, dtype=torch.float32)
    rows, columns = _sizes(logits.shape, batch_dims)
    values, x = _Plane(logits, batch_dims), _Plane(target, batch_dims)
    tiling = _Tiling(rows, columns, drawn=False, sums=True)
    nll = tiling.parts(rows, logits)
    _bernoulli_kernel[tiling.grid](
        values.data, x.data, nll, rows, columns, tiling.chunks, tiling.tiles, values.row, x.row,
        LOGITS_COL=values.col, TARGET_COL=x.col, **tiling.shape,
    )  # fmt: skip
    return _add_up(nll).view(batch)


def bernoulli_nll_backward(
    grad: Tensor | None, logits: Tensor, target: Tensor, batch_dims: int, needs: int
) -> tuple[Tensor, Tensor]:
    """``genfuse::bernoulli_nll_backward``: the gradients of logits and target."""
    gradients = [_like(tensor, bool(needs >> index & 1), logits) for index, tensor in enumerate((logits, target))]
    if grad is None:
        return gradients[0].zero_(), gradients[1].zero_()
    if any(gradient.numel() > 0 for gradient in gradients):
        rows, columns = _sizes(logits.shape, batch_dims)
        values, x = _Plane(logits, batch_dims), _Plane(target, batch_dims)
        tiling = _Tiling(rows, columns, drawn=False)
        g = grad.reshape(-1)
        _bernoulli_backward_kernel[tiling.grid](
            g, values.data, x.data, *map(_or_none, gradients), rows, columns, tiling.chunks, g.stride(0), values.row,
            x.row, LOGITS_COL=values.col, TARGET_COL=x.col, **tiling.shape,
        )  # fmt: skip
    return gradients[0], gradients[1]


# ---------------------------------------------------------------------------------------------------------------------
# Gaussian
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _standardized(
    x, mean, scale, row, col, ok, x_row, mean_row, scale_row,
    X_COL: tl.constexpr, MEAN_COL: tl.constexpr, SCALE_COL: tl.constexpr, LOG_STD: tl.constexpr,
    DISCRETIZED: tl.constexpr,
):  # fmt: skip
    """(x - mean) / deviation, ln of the deviation, the root of its inverse, and x."""
    value = _load(x, row, x_row, col, ok, X_COL)
    log_deviation = _load(scale, row, scale_row, col, ok, SCALE_COL)
    log_deviation = log_deviation if LOG_STD else 0.5 * log_deviation
    # Twice the root: a small difference times a large inverse deviation does not overflow.
    root = tl.exp(-0.5 * log_deviation)
    if DISCRETIZED:
        # Edges are then finite, for products with 0; of two deviations below 1e-30 no bin can tell the difference.
        root = tl.where(root > 1e15, 1e15, root)
    center = (value - _load(mean, row, mean_row, col, ok, MEAN_COL)) * root * root
    return center, log_deviation, root, value


@triton.jit(do_not_specialize=["R", "chunks", "tiles"])
def _gaussian_kernel(
    x, mean, scale, nll, R, C, chunks, tiles, x_row, mean_row, scale_row, half, lowest, highest,
    X_COL: tl.constexpr, MEAN_COL: tl.constexpr, SCALE_COL: tl.constexpr, LOG_STD: tl.constexpr,
    DISCRETIZED: tl.constexpr, SHIFT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Each row's part of the nll: of densities, or (DISCRETIZED) of bins of half-width `half`."""
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks * BR + tl.arange(0, BR)
    total = tl.zeros((BR, BC), tl.float32)
    for tile in range(tiles):
        col, ok = _columns(row, (program % chunks * tiles + tile) * BC, R, C, SHIFT, BC)
        center, log_deviation, root, value = _standardized(
            x,
            mean,
            scale,
            row,
            col,
            ok,
            x_row,
            mean_row,
            scale_row,
            X_COL,
            MEAN_COL,
            SCALE_COL,
            LOG_STD,
            DISCRETIZED,
        )
        if DISCRETIZED:
            each = -_log_bin(center, half * root * root, value < lowest, value > highest)
        else:
            each = log_deviation + _HALF_LOG_2_PI + 0.5 * center * center
        total += tl.where(ok, each, 0.0)
    tl.store(nll + program % chunks * R + row, tl.sum(total, 1), mask=row < R)


@triton.jit(do_not_specialize=["R", "chunks", "grad_row"])
def _gaussian_backward_kernel(
    grad, x, mean, scale, grad_x, grad_mean, grad_scale, R, C, chunks, grad_row, x_row, mean_row, scale_row,
    half, lowest, highest, X_COL: tl.constexpr, MEAN_COL: tl.constexpr, SCALE_COL: tl.constexpr,
    LOG_STD: tl.constexpr, DISCRETIZED: tl.constexpr, SHIFT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks * BR + tl.arange(0, BR)
    col, ok = _columns(row, program % chunks * BC, R, C, SHIFT, BC)
    g = tl.load(grad + row * grad_row, mask=row < R, other=0.0).to(tl.float32)[:, None]
    center, _, root, value = _standardized(
        x,
        mean,
        scale,
        row,
        col,
        ok,
        x_row,
        mean_row,
        scale_row,
        X_COL,
        MEAN_COL,
        SCALE_COL,
        LOG_STD,
        DISCRETIZED,
    )
    if DISCRETIZED:
        by_center, by_log_deviation = _log_bin_gradient(center, half * root * root, value < lowest, value > highest)
        by_x = -g * by_center * root * root
        by_scale = -g * by_log_deviation
    else:
        by_x = g * center * root * root
        by_scale = g - g * center * center
    _store(grad_x, row, col, C, ok, by_x)
    _store(grad_mean, row, col, C, ok, -by_x)
    _store(grad_scale, row, col, C, ok, by_scale if LOG_STD else 0.5 * by_scale)


# ---------------------------------------------------------------------------------------------------------------------
# The mass of a bin
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _mills(t):
    """Mills' ratio (mass above t) / (density at t) of a standard normal, t >= 0, within 2 units in the last place.

    (1 + t) times it, a smooth function of (t - 4) / (t + 4) on [-1, 1], as a polynomial interpolated in Chebyshev's
    points (relative error 9e-9).
    """
    q = (t - 4.0) / (t + 4.0)
    s = -0.00021554937120527029 + q * (-0.00014542572898790240 + q * 3.2810898119350895e-05)
    s = -0.012501930817961693 + q * (-0.00072648067725822330 + q * (0.0016664087306708097 + q * s))
    s = 0.071690276265144348 + q * (-0.080716498196125031 + q * (0.044961545616388321 + q * s))
    s = 1.1832618713378906 + q * (-0.24239966273307800 + q * (0.035092599689960480 + q * s))
    return s / (1.0 + t)


@triton.jit
def _density(t):
    return tl.exp(-0.5 * t * t) * _DENSITY_AT_0


@triton.jit
def _quadrature(c, h):
    """The integral of e^(-c t - t^2 / 2) over [-h, h], by h: Gauss and Legendre's rule of ten points. For c h < 1."""
    a = 0.1488743389816312 * h
    total = 0.2955242247147529 * (tl.exp(a * (c - 0.5 * a)) + tl.exp(-a * (c + 0.5 * a)))
    a = 0.4333953941292472 * h
    total += 0.2692667193099963 * (tl.exp(a * (c - 0.5 * a)) + tl.exp(-a * (c + 0.5 * a)))
    a = 0.6794095682990244 * h
    total += 0.2190863625159820 * (tl.exp(a * (c - 0.5 * a)) + tl.exp(-a * (c + 0.5 * a)))
    a = 0.8650633666889845 * h
    total += 0.1494513491505806 * (tl.exp(a * (c - 0.5 * a)) + tl.exp(-a * (c + 0.5 * a)))
    a = 0.9739065285171717 * h
    total += 0.0666713443086881 * (tl.exp(a * (c - 0.5 * a)) + tl.exp(-a * (c + 0.5 * a)))
    return total


@triton.jit
def _edges(center, half, lower, upper):
    """The near edge of a bin, as seen from the tail that it lies in, and the far one; whether it has a far one; and
    whether it is narrow."""
    inside = (lower | upper) == 0
    distance = tl.abs(center)
    near = tl.where(lower, -(center + half), tl.where(upper, center - half, distance - half))
    return near, distance + half, inside, inside & (half * (1.0 + distance) < 1.0)


@triton.jit
def _log_bin(center, half, lower, upper):
    """ln of a standard normal's mass in [center - half, center + half]; the bins `lower` and `upper` have no end on
    their side."""
    near, far, inside, narrow = _edges(center, half, lower, upper)
    c, h = tl.where(narrow, tl.abs(center), 0.0), tl.where(narrow, half, 1.0)
    by_quadrature = tl.log(h * _quadrature(c, h)) - 0.5 * c * c - _HALF_LOG_2_PI
    at_near, at_far = _mills(tl.abs(near)), _mills(far)
    # In the tail, the mass above the near edge less that above the far one; else 1 less the masses on both sides.
    ratio = tl.where(inside, tl.exp(-2.0 * tl.abs(center) * half) * (at_far / at_near), 0.0)
    tail = tl.log(at_near * _DENSITY_AT_0) - 0.5 * near * near + _log1p(-ratio)
    outside = at_near * _density(near) + tl.where(inside, at_far * _density(far), 0.0)
    return tl.where(narrow, by_quadrature, tl.where(near > 0.0, tail, _log1p(-outside)))


@triton.jit
def _log_bin_gradient(center, half, lower, upper):
    """The derivatives of `_log_bin` by center and by ln of the deviation, to which center and half are inverse.

    With A and B the densities at the near and the far edge over the mass: B - A (with the sign of center) and
    near A - far B.
    """
    near, far, inside, narrow = _edges(center, half, lower, upper)
    distance = tl.abs(center)
    c, h = tl.where(narrow, distance, 0.0), tl.where(narrow, half, 1.0)
    # A and B are e^(+-c h - h^2 / 2) / (h integral): their difference by sinh(c h) / (c h), which has no 0 / 0.
    y = c * h
    s = y * y
    sinh = 1.0 + s * (
        0.16666666666666666 + s * (0.008333333333333333 + s * (0.0001984126984126984 + s * 2.7557319e-06))
    )
    cosh = 0.5 * (tl.exp(y) + tl.exp(-y))
    twice = 2.0 * tl.exp(-0.5 * h * h) / _quadrature(c, h)
    narrow_center = -twice * c * sinh
    narrow_deviation = twice * (c * c * sinh - cosh)

    at_near, at_far = _mills(tl.abs(near)), _mills(far)
    log_ratio = -2.0 * distance * half
    ratio = tl.where(inside, tl.exp(log_ratio), 0.0)  # B / A
    density = _density(near)
    in_tail = 1.0 / (at_near * (1.0 - ratio * (at_far / at_near)))
    mass = 1.0 - at_near * density - tl.where(inside, at_far * _density(far), 0.0)
    A = tl.where(near > 0.0, in_tail, density / mass)
    # e^x - 1, for the difference of the densities near the middle.
    small = tl.where(tl.abs(log_ratio) < 1.0, log_ratio, 0.0)
    expm1 = tl.where(tl.abs(log_ratio) < 1.0, small + small * small * _excess(small), ratio - 1.0)
    wide_center = tl.where(lower, A, tl.where(upper, -A, tl.where(center < 0.0, -A, A) * expm1))
    B = tl.where(near > 0.0, A * ratio, tl.where(inside, _density(far) / mass, 0.0))
    return tl.where(narrow, tl.where(center < 0.0, -narrow_center, narrow_center), wide_center), tl.where(
        narrow, narrow_deviation, near * A - far * B
    )


def _gaussian(x: Tensor, mean: Tensor, scale: Tensor, batch_dims: int, log_std: bool, levels: int | None) -> Tensor:
    batch = x.shape[:batch_dims]
    if x.numel() == 0:
        return x.new_zeros(batch, dtype=torch.float32)
    rows, columns = _sizes(x.shape, batch_dims)
    planes = [_Plane(tensor, batch_dims) for tensor in (x, mean, scale)]
    tiling = _Tiling(rows, columns, drawn=False, sums=True, share=_share(levels))
    nll = tiling.parts(rows, x)
    _gaussian_kernel[tiling.grid](
        *(plane.data for plane in planes), nll, rows, columns, tiling.chunks, tiling.tiles,
        *(plane.row for plane in planes), *_bins(levels), **_columns_of(planes), LOG_STD=log_std,
        DISCRETIZED=levels is not None, **tiling.shape,
    )  # fmt: skip
    return _add_up(nll).view(batch)


def _gaussian_backward(
    grad: Tensor | None,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    batch_dims: int,
    log_std: bool,
    levels: int | None,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (x, mean, scale)
    gradients = [_like(tensor, bool(needs >> index & 1), x) for index, tensor in enumerate(inputs)]
    if grad is None:
        for gradient in gradients:
            gradient.zero_()
    elif any(gradient.numel() > 0 for gradient in gradients):
        rows, columns = _sizes(x.shape, batch_dims)
        planes = [_Plane(tensor, batch_dims) for tensor in inputs]
        tiling = _Tiling(rows, columns, drawn=False, share=_share(levels))
        g = grad.reshape(-1)
        _gaussian_backward_kernel[tiling.grid](
            g, *(plane.data for plane in planes), *map(_or_none, gradients), rows, columns, tiling.chunks, g.stride(0),
            *(plane.row for plane in planes), *_bins(levels), **_columns_of(planes), LOG_STD=log_std,
            DISCRETIZED=levels is not None, **tiling.shape,
        )  # fmt: skip
    return gradients[0], gradients[1], gradients[2]


def _share(levels: int | None) -> int:
    """A half tile where each element needs many registers."""
    return 1 if levels is None else 2


def _bins(levels: int | None) -> tuple[float, float, float]:
    """Half the width of a bin, and what is below the lowest and above the highest inner edge."""
    half = 0.0 if levels is None else 1.0 / (levels - 1)
    return half, -1.0 + half, 1.0 - half


def _columns_of(planes: list[_Plane]) -> dict[str, Any]:
    return dict(zip(("X_COL", "MEAN_COL", "SCALE_COL"), (plane.col for plane in planes), strict=True))


def gaussian_nll(x: Tensor, mean: Tensor, scale: Tensor, batch_dims: int, log_std: bool) -> Tensor:
    """``genfuse::gaussian_nll``."""
    return _gaussian(x, mean, scale, batch_dims, log_std, None)


def gaussian_nll_backward(
    grad: Tensor | None, x: Tensor, mean: Tensor, scale: Tensor, batch_dims: int, log_std: bool, needs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``genfuse::gaussian_nll_backward``: the gradients of x, mean and scale."""
    return _gaussian_backward(grad, x, mean, scale, batch_dims, log_std, None, needs)


def discretized_gaussian_nll(
    x: Tensor, mean: Tensor, scale: Tensor, batch_dims: int, log_std: bool, levels: int
) -> Tensor:
    """``genfuse::discretized_gaussian_nll``."""
    return _gaussian(x, mean, scale, batch_dims, log_std, levels)


def discretized_gaussian_nll_backward(
    grad: Tensor | None, x: Tensor, mean: Tensor, scale: Tensor, batch_dims: int, log_std: bool, levels: int, needs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``genfuse::discretized_gaussian_nll_backward``: the gradients of x, mean and scale."""
    return _gaussian_backward(grad, x, mean, scale, batch_dims, log_std, levels, needs)


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures of discretised logistics
# ---------------------------------------------------------------------------------------------------------------------

_PIXELS = 128  # to a program, each a thread's
_MANY = 1024  # programs are enough to fill a device: with more, a program sums more than one block of an image
_FLAX = tl.constexpr(2)
_LOG_LEAST_MASS = tl.constexpr(math.log(1e-5))  # below it the published formula takes a density
_LARGEST_LOG = tl.constexpr(0.9999 * math.log(torch.finfo(torch.float32).max))
_LEAST_INVERSE = tl.constexpr(1e-7)


@triton.jit
def _parameter(params, place, index, by_channel, ok):
    return tl.load(params + place + index * by_channel, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _log_inverse(raw, least, LAYOUT: tl.constexpr):
    """-ln scale, and its derivative by the parameter."""
    if LAYOUT == _FLAX:
        small = tl.exp(-tl.abs(raw))
        softplus = tl.where(raw > 0.0, raw, 0.0) + _log1p(small)
        low = softplus < _LEAST_INVERSE
        found = tl.log(tl.where(low, _LEAST_INVERSE, softplus))
        slope = tl.where(low, 0.0, tl.where(raw > 0.0, 1.0, small) / (1.0 + small) / softplus)
    else:
        low = raw < least
        found = -tl.where(low, least, raw)
        slope = tl.where(low, 0.0, -1.0)
    return found, slope


@triton.jit
def _edges_of(x, half, OPENAI: tl.constexpr):
    """Whether x lies in the bin of the lowest or of the highest level, which reach to infinity."""
    if OPENAI:
        lowest, highest = x < -0.999, x > 0.999
    else:
        lowest, highest = x < -1.0 + half, x > 1.0 - half
    return lowest, highest


@triton.jit
def _log_mass(x, mean, log_inverse, half, log_width, OPENAI: tl.constexpr):
    """ln of a level's mass under one logistic: sigmoid(a) sigmoid(-b) (1 - e^(b - a)), without cancellation.

    `log_width` is ln of the bin's width.
    """
    lowest, highest = _edges_of(x, half, OPENAI)
    inside = (lowest | highest) == 0
    inverse = tl.exp(tl.where(log_inverse > _LARGEST_LOG, _LARGEST_LOG, log_inverse))
    centered = x - mean
    a, b = inverse * (centered + half), inverse * (centered - half)
    w = inverse * half
    # One logarithm of 1 - (what is missing) for all three factors; of the third, ln(2 w) - w + ... where it is small.
    above = tl.where(highest, 0.0, tl.exp(-tl.abs(a)))
    below = tl.where(lowest, 0.0, tl.exp(-tl.abs(b)))
    rest = above + below + above * below
    near = w < 0.35
    beyond = tl.where(inside & (near == 0), tl.exp(-2.0 * w), 0.0)
    found = _log1p(-(beyond + rest) / (1.0 + rest))
    found += tl.where((a < 0.0) & (highest == 0), a, 0.0) - tl.where((b > 0.0) & (lowest == 0), b, 0.0)
    s = w * w
    sinh = s * (0.16666666666666666 - s * (0.005555555555555556 - s * 0.0003527336860670194))
    found += tl.where(inside & near, (log_width + log_inverse) - w + sinh, 0.0)
    if OPENAI:
        middle = inverse * centered
        density = -tl.abs(middle) + log_inverse - 2.0 * _log1p(tl.exp(-tl.abs(middle)))
        found = tl.where(inside & (found <= _LOG_LEAST_MASS), density + log_width, found)
    return found


@triton.jit
def _log_mass_gradient(x, mean, log_inverse, half, log_width, OPENAI: tl.constexpr):
    """The derivatives of `_log_mass` by the mean and by -ln scale."""
    lowest, highest = _edges_of(x, half, OPENAI)
    inside = (lowest | highest) == 0
    inverse = tl.exp(tl.where(log_inverse > _LARGEST_LOG, _LARGEST_LOG, log_inverse))
    centered = x - mean
    a, b = inverse * (centered + half), inverse * (centered - half)
    d = 2.0 * inverse * half
    above, below = tl.exp(-tl.abs(a)), tl.exp(-tl.abs(b))
    by_a = tl.where(highest, 0.0, tl.where(a > 0.0, above, 1.0) / (1.0 + above))  # sigmoid(-a)
    by_b = tl.where(lowest, 0.0, tl.where(b > 0.0, 1.0, below) / (1.0 + below))  # sigmoid(b)
    near = d < 0.7
    small = tl.where(near, d, 0.0)
    power = tl.exp(-d)
    ratio = tl.where(near, 1.0 / (1.0 + small * _excess(small)), d * power / (1.0 - tl.where(near, 0.0, power)))
    by_mean = -inverse * (by_a - by_b)
    by_scale = tl.where(highest, 0.0, a * by_a) - tl.where(lowest, 0.0, b * by_b) + tl.where(inside, ratio, 0.0)
    if OPENAI:
        published = inside & (_log_mass(x, mean, log_inverse, half, log_width, False) <= _LOG_LEAST_MASS)
        middle = inverse * centered
        small = tl.exp(-tl.abs(middle))
        tilt = (1.0 - small) / (1.0 + small)  # tanh(|middle| / 2)
        tilt = tl.where(middle > 0.0, -tilt, tilt)
        by_mean = tl.where(published, -inverse * tilt, by_mean)
        by_scale = tl.where(published, 1.0 + middle * tilt, by_scale)
    return by_mean, by_scale


@triton.jit
def _sum_up(top, total, value):
    """A logarithm of a sum of exponentials, ln total + top, with one more value. Of -infinity alone it is -infinity."""
    small = tl.where(value == top, 1.0, tl.exp(-tl.abs(value - top)))
    larger = value > top
    return tl.where(larger, value, top), tl.where(larger, total * small + 1.0, total + small)


@triton.jit
def _coefficients(params, place, first, by_channel, step, ok):
    """The three of a component, which couple green to red, blue to red, and blue to green."""
    green_red, _ = _tanh(_parameter(params, place, first, by_channel, ok))
    blue_red, _ = _tanh(_parameter(params, place, first + step, by_channel, ok))
    blue_green, _ = _tanh(_parameter(params, place, first + 2 * step, by_channel, ok))
    return green_red, blue_red, blue_green


@triton.jit
def _component(
    params, place, first, by_channel, ok, red, green, blue, half, log_width, least, CHANNELS: tl.constexpr,
    STEP: tl.constexpr, KIND: tl.constexpr, LAYOUT: tl.constexpr, OPENAI: tl.constexpr,
):  # fmt: skip
    """ln of a pixel's mass under one component, whose parameters begin at `first`."""
    mean = _parameter(params, place, first, by_channel, ok)
    scale, _ = _log_inverse(_parameter(params, place, first + KIND, by_channel, ok), least, LAYOUT)
    found = _log_mass(red, mean, scale, half, log_width, OPENAI)
    if CHANNELS == 3:
        green_red, blue_red, blue_green = _coefficients(params, place, first + 2 * KIND, by_channel, STEP, ok)
        mean = _parameter(params, place, first + STEP, by_channel, ok) + green_red * red
        scale, _ = _log_inverse(_parameter(params, place, first + STEP + KIND, by_channel, ok), least, LAYOUT)
        found += _log_mass(green, mean, scale, half, log_width, OPENAI)
        mean = _parameter(params, place, first + 2 * STEP, by_channel, ok) + (blue_red * red + blue_green * green)
        scale, _ = _log_inverse(_parameter(params, place, first + 2 * STEP + KIND, by_channel, ok), least, LAYOUT)
        found += _log_mass(blue, mean, scale, half, log_width, OPENAI)
    return found


@triton.jit
def _all_components(
    params, place, by_channel, ok, red, green, blue, half, log_width, least, M: tl.constexpr, CHANNELS: tl.constexpr,
    COMPONENT: tl.constexpr, STEP: tl.constexpr, KIND: tl.constexpr, LAYOUT: tl.constexpr, OPENAI: tl.constexpr,
):  # fmt: skip
    """ln of the sum of the components' weights, and of their weights times the pixel's mass."""
    nothing = tl.zeros(red.shape, tl.float32)
    top, joint_top = nothing - float("inf"), nothing - float("inf")
    total, joint_total = nothing, nothing
    for m in tl.range(M, loop_unroll_factor=2):  # two that do not wait for each other
        logit = _parameter(params, place, m, by_channel, ok)
        each = _component(
            params, place, M + m * COMPONENT, by_channel, ok, red, green, blue, half, log_width, least, CHANNELS, STEP,
            KIND, LAYOUT, OPENAI,
        )  # fmt: skip
        # What cannot be has no part, whatever its parameters are.
        each = tl.where(logit == -float("inf"), logit, logit + each)
        top, total = _sum_up(top, total, logit)
        joint_top, joint_total = _sum_up(joint_top, joint_total, each)
    return top + tl.log(total), joint_top + tl.log(joint_total)


@triton.jit
def _pixels_of(x, row, space, ok, by_row, by_channel, by_space, CHANNELS: tl.constexpr):
    place = row * by_row + space * by_space
    red = tl.load(x + place, mask=ok, other=0.0).to(tl.float32)
    green, blue = red, red
    if CHANNELS == 3:
        green = tl.load(x + place + by_channel, mask=ok, other=0.0).to(tl.float32)
        blue = tl.load(x + place + 2 * by_channel, mask=ok, other=0.0).to(tl.float32)
    return red, green, blue


@triton.jit(do_not_specialize=["R", "S", "chunks", "tiles"])
def _mixture_kernel(
    x, params, pixel, parts, R, S, chunks, tiles, x_row, x_channel, x_space, params_row, params_channel, params_space,
    half, log_width, least, M: tl.constexpr, CHANNELS: tl.constexpr, COMPONENT: tl.constexpr, STEP: tl.constexpr,
    KIND: tl.constexpr, LAYOUT: tl.constexpr, OPENAI: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Nats of each pixel or, where there is `parts`, the image's sums over `tiles` blocks."""
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks
    sums = tl.zeros((BS,), tl.float32)
    for tile in range(tiles):
        space = (program % chunks * tiles + tile) * BS + tl.arange(0, BS)
        ok = space < S
        red, green, blue = _pixels_of(x, row, space, ok, x_row, x_channel, x_space, CHANNELS)
        place = row * params_row + space * params_space
        total, joint = _all_components(
            params, place, params_channel, ok, red, green, blue, half, log_width, least, M, CHANNELS, COMPONENT, STEP,
            KIND, LAYOUT, OPENAI,
        )  # fmt: skip
        # Where no component can be, nor can the pixel.
        nll = tl.where(joint == -float("inf"), float("inf"), total - joint)
        if pixel is not None:
            tl.store(pixel + row * S + space, nll, mask=ok)
        sums += tl.where(ok, nll, 0.0)
    if parts is not None:
        tl.store(parts + program % chunks * R + row, tl.sum(sums, 0))


@triton.jit
def _give(pointer, place, index, by_channel, ok, value):
    tl.store(pointer + place + index * by_channel, value.to(pointer.dtype.element_ty), mask=ok)


@triton.jit
def _channel_gradient(
    x, mean, params, place, grad_params, grad_place, first, by_channel, to_channel, share, dead, half, log_width,
    least, ok, KIND: tl.constexpr, LAYOUT: tl.constexpr, OPENAI: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of a channel's mean and scale; returns that of the mean."""
    scale, slope = _log_inverse(_parameter(params, place, first + KIND, by_channel, ok), least, LAYOUT)
    by_mean, by_scale = _log_mass_gradient(x, mean, scale, half, log_width, OPENAI)
    by_mean = tl.where(dead, 0.0, share * by_mean)
    if grad_params is not None:
        _give(grad_params, grad_place, first, to_channel, ok, by_mean)
        _give(
            grad_params, grad_place, first + KIND, to_channel, ok, tl.where(dead, 0.0, share * by_scale * slope)
        )  # fmt: skip
    return by_mean


@triton.jit
def _coefficient_gradient(params, place, grad_params, grad_place, index, by_channel, to_channel, by, x, dead, ok):
    """Writes the gradient of a coefficient times x in a mean; returns that of x."""
    value, slope = _tanh(_parameter(params, place, index, by_channel, ok))
    if grad_params is not None:
        _give(grad_params, grad_place, index, to_channel, ok, tl.where(dead, 0.0, by * x * slope))
    return tl.where(dead, 0.0, by * value)


@triton.jit(do_not_specialize=["S", "spaces", "grad_row", "grad_space"])
def _mixture_backward_kernel(
    grad, x, params, grad_x, grad_params, S, spaces, grad_row, grad_space, x_row, x_channel, x_space, params_row,
    params_channel, params_space, to_x_row, to_x_channel, to_x_space, to_row, to_channel, to_space, half, log_width,
    least, M: tl.constexpr, CHANNELS: tl.constexpr, COMPONENT: tl.constexpr, STEP: tl.constexpr, KIND: tl.constexpr,
    LAYOUT: tl.constexpr, OPENAI: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The gradients of pixels and parameters: each component's by its share of what the pixel is due to."""
    program = tl.program_id(0).to(tl.int64)
    row = program // spaces
    space = program % spaces * BS + tl.arange(0, BS)
    ok = space < S
    g = -tl.load(grad + row * grad_row + space * grad_space, mask=ok, other=0.0).to(tl.float32)
    red, green, blue = _pixels_of(x, row, space, ok, x_row, x_channel, x_space, CHANNELS)
    place = row * params_row + space * params_space
    total, joint = _all_components(
        params, place, params_channel, ok, red, green, blue, half, log_width, least, M, CHANNELS, COMPONENT, STEP,
        KIND, LAYOUT, OPENAI,
    )  # fmt: skip
    to = row * to_row + space * to_space
    by_red = tl.zeros((BS,), tl.float32)
    by_green = tl.zeros((BS,), tl.float32)
    by_blue = tl.zeros((BS,), tl.float32)
    for m in range(M):
        first = M + m * COMPONENT
        logit = _parameter(params, place, m, params_channel, ok)
        dead = logit == -float("inf")
        each = _component(
            params, place, first, params_channel, ok, red, green, blue, half, log_width, least, CHANNELS, STEP, KIND,
            LAYOUT, OPENAI,
        )  # fmt: skip
        share = tl.exp(logit + each - joint)
        if grad_params is not None:
            by_logit = tl.where(dead, 0.0, g * (share - tl.exp(logit - total)))
            _give(grad_params, to, m, to_channel, ok, by_logit)
        share = g * share
        mean = _parameter(params, place, first, params_channel, ok)
        by = _channel_gradient(
            red, mean, params, place, grad_params, to, first, params_channel, to_channel, share, dead, half, log_width,
            least, ok, KIND, LAYOUT, OPENAI,
        )  # fmt: skip
        by_red -= by
        if CHANNELS == 3:
            green_red, blue_red, blue_green = _coefficients(
                params, place, first + 2 * KIND, params_channel, STEP, ok
            )  # fmt: skip
            mean = _parameter(params, place, first + STEP, params_channel, ok) + green_red * red
            by = _channel_gradient(
                green, mean, params, place, grad_params, to, first + STEP, params_channel, to_channel, share, dead,
                half, log_width, least, ok, KIND, LAYOUT, OPENAI,
            )  # fmt: skip
            by_green -= by
            index = first + 2 * KIND
            by_red += _coefficient_gradient(
                params, place, grad_params, to, index, params_channel, to_channel, by, red, dead, ok
            )
            mean = _parameter(params, place, first + 2 * STEP, params_channel, ok)
            mean += blue_red * red + blue_green * green
            by = _channel_gradient(
                blue, mean, params, place, grad_params, to, first + 2 * STEP, params_channel, to_channel, share, dead,
                half, log_width, least, ok, KIND, LAYOUT, OPENAI,
            )  # fmt: skip
            by_blue -= by
            by_red += _coefficient_gradient(
                params, place, grad_params, to, index + STEP, params_channel, to_channel, by, red, dead, ok
            )
            by_green += _coefficient_gradient(
                params, place, grad_params, to, index + 2 * STEP, params_channel, to_channel, by, green, dead, ok
            )
    if grad_x is not None:
        to = row * to_x_row + space * to_x_space
        _give(grad_x, to, 0, to_x_channel, ok, by_red)
        if CHANNELS == 3:
            _give(grad_x, to, 1, to_x_channel, ok, by_green)
            _give(grad_x, to, 2, to_x_channel, ok, by_blue)


@triton.jit
def _drawn_logistic(mean, scale, v):
    """mean + scale (ln v - ln(1 - v)), within [-1, 1] and NaN where it is none."""
    v = tl.where(v < 1e-5, 1e-5, tl.where(v > 1.0 - 1e-5, 1.0 - 1e-5, v))
    value = mean + scale * (tl.log(v) - _log1p(-v))
    return tl.where(value < -1.0, -1.0, tl.where(value > 1.0, 1.0, value))


@triton.jit
def _snapped(value, last):
    """The nearest level's value, halves to the even one. Below 2^23 a float32's rest is rounded away by adding that."""
    level = (value + 1.0) * (0.5 * last)
    level = tl.where(level < 8388608.0, (level + 8388608.0) - 8388608.0, level)
    return tl.math.div_rn(2.0 * level - last, tl.zeros(value.shape, tl.float32) + last)


@triton.jit
def _uniform_of(u, rng, place, ok):
    """Given, or drawn by address."""
    if u is not None:
        number = tl.load(u + place, mask=ok, other=0.5).to(tl.float32)
    else:
        w0, w1, w2, w3 = _words(rng, place >> 2)
        word = place & 3
        number = _element(tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3))), 1, 24)
    return number


@triton.jit(do_not_specialize=["S", "spaces"])
def _mixture_sample_kernel(
    params, u, rng, x, S, spaces, params_row, params_channel, params_space, u_row, u_channel, u_space, x_row,
    x_channel, x_space, least, temperature, last, M: tl.constexpr, CHANNELS: tl.constexpr, COMPONENT: tl.constexpr,
    STEP: tl.constexpr, KIND: tl.constexpr, LAYOUT: tl.constexpr, SNAP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """A component by inversion in the order of the components, and of its parameters alone the channels."""
    program = tl.program_id(0).to(tl.int64)
    row = program // spaces
    space = program % spaces * BS + tl.arange(0, BS)
    ok = space < S
    place = row * params_row + space * params_space
    top = _parameter(params, place, 0, params_channel, ok)
    for m in range(1, M):
        logit = _parameter(params, place, m, params_channel, ok)
        top = tl.where((logit > top) | (top != top), logit, top)
    total = tl.zeros((BS,), tl.float64)
    for m in range(M):
        logit = _parameter(params, place, m, params_channel, ok)
        total += tl.exp((logit - top) / temperature).to(tl.float64)
    at = row * u_row + space * u_space
    threshold = _uniform_of(u, rng, at, ok).to(tl.float64) * total
    cumulated = tl.zeros((BS,), tl.float64)
    chosen = tl.zeros((BS,), tl.int64)
    found = tl.zeros((BS,), tl.int1)
    for m in range(M):
        logit = _parameter(params, place, m, params_channel, ok)
        weight = tl.exp((logit - top) / temperature)
        cumulated += weight.to(tl.float64)
        # The last that can be, if none exceeds it: the product may be rounded up to the total.
        chosen = tl.where((found == 0) & (weight > 0.0), m, chosen)
        found = found | (cumulated > threshold)
    good = (total > 0.0) & (total < float("inf"))
    place += (M + chosen * COMPONENT) * params_channel
    out = row * x_row + space * x_space
    mean = _parameter(params, place, 0, params_channel, ok)
    log_inverse, _ = _log_inverse(_parameter(params, place, KIND, params_channel, ok), least, LAYOUT)
    v = _uniform_of(u, rng, at + u_channel, ok)
    red = _drawn_logistic(mean, temperature * tl.exp(-log_inverse), v)
    if SNAP:
        red = _snapped(red, last)
    tl.store(x + out, tl.where(good, red, float("nan")), mask=ok)
    if CHANNELS == 3:
        green_red, blue_red, blue_green = _coefficients(params, place, 2 * KIND, params_channel, STEP, ok)
        mean = _parameter(params, place, STEP, params_channel, ok) + green_red * red
        log_inverse, _ = _log_inverse(_parameter(params, place, STEP + KIND, params_channel, ok), least, LAYOUT)
        v = _uniform_of(u, rng, at + 2 * u_channel, ok)
        green = _drawn_logistic(mean, temperature * tl.exp(-log_inverse), v)
        if SNAP:
            green = _snapped(green, last)
        tl.store(x + out + x_channel, tl.where(good, green, float("nan")), mask=ok)
        mean = _parameter(params, place, 2 * STEP, params_channel, ok) + (blue_red * red + blue_green * green)
        log_inverse, _ = _log_inverse(_parameter(params, place, 2 * STEP + KIND, params_channel, ok), least, LAYOUT)
        v = _uniform_of(u, rng, at + 3 * u_channel, ok)
        blue = _drawn_logistic(mean, temperature * tl.exp(-log_inverse), v)
        if SNAP:
            blue = _snapped(blue, last)
        tl.store(x + out + 2 * x_channel, tl.where(good, blue, float("nan")), mask=ok)


class _Mixture:
    """How parameters ``[B, P, *S]`` of `channels` lie, and how pixels are cut into blocks.

    Attributes:
        rows, space: of pixels; rows without space are taken for it.
        spaces: blocks to a row.
        shape: the kernels' constants.
    """

    __slots__ = ("rows", "shape", "space", "spaces")

    def __init__(self, params: Tensor, channels: int, layout: int) -> None:
        kinds = 3 if channels > 1 else 2
        M = params.size(1) // (1 + kinds * channels)
        steps = {1: (channels, 1, M * channels), 2: (kinds, M * kinds, 1)}.get(layout, (1, M * kinds, M))
        self.rows, self.space = params.size(0), math.prod(params.shape[2:])
        if self.space == 1:
            self.rows, self.space = 1, self.rows
        BS = min(_power_of_two(self.space), _PIXELS)
        self.spaces = triton.cdiv(self.space, BS)
        self.shape: dict[str, Any] = {
            **dict(zip(("COMPONENT", "STEP", "KIND"), steps, strict=True)),
            "M": M,
            "CHANNELS": channels,
            "LAYOUT": layout,
            "BS": BS,
        }


def _bin_of(bits: int, log_scale_min: float) -> tuple[float, float, float]:
    """Half the width of a bin, ln of its width, and the least log-scale."""
    half = 1.0 / (2**bits - 1)
    return half, math.log(2.0 * half), float(log_scale_min)


def discretized_logistic_mixture_nll(
    x: Tensor, params: Tensor, bits: int, openai: bool, layout: int, log_scale_min: float, by_pixel: bool
) -> Tensor:
    """``genfuse::discretized_logistic_mixture_nll``."""
    shape = (x.size(0), *x.shape[2:]) if by_pixel else x.shape[:1]
    nll = x.new_empty(shape, dtype=torch.float32)
    if x.numel() == 0:
        return nll.zero_()
    mixture = _Mixture(params, x.size(1), layout)
    alone = by_pixel or mixture.rows != x.size(0) or mixture.space == 1  # each pixel is a result
    tiles = 1 if alone else min(max(mixture.rows * mixture.spaces // _MANY, 1), mixture.spaces)
    chunks = triton.cdiv(mixture.spaces, tiles)
    parts = None if alone else x.new_empty((chunks, mixture.rows), dtype=torch.float32)
    values, given = _Strided(x, 1), _Strided(params, 1)
    _mixture_kernel[(mixture.rows * chunks,)](
        values.data, given.data, nll if alone else None, parts, mixture.rows, mixture.space, chunks, tiles,
        *values.strides, *given.strides, *_bin_of(bits, log_scale_min), OPENAI=openai, **mixture.shape,
    )  # fmt: skip
    return nll if parts is None else _add_up(parts)


def discretized_logistic_mixture_nll_backward(
    grad: Tensor | None,
    x: Tensor,
    params: Tensor,
    bits: int,
    openai: bool,
    layout: int,
    log_scale_min: float,
    by_pixel: bool,
    needs: int,
) -> tuple[Tensor, Tensor]:
    """``genfuse::discretized_logistic_mixture_nll_backward``: the gradients of x and params."""
    to_x, to_params = (
        torch.empty_like(tensor) if needs >> index & 1 else x.new_empty(0) for index, tensor in enumerate((x, params))
    )
    if grad is None:
        return to_x.zero_(), to_params.zero_()
    if x.numel() > 0 and to_x.numel() + to_params.numel() > 0:
        mixture = _Mixture(params, x.size(1), layout)
        g = grad.reshape(x.size(0), -1) if by_pixel else grad.reshape(-1, 1).expand(-1, mixture.space)
        steps = g.stride()
        if mixture.rows != x.size(0) or mixture.space == 1:
            steps = 0, g.stride(0)
        values, given, out, out_params = (
            _Strided(tensor, 1) for tensor in (x, params, _or_none(to_x), _or_none(to_params))
        )
        _mixture_backward_kernel[(mixture.rows * mixture.spaces,)](
            g, values.data, given.data, out.data, out_params.data, mixture.space, mixture.spaces, *steps,
            *values.strides, *given.strides, *out.strides, *out_params.strides, *_bin_of(bits, log_scale_min),
            OPENAI=openai, **mixture.shape,
        )  # fmt: skip
        for gradient, written in ((to_x, out.data), (to_params, out_params.data)):
            if written is not None and written is not gradient:
                gradient.copy_(written)
    return to_x, to_params


def discretized_logistic_mixture_sample(
    params: Tensor,
    u: Tensor | None,
    rng: Tensor | None,
    channels: int,
    bits: int,
    layout: int,
    log_scale_min: float,
    temperature: float,
    snap: bool,
) -> Tensor:
    """``genfuse::discretized_logistic_mixture_sample``."""
    x = params.new_empty((params.size(0), channels, *params.shape[2:]), dtype=torch.float32)
    if x.numel() > 0:
        mixture, given, out = _Mixture(params, channels, layout), _Strided(params, 1), _Strided(x, 1)
        noise = _Strided(u, 1)
        # Drawn ones by their places in a tensor that is not there.
        steps = noise.strides if u is not None else (
            (0, 1, 1 + channels) if mixture.rows != x.size(0) or mixture.space == 1
            else ((1 + channels) * mixture.space, mixture.space, 1)
        )  # fmt: skip
        _mixture_sample_kernel[(mixture.rows * mixture.spaces,)](
            given.data, noise.data, rng if u is None else None, x, mixture.space, mixture.spaces, *given.strides,
            *steps, *out.strides, float(log_scale_min), float(temperature), float(2**bits - 1), SNAP=snap,
            **mixture.shape,
        )  # fmt: skip
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Levels under a softmax
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R", "outer", "chunks", "tiles"])
def _categorical_nll_kernel(
    logits, target, nll, tops, log_sums, parts, R, outer, inner, L, chunks, tiles, row_step, outer_step, inner_step,
    level_step, target_row, target_outer, target_inner, BP: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """The largest logit, ln of the sum over levels in units of its exponential, and what of both each position lacks;
    each lane sums its own levels first. The two are not added: their sum would lose what large logits differ by.
    """
    program = tl.program_id(0).to(tl.int64)
    piece = program % (outer * chunks)
    row = program // (outer * chunks)
    start = piece // chunks
    at = row * row_step + start * outer_step
    target_at = row * target_row + start * target_outer
    sums = tl.zeros((BP,), tl.float32)
    for tile in range(tiles):
        position = (piece % chunks * tiles + tile) * BP + tl.arange(0, BP)
        ok = position < inner
        place = at + position * inner_step
        top = tl.full((BP, BL), -float("inf"), tl.float32)
        total = tl.zeros((BP, BL), tl.float32)
        for first in range(0, L, BL):
            level = first + tl.arange(0, BL)
            value = tl.load(
                logits + place[:, None] + level.to(tl.int64)[None, :] * level_step,
                mask=ok[:, None] & (level < L)[None, :],
                other=-float("inf"),
            ).to(tl.float32)
            top, total = _sum_up(top, total, value)
        highest = tl.max(top, 1)
        # NaN is passed over in a maximum, but not in the sum.
        decay = tl.where(top == highest[:, None], 1.0, tl.exp(top - highest[:, None]))
        log_sum = tl.log(tl.sum(total * decay, 1))
        chosen = tl.load(target + target_at + position * target_inner, mask=ok, other=0).to(tl.int64)
        there = ok & (chosen >= 0) & (chosen < L)
        value = tl.load(logits + place + chosen * level_step, mask=there, other=float("nan")).to(tl.float32)
        each = (highest - value) + log_sum
        result = (row * outer + start) * inner + position
        tl.store(tops + result, highest, mask=ok)
        tl.store(log_sums + result, log_sum, mask=ok)
        if nll is not None:
            tl.store(nll + result, each, mask=ok)
        sums += tl.where(ok, each, 0.0)
    if parts is not None:
        tl.store(parts + piece * R + row, tl.sum(sums, 0))


@triton.jit(do_not_specialize=["outer", "chunks", "levels", "grad_row", "grad_position"])
def _categorical_nll_backward_kernel(
    grad, logits, target, tops, log_sums, grad_logits, outer, inner, L, chunks, levels, grad_row, grad_position,
    row_step, outer_step, inner_step, level_step, target_row, target_outer, target_inner, to_row, to_outer, to_inner,
    to_level, BP: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Softmax less the one that is; `levels` blocks of levels to a block of positions."""
    program = tl.program_id(0).to(tl.int64)
    position = program // levels % chunks * BP + tl.arange(0, BP)
    start = program // levels // chunks % outer
    row = program // levels // chunks // outer
    level = program % levels * BL + tl.arange(0, BL)
    ok = position < inner
    both = ok[:, None] & (level < L)[None, :]
    place = row * row_step + start * outer_step + position * inner_step
    value = tl.load(logits + place[:, None] + level[None, :] * level_step, mask=both, other=0.0).to(tl.float32)
    index = start * inner + position
    top = tl.load(tops + row * outer * inner + index, mask=ok, other=0.0).to(tl.float32)
    log_sum = tl.load(log_sums + row * outer * inner + index, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(grad + row * grad_row + index * grad_position, mask=ok, other=0.0).to(tl.float32)
    place = row * target_row + start * target_outer + position * target_inner
    chosen = tl.load(target + place, mask=ok, other=0).to(tl.int64)
    share = tl.exp((value - top[:, None]) - log_sum[:, None])
    by = g[:, None] * (share - tl.where(level[None, :] == chosen[:, None], 1.0, 0.0))
    place = row * to_row + start * to_outer + position * to_inner
    tl.store(
        grad_logits + place[:, None] + level[None, :] * to_level, by.to(grad_logits.dtype.element_ty), mask=both
    )  # fmt: skip


class _Positions:
    """The positions of images, all dimensions of logits but the batch and the levels, taken as two.

    Attributes:
        data: the tensors, or contiguous copies where they have more strides than that.
        outer, inner: the sizes of both dimensions.
        strides: of each tensor, by rows and both dimensions.
    """

    __slots__ = ("data", "inner", "outer", "strides")

    def __init__(self, dim: int, logits: Tensor, target: Tensor, *rest: Tensor) -> None:
        self.data = [logits, target, *rest]
        cut = self._cut(dim, self.data)
        if cut is None:
            self.data = [tensor.contiguous() for tensor in self.data]
            cut = self._cut(dim, self.data)
            assert cut is not None
        self.outer, self.inner, self.strides = cut

    @staticmethod
    def _cut(dim: int, tensors: list[Tensor]) -> tuple[int, int, list[tuple[int, int, int]]] | None:
        shape = list(tensors[1].shape)
        strides = [
            [stride for d, stride in enumerate(tensor.stride()) if tensor is tensors[1] or d != dim]
            for tensor in tensors
        ]
        sizes: list[int] = []
        steps: list[list[int]] = []  # of each dimension that is left, of all tensors
        for d in range(1, len(shape)):
            here = [stride[d] for stride in strides]
            if shape[d] == 1:
                continue
            if sizes and all(a == b * shape[d] for a, b in zip(steps[-1], here, strict=True)):
                sizes[-1] *= shape[d]
                steps[-1] = here
            else:
                sizes.append(shape[d])
                steps.append(here)
        if len(sizes) > 2:
            return None
        while len(sizes) < 2:
            sizes.insert(0, 1)
            steps.insert(0, [0] * len(tensors))
        return (
            sizes[0],
            sizes[1],
            [(stride[0], outer, inner) for stride, outer, inner in zip(strides, steps[0], steps[1], strict=True)],
        )


def _level_tile(levels: int, count: int, level_step: int, inner_step: int) -> tuple[int, int]:
    """Positions by levels of a block, the longer side where numbers lie side by side."""
    if level_step == 1 and inner_step != 1:
        BL = min(_power_of_two(levels), 256)
        return max(min(1024 // BL, _power_of_two(count)), 1), BL
    BP = min(_power_of_two(count), 128)
    return BP, min(_power_of_two(levels), 8)


def categorical_nll(logits: Tensor, target: Tensor, dim: int, by_position: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``genfuse::categorical_nll``: (nll, largest logit, ln sum e^(logit - it)). A level that is none makes NaN."""
    top = logits.new_empty(target.shape, dtype=torch.float32)
    log_sum = torch.empty_like(top)
    if target.numel() == 0:
        return logits.new_zeros(target.shape if by_position else target.shape[:1], dtype=torch.float32), top, log_sum
    where = _Positions(dim, logits, target)
    data, rows, levels = where.data[0], target.size(0), logits.size(dim)
    BP, BL = _level_tile(levels, where.inner, data.stride(dim), where.strides[0][2])
    blocks = triton.cdiv(where.inner, BP)
    tiles = 1 if by_position else min(max(rows * where.outer * blocks // _MANY, 1), blocks)
    chunks = triton.cdiv(blocks, tiles)
    nll = torch.empty_like(top) if by_position else None
    parts = None if by_position else logits.new_empty((where.outer * chunks, rows), dtype=torch.float32)
    _categorical_nll_kernel[(rows * where.outer * chunks,)](
        data, where.data[1], nll, top, log_sum, parts, rows, where.outer, where.inner, levels, chunks, tiles,
        *where.strides[0], data.stride(dim), *where.strides[1], BP=BP, BL=BL,
    )  # fmt: skip
    if nll is not None:
        return nll, top, log_sum
    assert parts is not None
    return _add_up(parts), top, log_sum


def categorical_nll_backward(
    grad: Tensor | None,
    logits: Tensor,
    target: Tensor,
    top: Tensor,
    log_sum: Tensor,
    dim: int,
    by_position: bool,
    needs: int,
) -> Tensor:
    """``genfuse::categorical_nll_backward``: the gradient of logits."""
    if not needs & 1:
        return logits.new_empty(0)
    to = torch.empty_like(logits)
    if grad is None:
        return to.zero_()
    if to.numel() > 0:
        where = _Positions(dim, logits, target, to)
        data, written, rows, levels = where.data[0], where.data[2], target.size(0), logits.size(dim)
        g = grad.reshape(rows, -1) if by_position else grad.reshape(-1, 1).expand(-1, target[0].numel())
        BP, BL = _level_tile(levels, where.inner, written.stride(dim), where.strides[2][2])
        chunks, blocks = triton.cdiv(where.inner, BP), triton.cdiv(levels, BL)
        _categorical_nll_backward_kernel[(rows * where.outer * chunks * blocks,)](
            g, data, where.data[1], top, log_sum, written, where.outer, where.inner, levels, chunks, blocks,
            *g.stride(), *where.strides[0], data.stride(dim), *where.strides[1], *where.strides[2],
            written.stride(dim), BP=BP, BL=BL,
        )  # fmt: skip
        if written is not to:
            to.copy_(written)
    return to
