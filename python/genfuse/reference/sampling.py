"""Noise by address, in plain PyTorch: what element ``e`` of the stream ``(seed, offset)`` is; and what is made of it.

The words come from `genfuse.reference.random`; a word ``w`` stands for ``u = (w + 1/2) / 2**32``, which is never 0 or
1, so that every number here is finite. Everything is computed in float64 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .random import words

__all__ = [
    "categorical_sample",
    "finite_exp",
    "gaussian",
    "gumbel_softmax",
    "philox_bits",
    "philox_gumbel",
    "philox_logistic",
    "philox_normal",
    "philox_uniform",
    "relaxed_bernoulli",
    "uniform_bits",
    "vector_quantize",
    "vector_quantize_statistics",
    "widen",
]


def uniform_bits(dtype: torch.dtype) -> int:
    """How many bits of a word a uniform takes: those that the dtype holds exactly, 24 at the most."""
    return {torch.bfloat16: 8, torch.float16: 11}.get(dtype, 24)


def _log_u(word: Tensor) -> Tensor:
    """ln u; in the upper half as ln(1 - d) from the distance d to 1, which float64 holds exactly either way."""
    upper = torch.log1p(-((2**32 - 1 - word).to(torch.float64) + 0.5) * 2.0**-32)
    return torch.where(word >= 2**31, upper, torch.log((word.to(torch.float64) + 0.5) * 2.0**-32))


def philox_bits(shape: Sequence[int], rng: Tensor) -> Tensor:
    """The words themselves, as int64 in [0, 2**32).

    Example:
        >>> [f"{int(word):08x}" for word in philox_bits((4,), torch.tensor([0, 0]))]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    return words(rng, torch.arange(math.prod(shape), device=rng.device)).reshape(tuple(shape))


def philox_uniform(shape: Sequence[int], rng: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniforms in [0, 1): a word's upper 24 bits (float16: 11, bfloat16: 8) over a power of two.

    Example:
        >>> philox_uniform((2,), torch.tensor([0, 0]))
        tensor([0.3990, 0.8805])
    """
    bits = uniform_bits(dtype)
    return ((philox_bits(shape, rng) >> (32 - bits)).to(torch.float64) * 2.0**-bits).to(dtype)


def philox_normal(shape: Sequence[int], rng: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals by Box and Muller (1958): elements 2j and 2j + 1 are r cos(2 pi u') and r sin(2 pi u'), with
    ``r = sqrt(-2 ln u)``, u from word 2j and u' from word 2j + 1.

    Example:
        >>> philox_normal((2,), torch.tensor([0, 0]))
        tensor([ 0.9911, -0.9247])
    """
    count = math.prod(shape)
    pairs = words(rng, torch.arange(count + count % 2, device=rng.device)).reshape(-1, 2)
    radius = torch.sqrt(-2.0 * _log_u(pairs[:, 0]))
    angle = (pairs[:, 1].to(torch.float64) + 0.5) * (2.0 * math.pi * 2.0**-32)
    both = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), 1)
    return both.flatten()[:count].reshape(tuple(shape)).to(dtype)


def philox_gumbel(shape: Sequence[int], rng: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard Gumbel numbers, -ln(-ln u).

    Example:
        >>> philox_gumbel((2,), torch.tensor([0, 0]))
        tensor([0.0848, 2.0617])
    """
    return -torch.log(-_log_u(philox_bits(shape, rng))).to(dtype)


def philox_logistic(shape: Sequence[int], rng: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard logistic numbers, ln u - ln(1 - u).

    Example:
        >>> philox_logistic((2,), torch.tensor([0, 0]))
        tensor([-0.4094,  1.9974])
    """
    word = philox_bits(shape, rng)
    return (_log_u(word) - _log_u(2**32 - 1 - word)).to(dtype)


# ---- what is made of noise -------------------------------------------------------------------------------------------


def widen(tensor: Tensor) -> Tensor:
    """In the dtype that everything is computed in: float64 as it is, anything narrower as float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def finite_exp(x: Tensor, part: float = 1.0) -> Tensor:
    """e^x, but no more than about the largest number (to the power of `part`): a factor of what may be 0."""
    return torch.exp(x.clamp(max=0.9999 * part * math.log(torch.finfo(x.dtype).max)))


class _ClampStraightThrough(torch.autograd.Function):
    """Clamped values with the gradient of the identity, so that what lies outside can come back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, low: float, high: float) -> Tensor:
        return value.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, low: None, high: None) -> Tensor:
        return tangent.view_as(tangent)


def _exp_less_tangent(d: Tensor) -> Tensor:
    """e^d - 1 - d, to all digits near 0, where it is d^2 / 2 and a difference would have none left."""
    near = d.abs() < 0.5
    t = torch.where(near, d, 0.0)  # harmless where it is not taken, so that no gradient is 0 times infinity
    series = torch.ones_like(t)
    for k in range(16, 2, -1):
        series = 1.0 + t / k * series
    # Infinity less infinity is no number; where d is cut, the first is infinite already.
    return torch.where(near, 0.5 * t.square() * series, torch.expm1(d) - d.clamp(max=1e3))


def gaussian(
    mean: Tensor,
    scale: Tensor,
    prior_mean: Tensor | None,
    prior_scale: Tensor | None,
    eps: Tensor | None,
    rng: Tensor | None,
    batch_dims: int,
    log_std: bool,
    free_bits: float,
    low: float,
    high: float,
    sample: bool,
    divergence: bool,
) -> tuple[Tensor, Tensor]:
    """z = mean + std eps, and KL(N(mean, std^2) || N(prior_mean, prior_std^2)) of each row (Kingma and Welling 2013,
    arXiv 1312.6114, eq. 10 and appendix B).

    ``scale`` and ``prior_scale`` are log-variances, or with ``log_std`` logarithms of the standard deviations; ``low``
    and ``high`` bound ``scale``, and the gradient passes the bounds as if they were not there. The KL of an element is
    at least ``free_bits``. What is not asked for by ``sample`` and ``divergence`` is an empty tensor.

    Example:
        >>> zero = torch.zeros(2, 3)
        >>> z, kl = gaussian(zero, zero, None, None, zero + 1, None, 1, False, 0.0, -math.inf, math.inf, True, True)
        >>> z[0], kl
        (tensor([1., 1., 1.]), tensor([0., 0.]))
    """
    dtype, shape = mean.dtype, mean.shape
    mean, scale = widen(mean), widen(scale)
    if low > -math.inf or high < math.inf:
        scale = _ClampStraightThrough.apply(scale, low, high)  # type: ignore[no-untyped-call]
    log_variance = 2.0 * scale if log_std else scale
    z = kl = mean.new_empty(0)
    if sample:
        if eps is None:
            assert rng is not None
            eps = philox_normal(shape, rng, mean.dtype)
        z = (mean + torch.exp(0.5 * log_variance) * widen(eps)).to(dtype)
    else:
        z = z.to(dtype)
    if divergence:
        from_prior = mean if prior_mean is None else mean - widen(prior_mean)
        if prior_scale is not None:
            prior_log_variance = 2.0 * widen(prior_scale) if log_std else widen(prior_scale)
            # In this order a small difference times a large inverse deviation does not overflow.
            from_prior = from_prior * finite_exp(-0.5 * prior_log_variance)
            log_variance = log_variance - prior_log_variance
        each = 0.5 * (_exp_less_tangent(log_variance) + from_prior.square())
        if free_bits > 0.0:
            each = each.clamp(min=free_bits)
        kl = each.flatten(batch_dims).sum(-1) if each.dim() > batch_dims else each
    return z, kl


def _noise_or(drawn: Any, noise: Tensor | None, rng: Tensor | None, like: Tensor) -> Tensor:
    if noise is not None:
        return widen(noise)
    assert rng is not None
    found: Tensor = drawn(like.shape, rng, like.dtype)
    return found


def gumbel_softmax(logits: Tensor, noise: Tensor | None, rng: Tensor | None, tau: float, hard: bool) -> tuple[Tensor]:
    """softmax((logits + g) / tau) over the last dimension, g standard Gumbel (Jang, Gu and Poole 2016, arXiv
    1611.01144, eq. 2); with ``hard`` the one-hot argmax (the first of several), with the gradient of the soft one.

    Example:
        >>> gumbel_softmax(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), None, 1.0, True)
        (tensor([[0., 1.]]),)
    """
    perturbed = widen(logits)
    perturbed = perturbed + _noise_or(philox_gumbel, noise, rng, perturbed)
    if perturbed.size(-1) == 0:
        return (perturbed.to(logits.dtype),)
    # Less the largest first: a small tau must not overflow.
    soft = torch.softmax((perturbed - perturbed.amax(-1, keepdim=True).detach()) / tau, -1)
    if hard:
        chosen = torch.zeros_like(soft).scatter(-1, perturbed.argmax(-1, keepdim=True), 1.0)
        soft = chosen + (soft - soft.detach())
    return (soft.to(logits.dtype),)


def relaxed_bernoulli(
    logits: Tensor, noise: Tensor | None, rng: Tensor | None, tau: float, hard: bool
) -> tuple[Tensor]:
    """sigmoid((logits + l) / tau), l standard logistic (Maddison, Mnih and Teh 2016, arXiv 1611.00712, appendix B);
    with ``hard`` 1 where logits + l > 0, else 0, with the gradient of the soft one.

    Example:
        >>> relaxed_bernoulli(torch.tensor([0.0, 1.0]), torch.zeros(2), None, 0.5, False)
        (tensor([0.5000, 0.8808]),)
    """
    perturbed = widen(logits)
    perturbed = perturbed + _noise_or(philox_logistic, noise, rng, perturbed)
    soft = torch.sigmoid(perturbed / tau)
    if hard:
        soft = (perturbed > 0).to(soft.dtype) + (soft - soft.detach())
    return (soft.to(logits.dtype),)


def categorical_sample(logits: Tensor, u: Tensor | None, rng: Tensor | None, num_samples: int) -> tuple[Tensor]:
    """The first class whose cumulated probability exceeds u, for each of ``num_samples`` uniforms of each row.

    A class of probability 0 adds nothing to the cumulated ones and so is never the first to exceed anything. A row
    without a distribution (NaN, +inf, or nothing but -inf) gives -1.

    Example:
        >>> categorical_sample(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.4, 0.5]]), None, 2)
        (tensor([[0, 1]]),)
    """
    weights = torch.exp(logits.to(torch.float64) - logits.amax(-1, keepdim=True).to(torch.float64))
    cumulated = weights.cumsum(-1)
    if u is None:
        assert rng is not None
        u = philox_uniform((*logits.shape[:-1], num_samples), rng, torch.float64)
    threshold = u.to(torch.float64) * cumulated[..., -1:]
    found = torch.searchsorted(cumulated, threshold.contiguous(), right=True)
    good = cumulated[..., -1:].isfinite() & (found < logits.size(-1))
    return (torch.where(good, found, -1),)


def vector_quantize(
    x: Tensor, codebook: Tensor, commitment_weight: float, codebook_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest code e of each vector, its index, and the loss codebook_weight |sg(x) - e|^2 + commitment_weight
    |x - sg(e)|^2 (van den Oord, Vinyals and Kavukcuoglu 2017, arXiv 1711.00937, eq. 2 and 3), where sg stops gradients.

    Of equally near codes the one of lowest index; a code with NaN is never the nearest. The gradient of the quantised
    vector goes to x as it is. A vector that is near to nothing (NaN, infinite) gives index 0 and NaN.

    Example:
        >>> vector_quantize(torch.tensor([[0.9]]), torch.tensor([[0.0], [1.0]]), 0.25, 1.0)[1]
        tensor([1])
    """
    wide, codes = widen(x), widen(codebook)
    flat = wide.detach().reshape(math.prod(wide.shape[:-1]), wide.size(-1))
    with torch.no_grad():
        # |x - e|^2 / 2 less what all codes share.
        distances = 0.5 * codes.square().sum(-1) - flat @ codes.T
        nearest, indices = distances.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf).min(-1)
        lost = ~nearest.isfinite()
        indices = indices.masked_fill(lost, 0).view(wide.shape[:-1])
        lost = lost.view(*wide.shape[:-1], 1)
    chosen = codes[indices]
    value = chosen.detach().masked_fill(lost, math.nan)
    loss = codebook_weight * (wide.detach() - chosen).square().sum(-1)
    loss = loss + commitment_weight * (wide - chosen.detach()).square().sum(-1)
    # x - x is 0, or NaN where the value is NaN anyway, with the gradient of x.
    return (value + (wide - wide.detach())).to(x.dtype), indices, loss


def vector_quantize_statistics(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How often each code was taken, and the sum of the vectors that took it: ``[K]`` and ``[K, D]``.

    Example:
        >>> vector_quantize_statistics(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1, 0, 1]), 3)
        (tensor([1., 2., 0.]), tensor([[2.],
                [5.],
                [0.]]))
    """
    wide = widen(x).reshape(indices.numel(), x.size(-1))
    flat = indices.reshape(-1)
    counts = wide.new_zeros(num_codes).index_add(0, flat, wide.new_ones(flat.numel()))
    return counts, wide.new_zeros(num_codes, wide.size(-1)).index_add(0, flat, wide)
