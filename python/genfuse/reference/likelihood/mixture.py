"""Mixtures of discretised logistics (Salimans, Karpathy, Chen and Kingma 2017, arXiv 1701.05517), in plain PyTorch.

Everything is computed in float32, or in float64 for float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse.reference.sampling import categorical_sample, finite_exp, philox_uniform, widen

__all__ = ["LAYOUTS", "discretized_logistic_mixture_nll", "discretized_logistic_mixture_sample"]

# How the parameters of a pixel lie, after the components' logits.
LAYOUTS = (
    "openai",  # for each channel: means, log-scales, coefficients of all components
    "pixel_models",  # means, then log-scales, then coefficients, each [component][channel]
    "flax",  # [channel][component][mean, scale, coefficient]; softplus(scale) is the inverse scale
    "wavenet",  # of one channel: means, log-scales
)
_FLAX_MIN = 1e-7  # of an inverse scale


class _Parameters(NamedTuple):
    logits: Tensor  # [B, M, *S]
    mean: Tensor  # [B, C, M, *S], before the channels are coupled
    log_inverse: Tensor  # [B, C, M, *S]: -ln scale
    coefficients: Tensor | None  # [B, 3, M, *S], in (-1, 1)


def _parameters(params: Tensor, channels: int, layout: str, log_scale_min: float) -> _Parameters:
    kinds = 3 if channels > 1 else 2
    components = params.shape[1] // (1 + kinds * channels)
    logits, rest = params[:, :components], params[:, components:]
    if layout == "pixel_models":
        parts = torch.unflatten(rest, 1, (kinds, components, channels)).transpose(2, 3).unbind(1)
    elif layout == "flax":
        parts = torch.unflatten(rest, 1, (channels, components, kinds)).unbind(3)
    else:
        parts = torch.unflatten(rest, 1, (channels, kinds, components)).unbind(2)
    # A component that cannot be, with a logit of -infinity, is replaced whole, whatever else it has.
    dead = (logits == -math.inf).unsqueeze(1)
    mean, scale, *more = (torch.where(dead, 0.0, part) for part in parts)
    if layout == "flax":
        log_inverse = torch.log((-F.logsigmoid(-scale)).clamp(min=_FLAX_MIN))
    else:
        log_inverse = -scale.clamp(min=log_scale_min)
    return _Parameters(logits, mean, log_inverse, torch.tanh(more[0]) if more else None)


def _coupled(mean: Tensor, coefficients: Tensor | None, x: Tensor) -> Tensor:
    """The means of green and blue, which take the channels before them (eq. 3). ``x``: [B, C, 1, *S]."""
    if coefficients is None:
        return mean
    green = mean[:, 1] + coefficients[:, 0] * x[:, 0]
    blue = mean[:, 2] + coefficients[:, 1] * x[:, 0] + coefficients[:, 2] * x[:, 1]
    return torch.stack((mean[:, 0], green, blue), 1)


def _log1mexp(w: Tensor, log_w: Tensor) -> Tensor:
    """ln(1 - e^(-2 w)), w > 0, whose logarithm is given as well. Near 0 by 1 - e^(-2 w) = 2 w e^-w sinh(w) / w."""
    near = w < 0.35
    small, large = torch.where(near, w, 0.0), torch.where(near, 1.0, w)  # harmless where they are not taken
    square, series = small.square(), torch.ones_like(small)
    for k in range(8, 0, -1):
        series = 1.0 + square / (2 * k * (2 * k + 1)) * series
    by_series = math.log(2.0) + log_w - small + torch.log(series)
    return torch.where(near, by_series, torch.log1p(-torch.exp(-2.0 * large)))


def discretized_logistic_mixture_nll(
    x: Tensor,
    params: Tensor,
    bits: int,
    openai: bool,
    layout: str,
    log_scale_min: float,
    by_pixel: bool,
) -> tuple[Tensor]:
    """-ln sum_m pi_m prod_c P(x_c | m), in nats of each pixel ``[B, *S]``, or of each image ``[B]``.

    ``x [B, C, *S]`` has C = 3 (red, green, blue) or 1; ``params [B, 10 M or 3 M, *S]``. The mass of a level is that of
    the bin around it, h = 1 / (2^bits - 1) on either side, a, b = (x - mean +- h) / scale:

        P = sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^(b - a))

    and the bins of the lowest and the highest level reach to infinity. With ``openai`` it is computed as published,
    where masses below 1e-5 are the density in the middle times the bin's width, which is no probability for wide bins.

    Example:
        >>> levels = (torch.arange(4.0) * 2 / 3 - 1).view(4, 1, 1)
        >>> nll, = discretized_logistic_mixture_nll(levels, torch.zeros(4, 3, 1), 2, False, "openai", -7.0, False)
        >>> torch.exp(-nll).sum()
        tensor(1.)
    """
    wide = torch.promote_types(widen(x).dtype, widen(params).dtype)
    x, params = x.to(wide), params.to(wide)
    logits, mean, log_inverse, coefficients = _parameters(params, x.shape[1], layout, log_scale_min)
    x = x.unsqueeze(2)
    half = 1.0 / (2**bits - 1)
    inverse = finite_exp(log_inverse)
    centered = x - _coupled(mean, coefficients, x)
    above, below = inverse * (centered + half), inverse * (centered - half)
    to_lowest, to_highest = F.logsigmoid(above), F.logsigmoid(-below)
    if openai:
        middle = inverse * centered
        density = middle + log_inverse + 2.0 * F.logsigmoid(-middle)
        mass = torch.sigmoid(above) - torch.sigmoid(below)
        by_density = density - math.log(0.5 / half)
        inside = torch.where(mass > 1e-5, torch.log(mass.clamp(min=1e-12)), by_density)
        lowest, highest = x < -0.999, x > 0.999
    else:
        inside = to_lowest + to_highest + _log1mexp(half * inverse, math.log(half) + log_inverse)
        lowest, highest = x < -1.0 + half, x > 1.0 - half
    each = torch.where(lowest, to_lowest, torch.where(highest, to_highest, inside)).sum(1)
    each = torch.where(logits == -math.inf, -math.inf, each + logits)
    nll = torch.logsumexp(logits, 1) - torch.logsumexp(each, 1)
    return (nll if by_pixel or nll.dim() == 1 else nll.flatten(1).sum(1),)


def discretized_logistic_mixture_sample(
    params: Tensor,
    u: Tensor | None,
    rng: Tensor | None,
    channels: int,
    bits: int,
    layout: str,
    log_scale_min: float,
    temperature: float,
    snap: bool,
) -> tuple[Tensor]:
    """x ``[B, C, *S]`` from uniforms ``u [B, 1 + C, *S]``: the first chooses the component, by inversion, the others
    the logistics, mean + scale (ln u - ln(1 - u)), within [-1, 1]. The means of green and blue take the channels before
    them as they were drawn. With ``snap`` a channel is rounded to the nearest of 2^bits levels. A temperature divides
    the logits and multiplies the scales. NaN where the logits are no distribution.

    Example:
        >>> params = torch.tensor([-9.0, 0.0, 0.25, 0.75, -5.0, -5.0]).view(1, 6, 1)
        >>> u = torch.full((1, 2, 1), 0.5)
        >>> discretized_logistic_mixture_sample(params, u, None, 1, 8, "openai", -7.0, 1.0, True)
        (tensor([[[0.7490]]]),)
    """
    params = widen(params)
    shape = (params.shape[0], 1 + channels, *params.shape[2:])
    if u is None:
        assert rng is not None
        u = philox_uniform(shape, rng, params.dtype)
    logits, mean, log_inverse, coefficients = _parameters(params, channels, layout, log_scale_min)
    weights = ((logits - logits.amax(1, keepdim=True)) / temperature).movedim(1, -1)
    (chosen,) = categorical_sample(weights, u[:, 0].unsqueeze(-1).to(params.dtype), None, 1)
    index = chosen.clamp(min=0).movedim(-1, 1).unsqueeze(1)  # [B, 1, 1, *S]

    def of_chosen(each: Tensor) -> Tensor:
        return each.gather(2, index.expand(each.shape[0], each.shape[1], 1, *each.shape[3:])).squeeze(2)

    mean, scale = of_chosen(mean), temperature * torch.exp(-of_chosen(log_inverse))
    coupling = None if coefficients is None else of_chosen(coefficients)
    v = u[:, 1:].to(params.dtype).clamp(1e-5, 1.0 - 1e-5)
    noise = scale * (torch.log(v) - torch.log1p(-v))
    last = 2**bits - 1
    drawn: list[Tensor] = []
    for c in range(channels):
        value = mean[:, c]
        if coupling is not None and c == 1:
            value = value + coupling[:, 0] * drawn[0]
        elif coupling is not None and c == 2:
            value = value + coupling[:, 1] * drawn[0] + coupling[:, 2] * drawn[1]
        value = (value + noise[:, c]).clamp(-1.0, 1.0)
        drawn.append((2.0 * torch.round((value + 1.0) * (0.5 * last)) - last) / last if snap else value)
    return (torch.where(chosen.movedim(-1, 1) < 0, math.nan, torch.stack(drawn, 1)),)
