"""The recurrent kernels on a GPU: what has to pass before they are switched on (docs/design/gpu.md).

Without CUDA all of it is skipped; what can be shown then stands in test_triton_recurrent.py and test_cuda_host.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

import genfuse  # noqa: E402
import genfuse.nn  # noqa: E402
import genfuse.ops  # noqa: E402
from genfuse import _native  # noqa: E402
from genfuse.kernels import recurrent as triton_kernels  # noqa: E402
from genfuse.reference import recurrent as reference  # noqa: E402
from sampling_rule import assert_log_probs  # noqa: E402
from test_generate import Model  # noqa: E402
from test_triton_recurrent import ALL, SEED, Case  # noqa: E402
from tolerances import assert_as_accurate, eager_runs  # noqa: E402

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
CELLS = pytest.mark.parametrize("cell", ["lstm", "gru"])


@pytest.fixture(params=["triton", "cuda"])
def family(request: pytest.FixtureRequest) -> Any:
    if request.param == "triton":
        return triton_kernels
    if (reason := _native.cuda_error()) is not None:
        pytest.skip(reason)
    return torch.ops.genfuse_cuda


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def skip_unless_served(family: Any, dtype: torch.dtype, **options: Any) -> None:
    if family is not triton_kernels and (dtype == torch.float16 or any(options.values())):
        pytest.skip("not for the persistent kernels")


@DTYPES
@CELLS
@pytest.mark.parametrize("hidden", [1, 20, 64, 128, 200], ids=str)
@pytest.mark.parametrize("batch", [1, 17])
def test_plain(
    family: Any, cell: str, dtype: torch.dtype, hidden: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_served(family, dtype)
    Case(cell, (7, batch, 12, hidden), dtype=dtype).check(monkeypatch, family, "cuda")


@DTYPES
@CELLS
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("hidden", [20, 200], ids=str)
def test_all_options(
    family: Any, cell: str, dtype: torch.dtype, reverse: bool, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_served(family, dtype)
    options: dict[str, Any] = {"resets": True, "training": True, "drops": ALL, "dtype": dtype, "reverse": reverse}
    Case(cell, (5, 9, 12, hidden), **options).check(monkeypatch, family, "cuda")


@DTYPES
@pytest.mark.parametrize("hidden", [20, 200], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"norm": True}, {"projection": 10}, {"norm": True, "projection": 10}, {"packed": True}],
    ids=lambda options: "-".join(options),
)
def test_triton_variants(
    dtype: torch.dtype, hidden: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {"training": True, "drops": ALL, "dtype": dtype, "resets": "packed" not in options}
    Case("lstm", (5, 9, 12, hidden), **options, **more).check(monkeypatch, triton_kernels, "cuda")
    Case("lstm", (5, 9, 12, hidden), **options, reverse=True, dtype=dtype).check(monkeypatch, triton_kernels, "cuda")


def call_of(cell: str, hidden: int, dtype: torch.dtype = torch.float32) -> tuple[list[Any], list[Any], list[Tensor]]:
    """Tensors, options and output gradients of a call with everything on, on the device."""
    case = Case(cell, (6, 16, 32, hidden), resets=True, training=True, drops=ALL, dtype=dtype)
    inputs = [None if t is None else t.to("cuda", dtype) for t in case.inputs]
    assert case.resets is not None
    tensors = [*inputs, None, case.resets.cuda(), SEED.cuda()]
    options = [*case.drops, *([1e-5] if cell == "lstm" else []), True, False]
    return tensors, options, [g.to("cuda", dtype) for g in case.gradients]


def run(family: Any, cell: str, tensors: list[Any], options: list[Any], grads: list[Tensor]) -> list[Tensor]:
    outputs = len(grads)
    saved = getattr(family, cell)(*tensors, *options, True)
    back = getattr(family, f"{cell}_backward")(*grads, *tensors, saved[0], *saved[outputs:], *options, True, True)
    return [*saved[:outputs], *back]


def captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@CELLS
@pytest.mark.parametrize("hidden", [32, 200], ids=str)
def test_cuda_graph_no_synchronisation_and_determinism(family: Any, cell: str, hidden: int) -> None:
    tensors, options, grads = call_of(cell, hidden)

    def function() -> list[Tensor]:
        return run(family, cell, tensors, options, grads)

    first = [t.clone() for t in function()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    graph, result = captured(function)
    tensors[0].mul_(-0.5)
    tensors[-1].add_(12345)  # other random numbers: they are read when the graph runs
    expected = [t.clone() for t in function()]
    for tensor in result:
        tensor.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(first[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@CELLS
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_through_the_public_function(cell: str, backend: str) -> None:
    if backend == "cuda" and (reason := _native.cuda_error()) is not None:
        pytest.skip(reason)
    layer = getattr(genfuse.nn, cell.upper())(24, 40)
    tensors = {"x": torch.randn(6, 5, 24), **dict(layer.named_parameters())}

    def results(name: str, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = {key: change(tensor.detach()).requires_grad_() for key, tensor in tensors.items()}
        with genfuse.use_backend(name):
            y = torch.func.functional_call(layer, {k: v for k, v in leaves.items() if k != "x"}, leaves["x"])[0]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), list(leaves.values()))]

    eager = eager_runs(lambda nudge: results("reference", nudge))
    exact = results("reference", Tensor.double)
    for name, ours, theirs, truth in zip(("y", *tensors), results(backend, Tensor.cuda), eager, exact, strict=True):
        assert_as_accurate(ours.cpu(), theirs, truth, name, gradient=name != "y")


def test_long_and_wide(family: Any) -> None:
    """More rows than one tile, more steps than a unit test has; with cuDNN to compare with."""
    inputs = [torch.randn(300, 40, 96), *(p.detach() for p in torch.nn.LSTM(96, 512).parameters())]
    state = torch.zeros(40, 512)

    def cudnn(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x, *weights = (change(tensor).cuda() for tensor in inputs)
        zeros = torch.zeros(1, 40, 512, dtype=x.dtype, device="cuda")
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            y, h, c = torch.lstm(x, (zeros, zeros), weights, True, 1, 0.0, False, False, False)
        return [y.cpu(), h[0].cpu(), c[0].cpu()]

    x, h0, c0, *weights = (tensor.cuda() for tensor in (inputs[0], state, state, *inputs[1:]))
    results = family.lstm(x, h0, c0, *weights, *[None] * 8, *[0.0] * 5, 1e-5, False, False, False)[:3]
    eager, exact = eager_runs(cudnn), cudnn(Tensor.double)
    for name, ours, theirs, truth in zip(("y", "h", "c"), results, eager, exact, strict=True):
        assert_as_accurate(ours.cpu(), theirs, truth, name)


@pytest.mark.parametrize("kind", ["lstm", "norm", "gru"])
@pytest.mark.parametrize("batch", [1, 2, 9, 64])
def test_generate(kind: str, batch: int) -> None:
    if (reason := _native.cuda_error()) is not None:
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(batch)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    vocab, embed, sizes, length, gates = 101, 48, (64, 100), 40, 3 if kind == "gru" else 4
    layers, inputs = [], embed
    for size in sizes:
        layer = [normal(gates * size, n, scale=n**-0.5) for n in (inputs, size)]
        layer += [normal(gates * size, scale=0.1) for _ in range(2)]
        layer += [normal(n) for n in (4 * size, 4 * size, size, size)] if kind == "norm" else []
        layers.append(layer)
        inputs = size
    embedding, head, bias = normal(vocab, embed), normal(vocab, inputs, scale=0.5), normal(vocab, scale=0.1)
    model = Model("layer norm" if kind == "norm" else kind, embedding, [tuple(layer) for layer in layers], head, bias)
    prompt = torch.randint(0, vocab, (batch, 3), generator=generator)
    state = torch.zeros(batch, sum(sizes), device="cuda")
    flat = [tensor.cuda() for layer in layers for tensor in layer]
    tensors = [t.cuda() for t in (embedding, head, bias)]

    for temperature, top_k, top_p in ((1.0, None, None), (0.7, 20, 0.9), (0.0, None, None)):
        filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        function = reference.gru_generate if kind == "gru" else reference.lstm_generate
        exact, _, _ = function(prompt, length, embedding, layers, head, bias, rng=SEED, **filters)
        numbers = (temperature, top_k or 0, 1.0 if top_p is None else top_p)
        call = (prompt.cuda(), length, tensors[0], flat, tensors[1], tensors[2], state)
        seed = SEED.cuda()

        def ours(call: Any = call, numbers: Any = numbers, seed: Tensor = seed) -> tuple[Tensor, Tensor]:
            if kind == "gru":
                found = torch.ops.genfuse_cuda.gru_generate(*call, None, seed, *numbers, 0.0, False)
            else:
                found = torch.ops.genfuse_cuda.lstm_generate(
                    *call, state, None, seed, *numbers, kind == "norm", 1e-5, 0.0, 0.0, False
                )
            return found[0], found[1]

        tokens, log_probs = ours()
        # A draw at the very edge of two tokens may fall either way; from there on the texts are different texts.
        same = (tokens.cpu() == exact).all(1)
        assert int(same.sum()) >= batch - max(1, batch // 20) + (batch == 1)
        found, texts = log_probs.cpu(), torch.cat([prompt, exact], 1)
        if temperature == 0.0:
            assert bool((found == 0.0).all())
        else:
            assert_log_probs(
                found, exact, lambda change, texts=texts: model.read(texts, change)[0][:, 2:-1], filters, same
            )
        graph, result = captured(ours)
        result[0].zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(result[0], tokens)


def test_generate_rows_depend_on_themselves_alone() -> None:
    if (reason := _native.cuda_error()) is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    vocab, embed, hidden = 50, 16, 96
    weights = [torch.randn(4 * hidden, embed), torch.randn(4 * hidden, hidden) / 10, torch.zeros(4 * hidden)]
    flat = [t.cuda() for t in (*weights, torch.zeros(4 * hidden))]
    embedding, head = torch.randn(vocab, embed).cuda(), torch.randn(vocab, hidden).cuda()

    def texts(batch: int) -> Tensor:
        prompt, state = torch.arange(batch, device="cuda")[:, None] % vocab, torch.zeros(batch, hidden, device="cuda")
        call = (prompt, 30, embedding, flat, head, None, state, state, None, SEED.cuda(), 1.0, 0, 1.0)
        tokens: Tensor = torch.ops.genfuse_cuda.lstm_generate(*call, False, 1e-5, 0.0, 0.0, False)[0]
        return tokens

    all_rows = texts(33)
    for batch in (1, 2, 8, 20):
        assert torch.equal(texts(batch), all_rows[:batch])
