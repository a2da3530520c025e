"""Counter-based random numbers: Philox 4x32-10 in plain integer tensor arithmetic.

Every random number of the library is addressed by ``(seed, offset, element)``, so it depends on no thread count,
block size or device: the C++ and Triton kernels produce the same bits. This file is the definition they are tested
against.

The cipher is that of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011),
in the version of the Random123 library: four 32-bit words in, four out, ten rounds.

Addressing: the key is ``(seed & 0xffffffff, seed >> 32)``, the counter is
``(element // 4 low, element // 4 high, offset low, offset high)``, and element ``e`` takes output word ``e % 4``.
All 64-bit numbers are two's complement. A uniform is the word's upper 24 bits: ``u = (word >> 8) * 2**-24``,
a multiple of 2^-24 in [0, 1), which float32 and float64 represent exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_rng", "keep_mask", "philox4x32", "uniform", "uniform_elements", "words"]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1
_ROUNDS = 10


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``word * multiplier``, through 16-bit halves: no intermediate passes 2^49."""
    upper = word * (multiplier >> 16)
    lower = word * (multiplier & 0xFFFF)
    high = (upper + (lower >> 16)) >> 16
    low = (lower + ((upper & 0xFFFF) << 16)) & _MASK
    return high, low


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = _ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Philox 4x32 bijection of Salmon et al. 2011, section 3.3.

    Args:
        counter: four int64 tensors of one (broadcastable) shape, each holding words in [0, 2^32).
        key: two int64 tensors, likewise.
        rounds: number of rounds; 10 is what the library uses.

    Returns:
        Four int64 tensors of words in [0, 2^32).

    Example:
        >>> zero = torch.zeros((), dtype=torch.int64)
        >>> words = philox4x32((zero, zero, zero, zero), (zero, zero))
        >>> [f"{int(word):08x}" for word in words]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(rng: Tensor, elements: Tensor, stream: int = 0) -> Tensor:
    """The 32-bit words of the given element indices.

    Args:
        rng: int64 ``[2]``, the pair ``(seed, offset)``.
        elements: int64 tensor of element indices >= 0, any shape.
        stream: added to the offset, so that one pair serves several independent streams.

    Returns:
        int64 tensor of ``elements``' shape, each in [0, 2^32).

    Example:
        >>> words(torch.tensor([0, 0]), torch.tensor([3, 0])).tolist()
        [2600524760, 1713891541]
    """
    seed, offset = rng[0], rng[1] + stream
    block = elements >> 2
    low, high = (offset & _MASK).expand(block.shape), ((offset >> 32) & _MASK).expand(block.shape)
    counter = (block & _MASK, (block >> 32) & _MASK, low, high)
    output = torch.stack(philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK)))
    return output.gather(0, (elements & 3).unsqueeze(0)).squeeze(0)


def uniform_elements(rng: Tensor, elements: Tensor, stream: int = 0) -> Tensor:
    """Uniforms in [0, 1) of the given element indices.

    Args:
        rng: int64 ``[2]``, the pair ``(seed, offset)``.
        elements: int64 tensor of element indices >= 0, any shape.
        stream: added to the offset, so that one pair serves several independent masks.

    Returns:
        float64 tensor of ``elements``' shape: multiples of 2^-24.

    Example:
        >>> rng = torch.tensor([1234, 0])
        >>> bool((uniform_elements(rng, torch.arange(8)) == uniform(rng, (2, 4)).flatten()).all())
        True
    """
    return (words(rng, elements, stream) >> 8).to(torch.float64) * 2.0**-24


def uniform(rng: Tensor, shape: tuple[int, ...], stream: int = 0) -> Tensor:
    """Uniforms in [0, 1) for the elements 0, 1, 2, ... of a row-major tensor of ``shape``.

    Args:
        rng: int64 ``[2]``, the pair ``(seed, offset)``.
        shape: shape of the result.
        stream: added to the offset.

    Returns:
        float64 tensor of ``shape`` on ``rng``'s device.

    Example:
        >>> uniform(torch.tensor([0, 0]), (2, 3)).shape
        torch.Size([2, 3])
    """
    count = 1
    for size in shape:
        count *= size
    return uniform_elements(rng, torch.arange(count, dtype=torch.int64, device=rng.device), stream).reshape(shape)


def keep_mask(rng: Tensor, shape: tuple[int, ...], probability: float, stream: int, dtype: torch.dtype) -> Tensor:
    """The inverted-dropout factor: ``1 / (1 - p)`` where ``u >= p``, else 0 (all 0 where ``p`` is 1).

    ``u`` and ``p`` are compared in float64, so that every device draws the same mask.

    Example:
        >>> keep_mask(torch.tensor([0, 0]), (4,), 1.0, 0, torch.float32)
        tensor([0., 0., 0., 0.])
    """
    kept = uniform(rng, shape, stream) >= probability
    scale = 0.0 if probability >= 1.0 else 1.0 / (1.0 - probability)
    return kept.to(dtype) * scale


def draw_rng(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A fresh ``(seed, offset)`` pair, int64 ``[2]`` on ``device``, drawn from ``generator`` (default: the device's
    own).

    Example:
        >>> draw_rng(torch.device("cpu")).shape
        torch.Size([2])
    """
    if generator is None:
        return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=generator.device, generator=generator).to(device)
