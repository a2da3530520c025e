"""The recurrent family in plain PyTorch: what the kernels compute, by definition.

Readable before fast: every function is a loop over time of the papers' equations, differentiable to any order, on any
device. The symbols: ``x`` input, ``h`` hidden state, ``c`` cell state, ``W`` weights, ``b`` biases, ``i, f, g, o`` the
LSTM's input, forget, candidate and output gates (torch's order), ``r, z, n`` the GRU's reset, update and candidate.
A tilde (``h_tilde``) marks a state before zoneout.

Sizes: T steps, B rows (sequences), I inputs, H cells, Hy outputs (P where the hidden state is projected, else H).

Inputs in half or bfloat16 are computed in float32 and the results cast back; float64 is float64 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .random import draw_rng, keep_mask, uniform, uniform_elements

__all__ = ["gru", "gru_generate", "linear_cross_entropy", "lstm", "lstm_generate", "sample_token"]

# Streams of random numbers: what is added to the offset of (seed, offset).
STREAM_ZONEOUT_H, STREAM_ZONEOUT_C, STREAM_WEIGHT, STREAM_INPUT, STREAM_OUTPUT = range(5)

State = tuple[Tensor, Tensor]


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _normalise(a: Tensor, eps: float) -> Tensor:
    """Zero mean and unit variance over the features (Ba, Kiros, Hinton 2016, eq. 4, without gain and bias)."""
    centred = a - a.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + eps)


def _row_counts(x: Tensor, batch_sizes: Tensor | None) -> list[int]:
    """How many rows are alive at each step: B always for a dense x, ``batch_sizes`` for a packed one."""
    return [x.size(1)] * x.size(0) if batch_sizes is None else [int(count) for count in batch_sizes.tolist()]


def _over_rows(mask: Tensor, counts: list[int]) -> Tensor:
    """A locked mask ``[B, F]`` repeated over the steps, as rows ``[N, F]`` of the packed order."""
    return torch.cat([mask[:count] for count in counts]) if counts else mask[:0]


def _zoneout(new: Tensor, old: Tensor, probability: float, u: Tensor | None) -> Tensor:
    """Keep the old state with ``probability`` (training), or their mean in eval (Krueger et al. 2016, eq. 2, 3)."""
    if probability == 0.0:
        return new
    if u is None:
        return probability * old + (1.0 - probability) * new
    return torch.where(u < probability, old, new)


def _update(state: Tensor, rows: Tensor, count: int) -> Tensor:
    """The state with its first ``count`` rows replaced: rows whose sequence is over (or not begun) keep theirs."""
    return rows if count == state.size(0) else torch.cat([rows, state[count:]])


def lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    ln_ih_weight: Tensor | None = None,
    ln_hh_weight: Tensor | None = None,
    ln_c_weight: Tensor | None = None,
    ln_c_bias: Tensor | None = None,
    eps: float = 1e-5,
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    weight_drop: float = 0.0,
    input_dropout: float = 0.0,
    output_dropout: float = 0.0,
    training: bool = False,
    reverse: bool = False,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer in one direction over a whole sequence: the definition of :func:`genfuse.ops.lstm`.

    Hochreiter and Schmidhuber 1997 with forget gates; with the ``ln_*`` weights the layer-normalised LSTM of Ba, Kiros
    and Hinton 2016 (arXiv 1607.06450, eq. 20-22). Arguments, shapes and options are those of :func:`genfuse.ops.lstm`.

    Returns:
        ``(y, h_n, c_n)``: y as x is laid out, ``[T, B, Hy]`` or packed ``[N, Hy]``; ``h_n [B, Hy]``, ``c_n [B, H]``.

    Example:
        >>> x, h, c = torch.randn(5, 3, 4), torch.zeros(3, 6), torch.zeros(3, 6)
        >>> y, h_n, c_n = lstm(x, h, c, torch.randn(24, 4), torch.randn(24, 6))
        >>> y.shape, bool((y[-1] == h_n).all())
        (torch.Size([5, 3, 6]), True)
    """
    dtype = _compute_dtype(x.dtype)
    hidden_size = weight_hh.size(0) // 4
    layer_norm = ln_ih_weight is not None
    counts = _row_counts(x, batch_sizes)
    steps, batch, outputs = len(counts), h0.size(0), h0.size(1)
    h, c = h0.to(dtype), c0.to(dtype)
    w_ih, w_hh = weight_ih.to(dtype), weight_hh.to(dtype)
    b_ih = bias_ih.to(dtype) if bias_ih is not None else None
    b_hh = bias_hh.to(dtype) if bias_hh is not None else None

    u_h = u_c = None
    input_mask = output_mask = None
    if training and max(zoneout_h, zoneout_c, weight_drop, input_dropout, output_dropout) > 0.0:
        rng = draw_rng(x.device, generator) if rng is None else rng
        if zoneout_h > 0.0:
            u_h = uniform(rng, (steps, batch, outputs), STREAM_ZONEOUT_H)
        if zoneout_c > 0.0:
            u_c = uniform(rng, (steps, batch, hidden_size), STREAM_ZONEOUT_C)
        if weight_drop > 0.0:
            w_hh = w_hh * keep_mask(rng, (w_hh.size(0), w_hh.size(1)), weight_drop, STREAM_WEIGHT, dtype)
        if input_dropout > 0.0:
            input_mask = keep_mask(rng, (batch, x.size(-1)), input_dropout, STREAM_INPUT, dtype)
        if output_dropout > 0.0:
            output_mask = keep_mask(rng, (batch, outputs), output_dropout, STREAM_OUTPUT, dtype)

    x_hat = x.to(dtype).reshape(sum(counts), x.size(-1))
    if input_mask is not None:
        x_hat = x_hat * _over_rows(input_mask, counts)
    from_input = x_hat @ w_ih.T
    if ln_ih_weight is not None:
        from_input = ln_ih_weight.to(dtype) * _normalise(from_input, eps)
    if b_ih is not None:
        from_input = from_input + b_ih
    by_step: tuple[Tensor, ...] = from_input.split(counts)  # type: ignore[no-untyped-call]

    ys: list[Tensor] = [h[:0]] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        count = counts[t]
        h_old, c_old = h[:count], c[:count]
        if resets is not None:
            alive = ~resets[t].unsqueeze(-1)
            h_old, c_old = torch.where(alive, h_old, 0.0), torch.where(alive, c_old, 0.0)

        from_hidden = h_old @ w_hh.T
        if ln_hh_weight is not None:
            from_hidden = ln_hh_weight.to(dtype) * _normalise(from_hidden, eps)
        if b_hh is not None:
            from_hidden = from_hidden + b_hh
        a_i, a_f, a_g, a_o = (by_step[t] + from_hidden).chunk(4, -1)
        i, f, g, o = a_i.sigmoid(), a_f.sigmoid(), a_g.tanh(), a_o.sigmoid()
        c_tilde = f * c_old + i * g
        c_normal = c_tilde
        if layer_norm and ln_c_weight is not None and ln_c_bias is not None:
            c_normal = ln_c_weight.to(dtype) * _normalise(c_tilde, eps) + ln_c_bias.to(dtype)
        h_tilde = o * c_normal.tanh()
        if weight_hr is not None:
            h_tilde = h_tilde @ weight_hr.to(dtype).T

        c_new = _zoneout(c_tilde, c_old, zoneout_c, u_c[t, :count] if u_c is not None else None)
        h_new = _zoneout(h_tilde, h_old, zoneout_h, u_h[t, :count] if u_h is not None else None)
        ys[t] = h_new if output_mask is None else h_new * output_mask[:count]
        h, c = _update(h, h_new, count), _update(c, c_new, count)

    y = torch.cat(ys) if ys else h[:0]
    return y.reshape(*x.shape[:-1], outputs).to(x.dtype), h.to(x.dtype), c.to(x.dtype)


def gru(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    zoneout_h: float = 0.0,
    weight_drop: float = 0.0,
    input_dropout: float = 0.0,
    output_dropout: float = 0.0,
    training: bool = False,
    reverse: bool = False,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One GRU layer in one direction over a whole sequence: the definition of :func:`genfuse.ops.gru`.

    Cho et al. 2014 in the variant that torch and cuDNN compute: the reset gate multiplies ``W_hn h + b_hn`` after the
    product. Arguments, shapes and options are those of :func:`genfuse.ops.gru`.

    Returns:
        ``(y, h_n)``: y as x is laid out, ``[T, B, H]`` or packed ``[N, H]``; ``h_n [B, H]``.

    Example:
        >>> y, h_n = gru(torch.randn(5, 3, 4), torch.zeros(3, 6), torch.randn(18, 4), torch.randn(18, 6))
        >>> y.shape, bool((y[-1] == h_n).all())
        (torch.Size([5, 3, 6]), True)
    """
    dtype = _compute_dtype(x.dtype)
    counts = _row_counts(x, batch_sizes)
    steps, batch, outputs = len(counts), h0.size(0), h0.size(1)
    h = h0.to(dtype)
    w_ih, w_hh = weight_ih.to(dtype), weight_hh.to(dtype)
    b_hh = bias_hh.to(dtype) if bias_hh is not None else None

    u_h = None
    input_mask = output_mask = None
    if training and max(zoneout_h, weight_drop, input_dropout, output_dropout) > 0.0:
        rng = draw_rng(x.device, generator) if rng is None else rng
        if zoneout_h > 0.0:
            u_h = uniform(rng, (steps, batch, outputs), STREAM_ZONEOUT_H)
        if weight_drop > 0.0:
            w_hh = w_hh * keep_mask(rng, (w_hh.size(0), w_hh.size(1)), weight_drop, STREAM_WEIGHT, dtype)
        if input_dropout > 0.0:
            input_mask = keep_mask(rng, (batch, x.size(-1)), input_dropout, STREAM_INPUT, dtype)
        if output_dropout > 0.0:
            output_mask = keep_mask(rng, (batch, outputs), output_dropout, STREAM_OUTPUT, dtype)

    x_hat = x.to(dtype).reshape(sum(counts), x.size(-1))
    if input_mask is not None:
        x_hat = x_hat * _over_rows(input_mask, counts)
    from_input = x_hat @ w_ih.T
    if bias_ih is not None:
        from_input = from_input + bias_ih.to(dtype)
    by_step: tuple[Tensor, ...] = from_input.split(counts)  # type: ignore[no-untyped-call]

    ys: list[Tensor] = [h[:0]] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        count = counts[t]
        h_old = h[:count]
        if resets is not None:
            h_old = torch.where(~resets[t].unsqueeze(-1), h_old, 0.0)

        from_hidden = h_old @ w_hh.T
        if b_hh is not None:
            from_hidden = from_hidden + b_hh
        x_r, x_z, x_n = by_step[t].chunk(3, -1)
        h_r, h_z, h_n = from_hidden.chunk(3, -1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        n = (x_n + r * h_n).tanh()
        h_tilde = (1.0 - z) * n + z * h_old

        h_new = _zoneout(h_tilde, h_old, zoneout_h, u_h[t, :count] if u_h is not None else None)
        ys[t] = h_new if output_mask is None else h_new * output_mask[:count]
        h = _update(h, h_new, count)

    y = torch.cat(ys) if ys else h[:0]
    return y.reshape(*x.shape[:-1], outputs).to(x.dtype), h.to(x.dtype)


def sample_token(
    logits: Tensor,
    u: Tensor | None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one index per row by the inverse of the cumulative distribution: the library's sampling rule.

    Temperature 0 is the argmax (lowest index wins a tie). Otherwise logits are divided by the temperature;
    ``top_k`` keeps every logit that is not below the k-th largest (ties are kept); ``top_p`` (nucleus sampling,
    Holtzman et al. 2019, arXiv 1904.09751) then keeps the smallest set of most probable tokens (ties: lower index
    first) whose renormalised probability reaches ``top_p``, at least one. The token is the first kept index v with
    ``cumsum(p)[v] > u``, or the last kept one where rounding leaves none.

    Args:
        logits: ``[B, V]``.
        u: uniforms in [0, 1), ``[B]``; None with temperature 0.

    Returns:
        ``(token, log_prob)``: int64 ``[B]``, float32 ``[B]`` (log-probability in nats under the filtered distribution;
        0 with temperature 0).

    Example:
        >>> token, log_prob = sample_token(torch.tensor([[0.0, 0.0]]), torch.tensor([0.75]))
        >>> int(token), round(float(log_prob), 3)
        (1, -0.693)
    """
    logits = logits.to(torch.float32)
    if temperature == 0.0:
        return logits.argmax(-1), logits.new_zeros(logits.shape[:-1])
    if u is None:
        raise ValueError("sample_token: u is needed unless temperature is 0")
    scaled = (logits / temperature).to(torch.float64)
    vocab = scaled.size(-1)
    keep = torch.ones_like(scaled, dtype=torch.bool)
    if top_k is not None and top_k < vocab:
        keep = scaled >= scaled.topk(top_k, -1).values[..., -1:]
    if top_p is not None and top_p < 1.0:
        p = scaled.masked_fill(~keep, -torch.inf).softmax(-1)
        sorted_p, order = p.sort(dim=-1, descending=True, stable=True)
        before = sorted_p.cumsum(-1) - sorted_p
        in_nucleus = before < top_p
        in_nucleus[..., 0] = True
        keep = keep & torch.zeros_like(keep).scatter(-1, order, in_nucleus)
    log_p = scaled.masked_fill(~keep, -torch.inf).log_softmax(-1)
    p = log_p.exp()
    beyond = (p.cumsum(-1) > u.to(torch.float64).unsqueeze(-1)) & keep & (p > 0.0)
    last = vocab - 1 - (p > 0.0).flip(-1).to(torch.int64).argmax(-1)
    token = torch.where(beyond.any(-1), beyond.to(torch.int64).argmax(-1), last)
    return token, log_p.gather(-1, token.unsqueeze(-1)).squeeze(-1).to(torch.float32)


def _generate_uniforms(rng: Tensor, batch: int, length: int) -> Tensor:
    """``u[b, s]``: element ``b * 2^32 + s``, so that row b depends on the seed and b alone."""
    rows = torch.arange(batch, dtype=torch.int64, device=rng.device).unsqueeze(-1) << 32
    return uniform_elements(rng, rows + torch.arange(length, dtype=torch.int64, device=rng.device))


def _rounded(weight: Tensor, weight_dtype: torch.dtype | None) -> Tensor:
    """Weights as the decoding loop multiplies them: float32, or rounded to ``weight_dtype`` first."""
    return (weight if weight_dtype is None else weight.to(weight_dtype)).to(torch.float32)


def _optional(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32)


@torch.no_grad()
def lstm_generate(
    prompt: Tensor,
    length: int,
    embedding: Tensor,
    layers: Sequence[Sequence[Tensor | None]],
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    *,
    state: Sequence[State] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
    u: Tensor | None = None,
    eps: float = 1e-5,
    weight_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, list[State]]:
    """Read a prompt, then draw token after token from an LSTM language model: see :func:`genfuse.ops.lstm_generate`.

    Returns:
        ``(tokens [B, length] int64, log_probs [B, length] float32, state)``, always all three. The state has read the
        prompt and every drawn token but the last, so ``tokens[:, -1:]`` is the prompt that continues the text.

    Example:
        >>> V, E, H = 7, 3, 5
        >>> layer = [torch.randn(4 * H, E), torch.randn(4 * H, H), None, None]
        >>> tokens, log_probs, state = lstm_generate(
        ...     torch.zeros(2, 1, dtype=torch.int64), 4, torch.randn(V, E), [layer], torch.randn(V, H))
        >>> tokens.shape
        torch.Size([2, 4])
    """
    batch = prompt.size(0)
    if u is None and rng is None and temperature != 0.0:
        rng = draw_rng(prompt.device, generator)
    if u is None and rng is not None:
        u = _generate_uniforms(rng, batch, length)
    weights = [tuple(_rounded(w, weight_dtype) for w in (layer[0], layer[1]) if w is not None) for layer in layers]
    vectors = [tuple(_optional(v) for v in layer[2:]) for layer in layers]
    head = _rounded(head_weight, weight_dtype)
    if state is None:
        sizes = [w_hh.size(1) for _, w_hh in weights]
        state = [(head.new_zeros(batch, size), head.new_zeros(batch, size)) for size in sizes]
    now = [(h.to(torch.float32), c.to(torch.float32)) for h, c in state]

    def read(tokens: Tensor) -> Tensor:
        """The top layer's last output after reading ``tokens [B, S]``."""
        x = F.embedding(tokens, embedding.to(torch.float32)).transpose(0, 1)
        for index, ((w_ih, w_hh), (b_ih, b_hh, *norm)) in enumerate(zip(weights, vectors, strict=True)):
            ln: Any = dict(zip(("ln_ih_weight", "ln_hh_weight", "ln_c_weight", "ln_c_bias"), norm, strict=False))
            x, h, c = lstm(
                x, *now[index], w_ih, w_hh, b_ih, b_hh, **ln, eps=eps, zoneout_h=zoneout_h, zoneout_c=zoneout_c
            )
            now[index] = (h, c)
        return x[-1]

    tokens: list[Tensor] = []
    log_probs: list[Tensor] = []
    top = read(prompt)
    for step in range(length):
        if step > 0:
            top = read(tokens[-1].unsqueeze(-1))
        logits = F.linear(top, head, _optional(head_bias))
        token, log_prob = sample_token(logits, None if u is None else u[:, step], temperature, top_k, top_p)
        tokens.append(token)
        log_probs.append(log_prob)
    if not tokens:
        return prompt[:, :0], head.new_zeros(batch, 0), now
    return torch.stack(tokens, 1), torch.stack(log_probs, 1), now


@torch.no_grad()
def gru_generate(
    prompt: Tensor,
    length: int,
    embedding: Tensor,
    layers: Sequence[Sequence[Tensor | None]],
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    *,
    state: Sequence[Tensor] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    zoneout_h: float = 0.0,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
    u: Tensor | None = None,
    weight_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Read a prompt, then draw token after token from a GRU language model: see :func:`genfuse.ops.gru_generate`.

    Returns:
        ``(tokens [B, length] int64, log_probs [B, length] float32, state)``, as :func:`lstm_generate`.

    Example:
        >>> V, E, H = 7, 3, 5
        >>> layer = [torch.randn(3 * H, E), torch.randn(3 * H, H), None, None]
        >>> tokens, log_probs, state = gru_generate(
        ...     torch.zeros(2, 1, dtype=torch.int64), 4, torch.randn(V, E), [layer], torch.randn(V, H))
        >>> tokens.shape
        torch.Size([2, 4])
    """
    batch = prompt.size(0)
    if u is None and rng is None and temperature != 0.0:
        rng = draw_rng(prompt.device, generator)
    if u is None and rng is not None:
        u = _generate_uniforms(rng, batch, length)
    weights = [tuple(_rounded(w, weight_dtype) for w in (layer[0], layer[1]) if w is not None) for layer in layers]
    vectors = [tuple(_optional(v) for v in layer[2:]) for layer in layers]
    head = _rounded(head_weight, weight_dtype)
    if state is None:
        state = [head.new_zeros(batch, w_hh.size(1)) for _, w_hh in weights]
    now = [h.to(torch.float32) for h in state]

    def read(tokens: Tensor) -> Tensor:
        """The top layer's last output after reading ``tokens [B, S]``."""
        x = F.embedding(tokens, embedding.to(torch.float32)).transpose(0, 1)
        for index, ((w_ih, w_hh), (b_ih, b_hh)) in enumerate(zip(weights, vectors, strict=True)):
            x, now[index] = gru(x, now[index], w_ih, w_hh, b_ih, b_hh, zoneout_h=zoneout_h)
        return x[-1]

    tokens: list[Tensor] = []
    log_probs: list[Tensor] = []
    top = read(prompt)
    for step in range(length):
        if step > 0:
            top = read(tokens[-1].unsqueeze(-1))
        logits = F.linear(top, head, _optional(head_bias))
        token, log_prob = sample_token(logits, None if u is None else u[:, step], temperature, top_k, top_p)
        tokens.append(token)
        log_probs.append(log_prob)
    if not tokens:
        return prompt[:, :0], head.new_zeros(batch, 0), now
    return torch.stack(tokens, 1), torch.stack(log_probs, 1), now


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Cross entropy in nats of ``softmax(hidden @ weight.T + bias)``: see :func:`genfuse.ops.linear_cross_entropy`.

    Args:
        hidden: ``[N, D]``.
        weight: ``[V, D]``.
        target: int64 ``[N]``.
        bias: ``[V]`` or None.

    Example:
        >>> loss = linear_cross_entropy(torch.zeros(3, 2), torch.randn(4, 2), torch.tensor([0, 1, 2]))
        >>> round(float(loss), 3)
        1.386
    """
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits, target, reduction=reduction, ignore_index=ignore_index)
