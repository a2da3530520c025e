"""The recurrent family: LSTM, GRU, LayerNormLSTM with zoneout, the decoding loop, and what one call costs.

    pytest benchmarks/bench_recurrent.py                      # pytest-benchmark, one group a case
    pytest benchmarks --benchmark-disable                     # executes everything once, small
    python benchmarks/report.py recurrent [--write]           # the table of the README

Forward runs under `torch.inference_mode`. Forward + backward takes the gradients of the input and of every parameter
(`torch.autograd.grad`, so nothing is accumulated) for a given gradient of the output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from baselines_recurrent import (
    CharModel,
    compiled,
    generate_cells,
    generate_lstm,
    generate_step,
    gru_loop,
    gru_step,
    layer_norm_lstm_loop,
    layer_norm_lstm_step,
    layer_norm_lstm_steps,
    lstm_loop,
    lstm_step,
    onnx_rnn,
    philox_uniform,
)
from cases import Case, Factory, Setting, Work, benchmark_tests
from torch import Tensor

Shape = tuple[int, int, int, int]  # T, B, I, H


def sizes(shape: Shape, setting: Setting) -> Shape:
    """Quick sizes are nearly the same for all cases, so that torch.compile captures each step once or twice."""
    return (5, min(shape[1], 3), 16, 16) if setting.quick else shape


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers that are the same for every contestant, whenever it is built."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def forward(function: Callable[[], Any]) -> Work:
    def work() -> Any:
        with torch.inference_mode():
            return function()

    return work


def forward_backward(function: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor) -> Work:
    def work() -> tuple[Tensor, ...]:
        y = function()
        return y, *torch.autograd.grad(y, inputs, grad)

    return work


# -------------------------------------------------------------------------------------------------- LSTM and GRU, plain


def sequence(kind: str, shape: Shape, train: bool, setting: Setting) -> Mapping[str, Factory]:
    t, b, i, h = sizes(shape, setting)

    @functools.cache
    def data() -> tuple[torch.nn.Module, Tensor, Tensor]:
        torch.manual_seed(0)
        module = getattr(torch.nn, kind)(i, h)
        return module, rand(t, b, i, seed=1).requires_grad_(train), rand(t, b, h, seed=2)

    def run(function: Callable[[], Tensor]) -> Work:
        if not train:
            return forward(function)
        module, x, grad = data()
        return forward_backward(function, [x, *module.parameters()], grad)

    def genfuse_module() -> Work:
        import genfuse.nn

        module, x, grad = data()
        ours = getattr(genfuse.nn, kind)(i, h)
        ours.load_state_dict(module.state_dict())
        if not train:
            return forward(lambda: ours(x)[0])
        return forward_backward(lambda: ours(x)[0], [x, *ours.parameters()], grad)

    def torch_module() -> Work:
        module, x, _ = data()
        return run(lambda: module(x)[0])

    def compiled_module() -> Work:
        module, x, _ = data()
        function = compiled(module, setting.backend)
        return run(lambda: function(x)[0])

    def compiled_step() -> Work:
        module, x, _ = data()
        parameters, zero = list(module.parameters()), torch.zeros(b, h)
        if kind == "LSTM":
            lstm = compiled(lstm_step, setting.backend)
            return run(lambda: lstm_loop(x, zero, zero, *parameters, step=lstm)[0])
        gru = compiled(gru_step, setting.backend)
        return run(lambda: gru_loop(x, zero, *parameters, step=gru)[0])

    def onnx() -> Work:
        module, x, _ = data()
        session = onnx_rnn(module, tuple(x.shape), setting.threads)
        return lambda: session(x)

    contestants: dict[str, Factory] = {"genfuse": genfuse_module, f"torch.nn.{kind}": torch_module}
    if b == 1 and not train and kind == "LSTM":
        contestants[f"torch.compile(nn.{kind})"] = compiled_module
    contestants["torch.compile(step) in a loop"] = compiled_step
    if not train:
        contestants["ONNX Runtime"] = onnx
    return contestants


def sequence_case(kind: str, shape: Shape, train: bool, target: float) -> Case:
    mode, peer = "forward+backward" if train else "forward", f"torch.nn.{kind}"
    return Case(
        name=f"{kind.lower()}-{'x'.join(map(str, shape))}-{mode}",
        title=f"{kind} {shape} {mode}",
        build=functools.partial(sequence, kind, shape, train),
        targets={peer: target},
        memory=train or shape == (100, 64, 512, 512),
        memory_targets={peer: 1.0} if train else {},
        rtol=1e-3,
    )


# ------------------------------------------------------------------------------------------------------------- one step


def one_step(ours: str, setting: Setting) -> Mapping[str, Factory]:
    size = 16 if setting.quick else 512

    @functools.cache
    def data() -> tuple[torch.nn.LSTM, torch.nn.LSTMCell, Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        lstm, cell = torch.nn.LSTM(size, size), torch.nn.LSTMCell(size, size)
        cell.load_state_dict({k.removesuffix("_l0"): v for k, v in lstm.state_dict().items()})
        return lstm, cell, *(rand(1, size, seed=k) for k in range(3))

    def layer(module: Callable[..., Any]) -> Work:
        *_, x, h, c = data()
        x, h, c = x[None], h[None], c[None]

        def run() -> tuple[Tensor, Tensor]:
            _, (new_h, new_c) = module(x, (h, c))
            return new_h[0], new_c[0]

        return forward(run)

    def cell(module: Callable[..., Any]) -> Work:
        *_, x, h, c = data()
        return forward(lambda: module(x, (h, c)))

    def genfuse_lstm() -> Work:
        import genfuse.nn

        module = genfuse.nn.LSTM(size, size)
        module.load_state_dict(data()[0].state_dict())
        return layer(module)

    def genfuse_cell() -> Work:
        import genfuse.nn

        module = genfuse.nn.LSTMCell(size, size)
        module.load_state_dict(data()[1].state_dict())
        return cell(module)

    return {
        "genfuse": genfuse_lstm if ours == "LSTM" else genfuse_cell,
        "torch.nn.LSTM": lambda: layer(data()[0]),
        "torch.nn.LSTMCell": lambda: cell(data()[1]),
        "torch.compile(nn.LSTM)": lambda: layer(compiled(data()[0], setting.backend)),
        "torch.compile(nn.LSTMCell)": lambda: cell(compiled(data()[1], setting.backend)),
    }


# ----------------------------------------------------------------------------------------------- layer norm and zoneout


ZONEOUT_H, ZONEOUT_C, SEED = 0.1, 0.3, 2024


def layer_norm_zoneout(shape: Shape, setting: Setting) -> Mapping[str, Factory]:
    t, b, i, h = sizes(shape, setting)

    @functools.cache
    def data() -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        near_one = [1 + rand(n, seed=k, scale=0.1) for k, n in enumerate((4 * h, 4 * h, h))]
        weights = [rand(4 * h, i, seed=10, scale=i**-0.5), rand(4 * h, h, seed=11, scale=h**-0.5)]
        biases = [rand(n, seed=20 + k, scale=0.1) for k, n in enumerate((4 * h, 4 * h, h))]
        parameters = [*weights, *biases[:2], *near_one, biases[2]]
        x, grad = rand(t, b, i, seed=30).requires_grad_(), rand(t, b, h, seed=31)
        return x, [p.requires_grad_() for p in parameters], torch.zeros(b, h), grad

    def ours() -> Work:
        import genfuse.nn
        import genfuse.ops

        x, parameters, zero, grad = data()
        if setting.exact:  # the op takes the seed from outside
            rng = torch.tensor([SEED, 0])
            names = ("ln_ih_weight", "ln_hh_weight", "ln_c_weight", "ln_c_bias")
            norms = dict(zip(names, parameters[4:], strict=True))

            def run() -> Tensor:
                options: dict[str, Any] = {"zoneout_h": ZONEOUT_H, "zoneout_c": ZONEOUT_C, "training": True, "rng": rng}
                y: Tensor = genfuse.ops.lstm(x, zero, zero, *parameters[:4], **norms, **options)[0]
                return y

            return forward_backward(run, [x, *parameters], grad)
        module = genfuse.nn.LayerNormLSTM(i, h, zoneout_h=ZONEOUT_H, zoneout_c=ZONEOUT_C).train()
        return forward_backward(lambda: module(x)[0], [x, *module.parameters()], grad)

    def masks() -> tuple[Tensor, Tensor]:
        if setting.exact:
            n = t * b * h
            u_h, u_c = (philox_uniform(SEED, stream, n).view(t, b, h) for stream in (0, 1))
            return u_h < ZONEOUT_H, u_c < ZONEOUT_C
        empty = functools.partial(torch.empty, t, b, h, dtype=torch.bool)
        return empty().bernoulli_(ZONEOUT_H), empty().bernoulli_(ZONEOUT_C)  # the fastest way to draw them

    def loop(**options: Any) -> Work:
        x, parameters, zero, grad = data()
        function = functools.partial(layer_norm_lstm_loop, **options)
        return forward_backward(lambda: function(x, zero, zero, *masks(), *parameters), [x, *parameters], grad)

    def compiled_step() -> Work:
        step = compiled(layer_norm_lstm_step, setting.backend)
        return loop(steps=functools.partial(layer_norm_lstm_steps, step=step))

    def compiled_chunk() -> Work:
        # All T steps as one graph take far too long to compile: docs/design/recurrent.md, "The baselines".
        chunk = max(n for n in range(1, 11) if t % n == 0)
        return loop(chunk=chunk, steps=compiled(layer_norm_lstm_steps, setting.backend))

    return {
        "genfuse": ours,
        "eager loop": loop,
        "torch.compile(step) in a loop": compiled_step,
        "torch.compile(8-10 steps) in a loop": compiled_chunk,
    }


# ----------------------------------------------------------------------------------------------------------- generation


def generation(batch: int, setting: Setting) -> Mapping[str, Factory]:
    vocab, embed, hidden, layers, length = (11, 16, 16, 2, 8) if setting.quick else (100, 256, 512, 2, 200)
    if setting.quick:
        batch = min(batch, 3)

    @functools.cache
    def data() -> tuple[CharModel, Tensor, Tensor | None]:
        torch.manual_seed(0)
        model = CharModel(vocab, embed, hidden, layers)
        with torch.no_grad():
            model.head.weight.mul_(10)  # distributions that are not flat: the draws then depend on the model
        prompt = torch.arange(batch)[:, None] % vocab
        u = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) if setting.exact else None
        return model, prompt, u

    def ours(weight_dtype: torch.dtype | None = None) -> Work:
        import genfuse.ops

        model, prompt, u = data()

        def run() -> Tensor:
            weights = [model.layer(k) for k in range(layers)]
            tokens: Tensor = genfuse.ops.lstm_generate(
                prompt,
                length,
                model.embedding.weight,
                weights,
                model.head.weight,
                model.head.bias,
                u=u,
                weight_dtype=weight_dtype,
            )
            return tokens

        return forward(run)

    def loop(function: Callable[..., Tensor], **more: Any) -> Work:
        model, prompt, u = data()
        return lambda: function(model, prompt, length, u, **more)

    return {
        "genfuse": ours,
        "genfuse, bfloat16 weights": lambda: ours(torch.bfloat16),
        "eager loop of nn.LSTM": lambda: loop(generate_lstm),
        "eager loop of cells": lambda: loop(generate_cells),
        "torch.compile(step) in a loop": lambda: loop(generate_cells, step=compiled(generate_step, setting.backend)),
    }


# -------------------------------------------------------------------------------------------------------- call overhead


def overhead(setting: Setting) -> Mapping[str, Factory]:
    """T = B = I = H = 1: nothing to compute, so this is dispatch, checks, allocation and autograd bookkeeping."""
    del setting

    @functools.cache
    def data(grad: bool) -> tuple[Tensor, ...]:
        x, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
        weights = [torch.ones(4, 1), torch.ones(4, 1), torch.zeros(4), torch.zeros(4)]
        return x, zero, zero, *(w.requires_grad_(grad) for w in weights)

    def registered_op() -> Work:
        import genfuse.ops  # noqa: F401  (registers it)

        op = torch.ops.genfuse.lstm.default
        rest = (*[None] * 8, *[0.0] * 5, 1e-5, False, False, False)
        arguments = data(False)
        return forward(lambda: op(*arguments, *rest))

    def ops_lstm() -> Work:
        import genfuse.ops

        arguments = data(False)
        return forward(lambda: genfuse.ops.lstm(*arguments))

    def ops_lstm_grad(backward: bool) -> Work:
        import genfuse.ops

        arguments = data(True)
        weights, grad = list(arguments[3:]), torch.ones(1, 1, 1)
        if backward:
            return forward_backward(lambda: genfuse.ops.lstm(*arguments)[0], weights, grad)
        return lambda: genfuse.ops.lstm(*arguments)

    def module(library: str, name: str, backward: bool = False) -> Work:
        if library == "genfuse":
            import genfuse.nn as nn
        else:
            nn = torch.nn  # type: ignore[misc]
        layer = getattr(nn, name)(1, 1)
        x = torch.ones(1, 1) if name == "LSTMCell" else torch.ones(1, 1, 1)
        if backward:
            return forward_backward(lambda: layer(x)[0], list(layer.parameters()), torch.ones_like(x))
        return forward(lambda: layer(x))

    def add() -> Work:
        x = torch.ones(1)
        return forward(lambda: torch.add(x, x))

    return {
        "torch.add": add,
        "torch.ops.genfuse.lstm": registered_op,
        "genfuse.ops.lstm": ops_lstm,
        "genfuse.ops.lstm, recording gradients": lambda: ops_lstm_grad(False),
        "genfuse.ops.lstm, forward+backward": lambda: ops_lstm_grad(True),
        "genfuse.nn.LSTM": lambda: module("genfuse", "LSTM"),
        "torch.nn.LSTM": lambda: module("torch", "LSTM"),
        "genfuse.nn.LSTMCell": lambda: module("genfuse", "LSTMCell"),
        "torch.nn.LSTMCell": lambda: module("torch", "LSTMCell"),
        "torch.nn.LSTM, forward+backward": lambda: module("torch", "LSTM", backward=True),
    }


# ---------------------------------------------------------------------------------------------------------------- cases


CASES: list[Case] = [
    *(
        sequence_case(kind, shape, train, 1.0)
        for kind in ("LSTM", "GRU")
        for shape in ((128, 32, 256, 256), (100, 64, 512, 512), (35, 20, 650, 650))
        for train in (False, True)
    ),
    sequence_case("LSTM", (64, 1, 512, 512), False, 2.0),
    sequence_case("LSTM", (64, 1, 512, 512), True, 1.5),
    *(
        Case(
            name=f"{name.lower()}-one-step",
            title=f"{name}, one step (1, 1, 512, 512)",
            build=functools.partial(one_step, name),
            targets={f"torch.nn.{name}": target},
        )
        for name, target in (("LSTM", 8.0), ("LSTMCell", 1.5))
    ),
    *(
        Case(
            name=f"layer-norm-lstm-zoneout-{'x'.join(map(str, shape))}",
            title=f"LayerNormLSTM + zoneout {shape} forward+backward",
            build=functools.partial(layer_norm_zoneout, shape),
            targets={
                "eager loop": 8.0,
                "torch.compile(step) in a loop": 2.0,
                "torch.compile(8-10 steps) in a loop": 2.0,
            },
            memory=True,
            rtol=1e-3,
            random=True,
        )
        for shape in ((128, 8, 128, 128), (100, 64, 512, 512))
    ),
    *(
        Case(
            name=f"generate-batch-{batch}",
            title=f"generate 200 tokens, V=100 E=256 H=512 L=2, B={batch}",
            build=functools.partial(generation, batch),
            targets={"eager loop of nn.LSTM": target},
            unchecked=("genfuse, bfloat16 weights",),
            random=True,
        )
        for batch, target in ((1, 12.0), (32, 3.0))
    ),
    Case(
        name="overhead",
        title="One call of the smallest op (T = B = I = H = 1)",
        build=overhead,
        ours=None,
        group="overhead_us",
        # Room for a machine of half this speed; a regression that matters (a second dispatch, a copy of the arguments,
        # a registry walked on every call) costs more than that.
        bounds_us={
            "torch.ops.genfuse.lstm": 25.0,
            "genfuse.ops.lstm": 50.0,
            "genfuse.ops.lstm, recording gradients": 120.0,
            "genfuse.ops.lstm, forward+backward": 300.0,
            "genfuse.nn.LSTM": 100.0,
            "genfuse.nn.LSTMCell": 75.0,
        },
        rtol=None,
    ),
]

test_speed, test_agree = benchmark_tests(CASES)
