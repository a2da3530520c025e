"""Random numbers by address in Triton, and what is sampled with them: what genfuse.reference.sampling defines.

Arguments and results of the functions are those of the registered operators ``genfuse::...`` in csrc/library.cpp. What
is computed is computed in float32, whatever the inputs' dtype. Nothing here waits for the device: the pair (seed,
offset) is read from a device tensor, and drawn again in backward.

Most operators see their tensors as a *plane* of R rows and C columns: dimensions to keep, and dimensions to sum over. A
tensor expanded along either is read in place, through strides of 0. A program computes a tile of BR x BC elements, or
several side by side where it sums; the sums of a row's parts are added in a fixed order by a second kernel, so every
result is the same from run to run.

A tile draws its noise four words at a time, as the cipher gives them. Where rows are no multiple of four elements long,
blocks of words straddle rows; a row's tiles then begin (SHIFT) up to three columns before the row, where its first
block does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "categorical_sample",
    "gaussian",
    "gaussian_backward",
    "gumbel_softmax",
    "gumbel_softmax_backward",
    "philox_",
    "relaxed_bernoulli",
    "relaxed_bernoulli_backward",
    "vector_quantize",
    "vector_quantize_backward",
    "vector_quantize_statistics",
]

_BLOCKS = 256  # of four words, to a program
_LAUNCH = 1 << 30  # programs in a launch: CUDA's grid ends at 2^31 - 1
_TILE = 1024  # elements of a plane
_PROGRAMS = 1024  # enough to fill a device: with more, a program sums more than one tile
_ROW = 8192  # the longest row that one program holds
_NORMAL, _GUMBEL, _LOGISTIC = (tl.constexpr(noise) for noise in (2, 3, 4))
_NO_COLUMN = tl.constexpr(2**62)


# ---------------------------------------------------------------------------------------------------------------------
# Noise
# ---------------------------------------------------------------------------------------------------------------------


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
def _words(rng, block):
    """The four words of each block (int64), as int64: Triton's unsigned comparisons and conversions differ between
    targets."""
    seed = tl.load(rng)
    offset = block * 0 + tl.load(rng + 1)
    w0, w1, w2, w3 = tl.philox(
        seed,
        (block & 0xFFFFFFFF).to(tl.uint32),
        ((block >> 32) & 0xFFFFFFFF).to(tl.uint32),
        (offset & 0xFFFFFFFF).to(tl.uint32),
        ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )
    w0, w1 = w0.to(tl.int64) & 0xFFFFFFFF, w1.to(tl.int64) & 0xFFFFFFFF
    w2, w3 = w2.to(tl.int64) & 0xFFFFFFFF, w3.to(tl.int64) & 0xFFFFFFFF
    return w0, w1, w2, w3


@triton.jit
def _noise(rng, block, NOISE: tl.constexpr, BITS: tl.constexpr):
    """The four numbers of each block."""
    w0, w1, w2, w3 = _words(rng, block)
    if NOISE == 2:
        v0, v1 = _normal(w0, w1)
        v2, v3 = _normal(w2, w3)
    else:
        v0, v1 = _element(w0, NOISE, BITS), _element(w1, NOISE, BITS)
        v2, v3 = _element(w2, NOISE, BITS), _element(w3, NOISE, BITS)
    return v0, v1, v2, v3


@triton.jit
def _philox_kernel(out, rng, count, first, NOISE: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr):
    """Elements 4 * block to 4 * block + 3 of `out` for BLOCKS blocks a program, the first program's being `first`."""
    block = (first + tl.program_id(0).to(tl.int64)) * BLOCKS + tl.arange(0, BLOCKS)
    v0, v1, v2, v3 = _noise(rng, block, NOISE, BITS)
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


# ---------------------------------------------------------------------------------------------------------------------
# Planes
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _columns(row, first, R, C, SHIFT: tl.constexpr, BC: tl.constexpr):
    """The columns of the tile that begins at `first`, and which of its elements there are."""
    col = first + tl.arange(0, BC)[None, :]
    if SHIFT:
        col -= ((row * C) & 3)[:, None]
    ok = (row < R)[:, None] & (col < C)
    if SHIFT:
        ok = ok & (col >= 0)
    return col, ok


@triton.jit
def _noise_tile(rng, row, first, C, NOISE: tl.constexpr, SHIFT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """The noise of the tile that begins at column `first`, a multiple of 4."""
    element = row * C
    if SHIFT:
        element -= element & 3
    block = ((element + first) >> 2)[:, None] + tl.arange(0, BC // 4)[None, :]
    v0, v1, v2, v3 = _noise(rng, block, NOISE, 24)
    return tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), (BR, BC))


@triton.jit
def _load(pointer, row, stride, col, ok, COL: tl.constexpr):
    return tl.load(pointer + (row * stride)[:, None] + col * COL, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, row, col, C, ok, value):
    """Into a contiguous plane, if there is one."""
    if pointer is not None:
        tl.store(pointer + (row * C)[:, None] + col, value.to(pointer.dtype.element_ty), mask=ok)


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _one_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The stride of dimensions taken as one, if they have one; 0 where there is no second element."""
    found = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    for (_, outer), (size, inner) in itertools.pairwise(found):
        if outer != size * inner:
            return None
    return found[-1][1] if found else 0


def _fits(tensor: Tensor, split: int) -> bool:
    """Whether a plane can be read in place: its rows with one stride, its columns side by side or all the same."""
    rows = _one_stride(tensor.shape[:split], tensor.stride()[:split])
    return rows is not None and _one_stride(tensor.shape[split:], tensor.stride()[split:]) in (0, 1)


class _Plane:
    """A tensor as R rows, the first ``split`` dimensions, and C columns, the others; None for no tensor.

    Attributes:
        data: the tensor, or a contiguous copy where its strides are none of a plane.
        row: stride of the rows.
        col: stride of the columns, 0 or 1.
    """

    __slots__ = ("col", "data", "row")

    def __init__(self, tensor: Tensor | None, split: int) -> None:
        if tensor is not None and not _fits(tensor, split):
            tensor = tensor.contiguous()
        self.data = tensor
        self.row = self.col = 0
        if tensor is not None:
            self.row = _one_stride(tensor.shape[:split], tensor.stride()[:split]) or 0
            self.col = _one_stride(tensor.shape[split:], tensor.stride()[split:]) or 0


class _Strided:
    """A tensor as rows, channels (dimension ``dim``) and space, with a stride each; None for no tensor.

    Rows that have no space are taken for it: a block is then many of them.

    Attributes:
        data: the tensor, or a contiguous copy where rows or space have more than one stride.
        strides: of rows, channels and space.
    """

    __slots__ = ("data", "strides")

    def __init__(self, tensor: Tensor | None, dim: int) -> None:
        self.data = tensor
        self.strides = (0, 0, 0)
        if tensor is None:
            return
        found = self._outer(tensor, dim)
        if found is None:
            self.data = tensor = tensor.contiguous()
            found = self._outer(tensor, dim)
            assert found is not None
        rows, space = found
        if math.prod(tensor.shape[dim + 1 :]) == 1:
            rows, space = 0, rows
        self.strides = (rows, tensor.stride(dim), space)

    @staticmethod
    def _outer(tensor: Tensor, dim: int) -> tuple[int, int] | None:
        rows = _one_stride(tensor.shape[:dim], tensor.stride()[:dim])
        space = _one_stride(tensor.shape[dim + 1 :], tensor.stride()[dim + 1 :])
        return None if rows is None or space is None else (rows, space)


def _best_split(*tensors: Tensor | None) -> int:
    """Where an elementwise operator may cut dimensions into rows and columns so that the fewest tensors are copied."""
    present = [tensor for tensor in tensors if tensor is not None]
    if all(tensor.is_contiguous() for tensor in present):
        return 0
    return max(range(present[0].dim() + 1), key=lambda split: sum(_fits(tensor, split) for tensor in present))


def _sizes(shape: Sequence[int], split: int) -> tuple[int, int]:
    rows = columns = 1
    for size in shape[:split]:
        rows *= size
    for size in shape[split:]:
        columns *= size
    return rows, columns


class _Tiling:
    """How a plane is cut.

    Attributes:
        grid: programs, those of a row tile side by side.
        chunks: programs to a row tile.
        tiles: tiles to a program.
        shape: BR, BC and SHIFT.
    """

    __slots__ = ("chunks", "grid", "shape", "tiles")

    def __init__(self, rows: int, columns: int, drawn: bool, sums: bool = False, share: int = 1) -> None:
        shift = drawn and rows > 1 and columns % 4 != 0
        width = columns + 3 * shift
        tile = _TILE // share
        BC = min(tile, max(_power_of_two(width), 4 if drawn else 1))
        BR = min(tile // BC, _power_of_two(rows))
        row_tiles, column_tiles = triton.cdiv(rows, BR), triton.cdiv(width, BC)
        self.tiles = min(max(row_tiles * column_tiles // _PROGRAMS, 1), column_tiles) if sums else 1
        self.chunks = triton.cdiv(column_tiles, self.tiles)
        self.grid = (row_tiles * self.chunks,)
        self.shape: dict[str, Any] = {"SHIFT": shift, "BR": BR, "BC": BC}

    def parts(self, rows: int, like: Tensor) -> Tensor:
        """Where the programs of a row write their sums of it."""
        return like.new_empty((self.chunks, rows), dtype=torch.float32)


def _add_up(parts: Tensor) -> Tensor:
    return parts[0] if parts.size(0) == 1 else parts.sum(0)


def _like(tensor: Tensor | None, wanted: bool, none: Tensor) -> Tensor:
    """A gradient to fill, or an empty tensor."""
    if tensor is None or not wanted:
        return none.new_empty(0)
    return tensor.new_empty(tensor.shape)


def _or_none(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() > 0 else None


# ---------------------------------------------------------------------------------------------------------------------
# Gaussians
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _excess(x):
    """(e^x - 1 - x) / x^2 for |x| < 1."""
    s = 2.505210838544172e-08 + x * 2.08767569878681e-09
    s = 2.48015873015873e-05 + x * (2.7557319223985893e-06 + x * (2.755731922398589e-07 + x * s))
    s = 0.008333333333333333 + x * (0.001388888888888889 + x * (0.0001984126984126984 + x * s))
    return 0.5 + x * (0.16666666666666666 + x * (0.041666666666666664 + x * s))


@triton.jit
def _half_excess(x):
    """(e^x - 1 - x) / 2, which near 0 keeps its digits."""
    near = tl.where(tl.abs(x) < 1.0, x, 0.0)
    # e^x by its root: half of it may be a number where e^x is none.
    root = tl.exp(0.5 * x)
    return tl.where(tl.abs(x) < 1.0, 0.5 * near * near * _excess(near), 0.5 * root * root - (0.5 + 0.5 * x))


@triton.jit
def _times_expm1(k, x):
    """k (e^x - 1)."""
    near = tl.where(tl.abs(x) < 1.0, x, 0.0)
    root = tl.exp(0.5 * x)
    return tl.where(tl.abs(x) < 1.0, k * (near + near * near * _excess(near)), (k * root) * root - k)


@triton.jit
def _clamped(x, low, high):
    # By comparisons that keep a NaN.
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _from_prior(
    mean, log_variance, prior_mean, prior_scale, row, col, ok, prior_mean_row, prior_scale_row,
    PRIOR_MEAN_COL: tl.constexpr, PRIOR_SCALE_COL: tl.constexpr, LOG_STD: tl.constexpr,
):  # fmt: skip
    """(mean - prior's) / prior's deviation, ln of the ratio of variances, and the root of 1 / prior's deviation."""
    distance = mean
    root = 1.0
    if prior_mean is not None:
        distance -= _load(prior_mean, row, prior_mean_row, col, ok, PRIOR_MEAN_COL)
    if prior_scale is not None:
        prior = _load(prior_scale, row, prior_scale_row, col, ok, PRIOR_SCALE_COL)
        prior = 2.0 * prior if LOG_STD else prior
        root = tl.exp(-0.25 * prior)
        # In this order a small difference times a large inverse deviation does not overflow.
        distance = distance * root * root
        log_variance -= prior
    return distance, log_variance, root


@triton.jit(do_not_specialize=["R", "chunks", "tiles"])
def _gaussian_kernel(
    mean, scale, prior_mean, prior_scale, eps, rng, z, kl, R, C, chunks, tiles,
    mean_row, scale_row, prior_mean_row, prior_scale_row, eps_row, free_bits, low, high,
    MEAN_COL: tl.constexpr, SCALE_COL: tl.constexpr, PRIOR_MEAN_COL: tl.constexpr, PRIOR_SCALE_COL: tl.constexpr,
    EPS_COL: tl.constexpr, LOG_STD: tl.constexpr, CLAMP: tl.constexpr, SHIFT: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """A sample, where there is `z`, and each row's part of the KL, where there is `kl`."""
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks * BR + tl.arange(0, BR)
    total = tl.zeros((BR, BC), tl.float32)
    for tile in range(tiles):
        first = (program % chunks * tiles + tile) * BC
        col, ok = _columns(row, first, R, C, SHIFT, BC)
        m = _load(mean, row, mean_row, col, ok, MEAN_COL)
        s = _load(scale, row, scale_row, col, ok, SCALE_COL)
        if CLAMP:
            s = _clamped(s, low, high)
        log_variance = 2.0 * s if LOG_STD else s
        if z is not None:
            if eps is not None:
                e = _load(eps, row, eps_row, col, ok, EPS_COL)
            else:
                e = _noise_tile(rng, row, first, C, _NORMAL, SHIFT, BR, BC)
            root = tl.exp(0.25 * log_variance)
            _store(z, row, col, C, ok, m + e * root * root)
        if kl is not None:
            distance, ratio, _ = _from_prior(
                m, log_variance, prior_mean, prior_scale, row, col, ok, prior_mean_row, prior_scale_row,
                PRIOR_MEAN_COL, PRIOR_SCALE_COL, LOG_STD,
            )  # fmt: skip
            each = _half_excess(ratio) + 0.5 * distance * distance
            each = tl.where(each < free_bits, free_bits, each)
            total += tl.where(ok, each, 0.0)
    if kl is not None:
        tl.store(kl + program % chunks * R + row, tl.sum(total, 1), mask=row < R)


@triton.jit(do_not_specialize=["R", "chunks", "grad_kl_row"])
def _gaussian_backward_kernel(
    grad_z, grad_kl, mean, scale, prior_mean, prior_scale, eps, rng,
    grad_mean, grad_scale, grad_prior_mean, grad_prior_scale, grad_eps, R, C, chunks,
    grad_z_row, grad_kl_row, mean_row, scale_row, prior_mean_row, prior_scale_row, eps_row, free_bits, low, high,
    GRAD_Z_COL: tl.constexpr, MEAN_COL: tl.constexpr, SCALE_COL: tl.constexpr, PRIOR_MEAN_COL: tl.constexpr,
    PRIOR_SCALE_COL: tl.constexpr, EPS_COL: tl.constexpr, LOG_STD: tl.constexpr, CLAMP: tl.constexpr,
    SHIFT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks * BR + tl.arange(0, BR)
    first = program % chunks * BC
    col, ok = _columns(row, first, R, C, SHIFT, BC)
    to_mean = tl.zeros((BR, BC), tl.float32)
    to_log_variance = tl.zeros((BR, BC), tl.float32)
    s = _load(scale, row, scale_row, col, ok, SCALE_COL)
    if CLAMP:
        s = _clamped(s, low, high)
    log_variance = 2.0 * s if LOG_STD else s
    if grad_z is not None:
        g = _load(grad_z, row, grad_z_row, col, ok, GRAD_Z_COL)
        root = tl.exp(0.25 * log_variance)
        to_mean += g
        if grad_eps is not None:
            _store(grad_eps, row, col, C, ok, g * root * root)
        if grad_scale is not None:
            if eps is not None:
                e = _load(eps, row, eps_row, col, ok, EPS_COL)
            else:
                e = _noise_tile(rng, row, first, C, _NORMAL, SHIFT, BR, BC)
            to_log_variance += 0.5 * g * e * root * root
    if grad_kl is not None:
        m = _load(mean, row, mean_row, col, ok, MEAN_COL)
        distance, ratio, inverse = _from_prior(
            m, log_variance, prior_mean, prior_scale, row, col, ok, prior_mean_row, prior_scale_row,
            PRIOR_MEAN_COL, PRIOR_SCALE_COL, LOG_STD,
        )  # fmt: skip
        k = tl.load(grad_kl + row * grad_kl_row, mask=row < R, other=0.0).to(tl.float32)[:, None]
        each = _half_excess(ratio) + 0.5 * distance * distance
        k = tl.where(each < free_bits, 0.0, k)
        by_mean = k * distance * inverse * inverse
        by_variance = 0.5 * _times_expm1(k, ratio)
        to_mean += by_mean
        to_log_variance += by_variance
        _store(grad_prior_mean, row, col, C, ok, -by_mean)
        if grad_prior_scale is not None:
            by_prior = -by_variance - 0.5 * k * distance * distance
            _store(grad_prior_scale, row, col, C, ok, 2.0 * by_prior if LOG_STD else by_prior)
    _store(grad_mean, row, col, C, ok, to_mean)
    _store(grad_scale, row, col, C, ok, 2.0 * to_log_variance if LOG_STD else to_log_variance)


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
    """``genfuse::gaussian``: (z, kl)."""
    z = mean.new_empty(mean.shape if sample else 0)
    batch = mean.shape[:batch_dims]
    if mean.numel() == 0 or not (sample or divergence):
        return z, mean.new_zeros(batch if divergence else 0, dtype=torch.float32)
    if not divergence:
        prior_mean = prior_scale = None
    if not sample:
        eps = None
    drawn = sample and eps is None
    split = batch_dims if divergence else _best_split(mean, scale, eps)
    rows, columns = _sizes(mean.shape, split)
    m, s, pm, ps, e = (_Plane(tensor, split) for tensor in (mean, scale, prior_mean, prior_scale, eps))
    tiling = _Tiling(rows, columns, drawn, sums=divergence)
    kl = tiling.parts(rows, mean) if divergence else None
    _gaussian_kernel[tiling.grid](
        m.data, s.data, pm.data, ps.data, e.data, rng if drawn else None, z if sample else None, kl, rows, columns,
        tiling.chunks, tiling.tiles, m.row, s.row, pm.row, ps.row, e.row, float(free_bits), float(low), float(high),
        MEAN_COL=m.col, SCALE_COL=s.col, PRIOR_MEAN_COL=pm.col, PRIOR_SCALE_COL=ps.col, EPS_COL=e.col,
        LOG_STD=log_std, CLAMP=low > -float("inf") or high < float("inf"), **tiling.shape,
    )  # fmt: skip
    return z, mean.new_empty(0, dtype=torch.float32) if kl is None else _add_up(kl).view(batch)


def gaussian_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
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
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``genfuse::gaussian_backward``: the gradients of mean, scale, prior_mean, prior_scale and eps."""
    if not sample:
        grad_z = None
    if not divergence:
        grad_kl = None
    inputs = (mean, scale, prior_mean, prior_scale, eps)
    gradients = [_like(tensor, bool(needs >> index & 1), mean) for index, tensor in enumerate(inputs)]
    for index, serves in enumerate((True, True, grad_kl is not None, grad_kl is not None, grad_z is not None)):
        if not serves:
            gradients[index].zero_()
    if mean.numel() > 0 and needs > 0:
        # The prior and the mean are read for the KL, the noise for the sample.
        if grad_kl is None:
            prior_mean = prior_scale = None
        if grad_z is None:
            eps = None
        drawn = grad_z is not None and eps is None and bool(needs & 2)
        split = batch_dims if grad_kl is not None else _best_split(grad_z, mean, scale, eps)
        rows, columns = _sizes(mean.shape, split)
        g, m, s, pm, ps, e = (_Plane(tensor, split) for tensor in (grad_z, mean, scale, prior_mean, prior_scale, eps))
        tiling = _Tiling(rows, columns, drawn)
        k = None if grad_kl is None else grad_kl.reshape(-1)
        _gaussian_backward_kernel[tiling.grid](
            g.data, k, m.data, s.data, pm.data, ps.data, e.data, rng if drawn else None, *map(_or_none, gradients),
            rows, columns, tiling.chunks, g.row, 0 if k is None else k.stride(0), m.row, s.row, pm.row, ps.row, e.row,
            float(free_bits), float(low), float(high), GRAD_Z_COL=g.col, MEAN_COL=m.col, SCALE_COL=s.col,
            PRIOR_MEAN_COL=pm.col, PRIOR_SCALE_COL=ps.col, EPS_COL=e.col, LOG_STD=log_std,
            CLAMP=low > -float("inf") or high < float("inf"), **tiling.shape,
        )  # fmt: skip
    return gradients[0], gradients[1], gradients[2], gradients[3], gradients[4]


# ---------------------------------------------------------------------------------------------------------------------
# Relaxed categories
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _perturbed(
    logits, noise, rng, row, first, col, ok, C, logits_row, noise_row, LOGITS_COL: tl.constexpr,
    NOISE_COL: tl.constexpr, NOISE: tl.constexpr, SHIFT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Logits and noise together; -inf where there is no element."""
    value = _load(logits, row, logits_row, col, ok, LOGITS_COL)
    if noise is not None:
        value += _load(noise, row, noise_row, col, ok, NOISE_COL)
    else:
        value += _noise_tile(rng, row, first, C, NOISE, SHIFT, BR, BC)
    return tl.where(ok, value, -float("inf"))


@triton.jit
def _decay(old, new, tau):
    """exp((old - new) / tau), 1 where both are the same infinity: what it multiplies is then 0, or NaN already."""
    return tl.where(old == new, 1.0, tl.exp((old - new) / tau))


@triton.jit
def _weight(value, top, tau):
    """exp((value - top) / tau), 0 for what is impossible, NaN for what is no number or +inf."""
    return tl.where(value == -float("inf"), 0.0, tl.exp((value - top) / tau))


@triton.jit(do_not_specialize=["R"])
def _gumbel_softmax_kernel(
    logits, noise, rng, y, R, C, logits_row, noise_row, tau,
    LOGITS_COL: tl.constexpr, NOISE_COL: tl.constexpr, HARD: tl.constexpr, SINGLE: tl.constexpr, SHIFT: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Whole rows: at once (SINGLE), or in one pass that finds the largest and the sum, and one that writes."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    if SINGLE:
        col, ok = _columns(row, 0, R, C, SHIFT, BC)
        p = _perturbed(
            logits, noise, rng, row, 0, col, ok, C, logits_row, noise_row, LOGITS_COL, NOISE_COL, _GUMBEL, SHIFT, BR, BC
        )
        top = tl.max(p, 1)[:, None]
        weight = _weight(p, top, tau)
        total = tl.sum(weight, 1)[:, None]
        chosen = tl.min(tl.where(p == top, col.to(tl.int64), _NO_COLUMN), 1)[:, None]
        # No sum above 0: a row of -inf alone, of NaN or of +inf.
        bad = tl.where(total > 0.0, 0.0, float("nan"))
        if HARD:
            value = tl.where(col == chosen, 1.0, 0.0) + bad
        else:
            value = weight / total + bad
        _store(y, row, col, C, ok, value)
    else:
        lane_top = tl.full((BR, BC), -float("inf"), tl.float32)
        lane_total = tl.zeros((BR, BC), tl.float32)
        lane_first = tl.full((BR, BC), _NO_COLUMN, tl.int64)
        for first in range(0, C + 3 * SHIFT, BC):
            col, ok = _columns(row, first, R, C, SHIFT, BC)
            p = _perturbed(
                logits, noise, rng, row, first, col, ok, C, logits_row, noise_row, LOGITS_COL, NOISE_COL, _GUMBEL,
                SHIFT, BR, BC,
            )  # fmt: skip
            lane_first = tl.where(p > lane_top, col.to(tl.int64), lane_first)
            new_top = tl.maximum(lane_top, p)
            lane_total = lane_total * _decay(lane_top, new_top, tau) + _weight(p, new_top, tau)
            lane_top = new_top
        top = tl.max(lane_top, 1)[:, None]
        total = tl.sum(lane_total * _decay(lane_top, top, tau), 1)[:, None]
        chosen = tl.min(tl.where(lane_top == top, lane_first, _NO_COLUMN), 1)[:, None]
        bad = tl.where(total > 0.0, 0.0, float("nan"))
        for first in range(0, C + 3 * SHIFT, BC):
            col, ok = _columns(row, first, R, C, SHIFT, BC)
            if HARD:
                value = tl.where(col == chosen, 1.0, 0.0) + bad
            else:
                p = _perturbed(
                    logits, noise, rng, row, first, col, ok, C, logits_row, noise_row, LOGITS_COL, NOISE_COL, _GUMBEL,
                    SHIFT, BR, BC,
                )  # fmt: skip
                value = _weight(p, top, tau) / total + bad
            _store(y, row, col, C, ok, value)


@triton.jit(do_not_specialize=["R"])
def _gumbel_softmax_backward_kernel(
    grad_y, logits, noise, rng, y, grad_logits, grad_noise, R, C, grad_y_row, logits_row, noise_row, tau,
    GRAD_Y_COL: tl.constexpr, LOGITS_COL: tl.constexpr, NOISE_COL: tl.constexpr, SINGLE: tl.constexpr,
    SHIFT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y (g - sum of g y) / tau for whole rows; y is computed anew where it was not kept (`y` is None)."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    if SINGLE:
        col, ok = _columns(row, 0, R, C, SHIFT, BC)
        g = _load(grad_y, row, grad_y_row, col, ok, GRAD_Y_COL)
        if y is not None:
            soft = _load(y, row, C, col, ok, 1)
        else:
            p = _perturbed(
                logits, noise, rng, row, 0, col, ok, C, logits_row, noise_row, LOGITS_COL, NOISE_COL, _GUMBEL, SHIFT,
                BR, BC,
            )  # fmt: skip
            weight = _weight(p, tl.max(p, 1)[:, None], tau)
            total = tl.sum(weight, 1)[:, None]
            soft = weight / total + tl.where(total > 0.0, 0.0, float("nan"))
        value = soft * (g - tl.sum(tl.where(ok, g * soft, 0.0), 1)[:, None]) / tau
        _store(grad_logits, row, col, C, ok, value)
        _store(grad_noise, row, col, C, ok, value)
    else:
        lane_top = tl.full((BR, BC), -float("inf"), tl.float32)
        lane_total = tl.zeros((BR, BC), tl.float32)
        lane_dot = tl.zeros((BR, BC), tl.float32)
        for first in range(0, C + 3 * SHIFT, BC):
            col, ok = _columns(row, first, R, C, SHIFT, BC)
            g = _load(grad_y, row, grad_y_row, col, ok, GRAD_Y_COL)
            if y is not None:
                lane_dot += g * _load(y, row, C, col, ok, 1)
            else:
                p = _perturbed(
                    logits, noise, rng, row, first, col, ok, C, logits_row, noise_row, LOGITS_COL, NOISE_COL, _GUMBEL,
                    SHIFT, BR, BC,
                )  # fmt: skip
                new_top = tl.maximum(lane_top, p)
                decay, weight = _decay(lane_top, new_top, tau), _weight(p, new_top, tau)
                lane_total = lane_total * decay + weight
                lane_dot = lane_dot * decay + g * weight
                lane_top = new_top
        if y is not None:
            dot = tl.sum(lane_dot, 1)[:, None]
        else:
            top = tl.max(lane_top, 1)[:, None]
            decay = _decay(lane_top, top, tau)
            total = tl.sum(lane_total * decay, 1)[:, None]
            bad = tl.where(total > 0.0, 0.0, float("nan"))
            dot = tl.sum(lane_dot * decay, 1)[:, None] / total
        for first in range(0, C + 3 * SHIFT, BC):
            col, ok = _columns(row, first, R, C, SHIFT, BC)
            g = _load(grad_y, row, grad_y_row, col, ok, GRAD_Y_COL)
            if y is not None:
                soft = _load(y, row, C, col, ok, 1)
            else:
                p = _perturbed(
                    logits, noise, rng, row, first, col, ok, C, logits_row, noise_row, LOGITS_COL, NOISE_COL, _GUMBEL,
                    SHIFT, BR, BC,
                )  # fmt: skip
                soft = _weight(p, top, tau) / total + bad
            value = soft * (g - dot) / tau
            _store(grad_logits, row, col, C, ok, value)
            _store(grad_noise, row, col, C, ok, value)


def _temperature(tau: float) -> float:
    """As a float32 that is neither 0 nor infinite: beyond, results are the same, but 0 / 0 and inf / inf are none."""
    return min(max(float(tau), torch.finfo(torch.float32).tiny), torch.finfo(torch.float32).max)


def _row_tiling(rows: int, columns: int, drawn: bool) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and shape of tiles for programs that need whole rows."""
    shift = drawn and rows > 1 and columns % 4 != 0
    BC = max(_power_of_two(columns + 3 * shift), 4)
    single = BC <= _ROW
    BC = BC if single else min(BC, _ROW // 2)
    BR = min(max(_TILE // BC, 1), _power_of_two(rows)) if single else 1
    warps = min(max(BR * BC // 256, 4), 16)
    return (triton.cdiv(rows, BR),), {"SINGLE": single, "SHIFT": shift, "BR": BR, "BC": BC, "num_warps": warps}


def gumbel_softmax(logits: Tensor, noise: Tensor | None, rng: Tensor | None, tau: float, hard: bool) -> Tensor:
    """``genfuse::gumbel_softmax``."""
    y = logits.new_empty(logits.shape)
    if logits.numel() == 0:
        return y
    split = logits.dim() - 1
    rows, columns = _sizes(logits.shape, split)
    values, n = _Plane(logits, split), _Plane(noise, split)
    grid, shape = _row_tiling(rows, columns, noise is None)
    _gumbel_softmax_kernel[grid](
        values.data, n.data, rng if noise is None else None, y, rows, columns, values.row, n.row, _temperature(tau),
        LOGITS_COL=values.col, NOISE_COL=n.col, HARD=hard, **shape,
    )  # fmt: skip
    return y


def gumbel_softmax_backward(
    grad_y: Tensor | None,
    logits: Tensor,
    noise: Tensor | None,
    rng: Tensor | None,
    y: Tensor,
    tau: float,
    hard: bool,
    needs: int,
) -> tuple[Tensor, Tensor]:
    """``genfuse::gumbel_softmax_backward``: the gradients of logits and noise."""
    gradients = [_like(tensor, bool(needs >> index & 1), logits) for index, tensor in enumerate((logits, noise))]
    if grad_y is None:
        return gradients[0].zero_(), gradients[1].zero_()
    if logits.numel() > 0 and any(gradient.numel() > 0 for gradient in gradients):
        split = logits.dim() - 1
        rows, columns = _sizes(logits.shape, split)
        # A half dtype has rounded the sample, and a hard one is another.
        anew = hard or y.dtype != torch.float32
        drawn = anew and noise is None
        g, values, n = (_Plane(tensor, split) for tensor in (grad_y, logits, noise if anew else None))
        grid, shape = _row_tiling(rows, columns, drawn)
        _gumbel_softmax_backward_kernel[grid](
            g.data, values.data, n.data, rng if drawn else None, None if anew else y.contiguous(),
            *map(_or_none, gradients), rows, columns, g.row, values.row, n.row, _temperature(tau),
            GRAD_Y_COL=g.col, LOGITS_COL=values.col, NOISE_COL=n.col, **shape,
        )  # fmt: skip
    return gradients[0], gradients[1]


@triton.jit(do_not_specialize=["R", "chunks"])
def _relaxed_bernoulli_kernel(
    grad_y, logits, noise, rng, y, grad_logits, grad_noise, R, C, chunks, grad_y_row, logits_row, noise_row, tau,
    GRAD_Y_COL: tl.constexpr, LOGITS_COL: tl.constexpr, NOISE_COL: tl.constexpr, HARD: tl.constexpr,
    SHIFT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The sample, or where there is `grad_y` its gradient, g y (1 - y) / tau with the soft y."""
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks * BR + tl.arange(0, BR)
    first = program % chunks * BC
    col, ok = _columns(row, first, R, C, SHIFT, BC)
    p = _perturbed(
        logits, noise, rng, row, first, col, ok, C, logits_row, noise_row, LOGITS_COL, NOISE_COL, _LOGISTIC, SHIFT,
        BR, BC,
    )  # fmt: skip
    # exp(-|x|) cannot overflow, and 1 - y keeps its digits where y is near 1.
    small = tl.exp(-tl.abs(p / tau))
    if grad_y is not None:
        g = _load(grad_y, row, grad_y_row, col, ok, GRAD_Y_COL)
        value = g * (small / ((1.0 + small) * (1.0 + small))) / tau
        _store(grad_logits, row, col, C, ok, value)
        _store(grad_noise, row, col, C, ok, value)
    else:
        if HARD:
            value = tl.where(p > 0.0, 1.0, tl.where(p <= 0.0, 0.0, p))
        else:
            value = tl.where(p >= 0.0, 1.0, small) / (1.0 + small)
        _store(y, row, col, C, ok, value)


def relaxed_bernoulli(logits: Tensor, noise: Tensor | None, rng: Tensor | None, tau: float, hard: bool) -> Tensor:
    """``genfuse::relaxed_bernoulli``."""
    y = logits.new_empty(logits.shape)
    if logits.numel() > 0:
        _relaxed_bernoulli(None, logits, noise, rng, y, [y.new_empty(0)] * 2, tau, hard)
    return y


def relaxed_bernoulli_backward(
    grad_y: Tensor | None,
    logits: Tensor,
    noise: Tensor | None,
    rng: Tensor | None,
    y: Tensor,
    tau: float,
    hard: bool,
    needs: int,
) -> tuple[Tensor, Tensor]:
    """``genfuse::relaxed_bernoulli_backward``: the gradients of logits and noise."""
    gradients = [_like(tensor, bool(needs >> index & 1), logits) for index, tensor in enumerate((logits, noise))]
    if grad_y is None:
        return gradients[0].zero_(), gradients[1].zero_()
    if any(gradient.numel() > 0 for gradient in gradients):
        _relaxed_bernoulli(grad_y, logits, noise, rng, None, gradients, tau, hard)
    return gradients[0], gradients[1]


def _relaxed_bernoulli(
    grad_y: Tensor | None,
    logits: Tensor,
    noise: Tensor | None,
    rng: Tensor | None,
    y: Tensor | None,
    gradients: list[Tensor],
    tau: float,
    hard: bool,
) -> None:
    drawn = noise is None
    split = _best_split(grad_y, logits, noise)
    rows, columns = _sizes(logits.shape, split)
    g, values, n = (_Plane(tensor, split) for tensor in (grad_y, logits, noise))
    tiling = _Tiling(rows, columns, drawn)
    _relaxed_bernoulli_kernel[tiling.grid](
        g.data, values.data, n.data, rng if drawn else None, y, *map(_or_none, gradients), rows, columns,
        tiling.chunks, g.row, values.row, n.row, _temperature(tau), GRAD_Y_COL=g.col, LOGITS_COL=values.col,
        NOISE_COL=n.col, HARD=hard, **tiling.shape,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Categories
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["S", "groups"])
def _categorical_kernel(
    logits, u, rng, out, C, S, groups, logits_row, LOGITS_COL: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr
):
    """BS samples of a row: a pass for the largest logit and the sum of weights, one that cumulates them again."""
    program = tl.program_id(0).to(tl.int64)
    row = program // groups
    sample = program % groups * BS + tl.arange(0, BS)
    wanted = sample < S
    element = row * S + sample
    if u is not None:
        at = tl.load(u + element, mask=wanted, other=0.0).to(tl.float32)
    else:
        w0, w1, w2, w3 = _words(rng, element >> 2)
        word = element & 3
        at = _element(tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3))), 1, 24)
    lane_top = tl.full((BC,), -float("inf"), tl.float32)
    lane_total = tl.zeros((BC,), tl.float32)
    for first in range(0, C, BC):
        col = tl.zeros((BC,), tl.int64) + first + tl.arange(0, BC)
        value = tl.load(logits + row * logits_row + col * LOGITS_COL, mask=col < C, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(lane_top, value)
        lane_total = lane_total * _decay(lane_top, new_top, 1.0) + _weight(value, new_top, 1.0)
        lane_top = new_top
    top = tl.max(lane_top, 0)
    total = tl.zeros((BS,), tl.float32) + tl.sum(lane_total * _decay(lane_top, top, 1.0), 0)
    threshold = at * total
    found = tl.full((BS,), _NO_COLUMN, tl.int64)
    last = tl.full((BC,), -1, tl.int64)
    before = 0.0
    for first in range(0, C, BC):
        col = tl.zeros((BC,), tl.int64) + first + tl.arange(0, BC)
        value = tl.load(logits + row * logits_row + col * LOGITS_COL, mask=col < C, other=-float("inf")).to(tl.float32)
        weight = _weight(value, top, 1.0)
        cumulated = before + tl.cumsum(weight, 0)
        # A parallel sum may round the cumulated weight of an impossible class above that of the one before.
        exceeds = (cumulated[:, None] > threshold[None, :]) & (weight > 0.0)[:, None]
        found = tl.minimum(found, tl.min(tl.where(exceeds, col[:, None], _NO_COLUMN), 0))
        last = tl.where(weight > 0.0, col, last)
        before += tl.sum(weight, 0)
    # u is below 1, but the two sums may differ in their last place.
    found = tl.where(found == _NO_COLUMN, tl.max(last, 0), found)
    good = (total > 0.0) & (total < float("inf")) & (at < 1.0)
    tl.store(out + element, tl.where(good, found, -1), mask=wanted)


def categorical_sample(logits: Tensor, u: Tensor | None, rng: Tensor | None, num_samples: int) -> Tensor:
    """``genfuse::categorical_sample``. Weights and their sums are float32."""
    split = logits.dim() - 1
    rows, columns = _sizes(logits.shape, split)
    out = logits.new_empty((*logits.shape[:-1], num_samples), dtype=torch.int64)
    if out.numel() == 0 or columns == 0:
        return out.fill_(-1)
    values = _Plane(logits, split)
    BC, BS = min(_power_of_two(columns), 1024), min(_power_of_two(num_samples), 8)
    groups = triton.cdiv(num_samples, BS)
    _categorical_kernel[(rows * groups,)](
        values.data, None if u is None else u.contiguous(), rng if u is None else None, out, columns, num_samples,
        groups, values.row, LOGITS_COL=values.col, BC=BC, BS=BS, num_warps=1 if BC * BS <= 256 else 4,
    )  # fmt: skip
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Vector quantisation
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "K"])
def _vector_quantize_kernel(
    x, codebook, quantized, indices, loss, N, K, D, x_row, weight,
    X_COL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """For BM vectors the code of largest x.e - |e|^2 / 2, over blocks of BN codes; each lane keeps its best."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    row_ok = row < N
    best = tl.full((BM, BN), -float("inf"), tl.float32)
    best_code = tl.zeros((BM, BN), tl.int32)
    for first in range(0, K, BN):
        code = first + tl.arange(0, BN)
        code_ok = code < K
        score = tl.zeros((BM, BN), tl.float32)
        square = tl.zeros((BN,), tl.float32)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            d_ok = d < D
            left = tl.load(
                x + (row * x_row)[:, None] + (d * X_COL)[None, :], mask=row_ok[:, None] & d_ok[None, :], other=0.0
            )
            right = tl.load(
                codebook + code[None, :].to(tl.int64) * D + d[:, None], mask=d_ok[:, None] & code_ok[None, :], other=0.0
            )
            score = tl.dot(left, right, score, input_precision="ieee")
            wide = right.to(tl.float32)
            square += tl.sum(wide * wide, 0)
        score -= 0.5 * square[None, :]
        # Comparisons with NaN are false; an infinite score comes of an infinite vector or code.
        better = code_ok[None, :] & (score > best) & (score < float("inf"))
        best_code = tl.where(better, code[None, :], best_code)
        best = tl.where(better, score, best)
    top = tl.max(best, 1)
    lost = top == -float("inf")
    # Each lane keeps the first of its equals; this is the first of the lanes'.
    found = tl.min(tl.where(best == top[:, None], best_code, 2147483647), 1)
    total = tl.zeros((BM, BD), tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        ok = row_ok[:, None] & (d < D)[None, :]
        value = tl.load(x + (row * x_row)[:, None] + (d * X_COL)[None, :], mask=ok, other=0.0).to(tl.float32)
        e = tl.load(codebook + found[:, None].to(tl.int64) * D + d[None, :], mask=ok, other=0.0).to(tl.float32)
        total += (value - e) * (value - e)
        e = tl.where(lost[:, None], float("nan"), e)
        tl.store(quantized + (row * D)[:, None] + d[None, :], e.to(quantized.dtype.element_ty), mask=ok)
    tl.store(indices + row, found.to(tl.int64), mask=row_ok)
    tl.store(loss + row, weight * tl.sum(total, 1), mask=row_ok)


@triton.jit(do_not_specialize=["N", "K"])
def _vector_quantize_backward_kernel(
    grad_quantized, grad_loss, x, codebook, indices, grad_x, N, K, D, grad_quantized_row, x_row, weight,
    GRAD_QUANTIZED_COL: tl.constexpr, X_COL: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradient of x: the quantised vector's as it is, and 2 weight (x - e) of the loss's."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    row_ok = row < N
    code = tl.load(indices + row, mask=row_ok, other=0)
    code_ok = row_ok & (code >= 0) & (code < K)
    if grad_loss is not None:
        by_loss = 2.0 * weight * tl.load(grad_loss + row, mask=row_ok, other=0.0).to(tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        ok = row_ok[:, None] & (d < D)[None, :]
        grad = tl.zeros((BM, BD), tl.float32)
        if grad_quantized is not None:
            g = _load(grad_quantized, row, grad_quantized_row, d[None, :], ok, GRAD_QUANTIZED_COL)
            grad += g
        if grad_loss is not None:
            value = _load(x, row, x_row, d[None, :], ok, X_COL)
            e = tl.load(codebook + (code * D)[:, None] + d[None, :], mask=ok & code_ok[:, None], other=0.0)
            grad += by_loss[:, None] * (value - e.to(tl.float32))
        _store(grad_x, row, d[None, :], D, ok, grad)


@triton.jit(do_not_specialize=["K", "splits", "blocks"])
def _segments_kernel(
    x, order, starts, grad_loss, codebook, out, K, D, splits, blocks, x_row, weight,
    X_COL: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sums over one of `splits` parts of the vectors that took a code, in their order: of x, or where there is
    `grad_loss` of weight g (e - x). Vectors are those of `order` from `starts[code]` on."""
    program = tl.program_id(0).to(tl.int64)
    d = (program % blocks * BD + tl.arange(0, BD))[None, :]
    split = program // blocks % splits
    code = program // blocks // splits
    begin = tl.load(starts + code)
    end = tl.load(starts + code + 1)
    length = (end - begin + splits - 1) // splits
    begin += split * length
    end = tl.minimum(begin + length, end)
    total = tl.zeros((BM, BD), tl.float32)
    if codebook is not None:
        e = tl.load(codebook + code * D + d, mask=d < D, other=0.0).to(tl.float32)
    for first in range(begin, end, BM):
        place = first + tl.arange(0, BM)
        row = tl.load(order + place, mask=place < end, other=0)
        ok = (place < end)[:, None] & (d < D)
        value = _load(x, row, x_row, d, ok, X_COL)
        if grad_loss is not None:
            g = weight * tl.load(grad_loss + row, mask=place < end, other=0.0).to(tl.float32)
            value = tl.where(ok, g[:, None] * (e - value), 0.0)
        total += value
    at = out + (split * K + code) * D + d
    tl.store(at, tl.sum(total, 0)[None, :].to(out.dtype.element_ty), mask=d < D)


def _segments(
    x: Tensor, indices: Tensor, codes: int, grad_loss: Tensor | None, codebook: Tensor | None, weight: float
) -> tuple[Tensor, Tensor]:
    """How many vectors took each code, as positions ``[K + 1]`` in their order by code, and the sums ``[K, D]`` of
    `_segments_kernel` in float32. An index that is no code's is passed over."""
    vectors = _Plane(x, x.dim() - 1)
    rows, columns = _sizes(x.shape, x.dim() - 1)
    ordered, order = torch.sort(indices.reshape(-1), stable=True)
    starts = torch.searchsorted(ordered, torch.arange(codes + 1, device=x.device))
    if rows == 0 or columns == 0:
        return starts, x.new_zeros((codes, columns), dtype=torch.float32)
    # One code may have taken all vectors, as in a codebook that has collapsed: it is nobody's work alone.
    splits = min(max(8192 // codes, 1), triton.cdiv(rows, 256), 64)
    BD = min(max(_power_of_two(columns), 16), 128)
    BM, blocks = max(_TILE // BD, 8), triton.cdiv(columns, BD)
    sums = x.new_empty((splits, codes, columns), dtype=torch.float32)
    _segments_kernel[(codes * splits * blocks,)](
        vectors.data, order, starts, grad_loss, codebook, sums, codes, columns, splits, blocks, vectors.row, weight,
        X_COL=vectors.col, BM=BM, BD=BD,
    )  # fmt: skip
    return starts, _add_up(sums)


def vector_quantize(
    x: Tensor, codebook: Tensor, commitment_weight: float, codebook_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``genfuse::vector_quantize``: (quantized, indices, loss)."""
    split = x.dim() - 1
    rows, columns = _sizes(x.shape, split)
    quantized = x.new_empty(x.shape)
    indices = x.new_empty(x.shape[:-1], dtype=torch.int64)
    loss = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if rows == 0 or columns == 0:
        return quantized, indices.zero_(), loss.zero_()
    vectors = _Plane(x, split)
    BM = min(max(_power_of_two(rows), 16), 64)
    BD = min(max(_power_of_two(columns), 16), 32 if x.dtype == torch.float32 else 64)
    _vector_quantize_kernel[(triton.cdiv(rows, BM),)](
        vectors.data, codebook.contiguous(), quantized, indices, loss, rows, codebook.size(0), columns, vectors.row,
        float(commitment_weight) + float(codebook_weight), X_COL=vectors.col, BM=BM, BN=64, BD=BD, num_stages=2,
        num_warps=8 if BM == 64 else 4,
    )  # fmt: skip
    return quantized, indices, loss


def vector_quantize_backward(
    grad_quantized: Tensor | None,
    grad_loss: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    commitment_weight: float,
    codebook_weight: float,
    needs: int,
) -> tuple[Tensor, Tensor]:
    """``genfuse::vector_quantize_backward``: the gradients of x and codebook."""
    grad_x, grad_codebook = _like(x, bool(needs & 1), x), _like(codebook, bool(needs & 2), x)
    split = x.dim() - 1
    rows, columns = _sizes(x.shape, split)
    codes, indices = codebook.contiguous(), indices.contiguous()
    by_loss = None if grad_loss is None else grad_loss.contiguous()
    if grad_x.numel() > 0:
        g, vectors = _Plane(grad_quantized, split), _Plane(x, split)
        BD = min(max(_power_of_two(columns), 16), 128)
        BM = min(max(_TILE // BD, 8), _power_of_two(rows))
        _vector_quantize_backward_kernel[(triton.cdiv(rows, BM),)](
            g.data, by_loss, vectors.data, codes, indices, grad_x, rows, codes.size(0), columns, g.row, vectors.row,
            float(commitment_weight), GRAD_QUANTIZED_COL=g.col, X_COL=vectors.col, BM=BM, BD=BD,
        )  # fmt: skip
    if grad_codebook.numel() > 0:
        if by_loss is None:
            grad_codebook.zero_()
        else:
            _, sums = _segments(x, indices, codes.size(0), by_loss, codes, 2.0 * float(codebook_weight))
            grad_codebook = sums.to(codebook.dtype)
    return grad_x, grad_codebook


def vector_quantize_statistics(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """``genfuse::vector_quantize_statistics``: (counts, sums)."""
    starts, sums = _segments(x, indices, num_codes, None, None, 1.0)
    return (starts[1:] - starts[:-1]).to(torch.float32), sums
