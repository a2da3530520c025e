"""Negative log-likelihoods of each row, in nats, in plain PyTorch.

Everything is computed in float32, or in float64 for float64. ``batch_dims`` leading dimensions are kept, the others
summed over; the arguments broadcast.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse.reference.sampling import finite_exp, widen

__all__ = ["bernoulli_nll", "discretized_gaussian_nll", "gaussian_nll", "log_normal_interval"]


def _sum_rows(each: Tensor, batch_dims: int) -> Tensor:
    return each.flatten(batch_dims).sum(-1) if each.dim() > batch_dims else each


def bernoulli_nll(logits: Tensor, target: Tensor, batch_dims: int) -> tuple[Tensor]:
    """-sum x ln p + (1 - x) ln(1 - p) with p = sigmoid(logits) and 1 - p = sigmoid(-logits), which keeps the digits of
    what is nearly certain.

    Example:
        >>> bernoulli_nll(torch.zeros(1, 3), torch.ones(1, 3), 1)[0] / math.log(2)
        tensor([3.])
    """
    logits, target = widen(logits), widen(target)
    each = -target * F.logsigmoid(logits) - (1.0 - target) * F.logsigmoid(-logits)
    return (_sum_rows(each, batch_dims),)


def gaussian_nll(x: Tensor, mean: Tensor, scale: Tensor, batch_dims: int, log_std: bool) -> tuple[Tensor]:
    """sum of ln(2 pi) / 2 + ln std + ((x - mean) / std)^2 / 2; ``scale`` is the log-variance, or ln std.

    Example:
        >>> gaussian_nll(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), 1, False)
        (tensor([0.9189]),)
    """
    x, mean, scale = widen(x), widen(mean), widen(scale)
    log_deviation = scale if log_std else 0.5 * scale
    each = 0.5 * math.log(2.0 * math.pi) + log_deviation + 0.5 * ((x - mean) * finite_exp(-log_deviation)).square()
    return (_sum_rows(each, batch_dims),)


# Gauss and Legendre's rule of ten points on [-1, 1]: halves, because it is symmetric.
_NODES = (0.1488743389816312, 0.4333953941292472, 0.6794095682990244, 0.8650633666889845, 0.9739065285171717)
_WEIGHTS = (0.2955242247147529, 0.2692667193099963, 0.2190863625159820, 0.1494513491505806, 0.0666713443086881)


def _log_upper(t: Tensor) -> Tensor:
    """ln of the normal distribution's mass above t."""
    high, low = t.clamp(min=0.0) * math.sqrt(0.5), t.clamp(max=0.0) * math.sqrt(0.5)
    above = torch.log(0.5 * torch.special.erfcx(high)) - high.square()
    return torch.where(t > 0, above, torch.log1p(-0.5 * torch.erfc(-low)))


def log_normal_interval(center: Tensor, half: Tensor) -> Tensor:
    """ln of a standard normal's mass in [center - half, center + half], half > 0, without cancellation.

    Narrow bins: phi(c) times the integral of e^(-c t - t^2 / 2), by quadrature. Wide ones: from the mass of the upper
    tails, on the side where they are small.

    Example:
        >>> log_normal_interval(torch.tensor(0.0), torch.tensor(1.0)).exp()
        tensor(0.6827)
    """
    distance = torch.where(center < 0, -center, center)  # not abs, whose second derivative at 0 is not that of a square
    narrow = half * (1.0 + distance) < 1.0
    # Where a branch is not taken its arguments are harmless, so that no gradient is 0 times infinity.
    c, h = distance, torch.where(narrow, half, 0.0)
    integral = torch.zeros_like(h)
    for t, weight in zip(_NODES, _WEIGHTS, strict=True):
        at = h * t
        integral = integral + weight * torch.exp(-0.5 * at.square()) * 2.0 * torch.cosh(
            torch.where(narrow, c, 0.0) * at
        )
    by_quadrature = torch.log(torch.where(narrow, half, 1.0) * integral)
    by_quadrature = by_quadrature - 0.5 * c.square() - 0.5 * math.log(2.0 * math.pi)
    c, h = torch.where(narrow, 0.0, distance), torch.where(narrow, 1.0, half)
    near, far = _log_upper(c - h), _log_upper(c + h)
    ratio = torch.where(near == -math.inf, 0.0, torch.exp(far - near))
    by_tails = near + torch.log1p(-ratio)
    return torch.where(narrow, by_quadrature, by_tails)


def discretized_gaussian_nll(
    x: Tensor, mean: Tensor, scale: Tensor, batch_dims: int, log_std: bool, levels: int
) -> tuple[Tensor]:
    """-sum of ln(Phi((x + h - mean) / std) - Phi((x - h - mean) / std)), h = 1 / (levels - 1): the mass of the bin
    around x, one of ``levels`` equally spaced values in [-1, 1] (Ho, Jain and Abbeel 2020, arXiv 2006.11239, eq. 13).
    The bins at the ends, x < -1 + h and x > 1 - h, reach to infinity.

    Example:
        >>> bins = torch.linspace(-1, 1, 4)
        >>> nll, = discretized_gaussian_nll(bins, torch.zeros(4), torch.zeros(4), 1, False, 4)
        >>> torch.exp(-nll).sum()
        tensor(1.0000)
    """
    x, mean, scale = widen(x), widen(mean), widen(scale)
    # Bounded so that a tail's argument is a number, and its square still infinite.
    inverse = finite_exp(-(scale if log_std else 0.5 * scale), 0.78)
    half = 1.0 / (levels - 1)
    difference, width = x - mean, half * inverse
    center = difference * inverse
    lower, upper = x < -1.0 + half, x > 1.0 - half
    inside = log_normal_interval(center, width)
    each = torch.where(lower, _log_upper(-(center + width)), torch.where(upper, _log_upper(center - width), inside))
    return (_sum_rows(-each, batch_dims),)
