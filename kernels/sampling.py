"""Random numbers by address in Triton: what genfuse.reference.sampling defines, a block of elements a program.

Nothing here waits for the device: the pair (seed, offset) is read from a device tensor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["philox_"]

_BLOCKS = 256  # of four words, to a program
_LAUNCH = 1 << 30  # programs in a launch: CUDA's grid ends at 2^31 - 1


@triton.jit
def _log_word(word):
    """ln u of u = (word + 1/2) / 2^32, in float32: from the distance to 1 in the upper half."""
    upper = word >= 0x80000000
    number = tl.where(upper, 0xFFFFFFFF - word, word).to(tl.float32) + 0.5
    near = number * 2.3283064365386963e-10  # u, or 1 - u
    # log1p(-d): tl.math has none that every target knows. With s = 1 - d rounded, ln(1 - d) = ln s + (the rest) / s.
    s = 1.0 - near
    log1p = tl.log(s) - (near - (1.0 - s)) / s
    small = near * (-1.0 - near * (0.5 + near * (0.33333334 + near * 0.25)))
    return tl.where(upper, tl.where(near < 0.01, small, log1p), tl.log(near))


@triton.jit
def _normal(radius, angle):
    r = tl.sqrt(-2.0 * _log_word(radius))
    # Quarter turns and the rest, so that the sine's argument keeps its places.
    quarter = (angle + 0x20000000) >> 30
    x = ((angle - (quarter << 30)).to(tl.float32) + 0.5) * 1.4629180792671597e-09
    cosine, sine = tl.cos(x), tl.sin(x)
    swapped = (quarter & 1) == 1
    even = tl.where(swapped, sine, cosine)
    odd = tl.where(swapped, cosine, sine)
    even = tl.where(((quarter + 1) & 2) == 2, -even, even)
    odd = tl.where((quarter & 2) == 2, -odd, odd)
    return r * even, r * odd


@triton.jit
def _element(word, NOISE: tl.constexpr, BITS: tl.constexpr):
    if NOISE == 0:
        value = word
    elif NOISE == 1:
        value = (word >> (32 - BITS)).to(tl.float32) * (1.0 / (1 << BITS))
    elif NOISE == 3:
        value = -tl.log(-_log_word(word))
    else:
        value = _log_word(word) - _log_word(0xFFFFFFFF - word)
    return value


@triton.jit
def _philox_kernel(out, rng, count, first, NOISE: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr):
    """Elements 4 * block to 4 * block + 3 of `out` for BLOCKS blocks a program, the first program's being `first`."""
    seed = tl.load(rng)
    offset = tl.load(rng + 1)
    block = (first + tl.program_id(0).to(tl.int64)) * BLOCKS + tl.arange(0, BLOCKS)
    w0, w1, w2, w3 = tl.philox(
        seed,
        (block & 0xFFFFFFFF).to(tl.uint32),
        ((block >> 32) & 0xFFFFFFFF).to(tl.uint32),
        ((block * 0 + offset) & 0xFFFFFFFF).to(tl.uint32),
        (((block * 0 + offset) >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )
    # int64: Triton's unsigned comparisons and conversions differ between targets.
    w0, w1 = w0.to(tl.int64) & 0xFFFFFFFF, w1.to(tl.int64) & 0xFFFFFFFF
    w2, w3 = w2.to(tl.int64) & 0xFFFFFFFF, w3.to(tl.int64) & 0xFFFFFFFF
    if NOISE == 2:
        v0, v1 = _normal(w0, w1)
        v2, v3 = _normal(w2, w3)
    else:
        v0, v1 = _element(w0, NOISE, BITS), _element(w1, NOISE, BITS)
        v2, v3 = _element(w2, NOISE, BITS), _element(w3, NOISE, BITS)
    kind = out.dtype.element_ty
    # [BLOCKS, 2, 2] with the word's index last: in memory order.
    even = tl.join(v0.to(kind), v2.to(kind))
    odd = tl.join(v1.to(kind), v3.to(kind))
    values = tl.reshape(tl.join(even, odd), (4 * BLOCKS,))
    element = (first + tl.program_id(0).to(tl.int64)) * BLOCKS * 4 + tl.arange(0, 4 * BLOCKS)
    tl.store(out + element, values, mask=element < count)


def philox_(out: Tensor, rng: Tensor, noise: int) -> None:
    """Fill ``out`` in the order of its elements; arguments as ``torch.ops.genfuse.philox_``, on one device.

    Args:
        out: float32, bfloat16 or float16; int64 for bits.
        rng: int64 ``[2]``, the pair ``(seed, offset)``.
        noise: 0 bits, 1 uniform, 2 normal, 3 gumbel, 4 logistic.
    """
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    bits = {torch.bfloat16: 8, torch.float16: 11}.get(out.dtype, 24)
    programs = triton.cdiv(out.numel(), 4 * _BLOCKS)
    for first in range(0, programs, _LAUNCH):
        grid = (min(_LAUNCH, programs - first),)
        _philox_kernel[grid](target, rng, out.numel(), first, NOISE=noise, BITS=bits, BLOCKS=_BLOCKS)
    if target is not out:
        out.copy_(target)
