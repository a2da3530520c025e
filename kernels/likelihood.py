"""Negative log-likelihoods of rows in Triton: what genfuse.reference.likelihood defines, forward and backward.

Arguments and results of the functions are those of the registered operators ``genfuse::...`` in csrc/library.cpp.
Everything is computed in float32, whatever the inputs' dtype. Tensors are planes of rows and columns, as in
sampling.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sampling import _add_up, _columns, _excess, _like, _load, _or_none, _Plane, _sizes, _store, _Tiling

__all__ = [
    "bernoulli_nll",
    "bernoulli_nll_backward",
    "discretized_gaussian_nll",
    "discretized_gaussian_nll_backward",
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
