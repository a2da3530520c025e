"""Monotone splines with the normalisation of their parameters, and the logarithm of their slope.

Every function is one element's; K is the number of bins, and a trailing dimension holds an element's parameters. The
input is put inside of the interval before anything is computed of it, so that what is not used has no gradient of NaN.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["KINDS", "NORMALIZERS", "parameter_counts", "spline"]

KINDS = ("rational_quadratic", "linear", "quadratic", "cubic")
NORMALIZERS = ("softmax", "identity", "zuko", "none")
ENDS = ("one", "wrap", "given")  # the slopes at both ends: 1; one parameter for both; a parameter for each

ZUKO_SLOPE = 1e-3  # the least slope of zuko's transformations, by which it clips logits softly


def parameter_counts(kind: str, bins: int, ends: str) -> tuple[int, int, int]:
    """How many widths, heights and derivatives an element has; a linear spline's masses are its widths."""
    if kind == "linear":
        return bins, 0, 0
    if kind == "quadratic":
        return bins, bins - 1 if ends == "one" else bins + 1, 0
    if kind == "cubic":
        return bins, bins, 2
    return bins, bins, {"one": bins - 1, "wrap": bins, "given": bins + 1}[ends]


def _soft_clip(logits: Tensor, limit: float) -> Tensor:
    return logits / (1 + (logits / limit).abs())


def _sizes(logits: Tensor, least: float, normalizer: str) -> Tensor:
    """Widths or heights of the bins of a unit interval: [..., K]."""
    bins = logits.shape[-1]
    if normalizer == "none":
        return least + (1 - least * bins) * logits
    if normalizer == "zuko":
        return F.softmax(_soft_clip(logits, 0.5 * math.log(1 / ZUKO_SLOPE)), dim=-1)
    return least + (1 - least * bins) * F.softmax(logits, dim=-1)


def _knots(sizes: Tensor, low: float, high: float) -> Tensor:
    """The K + 1 borders of the bins, of which the ends are exactly low and high."""
    inner = low + (high - low) * sizes.cumsum(-1)[..., :-1]
    ends = torch.full_like(inner[..., :1] if inner.shape[-1] else sizes, low), torch.full_like(sizes[..., :1], high)
    return torch.cat([ends[0], inner, ends[1]], dim=-1)


def _slopes(derivatives: Tensor, least: float, normalizer: str, ends: str) -> Tensor:
    """The slopes at all K + 1 knots."""
    if normalizer == "none":
        slopes = least + derivatives
    elif normalizer == "zuko":
        slopes = torch.exp(_soft_clip(derivatives, math.log(1 / ZUKO_SLOPE)))
    elif normalizer == "identity":
        slopes = least + F.softplus(derivatives, beta=math.log(2) / (1 - least))
    else:
        slopes = least + F.softplus(derivatives)
    if ends == "one":
        return F.pad(slopes, (1, 1), value=1.0)
    if ends == "wrap":
        return torch.cat([slopes, slopes[..., :1]], dim=-1)
    return slopes


def _bin_of(knots: Tensor, x: Tensor) -> Tensor:
    """[..., 1]: a knot belongs to the bin on its right, the last one to the last bin."""
    return (x[..., None] >= knots[..., 1:-1]).sum(-1, keepdim=True)


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index)[..., 0]


def _rational_quadratic(x: Tensor, xs: Tensor, ys: Tensor, slopes: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Durkan et al. 2019 (arXiv 1906.04032), eq. 4 and 5; the inverse is their eq. 6 to 8."""
    k = _bin_of(ys if inverse else xs, x)
    x_k, w = _at(xs, k), _at(xs[..., 1:] - xs[..., :-1], k)
    y_k, h = _at(ys, k), _at(ys[..., 1:] - ys[..., :-1], k)
    d_0, d_1, s = _at(slopes, k), _at(slopes, k + 1), h / w
    if inverse:
        above = (x - y_k) * (d_0 + d_1 - 2 * s)
        a, b, c = h * (s - d_0) + above, h * d_0 - above, -s * (x - y_k)
        # Rounding may make it negative, where the root of 0 has no gradient.
        discriminant = b.square() - 4 * a * c
        positive = ~(discriminant <= 0)
        root = torch.where(positive, discriminant, 1).sqrt() * positive
        theta = 2 * c / (-b - root)
        # Not beyond the bin by rounding: there the slope of a steep one with flat ends would be negative.
        theta = theta + (theta.clamp(0, 1) - theta).detach()
    else:
        theta = (x - x_k) / w
    between = theta * (1 - theta)
    denominator = s + (d_0 + d_1 - 2 * s) * between
    slope = d_1 * theta.square() + 2 * s * between + d_0 * (1 - theta).square()
    log_slope = 2 * s.log() + slope.log() - 2 * denominator.log()
    if inverse:
        return x_k + theta * w, -log_slope
    return y_k + h * (s * theta.square() + d_0 * between) / denominator, log_slope


def _linear(x: Tensor, logits: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Müller et al. 2018 (arXiv 1808.03856), section 4.1: bins of one width, on the unit square."""
    bins = logits.shape[-1]
    pdf = F.softmax(logits, dim=-1)
    cdf = _knots(pdf, 0.0, 1.0)
    if inverse:
        k = _bin_of(cdf, x)
        mass = _at(cdf[..., 1:] - cdf[..., :-1], k)
        y = (k[..., 0] + (x - _at(cdf, k)) / mass) / bins
        return y.clamp(0, 1), -(mass * bins).log()
    k = (x.detach() * bins).long().clamp(0, bins - 1)[..., None]
    mass = _at(pdf, k)
    y = _at(cdf, k) + (x * bins - k[..., 0]) * mass
    return y.clamp(0, 1), (mass * bins).log()


def _quadratic(
    x: Tensor, widths: Tensor, heights: Tensor, min_width: float, min_height: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Müller et al. 2018, section 4.2: a density that is linear in each bin, as nflows normalises it."""
    bins = widths.shape[-1]
    w = _sizes(widths, min_width, "softmax")
    v = F.softplus(heights) + 1e-3
    if v.shape[-1] == bins - 1:  # the density at both ends, for a slope of 1 there; nflows halves the end bins twice
        first, last = 0.5 * w[..., 0], 0.5 * w[..., -1]
        mass = 0.5 * first * v[..., 0] + 0.5 * last * v[..., -1]
        mass = mass + (0.5 * (v[..., :-1] + v[..., 1:]) * w[..., 1:-1]).sum(-1)
        end = (mass / (1 - 0.5 * first - 0.5 * last))[..., None]
        v = torch.cat([end, v, end], dim=-1)
    v = v / (0.5 * (v[..., :-1] + v[..., 1:]) * w).sum(-1, keepdim=True)
    v = min_height + (1 - min_height) * v
    ys, xs = _knots(0.5 * (v[..., :-1] + v[..., 1:]) * w, 0.0, 1.0), _knots(w, 0.0, 1.0)
    k = _bin_of(ys if inverse else xs, x)
    x_k, w_k, y_k, v_0, v_1 = _at(xs, k), _at(w, k), _at(ys, k), _at(v, k), _at(v, k + 1)
    a, b = 0.5 * (v_1 - v_0) * w_k, v_0 * w_k
    if inverse:
        # a alpha^2 + b alpha = x - y_k by the form that cancels nothing, whatever a is.
        above = x - y_k
        discriminant = b.square() + 4 * a * above
        positive = ~(discriminant <= 0)
        root = torch.where(positive, discriminant, 1).sqrt() * positive
        alpha = 2 * above / (b + root)
        return (x_k + alpha * w_k).clamp(0, 1), -(v_0 + alpha * (v_1 - v_0)).log()
    alpha = (x - x_k) / w_k
    return (y_k + alpha * (b + alpha * a)).clamp(0, 1), (v_0 + alpha * (v_1 - v_0)).log()


def _cubic(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    min_width: float,
    min_height: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Steffen 1990 by Durkan et al. 2019 (arXiv 1906.02145), section 3: monotone cubics on the unit square."""
    w, h = _sizes(widths, min_width, "softmax"), _sizes(heights, min_height, "softmax")
    xs, ys = _knots(w, 0.0, 1.0), _knots(h, 0.0, 1.0)
    s = h / w
    weighted = 0.5 * (w[..., 1:] * s[..., :-1] + w[..., :-1] * s[..., 1:]) / (w[..., :-1] + w[..., 1:])
    inner = 2 * torch.minimum(torch.minimum(s[..., :-1], s[..., 1:]), weighted)
    ends = 3 * torch.sigmoid(derivatives)
    d = torch.cat([ends[..., :1] * s[..., :1], inner, ends[..., 1:] * s[..., -1:]], dim=-1)
    k = _bin_of(ys if inverse else xs, x)
    x_k, w_k, y_k, s_k, d_0, d_1 = _at(xs, k), _at(w, k), _at(ys, k), _at(s, k), _at(d, k), _at(d, k + 1)
    # In t = (x - x_k) / w: y_k + w t (d_0 + t (c_2 + t c_3)).
    c_2, c_3 = 3 * s_k - 2 * d_0 - d_1, d_0 + d_1 - 2 * s_k
    if inverse:
        t = _solve_cubic((x - y_k) / w_k, d_0, c_2, c_3)
    else:
        t = (x - x_k) / w_k
    slope = d_0 + t * (2 * c_2 + 3 * t * c_3)
    if inverse:
        return x_k + t * w_k, -slope.log()
    return y_k + w_k * t * (d_0 + t * (c_2 + t * c_3)), slope.log()


def _solve_cubic(target: Tensor, c_1: Tensor, c_2: Tensor, c_3: Tensor) -> Tensor:
    """t in [0, 1] with c_1 t + c_2 t^2 + c_3 t^3 = target, of a cubic that rises there.

    By bisection, which nothing can mislead (the closed form divides by c_3, which may vanish), then one step of Newton
    on the graph, which has the root's derivatives of every order up to the rounding of the root; two for the second.
    """
    with torch.no_grad():
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(60 if target.dtype == torch.float64 else 30):
            middle = 0.5 * (low + high)
            below = middle * (c_1 + middle * (c_2 + middle * c_3)) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        t = torch.where(target != target, target, 0.5 * (low + high))
    for _ in range(2):
        slope = c_1 + t * (2 * c_2 + 3 * t * c_3)
        flat = slope <= 0  # at the end of a bin whose slope there is 0, or by rounding
        step = (t * (c_1 + t * (c_2 + t * c_3)) - target) / torch.where(flat, 1, slope)
        t = t - torch.where(flat, torch.zeros_like(step), step)
    return t


def spline(
    x: Tensor,
    params: Tensor,
    heights: Tensor | None,
    derivatives: Tensor | None,
    kind: str,
    normalizer: str,
    ends: str,
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
    """(y, log |dy / dx|), the logarithm summed over all but the first `batch_dims` dimensions of x.

    `params` is packed, [*x.shape, widths + heights + derivatives], or has the widths alone. Outside of the interval y
    is x and the logarithm 0 with `tails`, and both are NaN without.
    """
    dtype = x.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, params = x.to(wide), params.to(wide)
    counts = parameter_counts(kind, bins, ends)
    if heights is None:
        widths, rest, slopes = params.split(counts, dim=-1)  # type: ignore[no-untyped-call]
    else:
        widths, rest = params, heights.to(wide)
        slopes = rest[..., :0] if derivatives is None else derivatives.to(wide)
    if logit_scale != 1.0:
        widths = widths * logit_scale
        if kind != "linear":
            rest = rest * logit_scale
    low, high = (bottom, top) if inverse else (left, right)
    first, last = (left, right) if inverse else (bottom, top)
    inside = (x >= low) & (x <= high)
    at = torch.where(inside, x, low)
    if kind == "rational_quadratic":
        xs = _knots(_sizes(widths, min_width, normalizer), left, right)
        ys = _knots(_sizes(rest, min_height, normalizer), bottom, top)
        y, log_slope = _rational_quadratic(at, xs, ys, _slopes(slopes, min_derivative, normalizer, ends), inverse)
    else:
        unit = (at - low) / (high - low)
        if kind == "linear":
            y, log_slope = _linear(unit, widths, inverse)
        elif kind == "quadratic":
            y, log_slope = _quadratic(unit, widths, rest, min_width, min_height, inverse)
        else:
            y, log_slope = _cubic(unit, widths, rest, slopes, min_width, min_height, inverse)
        y = first + (last - first) * y
        log_ratio = math.log((top - bottom) / (right - left))
        log_slope = log_slope + (-log_ratio if inverse else log_ratio)
    # Not beyond the ends by rounding: a spline without tails that comes next would refuse it.
    y = y + (y.clamp(first, last) - y).detach()
    nan = torch.full_like(x, math.nan)
    y = torch.where(inside, y, x if tails else nan)
    log_slope = torch.where(inside, log_slope, torch.where(x == x, 0.0, nan) if tails else nan)
    if batch_dims < x.dim():
        log_slope = log_slope.sum(tuple(range(batch_dims, x.dim())))
    return y.to(dtype), log_slope if batch_dims < x.dim() else log_slope.to(dtype)
