"""Gated activation and concatenated ELU, beside the lines that people write in eager PyTorch, and those compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from bench_sampling import forward
from cases import Case, Factory, Setting, Work, benchmark_tests
from torch import Tensor

Function = Callable[..., Tensor]


def contest(
    ours: Function, eager: Function, shapes: list[tuple[int, ...]], last: bool, backward: bool, setting: Setting
) -> Mapping[str, Factory]:
    """The contestants of a case: functions of tensors of these shapes, images with their channels first or last."""

    def tensor(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        values = torch.randn(shape, generator=generator)
        return values.contiguous(memory_format=torch.channels_last) if last and len(shape) == 4 else values

    def work(function: Function) -> Work:
        generator = torch.Generator().manual_seed(0)
        inputs = [tensor(shape, generator).requires_grad_(backward) for shape in shapes]
        if not backward:
            return forward(lambda: function(*inputs))
        with torch.no_grad():  # the gradient comes as the next layer leaves it: in the format of the result
            cotangent = tensor(tuple(eager(*inputs).shape), generator)
        return lambda: torch.autograd.grad(function(*inputs), inputs, cotangent)

    def compiled() -> Work:
        torch._dynamo.reset()  # one function is compiled for more shapes, over all the cases, than Dynamo allows
        return work(torch.compile(eager, fullgraph=True, backend=setting.backend))

    return {
        "genfuse": lambda: work(ours),
        "eager": lambda: work(eager),
        "torch.compile(eager)": compiled,
    }


def gate(kind: str, last: bool, backward: bool, setting: Setting) -> Mapping[str, Factory]:
    """A tanh gate; with a class and a bias; or PixelCNN++'s, with its residual."""
    batch, channels, side = (2, 8, 4) if setting.quick else (16, 256, 32)
    x, half = (batch, channels, side, side), (batch, channels // 2, side, side)

    def plain(x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.tanh(a) * torch.sigmoid(b)

    def of_class(x: Tensor, label: Tensor, bias: Tensor) -> Tensor:
        a, b = (x + bias[:, None, None] + label[:, :, None, None]).chunk(2, 1)
        return torch.tanh(a) * torch.sigmoid(b)

    def linear(x: Tensor, residual: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return residual + a * torch.sigmoid(b)

    from genfuse import ops

    eager, ours, shapes = {
        "plain": (plain, ops.gated_activation, [x]),
        "class": (of_class, lambda x, label, bias: ops.gated_activation(x, label, bias=bias), [x, x[:2], x[1:2]]),
        "linear": (linear, lambda x, r: ops.gated_activation(x, residual=r, activation="linear"), [x, half]),
    }[kind]
    return contest(ours, eager, shapes, last, backward, setting)


def elu(last: bool, backward: bool, setting: Setting) -> Mapping[str, Factory]:
    shape = (2, 8, 4, 4) if setting.quick else (16, 256, 32, 32)

    from genfuse import ops

    def eager(x: Tensor) -> Tensor:
        return F.elu(torch.cat((x, -x), 1))

    return contest(ops.concat_elu, eager, [shape], last, backward, setting)


def overhead(setting: Setting) -> Mapping[str, Factory]:
    """Two numbers: nothing to compute, so this is dispatch, checks, allocation and autograd bookkeeping."""
    del setting
    x, y = torch.ones(1, 2), torch.ones(1, 1)
    leaf = torch.ones(1, 2).requires_grad_()

    from genfuse import ops

    def eager(x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.tanh(a) * torch.sigmoid(b)

    def backward(function: Function) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(leaf), leaf, y)

    op = torch.ops.genfuse.gated_activation.default
    return {
        "torch.ops.genfuse.gated_activation": lambda: forward(lambda: op(x, None, None, None, 1, 0)),
        "genfuse.ops.gated_activation": lambda: forward(lambda: ops.gated_activation(x)),
        "genfuse.ops.gated_activation, recording gradients": lambda: lambda: ops.gated_activation(leaf),
        "genfuse.ops.gated_activation, forward+backward": lambda: backward(ops.gated_activation),
        "eager": lambda: forward(lambda: eager(x)),
        "eager, forward+backward": lambda: backward(eager),
        "genfuse.ops.concat_elu": lambda: forward(lambda: ops.concat_elu(x)),
    }


# The project's promises: forward and forward+backward.
TARGETS: dict[bool, dict[str, float]] = {
    False: {"eager": 4.0, "torch.compile(eager)": 1.0},
    True: {"eager": 3.0, "torch.compile(eager)": 1.2},
}
SIZE = "16 x 256 x 32 x 32"

CASES: list[Case] = [
    *(
        Case(
            name=f"{name}-{'last' if last else 'first'}-{'backward' if backward else 'forward'}",
            title=f"{title}, {SIZE}, channels {'last' if last else 'first'}, "
            f"{'forward+backward' if backward else 'forward'}",
            build=functools.partial(build, last, backward),
            targets=TARGETS[backward],
            memory=True,
        )
        for name, title, build in (
            ("gate", "tanh gate", functools.partial(gate, "plain")),
            ("gate-class", "tanh gate with a class and a bias", functools.partial(gate, "class")),
            ("gate-linear", "linear gate with a residual", functools.partial(gate, "linear")),
            ("concat-elu", "concatenated ELU", elu),
        )
        for last in (False, True)
        for backward in (False, True)
    ),
    Case(
        name="overhead-gate",
        title="One call of a gate of two numbers",
        build=overhead,
        ours=None,
        group="overhead_us",
        # Room for a machine of half this speed, as of bench_recurrent's.
        bounds_us={
            "torch.ops.genfuse.gated_activation": 25.0,
            "genfuse.ops.gated_activation": 50.0,
            "genfuse.ops.gated_activation, recording gradients": 100.0,
            "genfuse.ops.gated_activation, forward+backward": 200.0,
            "genfuse.ops.concat_elu": 50.0,
        },
        rtol=None,
    ),
]

test_speed, test_agree = benchmark_tests(CASES)
