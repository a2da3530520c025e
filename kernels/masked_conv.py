"""Masked convolutions and the elementwise layers around them in Triton: what genfuse.reference.masked_conv defines.

Arguments and results of the functions are those of the registered operators ``genfuse::...`` in csrc/library.cpp. Half
types are computed in float32; nothing is read on the host, and all sums are added in a fixed order.

A masked convolution is a matrix product without a matrix: pixels by output channels, over a depth of live taps by input
channels. In the order of rows, the live taps of every mask are one run, and after it comes the centre where channel
groups share it. The depth is cut into blocks of one tap's channels, or, where there are few of them (3 for RGB), into
blocks of the run as a whole. At the centre the groups take turns as inputs, and each output chooses, by a selection and
not by a product with zero, whose turns count: what it does not see may be NaN. The gradient of x is the same kernel
with taps turned round and weights transposed. The gradient of the weights is a product over all pixels, cut into parts
that are added in order.

Elementwise layers see ``[B, C, *S]`` (channels wherever they are) as rows, channels and space with a stride each, so a
channels-last tensor is read and written as it lies.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .flow import _sigmoid
from .likelihood import _tanh
from .sampling import _add_up, _excess, _like, _one_stride, _or_none, _power_of_two, _Strided

__all__ = [
    "concat_elu",
    "concat_elu_backward",
    "gated_activation",
    "gated_activation_backward",
    "masked_conv2d",
    "masked_conv2d_backward",
]

_TILE = 1024  # elements of a volume to a block
_PROGRAMS = 1024  # enough to fill a device: with more, a program of the elementwise layers sums more than one block


# ---------------------------------------------------------------------------------------------------------------------
# Volumes
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _place(row, channel, space, by_row, by_channel, by_space):
    return row * by_row + channel * by_channel + space * by_space


@triton.jit
def _number(pointer, place, ok):
    return tl.load(pointer + place, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _put(pointer, place, ok, value):
    """Into a tensor, if there is one."""
    if pointer is not None:
        tl.store(pointer + place, value.to(pointer.dtype.element_ty), mask=ok)


class _Cut:
    """How a volume is cut into blocks of channels by places in space.

    Attributes:
        sizes: rows, channels, space.
        grid: programs, those of a row side by side.
        groups: blocks of channels to a row.
        spaces: blocks to a channel.
        chunks: programs to a row's block of channels.
        tiles: blocks to a program.
        shape: BP and BS.
    """

    __slots__ = ("chunks", "grid", "groups", "shape", "sizes", "spaces", "tiles")

    def __init__(self, like: Tensor, dim: int, channels: int, sums: bool = False) -> None:
        """`like` is what is written: a block follows its memory."""
        rows, space = math.prod(like.shape[:dim]), math.prod(like.shape[dim + 1 :])
        side_by_side = space == 1 or like.stride(dim) == 1
        if space == 1:
            rows, space = 1, rows
        self.sizes = rows, channels, space
        if side_by_side:  # channels are
            BP = min(_power_of_two(channels), max(_TILE // 8, 1))
            BS = min(_power_of_two(space), max(_TILE // BP, 1))
        else:
            BS = min(_power_of_two(space), _TILE)
            BP = min(_power_of_two(channels), max(_TILE // BS, 1))
        self.spaces, self.groups = triton.cdiv(space, BS), triton.cdiv(channels, BP)
        self.tiles = min(max(rows * self.groups * self.spaces // _PROGRAMS, 1), self.spaces) if sums else 1
        self.chunks = triton.cdiv(self.spaces, self.tiles)
        self.grid = (rows * self.groups * self.chunks,)
        self.shape = {"BP": BP, "BS": BS}


def _memory_format(x: Tensor) -> torch.memory_format:
    """Channels last if that is how the numbers of an image or a volume lie, else contiguous."""
    if x.dim() not in (4, 5) or x.is_contiguous() or x.stride(1) != 1:
        return torch.contiguous_format
    step = 1
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.shape[d] > 1:
            if x.stride(d) < step:
                return torch.contiguous_format
            step = x.stride(d) * x.shape[d]
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def _empty(x: Tensor, dim: int, channels: int, dtype: torch.dtype) -> Tensor:
    """A tensor to fill, of x's shape but for its channels and in its memory format."""
    shape = (*x.shape[:dim], channels, *x.shape[dim + 1 :])
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=_memory_format(x))


# ---------------------------------------------------------------------------------------------------------------------
# The gate
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _halves(
    x, conditional, bias, row, channel, space, ok, C, S, x_row, x_channel, x_space, c_row, c_channel, c_space,
):  # fmt: skip
    """a and b: what goes through the activation, and the gate."""
    first = _place(row, channel, space, x_row, x_channel, x_space)
    second = _place(row, channel + C, space, x_row, x_channel, x_space)
    a, b = _number(x, first, ok), _number(x, second, ok)
    if conditional is not None:
        first = _place(row, channel, space, c_row, c_channel, c_space)
        second = _place(row, channel + C, space, c_row, c_channel, c_space)
        a += _number(conditional, first, ok)
        b += _number(conditional, second, ok)
    if bias is not None:
        a += _number(bias, channel, channel < C)
        b += _number(bias, channel + C, channel < C)
    return a, b


@triton.jit(do_not_specialize=["spaces", "groups"])
def _gate_kernel(
    x, conditional, bias, residual, y, C, S, spaces, groups, x_row, x_channel, x_space, c_row, c_channel, c_space,
    r_row, r_channel, r_space, y_row, y_channel, y_space, LINEAR: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """act(a) sigmoid(b), and the residual; `groups` blocks of channels to a row."""
    program = tl.program_id(0).to(tl.int64)
    row = program // spaces // groups
    channel = (program // spaces % groups * BP + tl.arange(0, BP))[:, None]
    space = (program % spaces * BS + tl.arange(0, BS))[None, :]
    ok = (channel < C) & (space < S)
    a, b = _halves(
        x, conditional, bias, row, channel, space, ok, C, S, x_row, x_channel, x_space, c_row, c_channel, c_space
    )
    if not LINEAR:
        a, _ = _tanh(a)
    value = a * _sigmoid(b)
    if residual is not None:
        value += _number(residual, _place(row, channel, space, r_row, r_channel, r_space), ok)
    _put(y, _place(row, channel, space, y_row, y_channel, y_space), ok, value)


@triton.jit(do_not_specialize=["R", "chunks", "tiles", "groups"])
def _gate_backward_kernel(
    grad, x, conditional, bias, grad_x, grad_conditional, parts, R, C, S, chunks, tiles, groups, g_row, g_channel,
    g_space, x_row, x_channel, x_space, c_row, c_channel, c_space, to_row, to_channel, to_space, each_row,
    each_channel, each_space, LINEAR: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The gradient of what is halved, to x and to a conditional of its size; and where there is `parts`, its sums over
    `tiles` blocks of space."""
    program = tl.program_id(0).to(tl.int64)
    chunk = program % chunks
    row = program // chunks // groups
    channel = (program // chunks % groups * BP + tl.arange(0, BP))[:, None]
    to_a = tl.zeros((BP, BS), tl.float32)
    to_b = tl.zeros((BP, BS), tl.float32)
    for tile in range(tiles):
        space = ((chunk * tiles + tile) * BS + tl.arange(0, BS))[None, :]
        ok = (channel < C) & (space < S)
        a, b = _halves(
            x, conditional, bias, row, channel, space, ok, C, S, x_row, x_channel, x_space, c_row, c_channel, c_space
        )
        g = _number(grad, _place(row, channel, space, g_row, g_channel, g_space), ok)
        gate = _sigmoid(b)
        by_a = g * gate
        if LINEAR:
            by_b = by_a * a * _sigmoid(-b)
        else:
            value, slope = _tanh(a)
            by_b = by_a * value * _sigmoid(-b)
            by_a = by_a * slope
        place = _place(row, channel, space, to_row, to_channel, to_space)
        _put(grad_x, place, ok, by_a)
        _put(grad_x, place + C * to_channel, ok, by_b)
        place = _place(row, channel, space, each_row, each_channel, each_space)
        _put(grad_conditional, place, ok, by_a)
        _put(grad_conditional, place + C * each_channel, ok, by_b)
        if parts is not None:
            to_a += tl.where(ok, by_a, 0.0)
            to_b += tl.where(ok, by_b, 0.0)
    if parts is not None:
        channel = program // chunks % groups * BP + tl.arange(0, BP)
        place = parts + (chunk * R + row) * (2 * C) + channel
        tl.store(place, tl.sum(to_a, 1), mask=channel < C)
        tl.store(place + C, tl.sum(to_b, 1), mask=channel < C)


def gated_activation(
    x: Tensor, bias: Tensor | None, conditional: Tensor | None, residual: Tensor | None, dim: int, activation: int
) -> Tensor:
    """``genfuse::gated_activation``."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    channels = x.size(dim) // 2
    y = _empty(x, dim, channels, dtype)
    if y.numel() > 0:
        values, out, rest = _Strided(x, dim), _Strided(y, dim), _Strided(residual, dim)
        given = _Strided(None if conditional is None else conditional.expand(x.shape), dim)
        cut = _Cut(y, dim, channels)
        _gate_kernel[cut.grid](
            values.data, given.data, None if bias is None else bias.contiguous(), rest.data, y, *cut.sizes[1:],
            cut.spaces, cut.groups, *values.strides, *given.strides, *rest.strides, *out.strides,
            LINEAR=activation == 1, **cut.shape,
        )  # fmt: skip
    return y


def gated_activation_backward(
    grad_y: Tensor | None,
    x: Tensor,
    bias: Tensor | None,
    conditional: Tensor | None,
    residual: Tensor | None,
    dim: int,
    activation: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``genfuse::gated_activation_backward``: the gradients of x, bias, conditional and residual."""
    none = x.new_empty(0)
    to_x = _empty(x, dim, x.size(dim), x.dtype) if needs & 1 else none
    to_bias, to_conditional = _like(bias, bool(needs & 2), x), none
    if conditional is not None and needs & 4:
        full = conditional.shape == x.shape
        to_conditional = _empty(x, dim, x.size(dim), conditional.dtype) if full else _like(conditional, True, x)
    to_residual = none
    if residual is not None and needs & 8:
        to_residual = _empty(x, dim, x.size(dim) // 2, residual.dtype)
        to_residual.zero_() if grad_y is None else to_residual.copy_(grad_y)
    if grad_y is None or grad_y.numel() == 0:
        return to_x.zero_(), to_bias.zero_(), to_conditional.zero_(), to_residual
    if to_x.numel() + to_bias.numel() + to_conditional.numel() == 0:
        return to_x, to_bias, to_conditional, to_residual

    channels = x.size(dim) // 2
    values, g = _Strided(x, dim), _Strided(grad_y, dim)
    given = _Strided(None if conditional is None else conditional.expand(x.shape), dim)
    # A conditional that is the same all over space takes the sums of its rows; another that broadcasts is summed after.
    each, by_rows = _or_none(to_conditional), False
    if each is not None and each.shape != x.shape:
        by_rows = each.shape[:dim] == x.shape[:dim] and math.prod(x.shape[dim + 1 :]) > 1
        by_rows = by_rows and math.prod(each.shape[dim + 1 :]) == 1
        each = None if by_rows else x.new_empty(x.shape, dtype=torch.float32)
    sums = by_rows or to_bias.numel() > 0
    cut = _Cut(grad_y if _memory_format(x) == torch.contiguous_format else x, dim, channels, sums)
    parts = x.new_empty((cut.chunks, cut.sizes[0], 2 * channels), dtype=torch.float32) if sums else None
    _gate_backward_kernel[cut.grid](
        g.data, values.data, given.data, None if bias is None else bias.contiguous(), _or_none(to_x), each, parts,
        *cut.sizes, cut.chunks, cut.tiles, cut.groups, *g.strides, *values.strides, *given.strides,
        *_Strided(_or_none(to_x), dim).strides, *_Strided(each, dim).strides, LINEAR=activation == 1, **cut.shape,
    )  # fmt: skip
    if parts is not None:
        rows = _add_up(parts)
        if by_rows:
            to_conditional.copy_(rows.view(to_conditional.shape))
        if to_bias.numel() > 0:
            to_bias.copy_(rows.sum(0))
    if each is not None and each.shape != to_conditional.shape:
        to_conditional.copy_(each.sum_to_size(to_conditional.shape))
    return to_x, to_bias, to_conditional, to_residual


# ---------------------------------------------------------------------------------------------------------------------
# Concatenated ELU
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _elu(x):
    """x, or e^x - 1 where that is negative."""
    near = tl.where(tl.abs(x) < 1.0, x, 0.0)
    below = tl.where(tl.abs(x) < 1.0, near + near * near * _excess(near), tl.exp(x) - 1.0)
    return tl.where(x > 0.0, x, below)


@triton.jit(do_not_specialize=["spaces", "groups"])
def _concat_elu_kernel(
    x, y, C, S, spaces, groups, x_row, x_channel, x_space, y_row, y_channel, y_space,
    BP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // spaces // groups
    channel = (program // spaces % groups * BP + tl.arange(0, BP))[:, None]
    space = (program % spaces * BS + tl.arange(0, BS))[None, :]
    ok = (channel < C) & (space < S)
    value = _number(x, _place(row, channel, space, x_row, x_channel, x_space), ok)
    _put(y, _place(row, channel, space, y_row, y_channel, y_space), ok, _elu(value))
    _put(y, _place(row, channel + C, space, y_row, y_channel, y_space), ok, _elu(-value))


@triton.jit(do_not_specialize=["spaces", "groups"])
def _concat_elu_backward_kernel(
    grad, x, grad_x, C, S, spaces, groups, g_row, g_channel, g_space, x_row, x_channel, x_space, to_row, to_channel,
    to_space, BP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // spaces // groups
    channel = (program // spaces % groups * BP + tl.arange(0, BP))[:, None]
    space = (program % spaces * BS + tl.arange(0, BS))[None, :]
    ok = (channel < C) & (space < S)
    value = _number(x, _place(row, channel, space, x_row, x_channel, x_space), ok)
    first = _number(grad, _place(row, channel, space, g_row, g_channel, g_space), ok)
    second = _number(grad, _place(row, channel + C, space, g_row, g_channel, g_space), ok)
    small = tl.exp(-tl.abs(value))
    by = tl.where(value > 0.0, first - second * small, first * small - second)
    _put(grad_x, _place(row, channel, space, to_row, to_channel, to_space), ok, by)


def concat_elu(x: Tensor, dim: int) -> Tensor:
    """``genfuse::concat_elu``."""
    channels = x.size(dim)
    y = _empty(x, dim, 2 * channels, x.dtype)
    if y.numel() > 0:
        values, out, cut = _Strided(x, dim), _Strided(y, dim), _Cut(y, dim, channels)
        _concat_elu_kernel[cut.grid](
            values.data, y, *cut.sizes[1:], cut.spaces, cut.groups, *values.strides, *out.strides, **cut.shape
        )
    return y


def concat_elu_backward(grad_y: Tensor | None, x: Tensor, dim: int, needs: int) -> Tensor:
    """``genfuse::concat_elu_backward``: the gradient of x."""
    if not needs & 1:
        return x.new_empty(0)
    to_x = _empty(x, dim, x.size(dim), x.dtype)
    if grad_y is None:
        return to_x.zero_()
    if to_x.numel() > 0:
        g, values, out, cut = _Strided(grad_y, dim), _Strided(x, dim), _Strided(to_x, dim), _Cut(to_x, dim, x.size(dim))
        _concat_elu_backward_kernel[cut.grid](
            g.data, values.data, to_x, *cut.sizes[1:], cut.spaces, cut.groups, *g.strides, *values.strides,
            *out.strides, **cut.shape,
        )  # fmt: skip
    return to_x


# ---------------------------------------------------------------------------------------------------------------------
# Masked convolutions
# ---------------------------------------------------------------------------------------------------------------------

_FEW = 16  # input channels that are too few for a block of one tap's
_SPLIT_PROGRAMS = 256  # that the gradient of the weights is cut into
_NO_CENTRE, _BEFORE, _UP_TO = (tl.constexpr(index) for index in range(3))


@triton.jit
def _group_of(channel, C: tl.constexpr, G: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        group = channel % G
    else:
        group = channel * G // C
    return group


@triton.jit
def _sees(output, input, CENTRE: tl.constexpr):
    """Whether an output of one group sees the centre of inputs of another."""
    if CENTRE == _BEFORE:
        seen = input < output
    else:
        seen = input <= output
    return seen


@triton.jit(do_not_specialize=["M", "height", "width", "out_height", "out_width", "top", "left", "down", "right"])
def _conv_kernel(
    x, weight, bias, y, M, height, width, out_height, out_width, top, left, down, right,
    x_row, x_channel, x_y, x_x, y_row, y_channel, y_x,
    IN: tl.constexpr, OUT: tl.constexpr, KW: tl.constexpr, FIRST: tl.constexpr, TAPS: tl.constexpr,
    CENTRE: tl.constexpr, TRANSPOSED: tl.constexpr, GROUPS: tl.constexpr, G: tl.constexpr, INTERLEAVED: tl.constexpr,
    FLAT: tl.constexpr, LARGE: tl.constexpr, SIDE_BY_SIDE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BM pixels of BN output channels of one of `GROUPS` groups of torch's, with IN inputs and OUT outputs each.

    `weight` is ``[GROUPS, taps, IN, OUT]`` of the TAPS live taps from FIRST on, in the order of rows, and of the centre
    after them, if channel groups share it (CENTRE). Tap (i, j) lies `down` i + `top` and `right` j + `left` from the
    pixel. TRANSPOSED: outputs are what the mask calls inputs. LARGE: images have BM pixels or more. Rows of y follow
    each other without a gap; SIDE_BY_SIDE: and its pixels, eight by eight.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (OUT + BN - 1) // BN
    group = (program // blocks % GROUPS).to(tl.int32)
    cols = (program % blocks).to(tl.int32) * BN + tl.arange(0, BN)
    # Images before this block, and where in the next one it begins: all other divisions are then of 32 bits.
    begin = program // (blocks * GROUPS) * BM
    size = out_height * out_width
    image_0 = begin // size
    rest = (begin - image_0 * size).to(tl.int32) + tl.arange(0, BM)
    if SIDE_BY_SIDE:
        M = M // 8 * 8  # which it is, and so the compiler knows
    there = tl.arange(0, BM) < M - begin
    if LARGE:
        image = (rest >= size).to(tl.int32)
    else:
        image = rest // size
    rest -= image * size
    row = rest // out_width
    col = rest - row * out_width
    x += image_0 * x_row
    y += image_0 * y_row
    base = image.to(tl.int64) * x_row + row.to(tl.int64) * x_y + col.to(tl.int64) * x_x
    x += group.to(tl.int64) * IN * x_channel
    depth: tl.constexpr = (TAPS if CENTRE == _NO_CENTRE else TAPS + 1) * IN
    weight += group.to(tl.int64) * depth * OUT
    acc = tl.zeros((BM, BN), tl.float32)
    if FLAT:
        for start in range(0, TAPS * IN, BK):
            k = start + tl.arange(0, BK)
            tap = k // IN
            place = FIRST + tap
            v = place // KW * down + top
            h = place % KW * right + left
            live = (k < TAPS * IN) & there[:, None]
            live = live & (row[:, None] + v >= 0) & (row[:, None] + v < height)
            live = live & (col[:, None] + h >= 0) & (col[:, None] + h < width)
            offset = v.to(tl.int64) * x_y + h.to(tl.int64) * x_x + (k - tap * IN).to(tl.int64) * x_channel
            a = tl.load(x + base[:, None] + offset[None, :], mask=live, other=0.0)
            ok = (k < TAPS * IN)[:, None] & (cols < OUT)[None, :]
            b = tl.load(weight + k[:, None] * OUT + cols[None, :], mask=ok, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        slices: tl.constexpr = (IN + BK - 1) // BK
        for step in range(TAPS * slices):
            tap = step // slices
            c = step % slices * BK + tl.arange(0, BK)
            place = FIRST + tap
            v = place // KW * down + top
            h = place % KW * right + left
            live = there & (row + v >= 0) & (row + v < height) & (col + h >= 0) & (col + h < width)
            offset = v.to(tl.int64) * x_y + h.to(tl.int64) * x_x
            a = tl.load(
                x + (base + offset)[:, None] + c.to(tl.int64)[None, :] * x_channel,
                mask=live[:, None] & (c < IN)[None, :],
                other=0.0,
            )
            ok = (c < IN)[:, None] & (cols < OUT)[None, :]
            b = tl.load(weight + (tap * IN + c)[:, None] * OUT + cols[None, :], mask=ok, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if CENTRE != _NO_CENTRE:
        v = (FIRST + TAPS) // KW * down + top
        h = (FIRST + TAPS) % KW * right + left
        live = there & (row + v >= 0) & (row + v < height) & (col + h >= 0) & (col + h < width)
        base += v.to(tl.int64) * x_y + h.to(tl.int64) * x_x
        ours = _group_of(group * OUT + cols, OUT * GROUPS, G, INTERLEAVED)
        low = group * IN
        for of in range(G):
            # The inputs of this group: lowest, lowest + stride ..., before `end`, as counted in torch's group.
            if INTERLEAVED:
                lowest = (of - low % G + G) % G
                end = low * 0 + IN
                stride: tl.constexpr = G
            else:
                lowest = tl.maximum((of * (IN * GROUPS) + G - 1) // G - low, 0)
                end = tl.minimum(((of + 1) * (IN * GROUPS) + G - 1) // G - low, IN)
                stride: tl.constexpr = 1
            more = acc
            for start in range(lowest, end, BC * stride):
                c = start + tl.arange(0, BC) * stride
                a = tl.load(
                    x + base[:, None] + c.to(tl.int64)[None, :] * x_channel,
                    mask=live[:, None] & (c < end)[None, :],
                    other=0.0,
                )
                ok = (c < end)[:, None] & (cols < OUT)[None, :]
                b = tl.load(weight + (TAPS * IN + c)[:, None] * OUT + cols[None, :], mask=ok, other=0.0)
                more = tl.dot(a, b, more, input_precision=PRECISION)
            seen = _sees(of, ours, CENTRE) if TRANSPOSED else _sees(ours, of, CENTRE)
            acc = tl.where(seen[None, :], more, acc)
    channel = group.to(tl.int64) * OUT + cols
    if bias is not None:
        acc += tl.load(bias + channel, mask=cols < OUT, other=0.0).to(tl.float32)[None, :]
    place = image.to(tl.int64) * y_row + rest.to(tl.int64) * y_x
    if SIDE_BY_SIDE:
        place = tl.max_contiguous(tl.multiple_of(place, 8), 8)
    place = place[:, None] + (channel * y_channel)[None, :]
    tl.store(y + place, acc.to(y.dtype.element_ty), mask=there[:, None] & (cols < OUT)[None, :])


@triton.jit(
    do_not_specialize=["M", "share", "height", "width", "out_height", "out_width", "top", "left", "down", "right"]
)
def _conv_weight_kernel(
    grad, x, parts, M, share, height, width, out_height, out_width, top, left, down, right,
    g_row, g_channel, g_y, g_x, x_row, x_channel, x_y, x_x,
    IN: tl.constexpr, OUT: tl.constexpr, KW: tl.constexpr, FIRST: tl.constexpr, TAPS: tl.constexpr,
    CENTRE: tl.constexpr, GROUPS: tl.constexpr, G: tl.constexpr, INTERLEAVED: tl.constexpr,
    DENSE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM outputs by BN pairs of a live tap and an input, summed over one `share` of the pixels (of whole blocks BK).

    `parts` is ``[shares, GROUPS OUT, taps, IN]``; TAPS includes the centre, of which only the live pairs are not 0.
    DENSE: all pixels of `grad` lie at one distance.
    """
    program = tl.program_id(0).to(tl.int64)
    columns: tl.constexpr = (TAPS * IN + BN - 1) // BN
    rows: tl.constexpr = (OUT + BM - 1) // BM
    pair = (program % columns).to(tl.int32) * BN + tl.arange(0, BN)
    out = (program // columns % rows).to(tl.int32) * BM + tl.arange(0, BM)
    group = (program // (columns * rows) % GROUPS).to(tl.int32)
    part = program // (columns * rows * GROUPS)
    x += group.to(tl.int64) * IN * x_channel
    grad += group.to(tl.int64) * OUT * g_channel
    tap = pair // IN
    channel = pair - tap * IN
    place = FIRST + tap
    v = place // KW * down + top
    h = place % KW * right + left
    offset = v.to(tl.int64) * x_y + h.to(tl.int64) * x_x + channel.to(tl.int64) * x_channel
    # Images before this share, and where in the next one it begins: the loop's divisions are then of 32 bits.
    begin = part * share
    size = out_height * out_width
    image_0 = begin // size
    begin_0 = (begin - image_0 * size).to(tl.int32)
    x += image_0 * x_row
    grad += image_0 * g_row
    count = tl.minimum(M - begin, share)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, count.to(tl.int32), BK):
        pixel = start + tl.arange(0, BK)
        there = pixel < count
        image = (begin_0 + pixel) // size
        rest = begin_0 + pixel - image * size
        row = rest // out_width
        col = rest - row * out_width
        if DENSE:
            at = (begin_0 + pixel).to(tl.int64) * g_x
        else:
            at = image.to(tl.int64) * g_row + row.to(tl.int64) * g_y + col.to(tl.int64) * g_x
        a = tl.load(
            grad + at[None, :] + out.to(tl.int64)[:, None] * g_channel,
            mask=there[None, :] & (out < OUT)[:, None],
            other=0.0,
        )
        at = image.to(tl.int64) * x_row + row.to(tl.int64) * x_y + col.to(tl.int64) * x_x
        if IN % BN == 0:  # one tap
            down_by, right_by = tl.max(v, 0), tl.max(h, 0)
            live = there & (row + down_by >= 0) & (row + down_by < height)
            live = (live & (col + right_by >= 0) & (col + right_by < width))[:, None]
        else:
            live = (there[:, None] & (row[:, None] + v >= 0)) & (row[:, None] + v < height)
            live = live & (col[:, None] + h >= 0) & (col[:, None] + h < width)
        b = tl.load(x + at[:, None] + offset[None, :], mask=live & (pair < TAPS * IN)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if CENTRE != _NO_CENTRE:
        output = _group_of(group * OUT + out, OUT * GROUPS, G, INTERLEAVED)
        input = _group_of(group * IN + channel, IN * GROUPS, G, INTERLEAVED)
        live = (tap < TAPS - 1)[None, :] | _sees(output[:, None], input[None, :], CENTRE)
        acc = tl.where(live, acc, 0.0)
    at = (part * GROUPS + group) * OUT * (TAPS * IN)
    at = at + (out * (TAPS * IN))[:, None] + pair[None, :]
    tl.store(parts + at, acc, mask=(out < OUT)[:, None] & (pair < TAPS * IN)[None, :])


_VERTICAL_A, _VERTICAL_B, _HORIZONTAL_A, _HORIZONTAL_B = range(2, 6)  # after A and B


class _Mask:
    """The live taps of a kernel kh by kw under one of the operator's masks.

    Attributes:
        first: the first of them, in the order of rows.
        taps: how many there are whose channels are all alive.
        centre: how channel groups share the one after them.
    """

    __slots__ = ("centre", "first", "taps")

    def __init__(self, mask: int, kh: int, kw: int, channel_groups: int) -> None:
        above, left = kh // 2 * kw, kw // 2
        includes = mask % 2 == 1
        self.first, self.taps, self.centre = 0, above + left, _NO_CENTRE.value
        if mask in (_VERTICAL_A, _VERTICAL_B):
            self.taps = above + kw * includes
            return
        if mask in (_HORIZONTAL_A, _HORIZONTAL_B):
            self.first, self.taps = above, left
        if channel_groups == 1:
            self.taps += includes
        else:
            self.centre = (_UP_TO if includes else _BEFORE).value

    @property
    def all_taps(self) -> int:
        """With a centre that is shared."""
        return self.taps + (self.centre != _NO_CENTRE.value)


def _precision(dtype: torch.dtype) -> str:
    """TF32 only where torch would take it for a convolution."""
    if dtype != torch.float32:
        return "ieee"
    allowed = getattr(torch.backends.cudnn, "conv", None)
    tf32 = allowed.fp32_precision == "tf32" if allowed is not None else torch.backends.cudnn.allow_tf32
    return "tf32" if tf32 and torch.version.hip is None else "ieee"


def _as_channels_last(x: Tensor) -> Tensor:
    """Channels side by side, so that a tap's are read 16 bytes at a time; few of them are read as they lie."""
    if x.size(1) < _FEW or x.stride(1) == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _conv(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    y: Tensor,
    mask: _Mask,
    kw: int,
    offsets: tuple[int, int, int, int],
    transposed: bool,
    channel_groups: int,
    interleaved: bool,
    groups: int,
) -> None:
    inputs, outputs = x.size(1) // groups, y.size(1) // groups
    pixels = y.size(0) * y.size(2) * y.size(3)
    precision, half = _precision(x.dtype), x.dtype != torch.float32
    x = _as_channels_last(x)
    flat = inputs < _FEW
    # Multiply-adds in float32 need their registers for sums.
    BN = min(max(_power_of_two(outputs), 16), 128 if half else 64)
    BM = 128 if (half or precision == "tf32") and pixels >= 128 * 64 else 64
    BK = min(max(_power_of_two(inputs * mask.taps if flat else inputs), 16), 64 if half and BN < 128 else 32)
    BC = min(max(_power_of_two(triton.cdiv(inputs, channel_groups)), 16), BK)
    size = y.size(2) * y.size(3)
    _conv_kernel[(triton.cdiv(pixels, BM) * triton.cdiv(outputs, BN) * groups,)](
        x, packed, bias, y, pixels, x.size(2), x.size(3), y.size(2), y.size(3), *offsets, *x.stride(), y.stride(0),
        y.stride(1), y.stride(3), IN=inputs, OUT=outputs, KW=kw, FIRST=mask.first, TAPS=mask.taps, CENTRE=mask.centre,
        TRANSPOSED=transposed, GROUPS=groups, G=channel_groups, INTERLEAVED=interleaved, FLAT=flat, LARGE=size >= BM,
        SIDE_BY_SIDE=y.stride(3) == 1 and size % 8 == 0, PRECISION=precision, BM=BM, BN=BN, BK=BK, BC=BC,
        num_warps=8 if flat or BM * BN >= 128 * 128 else 4,
        num_stages=2 if BK * (BM + BN) * x.element_size() > 16384 else 3,
    )  # fmt: skip


def _packed(weight: Tensor, mask: _Mask, groups: int, transposed: bool) -> Tensor:
    """The live taps of a weight ``[O, I, kh, kw]`` as ``[groups, taps, inputs, outputs]``."""
    run = weight.contiguous().flatten(2)[:, :, mask.first : mask.first + mask.all_taps]
    run = run.unflatten(0, (groups, -1))
    return run.permute((0, 3, 1, 2) if transposed else (0, 3, 2, 1)).contiguous()


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: int,
    channel_groups: int,
    interleaved: bool,
    padding_h: int,
    padding_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
) -> Tensor:
    """``genfuse::masked_conv2d``."""
    outputs, _, kh, kw = weight.shape
    last = _is_channels_last(x) or _is_channels_last(weight)
    y = torch.empty(
        (
            *(x.size(0), outputs),
            *(x.size(2) + 2 * padding_h - dilation_h * (kh - 1), x.size(3) + 2 * padding_w - dilation_w * (kw - 1)),
        ),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    if y.numel() > 0 and x.numel() == 0:
        y.copy_(y.new_zeros(()) if bias is None else bias[:, None, None])
    elif y.numel() > 0:
        live = _Mask(mask, kh, kw, channel_groups)
        offsets = -padding_h, -padding_w, dilation_h, dilation_w
        numbers = None if bias is None else bias.contiguous()
        packed = _packed(weight, live, groups, False)
        _conv(x, packed, numbers, y, live, kw, offsets, False, channel_groups, interleaved, groups)
    return y


def masked_conv2d_backward(
    grad_y: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: int,
    channel_groups: int,
    interleaved: bool,
    padding_h: int,
    padding_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``genfuse::masked_conv2d_backward``: the gradients of x, weight and bias."""
    to_weight, to_bias = _like(weight, bool(needs & 2), x), _like(bias, bool(needs & 4), x)
    to_x = x.new_empty(0)
    if needs & 1:
        form = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
        to_x = torch.empty_like(x, memory_format=form)
    if grad_y is None or grad_y.numel() == 0 or x.numel() == 0:
        for gradient in (to_x, to_weight):
            gradient.zero_()
        if to_bias.numel() > 0 and grad_y is not None:
            to_bias.copy_(grad_y.sum((0, 2, 3), dtype=torch.float32))
        else:
            to_bias.zero_()
        return to_x, to_weight, to_bias
    _, _, kh, kw = weight.shape
    live = _Mask(mask, kh, kw, channel_groups)
    if to_bias.numel() > 0:
        to_bias.copy_(grad_y.sum((0, 2, 3), dtype=torch.float32))
    if to_x.numel() > 0 or to_weight.numel() > 0:
        grad_y = _as_channels_last(grad_y)
    if to_x.numel() > 0:
        offsets = padding_h, padding_w, -dilation_h, -dilation_w
        packed = _packed(weight, live, groups, True)
        _conv(grad_y, packed, None, to_x, live, kw, offsets, True, channel_groups, interleaved, groups)
    if to_weight.numel() > 0:
        to_weight.zero_()
        if live.all_taps > 0:
            offsets = -padding_h, -padding_w, dilation_h, dilation_w
            sums = _conv_weight(grad_y, x, live, kw, offsets, channel_groups, interleaved, groups)
            run = to_weight.flatten(2)[:, :, live.first : live.first + live.all_taps]
            run.copy_(sums.transpose(1, 2))
    return to_x, to_weight, to_bias


def _conv_weight(
    grad_y: Tensor,
    x: Tensor,
    mask: _Mask,
    kw: int,
    offsets: tuple[int, int, int, int],
    channel_groups: int,
    interleaved: bool,
    groups: int,
) -> Tensor:
    """The gradient of the live taps ``[O, taps, I / groups]``, in float32."""
    inputs, outputs, taps = x.size(1) // groups, grad_y.size(1) // groups, mask.all_taps
    pixels = grad_y.size(0) * grad_y.size(2) * grad_y.size(3)
    precision, half = _precision(x.dtype), x.dtype != torch.float32
    x = _as_channels_last(x)
    BM = min(max(_power_of_two(outputs), 16), 128 if half or precision == "tf32" else 64)
    BN = min(max(_power_of_two(taps * inputs), 16), 64)
    BK = 64 if half else 32
    programs = triton.cdiv(outputs, BM) * triton.cdiv(taps * inputs, BN) * groups
    blocks = triton.cdiv(pixels, BK)
    share = triton.cdiv(blocks, min(max(_SPLIT_PROGRAMS // programs, 1), blocks)) * BK
    shares = triton.cdiv(pixels, share)
    parts = x.new_empty((shares, outputs * groups, taps, inputs), dtype=torch.float32)
    steps = grad_y.stride()
    dense = _one_stride((grad_y.size(0), *grad_y.shape[2:]), (steps[0], *steps[2:]))
    if dense is not None:
        steps = *steps[:3], dense
    _conv_weight_kernel[(programs * shares,)](
        grad_y, x, parts, pixels, share, x.size(2), x.size(3), grad_y.size(2), grad_y.size(3), *offsets,
        *steps, *x.stride(), IN=inputs, OUT=outputs, KW=kw, FIRST=mask.first, TAPS=taps, CENTRE=mask.centre,
        GROUPS=groups, G=channel_groups, INTERLEAVED=interleaved, DENSE=dense is not None, PRECISION=precision, BM=BM,
        BN=BN, BK=BK, num_warps=4, num_stages=2 if BK * (BM + BN) * x.element_size() > 16384 else 3,
    )  # fmt: skip
    return parts[0] if shares == 1 else parts.sum(0)
