"""The recurrent family on an NVIDIA GPU: our kernels against cuDNN, compiled loops and eager decoding.

    python benchmarks/report.py recurrent_gpu [--write]

Without CUDA every contestant is unavailable. Ours are called by name (`genfuse.use_backend`), because a kernel that has
no results here yet is off in the default dispatch (docs/design/gpu.md says what switches it on).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from baselines_recurrent import (
    CharModel,
    compiled,
    generate_lstm,
    gru_loop,
    gru_step,
    layer_norm_lstm_loop,
    layer_norm_lstm_step,
    layer_norm_lstm_steps,
    lstm_loop,
    lstm_step,
)
from cases import Case, Factory, Setting, UnavailableError, Work, benchmark_tests
from torch import Tensor

Shape = tuple[int, int, int, int]  # T, B, I, H
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ZONEOUT_H, ZONEOUT_C = 0.05, 0.5


def need_cuda(native: bool = False) -> None:
    if not torch.cuda.is_available():
        raise UnavailableError("no CUDA device")
    if native:
        from genfuse import _native

        if (reason := _native.cuda_error()) is not None:
            raise UnavailableError(reason)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def with_backend(name: str, function: Callable[[], Any]) -> Callable[[], Any]:
    import genfuse

    need_cuda(native=name == "cuda")

    def run() -> Any:
        with genfuse.use_backend(name):
            return function()

    return run


def as_graph(work: Work) -> Work:
    """The same work recorded once and replayed: what is left is the device's own time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def run() -> Any:
        graph.replay()
        return result

    return run


def passes(function: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor, train: bool) -> Work:
    """A forward pass, or forward + backward."""

    def forward() -> Any:
        with torch.inference_mode():
            return function()

    def both() -> Any:
        y = function()
        return y, *torch.autograd.grad(y, inputs, grad)

    return both if train else forward


def sequence(kind: str, shape: Shape, dtype: torch.dtype, train: bool, setting: Setting) -> Mapping[str, Factory]:
    t, b, i, h = (5, 3, 16, 16) if setting.quick else shape

    @functools.cache
    def data() -> tuple[torch.nn.Module, Tensor, Tensor]:
        need_cuda()
        torch.manual_seed(0)
        module = getattr(torch.nn, kind)(i, h).to("cuda", dtype)
        return module, rand(t, b, i, seed=1, dtype=dtype).requires_grad_(train), rand(t, b, h, seed=2, dtype=dtype)

    def ours(backend: str) -> Work:
        module, x, grad = data()
        import genfuse.nn

        layer = getattr(genfuse.nn, kind)(i, h).to("cuda", dtype)
        layer.load_state_dict(module.state_dict())
        return passes(with_backend(backend, lambda: layer(x)[0]), [x, *layer.parameters()], grad, train)

    def vendor() -> Work:
        module, x, grad = data()
        return passes(lambda: module(x)[0], [x, *module.parameters()], grad, train)

    def loop() -> Work:
        module, x, grad = data()
        parameters, zero = list(module.parameters()), torch.zeros(b, h, device="cuda", dtype=dtype)
        if kind == "LSTM":
            step = compiled(lstm_step, setting.backend)
            function = functools.partial(lstm_loop, x, zero, zero, *parameters, step=step)
        else:
            function = functools.partial(gru_loop, x, zero, *parameters, step=compiled(gru_step, setting.backend))
        return passes(lambda: function()[0], [x, *parameters], grad, train)

    return {
        "genfuse cuda": lambda: ours("cuda"),
        "genfuse triton": lambda: ours("triton"),
        "genfuse triton, CUDA graph": lambda: as_graph(ours("triton")),
        f"torch.nn.{kind} (cuDNN)": vendor,
        "torch.compile(step) in a loop": loop,
    }


def layer_norm_zoneout(shape: Shape, dtype: torch.dtype, setting: Setting) -> Mapping[str, Factory]:
    t, b, i, h = (5, 3, 16, 16) if setting.quick else shape

    @functools.cache
    def data() -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        need_cuda()
        weights = [rand(4 * h, n, seed=k, dtype=dtype) * n**-0.5 for k, n in enumerate((i, h))]
        vectors = [rand(4 * h, seed=k, dtype=dtype) * 0.1 for k in (2, 3)]
        gains = [torch.ones(n, device="cuda", dtype=dtype) for n in (4 * h, 4 * h, h)]
        parameters = [*weights, *vectors, *gains, torch.zeros(h, device="cuda", dtype=dtype)]
        zero = torch.zeros(b, h, device="cuda", dtype=dtype)
        x = rand(t, b, i, seed=4, dtype=dtype).requires_grad_()
        return x, [p.requires_grad_() for p in parameters], zero, rand(t, b, h, seed=5, dtype=dtype)

    def ours() -> Work:
        import genfuse.ops

        x, parameters, zero, grad = data()
        rng = torch.tensor([1, 0], device="cuda")
        names = ("ln_ih_weight", "ln_hh_weight", "ln_c_weight", "ln_c_bias")
        norm: dict[str, Any] = dict(zip(names, parameters[4:], strict=True))

        def function() -> Tensor:
            y: Tensor = genfuse.ops.lstm(
                x, zero, zero, *parameters[:4], **norm, zoneout_h=ZONEOUT_H, zoneout_c=ZONEOUT_C, training=True, rng=rng
            )[0]
            return y

        return passes(with_backend("triton", function), [x, *parameters], grad, True)

    def loop() -> Work:
        x, parameters, zero, grad = data()
        step = compiled(layer_norm_lstm_step, setting.backend)
        steps = functools.partial(layer_norm_lstm_steps, step=step)

        def function() -> Tensor:
            empty = functools.partial(torch.empty, t, b, h, dtype=torch.bool, device="cuda")
            masks = empty().bernoulli_(ZONEOUT_H), empty().bernoulli_(ZONEOUT_C)
            return layer_norm_lstm_loop(x, zero, zero, *masks, *parameters, steps=steps)

        return passes(function, [x, *parameters], grad, True)

    def plain_vendor() -> Work:
        x, _, _, grad = data()
        module = torch.nn.LSTM(i, h).to("cuda", dtype)
        return passes(lambda: module(x)[0], [x, *module.parameters()], grad, True)

    return {
        "genfuse triton": ours,
        "genfuse triton, CUDA graph": lambda: as_graph(ours()),
        "torch.compile(step) in a loop": loop,
        "torch.nn.LSTM (cuDNN), plain": plain_vendor,
    }


def generation(batch: int, setting: Setting) -> Mapping[str, Factory]:
    vocab, embed, hidden, layers, length = (11, 16, 16, 2, 8) if setting.quick else (100, 256, 512, 2, 200)

    @functools.cache
    def data() -> tuple[CharModel, Tensor, Tensor | None]:
        need_cuda()
        torch.manual_seed(0)
        model = CharModel(vocab, embed, hidden, layers).cuda()
        with torch.no_grad():
            model.head.weight.mul_(10)
        u = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)).cuda() if setting.exact else None
        return model, torch.arange(batch, device="cuda")[:, None] % vocab, u

    def ours(bf16: bool) -> Work:
        model, prompt, u = data()
        need_cuda(native=True)
        flat = [tensor for k in range(layers) for tensor in model.layer(k)]
        zero = torch.zeros(batch, layers * hidden, device="cuda")

        def run() -> Tensor:
            rng = None if u is not None else torch.randint(0, 2**62, (2,), device="cuda")
            tokens: Tensor = torch.ops.genfuse_cuda.lstm_generate(
                prompt, length, model.embedding.weight, flat, model.head.weight, model.head.bias, zero, zero, u, rng,
                1.0, 0, 1.0, False, 1e-5, 0.0, 0.0, bf16,
            )[0]  # fmt: skip
            return tokens

        return run

    def loop() -> Work:
        model, prompt, u = data()
        return lambda: generate_lstm(model, prompt, length, u)

    return {
        "genfuse cuda": lambda: ours(False),
        "genfuse cuda, bfloat16 weights": lambda: ours(True),
        "eager loop of nn.LSTM": loop,
    }


CASES: list[Case] = [
    *(
        Case(
            name=f"gpu-{kind.lower()}-{'x'.join(map(str, shape))}-{name}-{'train' if train else 'forward'}",
            title=f"{kind} {shape} {name}, forward{'+backward' if train else ''}",
            build=functools.partial(sequence, kind, shape, dtype, train),
            ours="genfuse cuda",
            targets={f"torch.nn.{kind} (cuDNN)": 1.0},
            rtol=1e-4 if name == "float32" else 5e-2,
            device="cuda",
        )
        for kind in ("LSTM", "GRU")
        for shape in ((1024, 16, 768, 768), (100, 64, 512, 512))
        for name, dtype in DTYPES.items()
        for train in (False, True)
    ),
    *(
        Case(
            name=f"gpu-layer-norm-lstm-zoneout-{name}",
            title=f"LayerNormLSTM + zoneout (1024, 16, 768, 768) {name}, forward+backward",
            build=functools.partial(layer_norm_zoneout, (1024, 16, 768, 768), dtype),
            ours="genfuse triton, CUDA graph",
            # At least 10 times the compiled loop, and at most 2.5 times the time of a plain LSTM in cuDNN.
            targets={"torch.compile(step) in a loop": 10.0, "torch.nn.LSTM (cuDNN), plain": 0.4},
            rtol=None,
            device="cuda",
        )
        for name, dtype in DTYPES.items()
    ),
    *(
        Case(
            name=f"gpu-generate-batch-{batch}",
            title=f"generate 200 tokens, V=100 E=256 H=512 L=2, B={batch}",
            build=functools.partial(generation, batch),
            ours="genfuse cuda",
            targets={"eager loop of nn.LSTM": 20.0},
            unchecked=("genfuse cuda, bfloat16 weights",),
            random=True,
            device="cuda",
        )
        for batch in (1, 8, 64)
    ),
]

test_speed, test_agree = benchmark_tests(CASES)
