"""What a user writes without genfuse: the recurrent family's baselines, each in its strongest plain-PyTorch form.

Strongest means: the input projection is hoisted out of the loop into one matrix product, all zoneout masks of a
sequence are drawn in one call, biases that can be merged are merged, and inference runs under `torch.inference_mode`.
A step is a function of its own because that is what `torch.compile` can take in bearable time; the loop around it
stays in Python. `ONNX Runtime` is the one maintained peer from PyPI with a recurrent CPU kernel (inference only).
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cases import UnavailableError
from torch import Tensor

Step = Callable[..., Any]


# ---------------------------------------------------------------------------------------------------------------- steps


def lstm_step(xw: Tensor, h: Tensor, c: Tensor, w_hh: Tensor) -> tuple[Tensor, Tensor]:
    """One LSTM step; `xw` = W_ih x + b_ih + b_hh is [B, 4H]."""
    i, f, g, o = torch.addmm(xw, h, w_hh.t()).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_step(xw: Tensor, h: Tensor, w_hh: Tensor, b_hh: Tensor) -> Tensor:
    """One GRU step; `xw` = W_ih x + b_ih is [B, 3H]."""
    xr, xz, xn = xw.chunk(3, 1)
    hr, hz, hn = torch.addmm(b_hh, h, w_hh.t()).chunk(3, 1)
    n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    return n + torch.sigmoid(xz + hz) * (h - n)


def layer_norm_lstm_step(
    xw: Tensor,
    h: Tensor,
    c: Tensor,
    old_h: Tensor,
    old_c: Tensor,
    w_hh: Tensor,
    b_hh: Tensor,
    ln_hh: Tensor,
    ln_c_weight: Tensor,
    ln_c_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """One layer-norm LSTM step (Ba, Kiros, Hinton 2016, eq. 20-22) with zoneout (Krueger et al. 2016).

    `xw` = layer_norm(W_ih x) is [B, 4H]; `old_h` and `old_c` [B, H] are true where the old state is kept.
    """
    a = xw + F.layer_norm(h @ w_hh.t(), b_hh.shape, ln_hh, b_hh)
    i, f, g, o = a.chunk(4, 1)
    new_c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    new_h = torch.sigmoid(o) * torch.tanh(F.layer_norm(new_c, ln_c_bias.shape, ln_c_weight, ln_c_bias))
    return torch.where(old_h, h, new_h), torch.where(old_c, c, new_c)


# ---------------------------------------------------------------------------------------------------------------- loops


def lstm_loop(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, *, step: Step = lstm_step
) -> tuple[Tensor, Tensor, Tensor]:
    ys = []
    for xw in F.linear(x, w_ih, b_ih + b_hh).unbind(0):
        h, c = step(xw, h, c, w_hh)
        ys.append(h)
    return torch.stack(ys), h, c


def gru_loop(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, *, step: Step = gru_step
) -> tuple[Tensor, Tensor]:
    ys = []
    for xw in F.linear(x, w_ih, b_ih).unbind(0):
        h = step(xw, h, w_hh, b_hh)
        ys.append(h)
    return torch.stack(ys), h


def layer_norm_lstm_steps(
    xw: Tensor, h: Tensor, c: Tensor, old_h: Tensor, old_c: Tensor, *weights: Tensor, step: Step = layer_norm_lstm_step
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps in a row: xw [S, B, 4H], old_h and old_c [S, B, H] -> (outputs [S, B, H], h, c)."""
    ys = []
    for gates, keep_h, keep_c in zip(xw.unbind(0), old_h.unbind(0), old_c.unbind(0), strict=True):
        h, c = step(gates, h, c, keep_h, keep_c, *weights)
        ys.append(h)
    return torch.stack(ys), h, c


def layer_norm_lstm_loop(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    old_h: Tensor,
    old_c: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    ln_ih: Tensor,
    ln_hh: Tensor,
    ln_c_weight: Tensor,
    ln_c_bias: Tensor,
    *,
    chunk: int | None = None,
    steps: Step = layer_norm_lstm_steps,
) -> Tensor:
    """`steps` is called for `chunk` steps at a time (default: all), so that it can be a compiled function."""
    gates = F.layer_norm(F.linear(x, w_ih), b_ih.shape, ln_ih, b_ih)
    ys, n = [], chunk or x.shape[0]
    for xw, keep_h, keep_c in zip(gates.split(n), old_h.split(n), old_c.split(n), strict=True):
        y, h, c = steps(xw, h, c, keep_h, keep_c, w_hh, b_hh, ln_hh, ln_c_weight, ln_c_bias)
        ys.append(y)
    return torch.cat(ys)


# ----------------------------------------------------------------------------------------------------------- generation


class CharModel(torch.nn.Module):
    """Embedding, L layers of torch.nn.LSTM, linear head: the model that every generation contestant decodes from."""

    def __init__(self, vocab: int, embed: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab, embed)
        self.lstm = torch.nn.LSTM(embed, hidden, layers)
        self.head = torch.nn.Linear(hidden, vocab)

    def layer(self, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return tuple(getattr(self.lstm, f"{n}_l{k}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))  # type: ignore[return-value]


def draw(probs: Tensor, u: Tensor | None) -> Tensor:
    """[B, V] -> [B, 1]; the first index whose cumulated probability exceeds u, where u [B, 1] is given."""
    if u is None:
        return torch.multinomial(probs, 1)
    return (probs.double().cumsum(1) <= u).sum(1, keepdim=True).clamp_(max=probs.shape[1] - 1)


def generate_lstm(model: CharModel, prompt: Tensor, length: int, u: Tensor | None = None) -> Tensor:
    """The loop of every tutorial: nn.LSTM for one step, Linear, softmax, multinomial."""
    with torch.inference_mode():
        out, state = model.lstm(model.embedding(prompt).transpose(0, 1))
        tokens: list[Tensor] = []
        for s in range(length):
            if s:
                out, state = model.lstm(model.embedding(tokens[-1]).transpose(0, 1), state)
            probs = torch.softmax(model.head(out[-1]), 1)
            tokens.append(draw(probs, None if u is None else u[:, s : s + 1]))
        return torch.cat(tokens, 1)


def generate_step(
    token: Tensor,
    states: Sequence[Tensor],
    embedding: Tensor,
    layers: Sequence[Sequence[Tensor]],
    head: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """token [B, 1] -> probabilities [B, V]; a function of tensors alone, so that one graph holds the whole step."""
    x, new = F.embedding(token[:, 0], embedding), []
    for k, (w_ih, w_hh, b_ih, b_hh) in enumerate(layers):
        x, c = lstm_step(F.linear(x, w_ih, b_ih + b_hh), states[2 * k], states[2 * k + 1], w_hh)
        new += [x, c]
    return torch.softmax(F.linear(x, head[0], head[1]), 1), new


def generate_cells(
    model: CharModel, prompt: Tensor, length: int, u: Tensor | None = None, *, step: Step = generate_step
) -> Tensor:
    """The faster loop: no nn.LSTM, one function a token (what torch.compile is given)."""
    n, hidden = model.lstm.num_layers, model.lstm.hidden_size
    layers, head = [model.layer(k) for k in range(n)], (model.head.weight, model.head.bias)
    with torch.inference_mode():
        states = [torch.zeros(prompt.shape[0], hidden) for _ in range(2 * n)]
        for t in range(prompt.shape[1]):
            probs, states = step(prompt[:, t : t + 1], states, model.embedding.weight, layers, head)
        tokens: list[Tensor] = []
        for s in range(length):
            if s:
                probs, states = step(tokens[-1], states, model.embedding.weight, layers, head)
            tokens.append(draw(probs, None if u is None else u[:, s : s + 1]))
        return torch.cat(tokens, 1)


# -------------------------------------------------------------------------------------------------------- torch.compile


@functools.cache
def compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """`torch.compile(fullgraph=True, dynamic=False)`, which must not fall back to eager unseen.

    Shapes are static (faster code) and every case brings its own, so the limit on recompilations of one code object is
    raised, and reaching it is an error: by default Dynamo would go on in eager mode, and that would be what is timed.
    """
    if backend == "inductor" and not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        raise UnavailableError("torch.compile needs a C++ compiler")
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.accumulated_recompile_limit = 1024
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.allow_rnn = True  # trace torch.nn.LSTM instead of breaking the graph there
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)


# --------------------------------------------------------------------------------------------------------- ONNX Runtime


def onnx_rnn(module: torch.nn.LSTM | torch.nn.GRU, shape: tuple[int, ...], threads: int) -> Callable[[Tensor], Tensor]:
    """x [T, B, I] -> y [T, B, H] by ONNX Runtime's CPU kernel, with the weights of a one-layer torch module."""
    try:
        import onnx
        import onnxruntime
    except ImportError as e:
        raise UnavailableError(f"onnxruntime and onnx are not installed ({e.name})") from None
    lstm = isinstance(module, torch.nn.LSTM)
    order = (0, 3, 1, 2) if lstm else (1, 0, 2)  # i f g o -> i o f c, and r z n -> z r h

    def blocks(p: Tensor) -> Any:
        parts = p.detach().chunk(len(order), 0)
        return torch.cat([parts[k] for k in order]).numpy()

    hidden = module.hidden_size
    weights = {
        "W": blocks(module.weight_ih_l0)[None],
        "R": blocks(module.weight_hh_l0)[None],
        "B": np.concatenate([blocks(module.bias_ih_l0), blocks(module.bias_hh_l0)])[None],
    }
    helper = onnx.helper
    kind = {} if lstm else {"linear_before_reset": 1}  # torch's GRU: r * (W_hn h + b_hn)
    node = helper.make_node("LSTM" if lstm else "GRU", ["X", *weights], ["Y"], hidden_size=hidden, **kind)
    t, b, _ = shape
    graph = helper.make_graph(
        [node],
        "rnn",
        [helper.make_tensor_value_info("X", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, (t, 1, b, hidden))],
        [onnx.numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its workers may spin inside a run, which helps it, but not on into the time of the next contestant.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"X": x.numpy()})[0]).squeeze(1)

    return run


# ------------------------------------------------------------------------------------------------- uniforms of the spec


def philox_uniform(seed: int, offset: int, n: int) -> Tensor:
    """The first n uniforms of (seed, offset), by Philox4x32-10 (Salmon et al. 2011).

    Written here a second time, in NumPy: a contestant given masks made from these agrees with genfuse only if genfuse's
    generator follows its documented contract.
    """
    low = np.uint64(0xFFFFFFFF)
    groups = np.arange((n + 3) // 4, dtype=np.uint64)
    c0, c1 = groups & low, groups >> np.uint64(32)
    c2, c3 = (np.full_like(groups, (offset >> s) & 0xFFFFFFFF) for s in (0, 32))
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words = np.stack([c0, c1, c2, c3], 1).reshape(-1)[:n]
    return torch.from_numpy((words >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24))
