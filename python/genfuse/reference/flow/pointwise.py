"""Pointwise transforms of flows in plain PyTorch: actnorm, and dequantisation followed by a logit.

Everything is computed in float32, or in float64 for float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genfuse.reference.sampling import finite_exp, philox_uniform, widen

__all__ = ["actnorm", "dequantize_logit", "logit_quantize"]


def actnorm(
    x: Tensor, log_scale: Tensor, bias: Tensor, *, inverse: bool = False, order: str = "multiply_add"
) -> tuple[Tensor, Tensor]:
    """y = x s + b ("multiply_add") or (x + b) s ("add_multiply") with s = e^log_scale and b of each channel, or the
    inverse; and ln |det dy/dx| = the number of positions times the sum of log_scale (or minus that), of each row.

    Args:
        x: ``[B, C, *S]``.
        log_scale: ``[C]``.
        bias: ``[C]``.

    Example:
        >>> actnorm(torch.ones(1, 2), torch.tensor([0.0, 0.5]), torch.tensor([1.0, 0.0]))
        (tensor([[2.0000, 1.6487]]), tensor([0.5000]))
    """
    dtype = torch.float64 if torch.float64 in (x.dtype, log_scale.dtype, bias.dtype) else torch.float32
    shape = (1, -1, *(1,) * (x.dim() - 2))
    sign = -1.0 if inverse else 1.0
    half = finite_exp(0.5 * sign * log_scale.to(dtype)).view(shape)
    shift = sign * bias.to(dtype).view(shape)
    wide = x.to(dtype)
    if (order == "add_multiply") != inverse:
        y = (wide + shift) * half * half
    else:
        y = wide * half * half + shift
    log_abs_det = sign * math.prod(x.shape[2:]) * log_scale.to(dtype).sum()
    return y.to(x.dtype), log_abs_det.expand(x.shape[0])


def dequantize_logit(
    x: Tensor,
    *,
    levels: int = 256,
    alpha: float = 0.05,
    u: Tensor | None = None,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = logit(p) with p = alpha + (1 - 2 alpha) v, v = (x + u) / levels (Dinh et al. 2017, arXiv 1605.08803, section
    4.1); and ln |det dy/dx| of each row: the sum of ln (1 - 2 alpha) / levels - ln p - ln(1 - p).

    Args:
        x: ``[B, ...]``, whole numbers in [0, levels), of dtype uint8 or floating.
        u: noise in [0, 1), of x's shape; by default the uniforms of the stream ``rng`` (in x's row-major order).

    Example:
        >>> dequantize_logit(torch.tensor([[0, 1]]).to(torch.uint8), levels=2, alpha=0.0, u=torch.full((1, 2), 0.5))
        (tensor([[-1.0986,  1.0986]]), tensor([1.9617]))
    """
    dtype = x.dtype if x.is_floating_point() else (torch.float32 if u is None else u.dtype)
    if u is None:
        assert rng is not None, "noise comes as u or from rng"
        u = philox_uniform(x.shape, rng, torch.float32)
    wide = torch.float64 if dtype == torch.float64 or u.dtype == torch.float64 else torch.float32
    value, noise = x.to(wide), u.to(wide)
    # 1 - v is not taken from v, which has lost the digits of a small difference.
    p = alpha + (1.0 - 2.0 * alpha) * ((value + noise) / levels)
    q = alpha + (1.0 - 2.0 * alpha) * (((levels - value) - noise) / levels)
    log_p, log_q = torch.log(p), torch.log(q)
    each = math.log((1.0 - 2.0 * alpha) / levels) - log_p - log_q
    return (log_p - log_q).to(dtype), (each.flatten(1).sum(1) if each.dim() > 1 else each)


def logit_quantize(y: Tensor, *, levels: int = 256, alpha: float = 0.05) -> Tensor:
    """The level that y = logit(p) lies in: floor(levels (sigmoid(y) - alpha) / (1 - 2 alpha)), within [0, levels).

    Example:
        >>> logit_quantize(torch.tensor([-9.0, -1.0, 1.0, 9.0]), levels=2)
        tensor([0., 0., 1., 1.])
    """
    v = (torch.sigmoid(widen(y)) - alpha) / (1.0 - 2.0 * alpha)
    return torch.floor(v * levels).clamp(0, levels - 1).to(y.dtype)
