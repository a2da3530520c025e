"""LSTM and GRU in Triton: the recurrence of a whole layer and direction, forward and backward.

Two ways through time. A *sequence* kernel runs the whole loop in one program per tile of rows, with the recurrent
weights loaded once; it serves small hidden sizes and dense inputs. Everything else is one *step* kernel per time
step (two or three with layer norm or a projection), each fused with its share of the recurrent product: a launch
reads the state that the launch before it wrote, so the order of the stream is the only synchronisation. The large
products outside the recurrence (input projection, weight gradients) are torch's.

Arguments, results and saved tensors are those of the registered operators ``genfuse::lstm``, ``genfuse::gru`` and
their ``*_backward``, so forward and backward may run on different backends. Nothing here waits for the device:
random numbers are read from the device tensor ``rng`` (seed, offset), and batch sizes live on the host.

Shapes: T steps, B rows, I inputs, H cells, Hy outputs (P where projected, else H), N rows of all steps together.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "can_run_gru",
    "can_run_lstm",
    "gru",
    "gru_backward",
    "gru_objection",
    "lstm",
    "lstm_backward",
    "lstm_objection",
]

# Streams of random numbers: what is added to the offset of (seed, offset).
_ZONEOUT_H = tl.constexpr(0)
_ZONEOUT_C = tl.constexpr(1)
_WEIGHT, _INPUT, _OUTPUT = 2, 3, 4

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---------------------------------------------------------------------------------------------------------------------
# Device functions
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _int64(value):
    return tl.full((), 0, tl.int64) + value


@triton.jit
def _tanh(x):
    # (1 - e) / (1 + e) with e = exp(-2|x|) <= 1 cannot become inf / inf; near 0, where 1 - e cancels, the series.
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = 0.0218694885361552 + s * (-0.008863235529902197 + s * 0.003592128036572481)
    near = -0.3333333333333333 + s * (0.13333333333333333 + s * (-0.05396825396825397 + s * near))
    near = size * (1.0 + s * near)
    t = tl.where(size < 0.4, near, far)
    return tl.where(x < 0.0, -t, t)


@triton.jit
def _sigmoid(x):
    # exp(-x) = inf for very negative x, and 1 / inf is the right limit.
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _random24(rng, stream, element):
    """The 24 random bits of each element (int64): u = bits * 2^-24. Philox 4x32-10, word e % 4 of block e // 4."""
    seed = tl.load(rng)
    offset = tl.load(rng + 1) + stream
    block = element >> 2
    high = block * 0 + offset
    w0, w1, w2, w3 = tl.philox(
        seed, block.to(tl.uint32), (block >> 32).to(tl.uint32), high.to(tl.uint32), (high >> 32).to(tl.uint32)
    )
    word = element & 3
    bits = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return (bits >> 8).to(tl.int32)


@triton.jit
def _zoneout(new, old, p, limit, rng, stream, element, MODE: tl.constexpr):
    """MODE 0: new; 1: old where the draw is below the limit (training); 2: their mean (eval). Krueger et al. 2016."""
    result = new
    if MODE == 1:
        result = tl.where(_random24(rng, stream, element) < limit, old, new)
    if MODE == 2:
        result = p * old + (1.0 - p) * new
    return result


@triton.jit
def _zoneout_backward(grad, p, limit, rng, stream, element, MODE: tl.constexpr):
    """The gradient's parts that belong to the new and to the old state."""
    to_new = grad
    to_old = grad * 0.0
    if MODE == 1:
        kept = _random24(rng, stream, element) < limit
        to_new = tl.where(kept, 0.0, grad)
        to_old = tl.where(kept, grad, 0.0)
    if MODE == 2:
        to_new = (1.0 - p) * grad
        to_old = p * grad
    return to_new, to_old


@triton.jit
def _product(
    acc, a, a_row, a_ok, w, w_stride_n, w_stride_k, cols, col_ok, K, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """acc + A W^T for a tile of rows and of W's rows (``w_stride_n``) in float32; A is cast to W's dtype.

    ``a_row`` are the element offsets of A's rows; rows without ``a_ok`` count as zeros.
    """
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        k_ok = k < K
        left = tl.load(a + a_row[:, None] + k[None, :], mask=a_ok[:, None] & k_ok[None, :], other=0.0)
        right = tl.load(
            w + cols[None, :].to(tl.int64) * w_stride_n + k[:, None].to(tl.int64) * w_stride_k,
            mask=k_ok[:, None] & col_ok[None, :],
            other=0.0,
        )
        acc = tl.dot(left.to(right.dtype), right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _alive(resets, t, B, rows, ok):
    """Rows whose state goes into step t: not those that are reset before it."""
    result = ok
    if resets is not None:
        result = ok & (tl.load(resets + _int64(t) * B + rows, mask=ok, other=0) == 0)
    return result


@triton.jit
def _lstm_cell_backward(d_tilde, i, f, g, c_old):
    """Gradients of the pre-activations of i, f, g and of c_{t-1}, given that of c~ = f c_{t-1} + i g."""
    return d_tilde * g * i * (1.0 - i), d_tilde * c_old * f * (1.0 - f), d_tilde * i * (1.0 - g * g), d_tilde * f


@triton.jit
def _moments(a0, a1, a2, a3, ok, size, eps):
    """Mean and 1 / sqrt(variance + eps) of rows cut into four parts [rows, BH]; ``size`` is the row's true length."""
    total = tl.sum(tl.where(ok, a0 + a1 + a2 + a3, 0.0), 1)
    mean = total / size
    d0 = a0 - mean[:, None]
    d1 = a1 - mean[:, None]
    d2 = a2 - mean[:, None]
    d3 = a3 - mean[:, None]
    variance = tl.sum(tl.where(ok, d0 * d0 + d1 * d1 + d2 * d2 + d3 * d3, 0.0), 1) / size
    return mean, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def _normalised(a, mean, rstd):
    return (a - mean[:, None]) * rstd[:, None]


@triton.jit
def _lstm_norm_tile(
    x0, x1, x2, x3, r0, r1, r2, r3, c_old, ln_ih, ln_hh, bias, ln_c_weight, ln_c_bias, cols, ok, H, eps
):
    """The layer-normalised cell (Ba, Kiros, Hinton 2016, eq. 20-22) for whole rows: c~, h~ and the six statistics.

    x*, r*: W x and U h, gate by gate, [rows, BH]; ``cols`` [BH] are the cells, ``ok`` [rows, BH] those that exist.
    """
    c_ok = cols < H
    mean_x, rstd_x = _moments(x0, x1, x2, x3, ok, 4 * H, eps)
    mean_r, rstd_r = _moments(r0, r1, r2, r3, ok, 4 * H, eps)
    a0, a1, a2, a3 = _lstm_norm_gates(
        x0, x1, x2, x3, r0, r1, r2, r3, mean_x, rstd_x, mean_r, rstd_r, ln_ih, ln_hh, bias, cols, c_ok, H
    )
    c_tilde = tl.where(ok, a1 * c_old + a0 * a2, 0.0)
    mean_c = tl.sum(c_tilde, 1) / H
    centred = tl.where(ok, c_tilde - mean_c[:, None], 0.0)
    rstd_c = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / H + eps)
    w_c = tl.load(ln_c_weight + cols, mask=c_ok, other=0.0).to(tl.float32)
    b_c = tl.load(ln_c_bias + cols, mask=c_ok, other=0.0).to(tl.float32)
    h_tilde = a3 * _tanh(w_c[None, :] * centred * rstd_c[:, None] + b_c[None, :])
    return c_tilde, h_tilde, mean_x, rstd_x, mean_r, rstd_r, mean_c, rstd_c


@triton.jit
def _lstm_norm_gate(x, r, mean_x, rstd_x, mean_r, rstd_r, ln_ih, ln_hh, bias, cols, c_ok):
    w_x = tl.load(ln_ih + cols, mask=c_ok, other=0.0).to(tl.float32)
    w_r = tl.load(ln_hh + cols, mask=c_ok, other=0.0).to(tl.float32)
    a = w_x[None, :] * _normalised(x, mean_x, rstd_x) + w_r[None, :] * _normalised(r, mean_r, rstd_r)
    if bias is not None:
        a += tl.load(bias + cols, mask=c_ok, other=0.0)[None, :]
    return a


@triton.jit
def _lstm_norm_gates(x0, x1, x2, x3, r0, r1, r2, r3, mean_x, rstd_x, mean_r, rstd_r, ln_ih, ln_hh, bias, cols, c_ok, H):
    i = _sigmoid(_lstm_norm_gate(x0, r0, mean_x, rstd_x, mean_r, rstd_r, ln_ih, ln_hh, bias, cols, c_ok))
    f = _sigmoid(_lstm_norm_gate(x1, r1, mean_x, rstd_x, mean_r, rstd_r, ln_ih, ln_hh, bias, H + cols, c_ok))
    g = _tanh(_lstm_norm_gate(x2, r2, mean_x, rstd_x, mean_r, rstd_r, ln_ih, ln_hh, bias, 2 * H + cols, c_ok))
    o = _sigmoid(_lstm_norm_gate(x3, r3, mean_x, rstd_x, mean_r, rstd_r, ln_ih, ln_hh, bias, 3 * H + cols, c_ok))
    return i, f, g, o


@triton.jit
def _norm_backward(d0, d1, d2, d3, n0, n1, n2, n3, rstd, ok, size):
    """Gradient of a normalised row's input from the gradients d* of its normalised values n*."""
    mean_d = tl.sum(tl.where(ok, d0 + d1 + d2 + d3, 0.0), 1) / size
    mean_dn = tl.sum(tl.where(ok, d0 * n0 + d1 * n1 + d2 * n2 + d3 * n3, 0.0), 1) / size
    m = mean_d[:, None]
    p = mean_dn[:, None]
    s = rstd[:, None]
    return (d0 - m - n0 * p) * s, (d1 - m - n1 * p) * s, (d2 - m - n2 * p) * s, (d3 - m - n3 * p) * s


@triton.jit
def _lstm_norm_tile_backward(
    d_u, d_tilde, x0, x1, x2, x3, r0, r1, r2, r3, mean_x, rstd_x, mean_r, rstd_r, mean_c, rstd_c, c_old,
    ln_ih, ln_hh, bias, ln_c_weight, ln_c_bias, cols, ok, H,
):  # fmt: skip
    """Back through the layer-normalised cell, for whole rows.

    d_u: gradient of o tanh(norm(c~)); d_tilde: what reaches c~ past it (from c_t).
    Returns the gradients of the pre-activations (a0..a3), of W x (4), of U h (4) and of c_{t-1}, of the cell norm's
    output and its normalised input, and u = o tanh(norm(c~)).
    """
    c_ok = cols < H
    i, f, g, o = _lstm_norm_gates(
        x0, x1, x2, x3, r0, r1, r2, r3, mean_x, rstd_x, mean_r, rstd_r, ln_ih, ln_hh, bias, cols, c_ok, H
    )
    w_c = tl.load(ln_c_weight + cols, mask=c_ok, other=0.0).to(tl.float32)
    b_c = tl.load(ln_c_bias + cols, mask=c_ok, other=0.0).to(tl.float32)
    c_hat = tl.where(ok, _normalised(f * c_old + i * g, mean_c, rstd_c), 0.0)
    tanh_c = _tanh(w_c[None, :] * c_hat + b_c[None, :])
    d_norm = tl.where(ok, d_u * o * (1.0 - tanh_c * tanh_c), 0.0)
    d_hat = d_norm * w_c[None, :]
    mean_d = tl.sum(d_hat, 1) / H
    mean_dn = tl.sum(d_hat * c_hat, 1) / H
    d_c = d_tilde + (d_hat - mean_d[:, None] - c_hat * mean_dn[:, None]) * rstd_c[:, None]
    a0, a1, a2, d_c_old = _lstm_cell_backward(d_c, i, f, g, c_old)
    a3 = d_u * tanh_c * o * (1.0 - o)

    n0 = _normalised(x0, mean_x, rstd_x)
    n1 = _normalised(x1, mean_x, rstd_x)
    n2 = _normalised(x2, mean_x, rstd_x)
    n3 = _normalised(x3, mean_x, rstd_x)
    w0 = tl.load(ln_ih + cols, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    w1 = tl.load(ln_ih + H + cols, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    w2 = tl.load(ln_ih + 2 * H + cols, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    w3 = tl.load(ln_ih + 3 * H + cols, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    dx0, dx1, dx2, dx3 = _norm_backward(a0 * w0, a1 * w1, a2 * w2, a3 * w3, n0, n1, n2, n3, rstd_x, ok, 4 * H)
    n0 = _normalised(r0, mean_r, rstd_r)
    n1 = _normalised(r1, mean_r, rstd_r)
    n2 = _normalised(r2, mean_r, rstd_r)
    n3 = _normalised(r3, mean_r, rstd_r)
    w0 = tl.load(ln_hh + cols, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    w1 = tl.load(ln_hh + H + cols, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    w2 = tl.load(ln_hh + 2 * H + cols, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    w3 = tl.load(ln_hh + 3 * H + cols, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    dr0, dr1, dr2, dr3 = _norm_backward(a0 * w0, a1 * w1, a2 * w2, a3 * w3, n0, n1, n2, n3, rstd_r, ok, 4 * H)
    return a0, a1, a2, a3, dx0, dx1, dx2, dx3, dr0, dr1, dr2, dr3, d_c_old, d_norm, c_hat, o * tanh_c


@triton.jit
def _load_gates(p, row, H, cols, ok):
    """Four parts of rows of a float32 [*, 4H] tensor; ``row`` [rows] int64 row numbers."""
    at = p + row[:, None] * (4 * H) + cols[None, :]
    return (
        tl.load(at, mask=ok, other=0.0),
        tl.load(at + H, mask=ok, other=0.0),
        tl.load(at + 2 * H, mask=ok, other=0.0),
        tl.load(at + 3 * H, mask=ok, other=0.0),
    )


@triton.jit
def _store_gates(p, row, H, cols, ok, v0, v1, v2, v3):
    at = p + row[:, None] * (4 * H) + cols[None, :]
    tl.store(at, v0.to(p.dtype.element_ty), mask=ok)
    tl.store(at + H, v1.to(p.dtype.element_ty), mask=ok)
    tl.store(at + 2 * H, v2.to(p.dtype.element_ty), mask=ok)
    tl.store(at + 3 * H, v3.to(p.dtype.element_ty), mask=ok)


@triton.jit
def _store_h(y, hidden, out_mask, row, b_row, Hy, cols, ok, h):
    """Writes h to ``hidden`` (where kept) and, under the output mask, to y."""
    at = row[:, None] * Hy + cols[None, :]
    shown = h
    if out_mask is not None:
        shown = h * tl.load(out_mask + b_row[:, None] * Hy + cols[None, :], mask=ok, other=0.0)
    if hidden is not None:
        tl.store(hidden + at, h, mask=ok)
    tl.store(y + at, shown.to(y.dtype.element_ty), mask=ok)


# ---------------------------------------------------------------------------------------------------------------------
# Step kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["numel", "period", "limit"])
def _dropout(x, out, rng, stream, numel, period, limit, scale, BLOCK: tl.constexpr):
    """out = x * (u >= p) / (1 - p), element i under the mask's element i % period."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < numel
    kept = _random24(rng, stream, i % period) >= limit
    value = tl.load(x + i, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + i, tl.where(kept, value * scale, 0.0).to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["M", "t", "B"])
def _matmul(
    a, w, out, out_row, resets, M, t, B, stride_n, stride_k, N: tl.constexpr, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[out_row + m] = A[m] W^T for m < M, in float32, with rows that are reset before step t counted as zeros."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    ok = rows < M
    b_row = rows.to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    acc = _product(
        acc, a, b_row * K, _alive(resets, t, B, rows, ok), w, stride_n, stride_k, cols, cols < N, K, BK, PRECISION
    )
    at = (b_row + out_row)[:, None] * N + cols[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=ok[:, None] & (cols < N)[None, :])


@triton.jit(do_not_specialize=["t", "row", "count", "B", "limit_h", "limit_c"])
def _lstm_step(
    xp, w, bias, h_in, h_out, c, u, y, gates, cells, hidden, out_mask, resets, rng,
    t, row, count, B, zoneout_h, zoneout_c, limit_h, limit_c,
    ZONE_H: tl.constexpr, ZONE_C: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One plain LSTM step for a tile of rows and cells: recurrent product, gates, cell and (no projection) output.

    xp [N, 4H] W x; h_in, h_out [B, K] float32, the state before and after; c [B, H] float32, updated in place;
    u [B, H]: where given, h~ before the projection goes there and nothing else of h is written.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    col_ok = cols < H
    live = rows < count
    b_row = rows.to(tl.int64)
    state = b_row[:, None] * H + cols[None, :]
    ok = live[:, None] & col_ok[None, :]
    go = _alive(resets, t, B, rows, live)
    old_ok = go[:, None] & col_ok[None, :]

    a_i = tl.zeros((BM, BN), tl.float32)
    a_f = tl.zeros((BM, BN), tl.float32)
    a_g = tl.zeros((BM, BN), tl.float32)
    a_o = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        k_ok = k < K
        h = tl.load(h_in + b_row[:, None] * K + k[None, :], mask=go[:, None] & k_ok[None, :], other=0.0)
        at = w + cols[None, :].to(tl.int64) * K + k[:, None]
        w_ok = k_ok[:, None] & col_ok[None, :]
        w_i = tl.load(at, mask=w_ok, other=0.0)
        h = h.to(w_i.dtype)
        a_i = tl.dot(h, w_i, a_i, input_precision=PRECISION)
        a_f = tl.dot(h, tl.load(at + H * K, mask=w_ok, other=0.0), a_f, input_precision=PRECISION)
        a_g = tl.dot(h, tl.load(at + 2 * H * K, mask=w_ok, other=0.0), a_g, input_precision=PRECISION)
        a_o = tl.dot(h, tl.load(at + 3 * H * K, mask=w_ok, other=0.0), a_o, input_precision=PRECISION)

    n_row = b_row + row
    x_i, x_f, x_g, x_o = _load_gates(xp, n_row, H, cols, ok)
    if bias is not None:
        x_i += tl.load(bias + cols, mask=col_ok, other=0.0)[None, :]
        x_f += tl.load(bias + H + cols, mask=col_ok, other=0.0)[None, :]
        x_g += tl.load(bias + 2 * H + cols, mask=col_ok, other=0.0)[None, :]
        x_o += tl.load(bias + 3 * H + cols, mask=col_ok, other=0.0)[None, :]
    i = _sigmoid(a_i + x_i)
    f = _sigmoid(a_f + x_f)
    g = _tanh(a_g + x_g)
    o = _sigmoid(a_o + x_o)
    c_old = tl.load(c + state, mask=old_ok, other=0.0)
    c_tilde = f * c_old + i * g
    h_tilde = o * _tanh(c_tilde)
    element = (_int64(t) * B + b_row)[:, None] * H + cols[None, :]
    c_new = _zoneout(c_tilde, c_old, zoneout_c, limit_c, rng, _ZONEOUT_C, element, ZONE_C)
    tl.store(c + state, c_new, mask=ok)
    if gates is not None:
        _store_gates(gates, n_row, H, cols, ok, i, f, g, o)
        tl.store(cells + n_row[:, None] * H + cols[None, :], c_new, mask=ok)
    if u is not None:
        tl.store(u + state, h_tilde, mask=ok)
    else:
        # Rows whose sequence is over (or not begun) carry their state along.
        carried = tl.load(h_in + state, mask=(rows < B)[:, None] & col_ok[None, :] & (old_ok | ~ok), other=0.0)
        h_new = _zoneout(h_tilde, carried, zoneout_h, limit_h, rng, _ZONEOUT_H, element, ZONE_H)
        tl.store(h_out + state, tl.where(ok, h_new, carried), mask=(rows < B)[:, None] & col_ok[None, :])
        _store_h(y, hidden, out_mask, n_row, b_row, H, cols, ok, h_new)


@triton.jit(do_not_specialize=["t", "row", "rec_row", "count", "B", "limit_c", "limit_h"])
def _lstm_norm_step(
    xp, rec, ln_ih, ln_hh, bias, ln_c_weight, ln_c_bias, h_in, h_out, c, u, y, cells, stats, hidden, out_mask,
    resets, rng, t, row, rec_row, count, B, eps, zoneout_h, zoneout_c, limit_h, limit_c,
    ZONE_H: tl.constexpr, ZONE_C: tl.constexpr, H: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """One layer-normalised LSTM step after its recurrent product ``rec`` [*, 4H]: one program a row."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    cols = tl.arange(0, BH)
    col_ok = cols < H
    live = rows < count
    b_row = rows.to(tl.int64)
    state = b_row[:, None] * H + cols[None, :]
    ok = live[:, None] & col_ok[None, :]
    go = _alive(resets, t, B, rows, live)
    old_ok = go[:, None] & col_ok[None, :]
    n_row = b_row + row

    x0, x1, x2, x3 = _load_gates(xp, n_row, H, cols, ok)
    r0, r1, r2, r3 = _load_gates(rec, b_row + rec_row, H, cols, ok)
    c_old = tl.load(c + state, mask=old_ok, other=0.0)
    c_tilde, h_tilde, mean_x, rstd_x, mean_r, rstd_r, mean_c, rstd_c = _lstm_norm_tile(
        x0, x1, x2, x3, r0, r1, r2, r3, c_old, ln_ih, ln_hh, bias, ln_c_weight, ln_c_bias, cols, ok, H, eps
    )
    element = (_int64(t) * B + b_row)[:, None] * H + cols[None, :]
    c_new = _zoneout(c_tilde, c_old, zoneout_c, limit_c, rng, _ZONEOUT_C, element, ZONE_C)
    tl.store(c + state, c_new, mask=ok)
    if cells is not None:
        tl.store(cells + n_row[:, None] * H + cols[None, :], c_new, mask=ok)
        _store_stats(stats, n_row, live, mean_x, rstd_x, mean_r, rstd_r, mean_c, rstd_c)
    if u is not None:
        tl.store(u + state, h_tilde, mask=ok)
    else:
        carried = tl.load(h_in + state, mask=col_ok[None, :] & (old_ok | ~ok), other=0.0)
        h_new = _zoneout(h_tilde, carried, zoneout_h, limit_h, rng, _ZONEOUT_H, element, ZONE_H)
        tl.store(h_out + state, tl.where(ok, h_new, carried), mask=col_ok[None, :])
        _store_h(y, hidden, out_mask, n_row, b_row, H, cols, ok, h_new)


@triton.jit
def _store_stats(stats, n_row, live, mean_x, rstd_x, mean_r, rstd_r, mean_c, rstd_c):
    tl.store(stats + n_row * 6, mean_x, mask=live)
    tl.store(stats + n_row * 6 + 1, rstd_x, mask=live)
    tl.store(stats + n_row * 6 + 2, mean_r, mask=live)
    tl.store(stats + n_row * 6 + 3, rstd_r, mask=live)
    tl.store(stats + n_row * 6 + 4, mean_c, mask=live)
    tl.store(stats + n_row * 6 + 5, rstd_c, mask=live)


@triton.jit(do_not_specialize=["t", "row", "count", "B", "limit_h"])
def _lstm_project(
    u, w_hr, h_in, h_out, y, hidden, out_mask, resets, rng, t, row, count, B, zoneout_h, limit_h,
    ZONE_H: tl.constexpr, P: tl.constexpr, H: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h~ = W_hr u, zoneout and output: the end of a projected step. u [B, H], w_hr [P, H], h_in and h_out [B, P]."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    col_ok = cols < P
    live = rows < count
    b_row = rows.to(tl.int64)
    ok = live[:, None] & col_ok[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    h_tilde = _product(acc, u, b_row * H, live, w_hr, H, 1, cols, col_ok, H, BK, PRECISION)
    old_ok = _alive(resets, t, B, rows, live)[:, None] & col_ok[None, :]
    state = b_row[:, None] * P + cols[None, :]
    inside = (rows < B)[:, None] & col_ok[None, :]
    carried = tl.load(h_in + state, mask=inside & (old_ok | ~ok), other=0.0)
    element = (_int64(t) * B + b_row)[:, None] * P + cols[None, :]
    h_new = _zoneout(h_tilde, carried, zoneout_h, limit_h, rng, _ZONEOUT_H, element, ZONE_H)
    tl.store(h_out + state, tl.where(ok, h_new, carried), mask=inside)
    _store_h(y, hidden, out_mask, b_row + row, b_row, P, cols, ok, h_new)


@triton.jit
def _grad_h_tile(
    d_next, d_width, w, h_direct, grad_y, out_mask, resets, rng,
    t, row, count, t_next, row_next, count_next, B, zoneout_h, limit_h, rows, cols,
    ZONE_H: tl.constexpr, Hy: tl.constexpr, K: tl.constexpr, SKIP: tl.constexpr, H: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of h~_t for a tile, from everything that reads h_t; ``h_direct`` [B, Hy] is brought up to date.

    The step after this one (in the order of the forward pass) is ``t_next`` with ``count_next`` rows; its
    pre-activation gradients are ``d_next[row_next + b]``. With SKIP (GRU), columns from 2H on lie one H further right.
    ``h_direct`` holds what bypasses the product: zoneout's, and the rows that the steps so far left alone.
    """
    col_ok = cols < Hy
    b_row = rows.to(tl.int64)
    inside = (rows < B)[:, None] & col_ok[None, :]
    go = _alive(resets, t_next, B, rows, rows < count_next)
    grad = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        k_ok = k < K
        from_col = k
        if SKIP:
            from_col = tl.where(k < 2 * H, k, k + H)
        left = tl.load(
            d_next + (b_row + row_next)[:, None] * d_width + from_col[None, :],
            mask=go[:, None] & k_ok[None, :],
            other=0.0,
        )
        right = tl.load(
            w + k[:, None].to(tl.int64) * Hy + cols[None, :], mask=k_ok[:, None] & col_ok[None, :], other=0.0
        )
        grad = tl.dot(left.to(right.dtype), right, grad, input_precision=PRECISION)
    state = b_row[:, None] * Hy + cols[None, :]
    grad += tl.load(h_direct + state, mask=inside, other=0.0)
    ok = (rows < count)[:, None] & col_ok[None, :]
    if grad_y is not None:
        shown = tl.load(grad_y + (b_row + row)[:, None] * Hy + cols[None, :], mask=ok, other=0.0).to(tl.float32)
        if out_mask is not None:
            shown *= tl.load(out_mask + state, mask=ok, other=0.0)
        grad += shown
    element = (_int64(t) * B + b_row)[:, None] * Hy + cols[None, :]
    to_new, to_old = _zoneout_backward(grad, zoneout_h, limit_h, rng, _ZONEOUT_H, element, ZONE_H)
    back = _alive(resets, t, B, rows, rows < count)[:, None] & col_ok[None, :]
    passed = tl.where(back, to_old, 0.0)
    return to_new, tl.where(ok, passed, grad), state, inside, ok, back


@triton.jit(do_not_specialize=["t", "row", "count", "t_next", "row_next", "count_next", "B", "limit_h"])
def _hidden_backward(
    d_next, w, h_direct, grad_y, out_mask, resets, rng, d_tilde,
    t, row, count, t_next, row_next, count_next, B, zoneout_h, limit_h,
    ZONE_H: tl.constexpr, Hy: tl.constexpr, K: tl.constexpr, OUT_BY_STEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of h~_t, alone: for layer norm and projection, whose cell needs whole rows of it.

    d_tilde [B, Hy] or, OUT_BY_STEP, [N, Hy].
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    grad, direct, state, inside, ok, _ = _grad_h_tile(
        d_next, K, w, h_direct, grad_y, out_mask, resets, rng,
        t, row, count, t_next, row_next, count_next, B, zoneout_h, limit_h, rows, cols,
        ZONE_H, Hy, K, False, 0, BM, BN, BK, PRECISION,
    )  # fmt: skip
    tl.store(h_direct + state, direct, mask=inside)
    shift = 0
    if OUT_BY_STEP:
        shift = row
    at = (rows.to(tl.int64) + shift)[:, None] * Hy + cols[None, :]
    tl.store(d_tilde + at, grad.to(d_tilde.dtype.element_ty), mask=ok)


@triton.jit
def _old_cell(cells, c0, row_old, count_old, rows, n, cols, ok):
    """State [rows, n] before a step: the row saved by the step before, or the initial state."""
    b_row = rows.to(tl.int64)
    saved = (rows < count_old)[:, None]
    before = tl.load(cells + (b_row + row_old)[:, None] * n + cols[None, :], mask=ok & saved, other=0.0)
    first = tl.load(c0 + b_row[:, None] * n + cols[None, :], mask=ok & ~saved, other=0.0)
    return tl.where(saved, before.to(tl.float32), first.to(tl.float32))


@triton.jit(
    do_not_specialize=[
        "t", "row", "count", "t_next", "row_next", "count_next", "row_old", "count_old", "B", "limit_h", "limit_c",
    ]
)  # fmt: skip
def _lstm_step_backward(
    d_next, w, h_direct, c_grad, grad_y, out_mask, resets, rng, gates, cells, c0, d_gates, u,
    t, row, count, t_next, row_next, count_next, row_old, count_old, B, zoneout_h, zoneout_c, limit_h, limit_c,
    ZONE_H: tl.constexpr, ZONE_C: tl.constexpr, PROJECTED: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One plain LSTM step backward for a tile of rows and cells, with the product that gives it its gradient.

    Without projection that product is d_next[row_next + b] W_hh (K = 4H). PROJECTED: d_next [N, P] is the gradient
    of h~_t itself, the product is with W_hr (K = P), and u [N, H] receives o tanh(c~) for W_hr's gradient.
    c_grad [B, H] float32 is the gradient of c_t on entry and of c_{t-1} on return; d_gates [N, 4H] the result.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    b_row = rows.to(tl.int64)
    col_ok = cols < H
    if PROJECTED:
        live = rows < count
        ok = live[:, None] & col_ok[None, :]
        back = _alive(resets, t, B, rows, live)[:, None] & col_ok[None, :]
        state = b_row[:, None] * H + cols[None, :]
        grad = tl.zeros((BM, BN), tl.float32)
        grad = _product(grad, d_next, (b_row + row) * K, live, w, 1, H, cols, col_ok, K, BK, PRECISION)
    else:
        grad, direct, state, inside, ok, back = _grad_h_tile(
            d_next, 4 * H, w, h_direct, grad_y, out_mask, resets, rng,
            t, row, count, t_next, row_next, count_next, B, zoneout_h, limit_h, rows, cols,
            ZONE_H, H, K, False, 0, BM, BN, BK, PRECISION,
        )  # fmt: skip
        tl.store(h_direct + state, direct, mask=inside)

    n_row = b_row + row
    i, f, g, o = _load_gates(gates, n_row, H, cols, ok)
    c_old = _old_cell(cells, c0, row_old, count_old, rows, H, cols, back)
    tanh_c = _tanh(f * c_old + i * g)
    element = (_int64(t) * B + b_row)[:, None] * H + cols[None, :]
    d_c = tl.load(c_grad + state, mask=ok, other=0.0)
    to_new, to_old = _zoneout_backward(d_c, zoneout_c, limit_c, rng, _ZONEOUT_C, element, ZONE_C)
    d_tilde = to_new + grad * o * (1.0 - tanh_c * tanh_c)
    d_i, d_f, d_g, d_old = _lstm_cell_backward(d_tilde, i, f, g, c_old)
    d_o = grad * tanh_c * o * (1.0 - o)
    tl.store(c_grad + state, tl.where(back, d_old + to_old, 0.0), mask=ok)
    _store_gates(d_gates, n_row, H, cols, ok, d_i, d_f, d_g, d_o)
    if u is not None:
        tl.store(u + n_row[:, None] * H + cols[None, :], (o * tanh_c).to(u.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["t", "row", "count", "row_old", "count_old", "B", "limit_c"])
def _lstm_norm_step_backward(
    d_u, c_grad, xp, rec, stats, cells, c0, ln_ih, ln_hh, bias, ln_c_weight, ln_c_bias, resets, rng,
    d_x, d_rec, sum_a, sum_ih, sum_hh, sum_cw, sum_cb, u,
    t, row, count, row_old, count_old, B, zoneout_c, limit_c,
    ZONE_C: tl.constexpr, H: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """One layer-normalised LSTM step backward, one program a row.

    d_u [B, H] is the gradient of o tanh(norm(c~)). The sum_* [B, 4H] or [B, H] float32 collect, over the steps, each
    row's gradients of biases and gains; only this program ever touches its row.
    """
    rows = tl.program_id(0) + tl.arange(0, 1)
    cols = tl.arange(0, BH)
    b_row = rows.to(tl.int64)
    ok = (rows < count)[:, None] & (cols < H)[None, :]
    back = _alive(resets, t, B, rows, rows < count)[:, None] & (cols < H)[None, :]
    state = b_row[:, None] * H + cols[None, :]
    n_row = b_row + row
    x0, x1, x2, x3 = _load_gates(xp, n_row, H, cols, ok)
    r0, r1, r2, r3 = _load_gates(rec, n_row, H, cols, ok)
    mean_x, rstd_x, mean_r, rstd_r, mean_c, rstd_c = _load_stats(stats, n_row, rows < count)
    c_old = _old_cell(cells, c0, row_old, count_old, rows, H, cols, back)
    element = (_int64(t) * B + b_row)[:, None] * H + cols[None, :]
    d_c = tl.load(c_grad + state, mask=ok, other=0.0)
    to_new, to_old = _zoneout_backward(d_c, zoneout_c, limit_c, rng, _ZONEOUT_C, element, ZONE_C)
    grad = tl.load(d_u + state, mask=ok, other=0.0).to(tl.float32)
    a0, a1, a2, a3, dx0, dx1, dx2, dx3, dr0, dr1, dr2, dr3, d_old, d_norm, c_hat, u_now = _lstm_norm_tile_backward(
        grad, to_new, x0, x1, x2, x3, r0, r1, r2, r3, mean_x, rstd_x, mean_r, rstd_r, mean_c, rstd_c, c_old,
        ln_ih, ln_hh, bias, ln_c_weight, ln_c_bias, cols, ok, H,
    )  # fmt: skip
    tl.store(c_grad + state, tl.where(back, d_old + to_old, 0.0), mask=ok)
    _store_gates(d_x, n_row, H, cols, ok, dx0, dx1, dx2, dx3)
    _store_gates(d_rec, n_row, H, cols, ok, dr0, dr1, dr2, dr3)
    if u is not None:
        tl.store(u + n_row[:, None] * H + cols[None, :], u_now.to(u.dtype.element_ty), mask=ok)
    s0, s1, s2, s3 = _load_gates(sum_a, b_row, H, cols, ok)
    _store_gates(sum_a, b_row, H, cols, ok, s0 + a0, s1 + a1, s2 + a2, s3 + a3)
    s0, s1, s2, s3 = _load_gates(sum_ih, b_row, H, cols, ok)
    _store_gates(
        sum_ih, b_row, H, cols, ok,
        s0 + a0 * _normalised(x0, mean_x, rstd_x), s1 + a1 * _normalised(x1, mean_x, rstd_x),
        s2 + a2 * _normalised(x2, mean_x, rstd_x), s3 + a3 * _normalised(x3, mean_x, rstd_x),
    )  # fmt: skip
    s0, s1, s2, s3 = _load_gates(sum_hh, b_row, H, cols, ok)
    _store_gates(
        sum_hh, b_row, H, cols, ok,
        s0 + a0 * _normalised(r0, mean_r, rstd_r), s1 + a1 * _normalised(r1, mean_r, rstd_r),
        s2 + a2 * _normalised(r2, mean_r, rstd_r), s3 + a3 * _normalised(r3, mean_r, rstd_r),
    )  # fmt: skip
    tl.store(sum_cw + state, tl.load(sum_cw + state, mask=ok, other=0.0) + d_norm * c_hat, mask=ok)
    tl.store(sum_cb + state, tl.load(sum_cb + state, mask=ok, other=0.0) + d_norm, mask=ok)


@triton.jit
def _load_stats(stats, n_row, live):
    at = stats + n_row * 6
    return (
        tl.load(at, mask=live, other=0.0),
        tl.load(at + 1, mask=live, other=0.0),
        tl.load(at + 2, mask=live, other=0.0),
        tl.load(at + 3, mask=live, other=0.0),
        tl.load(at + 4, mask=live, other=0.0),
        tl.load(at + 5, mask=live, other=0.0),
    )


@triton.jit(do_not_specialize=["t", "row", "count", "B", "limit_h"])
def _gru_step(
    xp, w, bias_ih, bias_hh, h_in, h_out, y, gates, hidden, out_mask, resets, rng,
    t, row, count, B, zoneout_h, limit_h, ZONE_H: tl.constexpr, H: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One GRU step for a tile of rows and cells. xp [N, 3H] W x; h_in, h_out [B, H] float32; gates [N, 4H]."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    col_ok = cols < H
    live = rows < count
    b_row = rows.to(tl.int64)
    state = b_row[:, None] * H + cols[None, :]
    ok = live[:, None] & col_ok[None, :]
    go = _alive(resets, t, B, rows, live)

    a_r = tl.zeros((BM, BN), tl.float32)
    a_z = tl.zeros((BM, BN), tl.float32)
    a_n = tl.zeros((BM, BN), tl.float32)
    for start in range(0, H, BK):
        k = start + tl.arange(0, BK)
        k_ok = k < H
        h = tl.load(h_in + b_row[:, None] * H + k[None, :], mask=go[:, None] & k_ok[None, :], other=0.0)
        at = w + cols[None, :].to(tl.int64) * H + k[:, None]
        w_ok = k_ok[:, None] & col_ok[None, :]
        w_r = tl.load(at, mask=w_ok, other=0.0)
        h = h.to(w_r.dtype)
        a_r = tl.dot(h, w_r, a_r, input_precision=PRECISION)
        a_z = tl.dot(h, tl.load(at + H * H, mask=w_ok, other=0.0), a_z, input_precision=PRECISION)
        a_n = tl.dot(h, tl.load(at + 2 * H * H, mask=w_ok, other=0.0), a_n, input_precision=PRECISION)

    n_row = b_row + row
    at = xp + n_row[:, None] * (3 * H) + cols[None, :]
    a_r += tl.load(at, mask=ok, other=0.0)
    a_z += tl.load(at + H, mask=ok, other=0.0)
    x_n = tl.load(at + 2 * H, mask=ok, other=0.0)
    if bias_ih is not None:
        a_r += tl.load(bias_ih + cols, mask=col_ok, other=0.0)[None, :].to(tl.float32)
        a_z += tl.load(bias_ih + H + cols, mask=col_ok, other=0.0)[None, :].to(tl.float32)
        x_n += tl.load(bias_ih + 2 * H + cols, mask=col_ok, other=0.0)[None, :].to(tl.float32)
    if bias_hh is not None:
        a_r += tl.load(bias_hh + cols, mask=col_ok, other=0.0)[None, :].to(tl.float32)
        a_z += tl.load(bias_hh + H + cols, mask=col_ok, other=0.0)[None, :].to(tl.float32)
        a_n += tl.load(bias_hh + 2 * H + cols, mask=col_ok, other=0.0)[None, :].to(tl.float32)
    r = _sigmoid(a_r)
    z = _sigmoid(a_z)
    n = _tanh(x_n + r * a_n)
    inside = (rows < B)[:, None] & col_ok[None, :]
    old_ok = go[:, None] & col_ok[None, :]
    carried = tl.load(h_in + state, mask=inside & (old_ok | ~ok), other=0.0)
    element = (_int64(t) * B + b_row)[:, None] * H + cols[None, :]
    h_new = _zoneout(n + z * (carried - n), carried, zoneout_h, limit_h, rng, _ZONEOUT_H, element, ZONE_H)
    tl.store(h_out + state, tl.where(ok, h_new, carried), mask=inside)
    if gates is not None:
        _store_gates(gates, n_row, H, cols, ok, r, z, n, a_n)
    _store_h(y, hidden, out_mask, n_row, b_row, H, cols, ok, h_new)


@triton.jit
def _gru_cell_backward(grad, r, z, n, hn, h_old):
    """Gradients of the pre-activations of r and z, of n's input part and of hn, and the direct part of h_{t-1}'s."""
    d_n = grad * (1.0 - z) * (1.0 - n * n)
    d_z = grad * (h_old - n) * z * (1.0 - z)
    return d_n * hn * r * (1.0 - r), d_z, d_n, d_n * r, grad * z


@triton.jit(
    do_not_specialize=["t", "row", "count", "t_next", "row_next", "count_next", "row_old", "count_old", "B", "limit_h"]
)
def _gru_step_backward(
    w, h_direct, grad_y, out_mask, resets, rng, gates, hidden, h0, d_gates,
    t, row, count, t_next, row_next, count_next, row_old, count_old, B, zoneout_h, limit_h,
    ZONE_H: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One GRU step backward for a tile. d_gates [N, 4H]: gradients of r, z, n (input part) and hn's pre-activations."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    grad, direct, state, inside, ok, back = _grad_h_tile(
        d_gates, 4 * H, w, h_direct, grad_y, out_mask, resets, rng,
        t, row, count, t_next, row_next, count_next, B, zoneout_h, limit_h, rows, cols,
        ZONE_H, H, K, True, H, BM, BN, BK, PRECISION,
    )  # fmt: skip
    n_row = rows.to(tl.int64) + row
    r, z, n, hn = _load_gates(gates, n_row, H, cols, ok)
    h_old = _old_cell(hidden, h0, row_old, count_old, rows, H, cols, back)
    d_r, d_z, d_n, d_hn, d_old = _gru_cell_backward(grad, r, z, n, hn, h_old)
    _store_gates(d_gates, n_row, H, cols, ok, d_r, d_z, d_n, d_hn)
    tl.store(h_direct + state, direct + tl.where(back, d_old, 0.0), mask=inside)


@triton.jit(do_not_specialize=["t_next", "row_next", "count_next", "B"])
def _first_state_backward(
    d_next, w, h_direct, out, resets, t_next, row_next, count_next, B,
    SKIP: tl.constexpr, Hy: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of h0 [B, Hy], from the first step and from what bypassed it."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    grad, _, state, inside, _, _ = _grad_h_tile(
        d_next, 4 * H, w, h_direct, None, None, resets, None,
        t_next, row_next, 0, t_next, row_next, count_next, B, 0.0, 0, rows, cols,
        0, Hy, K, SKIP, H, BM, BN, BK, PRECISION,
    )  # fmt: skip
    tl.store(out + state, grad.to(out.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# Sequence kernels: the time loop in one program per tile of rows, recurrent weights loaded once
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_weight(w, gate, H, cols, TRANSPOSED: tl.constexpr):
    """W of one gate as a resident [BH, BH] tile: [k, n] for h W^T (TRANSPOSED) or [n, k] for d W."""
    ok = (cols < H)[:, None] & (cols < H)[None, :]
    if TRANSPOSED:
        at = w + (gate * H + cols)[None, :] * H + cols[:, None]
    else:
        at = w + (gate * H + cols)[:, None] * H + cols[None, :]
    return tl.load(at, mask=ok, other=0.0)


@triton.jit(do_not_specialize=["T", "B", "limit_h", "limit_c"])
def _lstm_sequence(
    xp, w, ln_ih, ln_hh, bias, ln_c_weight, ln_c_bias, h0, c0, h_n, c_n, y, gates, cells, recurrent, stats, hidden,
    out_mask, resets, rng, T, B, eps, zoneout_h, zoneout_c, limit_h, limit_c,
    ZONE_H: tl.constexpr, ZONE_C: tl.constexpr, REVERSE: tl.constexpr, H: tl.constexpr, BH: tl.constexpr,
    BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A whole LSTM sequence (plain, or with layer norm where ln_ih is given), dense and unprojected."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BH)
    col_ok = cols < H
    live = rows < B
    b_row = rows.to(tl.int64)
    ok = live[:, None] & col_ok[None, :]
    state = b_row[:, None] * H + cols[None, :]
    w_i = _load_weight(w, 0, H, cols, True)
    w_f = _load_weight(w, 1, H, cols, True)
    w_g = _load_weight(w, 2, H, cols, True)
    w_o = _load_weight(w, 3, H, cols, True)
    h = tl.load(h0 + state, mask=ok, other=0.0).to(tl.float32)
    c = tl.load(c0 + state, mask=ok, other=0.0).to(tl.float32)
    zero = tl.zeros((BM, BH), tl.float32)
    for s in range(T):
        t = s
        if REVERSE:
            t = T - 1 - s
        n_row = b_row + _int64(t) * B
        x0, x1, x2, x3 = _load_gates(xp, n_row, H, cols, ok)
        if resets is not None:
            go = _alive(resets, t, B, rows, live)[:, None]
            h = tl.where(go, h, 0.0)
            c = tl.where(go, c, 0.0)
        left = h.to(w_i.dtype)
        r0 = tl.dot(left, w_i, zero, input_precision=PRECISION)
        r1 = tl.dot(left, w_f, zero, input_precision=PRECISION)
        r2 = tl.dot(left, w_g, zero, input_precision=PRECISION)
        r3 = tl.dot(left, w_o, zero, input_precision=PRECISION)
        if ln_ih is not None:
            c_tilde, h_tilde, mean_x, rstd_x, mean_r, rstd_r, mean_c, rstd_c = _lstm_norm_tile(
                x0, x1, x2, x3, r0, r1, r2, r3, c, ln_ih, ln_hh, bias, ln_c_weight, ln_c_bias, cols, ok, H, eps
            )
            if recurrent is not None:
                _store_gates(recurrent, n_row, H, cols, ok, r0, r1, r2, r3)
                _store_stats(stats, n_row, live, mean_x, rstd_x, mean_r, rstd_r, mean_c, rstd_c)
        else:
            if bias is not None:
                x0 += tl.load(bias + cols, mask=col_ok, other=0.0)[None, :]
                x1 += tl.load(bias + H + cols, mask=col_ok, other=0.0)[None, :]
                x2 += tl.load(bias + 2 * H + cols, mask=col_ok, other=0.0)[None, :]
                x3 += tl.load(bias + 3 * H + cols, mask=col_ok, other=0.0)[None, :]
            i = _sigmoid(x0 + r0)
            f = _sigmoid(x1 + r1)
            g = _tanh(x2 + r2)
            o = _sigmoid(x3 + r3)
            c_tilde = f * c + i * g
            h_tilde = o * _tanh(c_tilde)
            if gates is not None:
                _store_gates(gates, n_row, H, cols, ok, i, f, g, o)
        element = n_row[:, None] * H + cols[None, :]
        # Rows past B and cells past H stay 0: 0 * w would not be 0 if they became infinite.
        c = tl.where(ok, _zoneout(c_tilde, c, zoneout_c, limit_c, rng, _ZONEOUT_C, element, ZONE_C), 0.0)
        h = tl.where(ok, _zoneout(h_tilde, h, zoneout_h, limit_h, rng, _ZONEOUT_H, element, ZONE_H), 0.0)
        if cells is not None:
            tl.store(cells + element, c, mask=ok)
        _store_h(y, hidden, out_mask, n_row, b_row, H, cols, ok, h)
    tl.store(h_n + state, h.to(h_n.dtype.element_ty), mask=ok)
    tl.store(c_n + state, c.to(c_n.dtype.element_ty), mask=ok)


@triton.jit
def _store_row(p, row, H, cols, v0, v1, v2, v3):
    at = p + row * 4 * H + cols
    ok = cols < H
    tl.store(at, v0, mask=ok)
    tl.store(at + H, v1, mask=ok)
    tl.store(at + 2 * H, v2, mask=ok)
    tl.store(at + 3 * H, v3, mask=ok)


@triton.jit(do_not_specialize=["T", "B", "limit_h", "limit_c"])
def _lstm_sequence_backward(
    grad_y, h_grad, c_grad, w, ln_ih, ln_hh, bias, ln_c_weight, ln_c_bias, c0, gates, cells, recurrent, stats,
    out_mask, resets, rng, d_x, d_rec, sum_a, sum_ih, sum_hh, sum_cw, sum_cb, T, B,
    zoneout_h, zoneout_c, limit_h, limit_c,
    ZONE_H: tl.constexpr, ZONE_C: tl.constexpr, REVERSE: tl.constexpr, H: tl.constexpr, BH: tl.constexpr,
    BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A whole LSTM sequence backward. h_grad, c_grad [B, H] float32: gradients of the last states in, of the first
    out. d_x [N, 4H]: of W x (+ biases, plain). Layer norm: d_rec [N, 4H] of U h, and each program's part of the
    gradients of biases and gains, sum_* [programs, 4H] or [programs, H]."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BH)
    live = rows < B
    b_row = rows.to(tl.int64)
    ok = live[:, None] & (cols < H)[None, :]
    state = b_row[:, None] * H + cols[None, :]
    w_i = _load_weight(w, 0, H, cols, False)
    w_f = _load_weight(w, 1, H, cols, False)
    w_g = _load_weight(w, 2, H, cols, False)
    w_o = _load_weight(w, 3, H, cols, False)
    dh = tl.load(h_grad + state, mask=ok, other=0.0)
    dc = tl.load(c_grad + state, mask=ok, other=0.0)
    t_a0 = tl.zeros((BH,), tl.float32)
    t_a1 = tl.zeros((BH,), tl.float32)
    t_a2 = tl.zeros((BH,), tl.float32)
    t_a3 = tl.zeros((BH,), tl.float32)
    t_x0 = tl.zeros((BH,), tl.float32)
    t_x1 = tl.zeros((BH,), tl.float32)
    t_x2 = tl.zeros((BH,), tl.float32)
    t_x3 = tl.zeros((BH,), tl.float32)
    t_r0 = tl.zeros((BH,), tl.float32)
    t_r1 = tl.zeros((BH,), tl.float32)
    t_r2 = tl.zeros((BH,), tl.float32)
    t_r3 = tl.zeros((BH,), tl.float32)
    t_cw = tl.zeros((BH,), tl.float32)
    t_cb = tl.zeros((BH,), tl.float32)
    for s in range(T):
        # Backward meets the steps in the opposite order, and the "old" state is that of the step still to come.
        t = T - 1 - s
        t_old = t - 1
        if REVERSE:
            t = s
            t_old = s + 1
        n_row = b_row + _int64(t) * B
        element = n_row[:, None] * H + cols[None, :]
        back = _alive(resets, t, B, rows, live)[:, None] & (cols < H)[None, :]
        count_old = tl.where(s == T - 1, 0, B)
        c_old = _old_cell(cells, c0, _int64(t_old) * B, count_old, rows, H, cols, back)
        if grad_y is not None:
            shown = tl.load(grad_y + element, mask=ok, other=0.0).to(tl.float32)
            if out_mask is not None:
                shown *= tl.load(out_mask + state, mask=ok, other=0.0)
            dh += shown
        d_u, dh_old = _zoneout_backward(dh, zoneout_h, limit_h, rng, _ZONEOUT_H, element, ZONE_H)
        d_tilde, dc_old = _zoneout_backward(dc, zoneout_c, limit_c, rng, _ZONEOUT_C, element, ZONE_C)
        v0, v1, v2, v3 = _load_gates(gates, n_row, H, cols, ok)
        if ln_ih is not None:
            r0, r1, r2, r3 = _load_gates(recurrent, n_row, H, cols, ok)
            mean_x, rstd_x, mean_r, rstd_r, mean_c, rstd_c = _load_stats(stats, n_row, live)
            a0, a1, a2, a3, dx0, dx1, dx2, dx3, d0, d1, d2, d3, d_old, d_norm, c_hat, _ = _lstm_norm_tile_backward(
                d_u, d_tilde, v0, v1, v2, v3, r0, r1, r2, r3, mean_x, rstd_x, mean_r, rstd_r, mean_c, rstd_c, c_old,
                ln_ih, ln_hh, bias, ln_c_weight, ln_c_bias, cols, ok, H,
            )  # fmt: skip
            _store_gates(d_x, n_row, H, cols, ok, dx0, dx1, dx2, dx3)
            _store_gates(d_rec, n_row, H, cols, ok, d0, d1, d2, d3)
            t_a0 += tl.sum(a0, 0)
            t_a1 += tl.sum(a1, 0)
            t_a2 += tl.sum(a2, 0)
            t_a3 += tl.sum(a3, 0)
            t_x0 += tl.sum(a0 * _normalised(v0, mean_x, rstd_x), 0)
            t_x1 += tl.sum(a1 * _normalised(v1, mean_x, rstd_x), 0)
            t_x2 += tl.sum(a2 * _normalised(v2, mean_x, rstd_x), 0)
            t_x3 += tl.sum(a3 * _normalised(v3, mean_x, rstd_x), 0)
            t_r0 += tl.sum(a0 * _normalised(r0, mean_r, rstd_r), 0)
            t_r1 += tl.sum(a1 * _normalised(r1, mean_r, rstd_r), 0)
            t_r2 += tl.sum(a2 * _normalised(r2, mean_r, rstd_r), 0)
            t_r3 += tl.sum(a3 * _normalised(r3, mean_r, rstd_r), 0)
            t_cw += tl.sum(d_norm * c_hat, 0)
            t_cb += tl.sum(d_norm, 0)
        else:
            tanh_c = _tanh(v1 * c_old + v0 * v2)
            d_tilde += d_u * v3 * (1.0 - tanh_c * tanh_c)
            d0, d1, d2, d_old = _lstm_cell_backward(d_tilde, v0, v1, v2, c_old)
            d3 = d_u * tanh_c * v3 * (1.0 - v3)
            _store_gates(d_x, n_row, H, cols, ok, d0, d1, d2, d3)
        # Padded cells have no gradient: there w is 0, but 0 * NaN of a padded row or cell would not be.
        e0 = tl.where(ok, d0, 0.0).to(w_i.dtype)
        e1 = tl.where(ok, d1, 0.0).to(w_i.dtype)
        e2 = tl.where(ok, d2, 0.0).to(w_i.dtype)
        e3 = tl.where(ok, d3, 0.0).to(w_i.dtype)
        dh = tl.dot(e0, w_i, dh_old, input_precision=PRECISION)
        dh = tl.dot(e1, w_f, dh, input_precision=PRECISION)
        dh = tl.dot(e2, w_g, dh, input_precision=PRECISION)
        dh = tl.dot(e3, w_o, dh, input_precision=PRECISION)
        dh = tl.where(back, dh, 0.0)
        dc = tl.where(back, d_old + dc_old, 0.0)
    tl.store(h_grad + state, dh, mask=ok)
    tl.store(c_grad + state, dc, mask=ok)
    if ln_ih is not None:
        part = tl.program_id(0)
        _store_row(sum_a, part, H, cols, t_a0, t_a1, t_a2, t_a3)
        _store_row(sum_ih, part, H, cols, t_x0, t_x1, t_x2, t_x3)
        _store_row(sum_hh, part, H, cols, t_r0, t_r1, t_r2, t_r3)
        tl.store(sum_cw + part * H + cols, t_cw, mask=cols < H)
        tl.store(sum_cb + part * H + cols, t_cb, mask=cols < H)


@triton.jit(do_not_specialize=["T", "B", "limit_h"])
def _gru_sequence(
    xp, w, bias_ih, bias_hh, h0, h_n, y, gates, hidden, out_mask, resets, rng, T, B, zoneout_h, limit_h,
    ZONE_H: tl.constexpr, REVERSE: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A whole GRU sequence, dense. xp [N, 3H]."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BH)
    col_ok = cols < H
    live = rows < B
    b_row = rows.to(tl.int64)
    ok = live[:, None] & col_ok[None, :]
    state = b_row[:, None] * H + cols[None, :]
    w_r = _load_weight(w, 0, H, cols, True)
    w_z = _load_weight(w, 1, H, cols, True)
    w_n = _load_weight(w, 2, H, cols, True)
    zero = tl.zeros((BM, BH), tl.float32)
    x_bias_r = tl.zeros((1, BH), tl.float32)
    x_bias_z = tl.zeros((1, BH), tl.float32)
    x_bias_n = tl.zeros((1, BH), tl.float32)
    h_bias_n = tl.zeros((1, BH), tl.float32)
    if bias_ih is not None:
        x_bias_r += tl.load(bias_ih + cols, mask=col_ok, other=0.0)[None, :].to(tl.float32)
        x_bias_z += tl.load(bias_ih + H + cols, mask=col_ok, other=0.0)[None, :].to(tl.float32)
        x_bias_n += tl.load(bias_ih + 2 * H + cols, mask=col_ok, other=0.0)[None, :].to(tl.float32)
    if bias_hh is not None:
        x_bias_r += tl.load(bias_hh + cols, mask=col_ok, other=0.0)[None, :].to(tl.float32)
        x_bias_z += tl.load(bias_hh + H + cols, mask=col_ok, other=0.0)[None, :].to(tl.float32)
        h_bias_n += tl.load(bias_hh + 2 * H + cols, mask=col_ok, other=0.0)[None, :].to(tl.float32)
    h = tl.load(h0 + state, mask=ok, other=0.0).to(tl.float32)
    for s in range(T):
        t = s
        if REVERSE:
            t = T - 1 - s
        n_row = b_row + _int64(t) * B
        if resets is not None:
            h = tl.where(_alive(resets, t, B, rows, live)[:, None], h, 0.0)
        left = h.to(w_r.dtype)
        at = xp + n_row[:, None] * (3 * H) + cols[None, :]
        a_r = tl.dot(left, w_r, zero, input_precision=PRECISION)
        a_z = tl.dot(left, w_z, zero, input_precision=PRECISION)
        hn = tl.dot(left, w_n, zero, input_precision=PRECISION) + h_bias_n
        r = _sigmoid(a_r + tl.load(at, mask=ok, other=0.0) + x_bias_r)
        z = _sigmoid(a_z + tl.load(at + H, mask=ok, other=0.0) + x_bias_z)
        n = _tanh(tl.load(at + 2 * H, mask=ok, other=0.0) + x_bias_n + r * hn)
        element = n_row[:, None] * H + cols[None, :]
        h_new = _zoneout(n + z * (h - n), h, zoneout_h, limit_h, rng, _ZONEOUT_H, element, ZONE_H)
        h = tl.where(ok, h_new, 0.0)
        if gates is not None:
            _store_gates(gates, n_row, H, cols, ok, r, z, n, hn)
        _store_h(y, hidden, out_mask, n_row, b_row, H, cols, ok, h)
    tl.store(h_n + state, h.to(h_n.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["T", "B", "limit_h"])
def _gru_sequence_backward(
    grad_y, h_grad, w, h0, gates, hidden, out_mask, resets, rng, d_gates, T, B, zoneout_h, limit_h,
    ZONE_H: tl.constexpr, REVERSE: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A whole GRU sequence backward. h_grad [B, H] float32: gradient of h_n in, of h0 out."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BH)
    live = rows < B
    b_row = rows.to(tl.int64)
    ok = live[:, None] & (cols < H)[None, :]
    state = b_row[:, None] * H + cols[None, :]
    w_r = _load_weight(w, 0, H, cols, False)
    w_z = _load_weight(w, 1, H, cols, False)
    w_n = _load_weight(w, 2, H, cols, False)
    dh = tl.load(h_grad + state, mask=ok, other=0.0)
    for s in range(T):
        t = T - 1 - s
        t_old = t - 1
        if REVERSE:
            t = s
            t_old = s + 1
        n_row = b_row + _int64(t) * B
        element = n_row[:, None] * H + cols[None, :]
        back = _alive(resets, t, B, rows, live)[:, None] & (cols < H)[None, :]
        count_old = tl.where(s == T - 1, 0, B)
        h_old = _old_cell(hidden, h0, _int64(t_old) * B, count_old, rows, H, cols, back)
        if grad_y is not None:
            shown = tl.load(grad_y + element, mask=ok, other=0.0).to(tl.float32)
            if out_mask is not None:
                shown *= tl.load(out_mask + state, mask=ok, other=0.0)
            dh += shown
        grad, dh_old = _zoneout_backward(dh, zoneout_h, limit_h, rng, _ZONEOUT_H, element, ZONE_H)
        r, z, n, hn = _load_gates(gates, n_row, H, cols, ok)
        d_r, d_z, d_n, d_hn, d_old = _gru_cell_backward(grad, r, z, n, hn, h_old)
        _store_gates(d_gates, n_row, H, cols, ok, d_r, d_z, d_n, d_hn)
        e_r = tl.where(ok, d_r, 0.0).to(w_r.dtype)
        e_z = tl.where(ok, d_z, 0.0).to(w_r.dtype)
        e_n = tl.where(ok, d_hn, 0.0).to(w_r.dtype)
        dh = tl.dot(e_r, w_r, dh_old + d_old, input_precision=PRECISION)
        dh = tl.dot(e_z, w_z, dh, input_precision=PRECISION)
        dh = tl.dot(e_n, w_n, dh, input_precision=PRECISION)
        dh = tl.where(back, dh, 0.0)
    tl.store(h_grad + state, dh, mask=ok)


# ---------------------------------------------------------------------------------------------------------------------
# Host
# ---------------------------------------------------------------------------------------------------------------------

_NORM_LIMIT = 4096  # the widest layer-normalised row that one program holds


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def _objection(op: str, tensors: dict[str, Tensor | None]) -> str | None:
    x = tensors["x"]
    assert x is not None
    if x.device.type != "cuda" and not _interpreted():
        return f"x is on {x.device.type}; it runs on cuda"
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}; it takes float32, bfloat16, float16"
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != x.dtype:
            return f"{name} is {tensor.dtype} and x is {x.dtype}; it takes one dtype for all"
    return None


def lstm_objection(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    ln_ih_weight: Tensor | None = None,
    ln_hh_weight: Tensor | None = None,
    ln_c_weight: Tensor | None = None,
    ln_c_bias: Tensor | None = None,
    **rest: object,
) -> str | None:
    """Why these kernels cannot serve an LSTM call (by the argument names of the op), or None."""
    tensors = {
        "x": x, "h0": h0, "c0": c0, "weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih,
        "bias_hh": bias_hh, "weight_hr": weight_hr, "ln_ih_weight": ln_ih_weight, "ln_hh_weight": ln_hh_weight,
        "ln_c_weight": ln_c_weight, "ln_c_bias": ln_c_bias,
    }  # fmt: skip
    hidden = weight_hh.size(0) // 4
    if ln_ih_weight is not None and hidden > _NORM_LIMIT:
        return f"hidden_size is {hidden}; with layer norm it takes at most {_NORM_LIMIT}"
    return _objection("lstm", tensors)


def gru_objection(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    **rest: object,
) -> str | None:
    """Why these kernels cannot serve a GRU call (by the argument names of the op), or None."""
    return _objection(
        "gru",
        {"x": x, "h0": h0, "weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh},
    )


def can_run_lstm(*args: object, raise_error: bool = False, **kwargs: object) -> bool:
    """Whether an LSTM call can run here. Arguments by the op's names; RuntimeError with the reason if asked for."""
    return _answer("lstm", lstm_objection(*args[:12], **kwargs), raise_error)  # type: ignore[arg-type]


def can_run_gru(*args: object, raise_error: bool = False, **kwargs: object) -> bool:
    """Whether a GRU call can run here. Arguments by the op's names; RuntimeError with the reason if asked for."""
    return _answer("gru", gru_objection(*args[:6], **kwargs), raise_error)  # type: ignore[arg-type]


def _answer(op: str, reason: str | None, raise_error: bool) -> bool:
    if reason is not None and raise_error:
        raise RuntimeError(f"genfuse.kernels.recurrent.{op} cannot run: {reason}")
    return reason is None


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _limit(p: float) -> int:
    """The smallest of 0..2^24 that no draw below p reaches: bits < limit exactly where bits * 2^-24 < p."""
    return math.ceil(p * 2**24)


def _mode(p: float, training: bool) -> int:
    return 0 if p == 0.0 else (1 if training else 2)


def _power_of_two(n: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(n))


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, from operands of any dtype."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _transposed_mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a^T b, accumulated in float32 and rounded once."""
    return _mm(a.t(), b).to(dtype)


def _dropped(x: Tensor, rng: Tensor, stream: int, p: float, period: int, out: Tensor | None = None) -> Tensor:
    """x * (u >= p) / (1 - p) for contiguous x, element i under the mask's element i % period."""
    out = torch.empty_like(x) if out is None else out
    numel = x.numel()
    if numel:
        scale = 0.0 if p >= 1.0 else 1.0 / (1.0 - p)
        _dropout[(triton.cdiv(numel, 1024),)](x, out, rng, stream, numel, period, _limit(p), scale, BLOCK=1024)
    return out


class _Steps:
    """Where each step's rows are: dense ([T, B]) or packed (batch_sizes)."""

    def __init__(self, x: Tensor, batch: int, batch_sizes: Tensor | None, reverse: bool) -> None:
        self.dense = batch_sizes is None
        self.counts = [batch] * x.size(0) if batch_sizes is None else [int(n) for n in batch_sizes.tolist()]
        self.rows = [0] * len(self.counts)
        for t in range(1, len(self.counts)):
            self.rows[t] = self.rows[t - 1] + self.counts[t - 1]
        self.total = sum(self.counts)
        self.order = list(range(len(self.counts)))
        if reverse:
            self.order.reverse()

    def place(self, t: int | None) -> tuple[int, int, int]:
        """(t, first row, rows) of a step; of no step, (0, 0, 0)."""
        return (0, 0, 0) if t is None else (t, self.rows[t], self.counts[t])

    def backward(self) -> list[tuple[int, int | None, int | None]]:
        """(t, the step after it, the step before it), last step first, in the order of the forward pass."""
        order = self.order
        return [
            (t, order[k + 1] if k + 1 < len(order) else None, order[k - 1] if k > 0 else None)
            for k, t in reversed(list(enumerate(order)))
        ]

    def before(self, states: Tensor, first: Tensor, resets: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The state that each row starts from, [N, n]: the row of the step before, or ``first``; 0 where reset."""
        if self.dense:
            # One block instead of T slices.
            batch, steps = first.size(0), len(self.order)
            if steps == 0:
                return first[:0].to(dtype)
            if self.order[0] == 0:
                old = torch.cat([first.to(dtype), states[: (steps - 1) * batch].to(dtype)])
            else:
                old = torch.cat([states[batch:].to(dtype), first.to(dtype)])
            return old if resets is None else old.masked_fill_(resets.reshape(-1, 1), 0.0)
        parts: list[Tensor] = [first[:0].to(dtype)] * len(self.order)
        for k, t in enumerate(self.order):
            count, known, row = self.counts[t], 0, 0
            if k > 0:
                known, row = min(self.counts[self.order[k - 1]], count), self.rows[self.order[k - 1]]
            parts[t] = torch.cat([states[row : row + known].to(dtype), first[known:count].to(dtype)])
        return torch.cat(parts)


def _tiles(batch: int) -> tuple[int, int]:
    """Rows of a step kernel's tile, and warps. Two sizes only, so that few batches mean a compilation."""
    return (16, 4) if batch <= 16 else (32, 4)


def _sequence_fits(hidden: int, x: Tensor, layer_norm: bool = False) -> bool:
    """Whether a sequence kernel keeps its weights and state on chip: in shared memory and in registers, as compiled."""
    limit = 64 if x.dtype == torch.float32 else 128
    if x.is_cuda:
        # As compiled, the largest (H = 128, 2 bytes) needs 144 KiB, those with H = 64 at most 80 KiB.
        shared = getattr(torch.cuda.get_device_properties(x.device), "shared_memory_per_block_optin", 0)
        limit = min(limit, 128 if shared >= 148 * 1024 else 64 if shared >= 81 * 1024 else 32)
    return hidden <= (limit // 2 if layer_norm else limit)


def _sequence_options(hidden: int) -> dict[str, int]:
    # One stage: the loop's loads depend on nothing that it computes, but prefetching buffers cost shared memory
    # that the resident weights need.
    return {"BM": 16, "BH": _power_of_two(hidden), "num_warps": 4 if hidden <= 32 else 8, "num_stages": 1}


def _input_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.size(-1))


def _masked_input(x: Tensor, steps: _Steps, rng: Tensor | None, p: float, period: int) -> Tensor:
    """x [N, I] under the locked input mask."""
    if p == 0.0:
        return x
    assert rng is not None
    x = x.contiguous()
    if steps.dense:
        return _dropped(x, rng, _INPUT, p, period)
    out = torch.empty_like(x)
    for row, count in zip(steps.rows, steps.counts, strict=True):
        _dropped(x[row : row + count], rng, _INPUT, p, period, out[row : row + count])
    return out


def _output_mask(rng: Tensor | None, p: float, batch: int, width: int, device: torch.device) -> Tensor | None:
    if p == 0.0:
        return None
    assert rng is not None
    ones = torch.ones(batch, width, dtype=torch.float32, device=device)
    return _dropped(ones, rng, _OUTPUT, p, batch * width)


def _bytes(resets: Tensor | None) -> Tensor | None:
    return None if resets is None else resets.contiguous().view(torch.uint8)


def _float_bias(bias_ih: Tensor | None, bias_hh: Tensor | None) -> Tensor | None:
    """b_ih + b_hh in float32: the LSTM only ever uses their sum."""
    if bias_ih is None or bias_hh is None:
        one = bias_ih if bias_hh is None else bias_hh
        return None if one is None else one.float().contiguous()
    return bias_ih.float() + bias_hh.float()


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    ln_ih_weight: Tensor | None,
    ln_hh_weight: Tensor | None,
    ln_c_weight: Tensor | None,
    ln_c_bias: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    rng: Tensor | None,
    zoneout_h: float,
    zoneout_c: float,
    weight_drop: float,
    input_dropout: float,
    output_dropout: float,
    eps: float,
    training: bool,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``genfuse::lstm``: (y, h_n, c_n, hidden, cells, gates, recurrent, stats)."""
    batch, outputs = h0.shape
    cells_size = weight_hh.size(0) // 4
    layer_norm, projected = ln_ih_weight is not None, weight_hr is not None
    steps = _Steps(x, batch, batch_sizes, reverse)
    weight_drop, input_dropout, output_dropout = (
        p if training else 0.0 for p in (weight_drop, input_dropout, output_dropout)
    )
    h0, c0, w_hh, w_hr, ln_ih, ln_hh, ln_cw, ln_cb = _contiguous(
        h0, c0, weight_hh, weight_hr, ln_ih_weight, ln_hh_weight, ln_c_weight, ln_c_bias
    )
    assert h0 is not None and c0 is not None and w_hh is not None
    if weight_drop > 0.0:
        assert rng is not None
        w_hh = _dropped(w_hh, rng, _WEIGHT, weight_drop, w_hh.numel())
    x_rows = _masked_input(_input_rows(x), steps, rng, input_dropout, batch * x.size(-1))
    xp = _mm(x_rows, weight_ih.t())
    bias = _float_bias(bias_ih, bias_hh)
    out_mask = _output_mask(rng, output_dropout, batch, outputs, x.device)
    reset_bytes = _bytes(resets)

    new = x.new_empty
    f32 = {"dtype": torch.float32}
    none = new(0, **f32)
    y = new(*x.shape[:-1], outputs)
    cells = new(steps.total, cells_size, **f32) if save else None
    recurrent = new(steps.total, 4 * cells_size, **f32) if save and layer_norm else None
    stats = new(steps.total, 6, **f32) if save and layer_norm else None
    hidden = new(steps.total, outputs, **f32) if save and out_mask is not None else None
    zone = {"ZONE_H": _mode(zoneout_h, training), "ZONE_C": _mode(zoneout_c, training)}
    limit_h, limit_c = _limit(zoneout_h), _limit(zoneout_c)
    precision = _precision()

    if batch == 0 or steps.total == 0 or cells_size == 0:
        h_n, c_n = h0.clone(), c0.clone()
    elif steps.dense and not projected and _sequence_fits(cells_size, x, layer_norm):
        h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
        _lstm_sequence[(triton.cdiv(batch, 16),)](
            xp, w_hh, ln_ih, ln_hh, bias, ln_cw, ln_cb, h0, c0, h_n, c_n, y, xp if save and not layer_norm else None,
            cells, recurrent, stats, hidden, out_mask, reset_bytes, rng, len(steps.order), batch, eps,
            zoneout_h, zoneout_c, limit_h, limit_c, **zone, REVERSE=reverse, H=cells_size,
            PRECISION=precision, **_sequence_options(cells_size),
        )  # fmt: skip
    else:
        h_in, c = h0.to(torch.float32, copy=True), c0.to(torch.float32, copy=True)
        h_out = torch.empty_like(h_in)
        u = new(batch, cells_size, **f32) if projected else None
        scratch = new(batch, 4 * cells_size, **f32) if layer_norm and recurrent is None else recurrent
        BM, warps = _tiles(batch)
        dot = {"BM": BM, "BN": 16, "BK": 64, "PRECISION": precision, "num_warps": warps}
        row_tiles = triton.cdiv(batch, BM)
        for t in steps.order:
            row, count = steps.rows[t], steps.counts[t]
            if layer_norm:
                rec_row = row if save else 0
                _matmul[(row_tiles, triton.cdiv(4 * cells_size, 16))](
                    h_in, w_hh, scratch, rec_row, reset_bytes, count, t, batch, outputs, 1,
                    N=4 * cells_size, K=outputs, **dot,
                )  # fmt: skip
                _lstm_norm_step[(batch,)](
                    xp, scratch, ln_ih, ln_hh, bias, ln_cw, ln_cb, h_in, h_out, c, u, y, cells, stats, hidden,
                    out_mask, reset_bytes, rng, t, row, rec_row, count, batch, eps, zoneout_h, zoneout_c,
                    limit_h, limit_c, **zone, H=cells_size, BH=_power_of_two(cells_size),
                )  # fmt: skip
            else:
                _lstm_step[(row_tiles, triton.cdiv(cells_size, 16))](
                    xp, w_hh, bias, h_in, h_out, c, u, y, xp if save else None, cells, hidden, out_mask, reset_bytes,
                    rng, t, row, count, batch, zoneout_h, zoneout_c, limit_h, limit_c, **zone,
                    H=cells_size, K=outputs, **dot,
                )  # fmt: skip
            if projected:
                _lstm_project[(row_tiles, triton.cdiv(outputs, 16))](
                    u, w_hr, h_in, h_out, y, hidden, out_mask, reset_bytes, rng, t, row, count, batch,
                    zoneout_h, limit_h, ZONE_H=zone["ZONE_H"], P=outputs, H=cells_size, **dot,
                )  # fmt: skip
            h_in, h_out = h_out, h_in
        h_n, c_n = h_in.to(x.dtype), c.to(x.dtype)

    return (
        y,
        h_n,
        c_n,
        none if hidden is None else hidden,
        none if cells is None else cells,
        xp if save else none,
        none if recurrent is None else recurrent,
        none if stats is None else stats,
    )


def _gradient(grad: Tensor | None, like: Tensor) -> Tensor:
    """A float32 copy that the kernels may update, or zeros."""
    if grad is None:
        return torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    return grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def lstm_backward(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    ln_ih_weight: Tensor | None,
    ln_hh_weight: Tensor | None,
    ln_c_weight: Tensor | None,
    ln_c_bias: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    rng: Tensor | None,
    y: Tensor,
    hidden: Tensor,
    cells: Tensor,
    gates: Tensor,
    recurrent: Tensor,
    stats: Tensor,
    zoneout_h: float,
    zoneout_c: float,
    weight_drop: float,
    input_dropout: float,
    output_dropout: float,
    eps: float,
    training: bool,
    reverse: bool,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor, ...]:
    """``genfuse::lstm_backward``: gradients of x, h0, c0, weight_ih, weight_hh, the biases (one for both), weight_hr,
    ln_ih_weight, ln_hh_weight, ln_c_weight, ln_c_bias; empty where absent or not needed."""
    batch, outputs = h0.shape
    H = weight_hh.size(0) // 4
    layer_norm, projected = ln_ih_weight is not None, weight_hr is not None
    steps = _Steps(x, batch, batch_sizes, reverse)
    weight_drop, input_dropout, output_dropout = (
        p if training else 0.0 for p in (weight_drop, input_dropout, output_dropout)
    )
    h0, c0, w_hh, w_hr, ln_ih, ln_hh, ln_cw, ln_cb, grad_y = _contiguous(
        h0, c0, weight_hh, weight_hr, ln_ih_weight, ln_hh_weight, ln_c_weight, ln_c_bias, grad_y
    )
    assert h0 is not None and c0 is not None and w_hh is not None
    if weight_drop > 0.0:
        assert rng is not None
        w_hh = _dropped(w_hh, rng, _WEIGHT, weight_drop, w_hh.numel())
    bias = _float_bias(bias_ih, bias_hh)
    out_mask = _output_mask(rng, output_dropout, batch, outputs, x.device)
    reset_bytes = _bytes(resets)
    h_grad, c_grad = _gradient(grad_h_n, h0), _gradient(grad_c_n, c0)

    new = x.new_empty
    f32 = {"dtype": torch.float32}
    none = new(0)
    total = steps.total
    d_x = new(total, 4 * H)
    d_rec = new(total, 4 * H) if layer_norm else d_x
    zone = {"ZONE_H": _mode(zoneout_h, training), "ZONE_C": _mode(zoneout_c, training)}
    limit_h, limit_c = _limit(zoneout_h), _limit(zoneout_c)
    precision = _precision()
    sum_a = sum_ih = sum_hh = sum_cw = sum_cb = d_tilde = u = None
    empty = batch == 0 or total == 0 or H == 0
    in_one = not empty and steps.dense and not projected and _sequence_fits(H, x, layer_norm)
    if layer_norm:
        # The sequence kernel writes one row a program; the step kernels add to one row a batch row.
        parts = triton.cdiv(batch, 16) if in_one else batch
        make = new if in_one else x.new_zeros
        sum_a, sum_ih, sum_hh = (make(parts, 4 * H, **f32) for _ in range(3))
        sum_cw, sum_cb = (make(parts, H, **f32) for _ in range(2))

    if empty:
        grad_h0, grad_c0 = h_grad.to(x.dtype), c_grad.to(x.dtype)
        if projected:
            d_tilde, u = new(total, outputs), new(total, H)
    elif in_one:
        _lstm_sequence_backward[(triton.cdiv(batch, 16),)](
            grad_y, h_grad, c_grad, w_hh, ln_ih, ln_hh, bias, ln_cw, ln_cb, c0, gates, cells,
            recurrent if layer_norm else None, stats if layer_norm else None, out_mask, reset_bytes, rng, d_x, d_rec,
            sum_a, sum_ih, sum_hh, sum_cw, sum_cb, len(steps.order), batch, zoneout_h, zoneout_c, limit_h, limit_c,
            **zone, REVERSE=reverse, H=H, PRECISION=precision, **_sequence_options(H),
        )  # fmt: skip
        grad_h0, grad_c0 = h_grad.to(x.dtype), c_grad.to(x.dtype)
    else:
        BM, warps = _tiles(batch)
        dot = {"BM": BM, "BN": 16, "BK": 64, "PRECISION": precision, "num_warps": warps}
        row_tiles = triton.cdiv(batch, BM)
        if projected:
            d_tilde, u = new(total, outputs), new(total, H)
        elif layer_norm:
            d_tilde = new(batch, outputs, **f32)
        d_u = new(batch, H, **f32) if layer_norm and projected else d_tilde
        for t, after, before in steps.backward():
            here, following, previous = steps.place(t), steps.place(after), steps.place(before)
            row, count = here[1:]
            row_old, count_old = previous[1:]
            if layer_norm or projected:
                _hidden_backward[(row_tiles, triton.cdiv(outputs, 16))](
                    d_rec, w_hh, h_grad, grad_y, out_mask, reset_bytes, rng, d_tilde, *here, *following, batch,
                    zoneout_h, limit_h, ZONE_H=zone["ZONE_H"], Hy=outputs, K=4 * H, OUT_BY_STEP=projected, **dot,
                )  # fmt: skip
            if layer_norm:
                if projected:
                    _matmul[(row_tiles, triton.cdiv(H, 16))](
                        d_tilde[row:], w_hr, d_u, 0, None, count, t, batch, 1, H, N=H, K=outputs, **dot
                    )
                _lstm_norm_step_backward[(batch,)](
                    d_u, c_grad, gates, recurrent, stats, cells, c0, ln_ih, ln_hh, bias, ln_cw, ln_cb, reset_bytes,
                    rng, d_x, d_rec, sum_a, sum_ih, sum_hh, sum_cw, sum_cb, u, t, row, count, row_old, count_old,
                    batch, zoneout_c, limit_c, ZONE_C=zone["ZONE_C"], H=H, BH=_power_of_two(H),
                )  # fmt: skip
            else:
                _lstm_step_backward[(row_tiles, triton.cdiv(H, 16))](
                    d_tilde if projected else d_rec, w_hr if projected else w_hh, h_grad, c_grad, grad_y, out_mask,
                    reset_bytes, rng, gates, cells, c0, d_x, u, *here, *following, row_old, count_old, batch,
                    zoneout_h, zoneout_c, limit_h, limit_c, **zone, PROJECTED=projected,
                    K=outputs if projected else 4 * H, H=H, **dot,
                )  # fmt: skip
        grad_h0, grad_c0 = new(batch, outputs), c_grad.to(x.dtype)
        _first_state_backward[(row_tiles, triton.cdiv(outputs, 16))](
            d_rec, w_hh, h_grad, grad_h0, reset_bytes, *steps.place(steps.order[0]), batch,
            SKIP=False, Hy=outputs, K=4 * H, H=H, **dot,
        )  # fmt: skip

    grad_x = none
    if needs_x:
        grad_x = _mm(d_x, weight_ih).to(x.dtype)
        grad_x = _masked_input(grad_x, steps, rng, input_dropout, batch * x.size(-1)).reshape(x.shape)
    if not needs_weights:
        return grad_x, grad_h0, grad_c0, *([none] * 8)
    x_rows = _masked_input(_input_rows(x), steps, rng, input_dropout, batch * x.size(-1))
    states = y.reshape(-1, outputs) if hidden.numel() == 0 else hidden
    grad_w_ih = _transposed_mm(d_x, x_rows, x.dtype)
    grad_w_hh = _transposed_mm(d_rec, steps.before(states, h0, resets, x.dtype), x.dtype)
    if weight_drop > 0.0:
        assert rng is not None
        grad_w_hh = _dropped(grad_w_hh, rng, _WEIGHT, weight_drop, grad_w_hh.numel())
    has_bias = bias is not None
    grad_w_hr = none
    if d_tilde is not None and u is not None:
        grad_w_hr = _transposed_mm(d_tilde, u, x.dtype)
    if sum_a is not None and sum_ih is not None and sum_hh is not None and sum_cw is not None and sum_cb is not None:
        grad_bias = sum_a.sum(0).to(x.dtype) if has_bias else none
        norms = tuple(part.sum(0).to(x.dtype) for part in (sum_ih, sum_hh, sum_cw, sum_cb))
    else:
        grad_bias = d_x.sum(0, dtype=torch.float32).to(x.dtype) if has_bias else none
        norms = (none, none, none, none)
    return grad_x, grad_h0, grad_c0, grad_w_ih, grad_w_hh, grad_bias, grad_w_hr, *norms


def gru(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    rng: Tensor | None,
    zoneout_h: float,
    weight_drop: float,
    input_dropout: float,
    output_dropout: float,
    training: bool,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``genfuse::gru``: (y, h_n, hidden, gates)."""
    batch, H = h0.shape
    steps = _Steps(x, batch, batch_sizes, reverse)
    weight_drop, input_dropout, output_dropout = (
        p if training else 0.0 for p in (weight_drop, input_dropout, output_dropout)
    )
    h0, w_hh, b_ih, b_hh = _contiguous(h0, weight_hh, bias_ih, bias_hh)
    assert h0 is not None and w_hh is not None
    if weight_drop > 0.0:
        assert rng is not None
        w_hh = _dropped(w_hh, rng, _WEIGHT, weight_drop, w_hh.numel())
    xp = _mm(_masked_input(_input_rows(x), steps, rng, input_dropout, batch * x.size(-1)), weight_ih.t())
    out_mask = _output_mask(rng, output_dropout, batch, H, x.device)
    reset_bytes = _bytes(resets)

    new = x.new_empty
    f32 = {"dtype": torch.float32}
    y = new(*x.shape[:-1], H)
    gates = new(steps.total, 4 * H, **f32) if save else None
    hidden = new(steps.total, H, **f32) if save and out_mask is not None else None
    zone, limit, precision = _mode(zoneout_h, training), _limit(zoneout_h), _precision()
    if batch == 0 or steps.total == 0 or H == 0:
        h_n = h0.clone()
    elif steps.dense and _sequence_fits(H, x):
        h_n = torch.empty_like(h0)
        _gru_sequence[(triton.cdiv(batch, 16),)](
            xp, w_hh, b_ih, b_hh, h0, h_n, y, gates, hidden, out_mask, reset_bytes, rng, len(steps.order), batch,
            zoneout_h, limit, ZONE_H=zone, REVERSE=reverse, H=H, PRECISION=precision, **_sequence_options(H),
        )  # fmt: skip
    else:
        h_in = h0.to(torch.float32, copy=True)
        h_out = torch.empty_like(h_in)
        BM, warps = _tiles(batch)
        for t in steps.order:
            _gru_step[(triton.cdiv(batch, BM), triton.cdiv(H, 16))](
                xp, w_hh, b_ih, b_hh, h_in, h_out, y, gates, hidden, out_mask, reset_bytes, rng, *steps.place(t),
                batch, zoneout_h, limit, ZONE_H=zone, H=H, BM=BM, BN=16, BK=64, PRECISION=precision, num_warps=warps,
            )  # fmt: skip
            h_in, h_out = h_out, h_in
        h_n = h_in.to(x.dtype)
    none = new(0, **f32)
    return y, h_n, none if hidden is None else hidden, none if gates is None else gates


def gru_backward(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    rng: Tensor | None,
    y: Tensor,
    hidden: Tensor,
    gates: Tensor,
    zoneout_h: float,
    weight_drop: float,
    input_dropout: float,
    output_dropout: float,
    training: bool,
    reverse: bool,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor, ...]:
    """``genfuse::gru_backward``: gradients of x, h0, weight_ih, weight_hh, bias_ih, bias_hh; empty where not needed."""
    batch, H = h0.shape
    steps = _Steps(x, batch, batch_sizes, reverse)
    weight_drop, input_dropout, output_dropout = (
        p if training else 0.0 for p in (weight_drop, input_dropout, output_dropout)
    )
    h0, w_hh, grad_y = _contiguous(h0, weight_hh, grad_y)
    assert h0 is not None and w_hh is not None
    if weight_drop > 0.0:
        assert rng is not None
        w_hh = _dropped(w_hh, rng, _WEIGHT, weight_drop, w_hh.numel())
    out_mask = _output_mask(rng, output_dropout, batch, H, x.device)
    reset_bytes = _bytes(resets)
    h_grad = _gradient(grad_h_n, h0)
    states = y.reshape(-1, H) if hidden.numel() == 0 else hidden

    none = x.new_empty(0)
    d_gates = x.new_empty(steps.total, 4 * H)
    zone, limit, precision = _mode(zoneout_h, training), _limit(zoneout_h), _precision()
    if batch == 0 or steps.total == 0 or H == 0:
        grad_h0 = h_grad.to(x.dtype)
    elif steps.dense and _sequence_fits(H, x):
        _gru_sequence_backward[(triton.cdiv(batch, 16),)](
            grad_y, h_grad, w_hh, h0, gates, states, out_mask, reset_bytes, rng, d_gates, len(steps.order), batch,
            zoneout_h, limit, ZONE_H=zone, REVERSE=reverse, H=H, PRECISION=precision, **_sequence_options(H),
        )  # fmt: skip
        grad_h0 = h_grad.to(x.dtype)
    else:
        BM, warps = _tiles(batch)
        grid = (triton.cdiv(batch, BM), triton.cdiv(H, 16))
        dot = {"BM": BM, "BN": 16, "BK": 64, "PRECISION": precision, "num_warps": warps}
        for t, after, before in steps.backward():
            _gru_step_backward[grid](
                w_hh, h_grad, grad_y, out_mask, reset_bytes, rng, gates, states, h0, d_gates, *steps.place(t),
                *steps.place(after), *steps.place(before)[1:], batch, zoneout_h, limit, ZONE_H=zone, H=H, K=3 * H,
                **dot,
            )  # fmt: skip
        grad_h0 = torch.empty_like(h0)
        _first_state_backward[grid](
            d_gates, w_hh, h_grad, grad_h0, reset_bytes, *steps.place(steps.order[0]), batch,
            SKIP=True, Hy=H, K=3 * H, H=H, **dot,
        )  # fmt: skip

    grad_x = none
    if needs_x:
        grad_x = _mm(d_gates[:, : 3 * H], weight_ih).to(x.dtype)
        grad_x = _masked_input(grad_x, steps, rng, input_dropout, batch * x.size(-1)).reshape(x.shape)
    if not needs_weights:
        return grad_x, grad_h0, none, none, none, none
    x_rows = _masked_input(_input_rows(x), steps, rng, input_dropout, batch * x.size(-1))
    old = steps.before(states, h0, resets, x.dtype)
    grad_w_ih = _transposed_mm(d_gates[:, : 3 * H], x_rows, x.dtype)
    grad_w_hh = torch.cat(
        [_transposed_mm(d_gates[:, : 2 * H], old, x.dtype), _transposed_mm(d_gates[:, 3 * H :], old, x.dtype)]
    )
    if weight_drop > 0.0:
        assert rng is not None
        grad_w_hh = _dropped(grad_w_hh, rng, _WEIGHT, weight_drop, grad_w_hh.numel())
    sums = d_gates.sum(0, dtype=torch.float32).to(x.dtype) if bias_ih is not None or bias_hh is not None else none
    grad_b_ih = sums[: 3 * H].clone() if bias_ih is not None else none
    grad_b_hh = torch.cat([sums[: 2 * H], sums[3 * H :]]) if bias_hh is not None else none
    return grad_x, grad_h0, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh
