"""Noise by address, in plain PyTorch: what element ``e`` of the stream ``(seed, offset)`` is.

The words come from `genfuse.reference.random`; a word ``w`` stands for ``u = (w + 1/2) / 2**32``, which is never 0 or
1, so that every number here is finite. Everything is computed in float64 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .random import words

__all__ = ["philox_bits", "philox_gumbel", "philox_logistic", "philox_normal", "philox_uniform", "uniform_bits"]


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
