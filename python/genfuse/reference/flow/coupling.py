"""Affine and additive couplings in plain PyTorch: y = x s + t on some channels, the others as they are.

x is ``[B, C, *S]`` and a coupling transforms Ct of its C channels; params' channels are paired with them in order. s is
a function of a raw scale r, of one of these kinds:

========================  ==========================================================================================
exp                       s = e^r
sigmoid                   s = sigmoid(r + offset) + eps
inverse_sigmoid           s = 1 / sigmoid(r + offset)
softplus                  s = min(softplus(r) + eps, clamp)
tanh                      s = e^(clamp tanh r)
atan                      s = e^(clamp 0.636 atan r)
sigmoid_clamp             s = e^(clamp (2 sigmoid(r) - 1))
softclip                  s = e^(r / (1 + |r / ln clamp|)): clamp is the least slope
clip                      s = e^(r within clamp), whose gradient is that of e^r within clamp by the clipped r
========================  ==========================================================================================

ln s is computed from r, never from an s that may vanish. Everything is computed in float32, or in float64 if any
argument is float64; y has x's dtype, log_abs_det float32 or float64.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse.reference.sampling import _ClampStraightThrough, finite_exp

__all__ = ["SCALES", "additive_coupling", "affine_coupling", "constants", "split_channels"]

# offset, eps, and the range of clamp of each kind (the low end is that of "clip" alone) where none is given.
SCALES: dict[str, tuple[float, float, float, float]] = {
    "exp": (0.0, 0.0, 0.0, 0.0),
    "sigmoid": (2.0, 0.0, 0.0, 0.0),
    "inverse_sigmoid": (2.0, 0.0, 0.0, 0.0),
    "softplus": (0.0, 1e-3, 0.0, math.inf),
    "tanh": (0.0, 0.0, 0.0, 2.0),
    "atan": (0.0, 0.0, 0.0, 2.0),
    "sigmoid_clamp": (0.0, 0.0, 0.0, 2.0),
    "softclip": (0.0, 0.0, 0.0, 1e-3),
    "clip": (0.0, 0.0, -5.0, 3.0),
}


def constants(
    scale: str, offset: float | None, eps: float | None, clamp: float | tuple[float, float] | None
) -> tuple[float, float, float, float]:
    """offset, eps, low and clamp of a kind of scale: as given, or by default.

    Example:
        >>> constants("clip", None, None, (-2.0, 2.0)), constants("sigmoid", None, 1e-3, None)
        ((0.0, 0.0, -2.0, 2.0), (2.0, 0.001, 0.0, 0.0))
    """
    own_offset, own_eps, own_low, own_clamp = SCALES[scale]
    low, high = clamp if isinstance(clamp, tuple) else (own_low, own_clamp if clamp is None else clamp)
    return own_offset if offset is None else offset, own_eps if eps is None else eps, low, high


def split_channels(channels: int, split: str | Tensor, device: torch.device | None = None) -> Tensor:
    """The channels that a split (not a mask) transforms, in the order of their parameters.

    Example:
        >>> split_channels(5, "first"), split_channels(5, "odd")
        (tensor([0, 1, 2]), tensor([1, 3]))
    """
    if isinstance(split, Tensor):
        return split
    middle = (channels + 1) // 2
    kept = {
        "all": range(channels),
        "first": range(middle),
        "second": range(middle, channels),
        "even": range(0, channels, 2),
        "odd": range(1, channels, 2),
    }[split]
    return torch.tensor(list(kept), dtype=torch.int64, device=device)


def _widest(*tensors: Tensor | None) -> torch.dtype:
    """What is computed in: float64 if any of them is, else float32."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def _scaled(
    x: Tensor, raw: Tensor, scale: str, offset: float, eps: float, low: float, clamp: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """x s and ln s, or x / s and -ln s."""
    sign = -1.0 if inverse else 1.0
    if scale in ("sigmoid", "inverse_sigmoid"):
        z = raw + offset
        if scale == "sigmoid" and eps > 0.0:
            s = torch.sigmoid(z) + eps
            return (x / s if inverse else x * s), sign * torch.log(s)
        if inverse == (scale == "inverse_sigmoid"):
            return x * torch.sigmoid(z), F.logsigmoid(z)
        return x + _times_exp(x, -z), -F.logsigmoid(z)  # 1 / sigmoid(z) = 1 + e^-z
    if scale == "softplus":
        s = F.softplus(raw, threshold=40.0)  # above it F.softplus is r; from its 20 float64 could tell
        if eps > 0.0:
            s = (s + eps).clamp(max=clamp)
            return (x / s if inverse else x * s), sign * torch.log(s)
        small = raw < -20.0  # ln softplus(r) = r - e^r / 2 + ..., also where softplus(r) is 0
        near_0 = raw - 0.5 * torch.exp(raw.clamp(max=-20.0))
        log_s = torch.where(small, near_0, torch.log(torch.where(small, 1.0, s)))
        log_s = log_s.clamp(max=math.log(clamp))
    elif scale == "exp":
        log_s = raw
    elif scale == "tanh":
        log_s = clamp * torch.tanh(raw)
    elif scale == "atan":
        log_s = clamp * (0.636 * torch.atan(raw))
    elif scale == "sigmoid_clamp":
        log_s = clamp * torch.tanh(0.5 * raw)
    elif scale == "softclip":
        log_s = raw / (1.0 + (raw / math.log(clamp)).abs())
    else:
        log_s = _ClampStraightThrough.apply(raw, low, clamp)  # type: ignore[no-untyped-call]
    return _times_exp(x, sign * log_s), sign * log_s


def _times_exp(x: Tensor, exponent: Tensor) -> Tensor:
    """x e^exponent, in two halves: right wherever the product is a number, also where x is 0 and the power is not."""
    half = finite_exp(0.5 * exponent)
    return x * half * half


def affine_coupling(
    x: Tensor,
    params: Tensor,
    shift: Tensor | None = None,
    *,
    scale: str = "exp",
    layout: str = "shift_scale",
    order: str = "multiply_add",
    split: str | Tensor = "all",
    inverse: bool = False,
    offset: float | None = None,
    eps: float | None = None,
    clamp: float | tuple[float, float] | None = None,
    reduce: bool = True,
) -> tuple[Tensor, Tensor]:
    """y = x s + t ("multiply_add") or (x + t) s ("add_multiply") on the channels of ``split``, or its inverse; and
    ln |det dy/dx| of each batch row (or of each element).

    Args:
        x: ``[B, C, *S]``.
        params: ``[B, 2 Ct, *S]``, shift and raw scale in ``layout``; or the raw scale alone if ``shift`` is given.
        shift: ``[B, Ct, *S]``.
        split: "all", "first" (the first half, the larger one of an odd number), "second", "even", "odd", the indices
            of the transformed channels, or a bool mask that broadcasts with x[0], for which Ct = C.

    Example:
        >>> y, log_abs_det = affine_coupling(torch.ones(1, 2), torch.tensor([[3.0, 0.0]]), split="second")
        >>> y, log_abs_det
        (tensor([[1., 4.]]), tensor([0.]))
    """
    numbers = constants(scale, offset, eps, clamp)
    dtype = _widest(x, params, shift)
    wide, params = x.to(dtype), params.to(dtype)
    mask = split if isinstance(split, Tensor) and split.dtype == torch.bool else None
    channels = split_channels(x.shape[1], "all" if mask is not None else split, x.device)
    if shift is not None:
        raw, shift = params, shift.to(dtype)
    elif layout.startswith("interleaved"):
        shift, raw = params[:, 0::2], params[:, 1::2]
    else:
        shift, raw = params.chunk(2, 1) if params.shape[1] else (params, params)
    if layout.endswith("scale_shift") and params is not raw:
        shift, raw = raw, shift
    if mask is not None:  # parameters of what is not transformed must not matter, were they NaN
        raw, shift = torch.where(mask, raw, 0.0), torch.where(mask, shift, 0.0)

    chosen = wide if mask is not None else wide.index_select(1, channels)
    add_first = (order == "add_multiply") != inverse
    signed = -shift if inverse else shift
    if add_first:
        new, log_abs_det = _scaled(chosen + signed, raw, scale, *numbers, inverse)
    else:
        new, log_abs_det = _scaled(chosen, raw, scale, *numbers, inverse)
        new = new + signed
    if mask is not None:
        y, each = torch.where(mask, new, wide), torch.where(mask, log_abs_det, 0.0)
    else:
        y = wide.index_copy(1, channels, new)
        each = torch.zeros_like(wide).index_copy(1, channels, log_abs_det)
    return y.to(x.dtype), (each.flatten(1).sum(1) if reduce else each)


def additive_coupling(x: Tensor, shift: Tensor, *, split: str | Tensor = "all", inverse: bool = False) -> Tensor:
    """y = x + t on the channels of ``split``, or x - t; the determinant is 1.

    Example:
        >>> additive_coupling(torch.ones(1, 2), torch.tensor([[3.0]]), split="second")
        tensor([[1., 4.]])
    """
    dtype = _widest(x, shift)
    wide, signed = x.to(dtype), -shift.to(dtype) if inverse else shift.to(dtype)
    if isinstance(split, Tensor) and split.dtype == torch.bool:
        return torch.where(split, wide + signed, wide).to(x.dtype)
    channels = split_channels(x.shape[1], split, x.device)
    return wide.index_copy(1, channels, wide.index_select(1, channels) + signed).to(x.dtype)
