"""Gated activation and concatenated ELU: equal to the formulas that people write, in every layout, and at the ends.

(What is asked of every operator is in test_operators.py, the options in gate_cases.py.)
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from genfuse import nn, ops
from operator_cases import DTYPE_NAMES, DTYPES, Problem, check, make
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

close = torch.testing.assert_close
INF = float("inf")
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
# Channels first and last, planes and rows shorter and longer than a vector, a part and a block.
SHAPES = [
    (1, 1),
    (3, 5),
    (70, 3),
    (2, 1030),
    (2, 3, 15),
    (2, 3, 16),
    (3, 2, 1030),
    (4, 3, 5, 7),
    (2, 24, 8, 9),
    (2, 3, 2, 3, 4),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def last(tensor: Tensor) -> Tensor:
    """The numbers with their channels last, if torch has such a format of so many dimensions."""
    return tensor.contiguous(memory_format=FORMATS[tensor.dim()]) if tensor.dim() in FORMATS else tensor


def is_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=FORMATS[tensor.dim()])


# ---- what people write -----------------------------------------------------------------------------------------------


def test_gated_pixelcnn() -> None:
    """Its equation 2, and 4 with a class."""
    x, of_class = torch.randn(2, 6, 3, 3, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    a, b = (x + of_class[:, :, None, None]).chunk(2, 1)
    close(ops.gated_activation(x, of_class), torch.tanh(a) * torch.sigmoid(b))
    a, b = x.chunk(2, 1)
    close(ops.gated_activation(x), torch.tanh(a) * torch.sigmoid(b))


def test_pixelcnn_plus_plus() -> None:
    """gated_resnet's end, and concat_elu."""
    x, before = torch.randn(2, 6, 3, 3, dtype=torch.float64), torch.randn(2, 3, 3, 3, dtype=torch.float64)
    a, b = x.chunk(2, 1)
    close(ops.gated_activation(x, residual=before, activation="linear"), before + a * torch.sigmoid(b))
    close(ops.gated_activation(x, activation="linear"), F.glu(x, 1))
    close(ops.concat_elu(x), F.elu(torch.cat([x, -x], 1)))


def test_wavenet() -> None:
    """A signal, with a local condition at every step."""
    x, condition = torch.randn(2, 8, 50), torch.randn(2, 8, 50)
    filter_, gate = (x + condition).chunk(2, 1)
    close(ops.gated_activation(x, condition), torch.tanh(filter_) * torch.sigmoid(gate))


def test_vectors_are_glu() -> None:
    x = torch.randn(5, 4, 12)
    close(ops.gated_activation(x, dim=-1, activation="linear"), F.glu(x, -1))
    close(nn.GatedActivation("linear", dim=-1)(x), F.glu(x, -1))


# ---- equal to the definition -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: tuple[int, ...]) -> None:
    for variant in ("everything", "class, bias, linear", "bias"):
        # One number by itself is a matter of luck, so several problems are compared as one.
        check(
            *(make("gated_activation", variant, shape=shape, seed=seed) for seed in range(16 if len(shape) < 3 else 2))
        )
    check(*(make("concat_elu", shape=shape, seed=seed) for seed in range(16 if len(shape) < 3 else 2)))


def any_problem(pick: random.Random) -> Problem:
    """A problem of any shape, dimension, format, broadcasting and options."""
    dims = pick.randrange(1, 6)
    shape = [pick.choice([0, 1, 1, 2, 3, 5, 17]) if pick.random() < 0.9 else 40 for _ in range(dims)]
    dim = pick.randrange(-dims, dims)
    op = pick.choice(["gated_activation", "gated_activation", "concat_elu"])
    if op == "gated_activation":
        shape[dim] *= 2

    def tensor(sizes: list[int]) -> Tensor:
        values = torch.randn(sizes, dtype=torch.float64)
        kind = pick.randrange(5)
        if kind == 0:
            values = last(values)
        elif kind == 1 and sizes:
            values = torch.stack((values, torch.full_like(values, torch.nan)), -1)[..., 0]
        elif kind == 2:
            order = list(range(len(sizes)))
            pick.shuffle(order)
            values = values.permute(order).contiguous().permute([order.index(k) for k in range(len(sizes))])
        elif kind == 3 and len(sizes) > 1:  # some channels of more, in either format
            more = torch.cat((values, torch.full_like(values, torch.nan)), 1)
            values = (last(more) if pick.random() < 0.5 else more)[:, : sizes[1]]
        return values

    def broadcast(sizes: list[int]) -> list[int]:
        if pick.random() < 0.4:
            return sizes
        return [1 if pick.random() < 0.5 else n for n in sizes][pick.choice([0, 0, 1]) :]

    inputs, options = {"x": tensor(shape)}, {"dim": dim}
    if op == "gated_activation":
        options["activation"] = pick.choice(["tanh", "linear"])  # type: ignore[assignment]
        if pick.random() < 0.6:
            axis = dim % dims
            rows = [n if d in (0, axis) else 1 for d, n in enumerate(shape)]
            inputs["conditional"] = tensor(pick.choice([rows, broadcast(shape)]))
        if pick.random() < 0.5:
            inputs["bias"] = tensor([shape[dim]])
        if pick.random() < 0.5:
            half = list(shape)
            half[dim] //= 2
            inputs["residual"] = tensor(broadcast(half))
    return Problem(op, inputs, options)


@pytest.mark.parametrize("seed", range(8))
def test_any_layout_and_any_broadcasting(seed: int) -> None:
    pick = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(40):
        problem = any_problem(pick)
        found = []
        for backend in (None, "reference"):
            leaves = problem.map(lambda tensor: tensor.detach().requires_grad_())
            (y,) = leaves.results(backend)
            cotangent = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
            if pick.random() < 0.3:
                cotangent = last(cotangent)
            found.append([y, *torch.autograd.grad(y, list(leaves.inputs.values()), cotangent)])
        close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
def test_dtypes_may_differ(dtype: torch.dtype) -> None:
    """What is added is of any dtype; the result of x's, or of what x and the residual promote to."""
    x = torch.randn(3, 4, 5).to(dtype)
    for other in DTYPES:
        bias, conditional = torch.randn(4).to(other), torch.randn(3, 4).to(other)
        y = ops.gated_activation(x, conditional, bias=bias)
        assert y.dtype == dtype
        exact = ops.gated_activation(x.double(), conditional.double(), bias=bias.double())
        close(y, exact.to(dtype))
        residual = torch.randn(3, 2, 5).to(other).requires_grad_()
        leaf = x.detach().requires_grad_()
        y = ops.gated_activation(leaf, residual=residual)
        assert y.dtype == torch.promote_types(dtype, other)
        y.sum().backward()
        assert residual.grad is not None
        assert residual.grad.dtype == other
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype


@pytest.mark.parametrize("op", ["gated_activation", "concat_elu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_changes_nothing(op: str, dtype: torch.dtype) -> None:
    problem = make(op, dtype=dtype)
    cotangents = problem.cotangents()
    expected = problem.run(cotangents)
    with torch.autocast("cpu", dtype=dtype):
        found = problem.run(cotangents)
        direct = getattr(torch.ops.genfuse, op)(
            *(problem.inputs[name] for name in ("x", "bias", "conditional", "residual") if name in problem.inputs),
            *((1, 0) if op == "gated_activation" else (1,)),
        )
    for ours, theirs in zip([*found, direct], [*expected, expected[0]], strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert torch.equal(ours, theirs)


# ---- where the numbers lie -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("shape", [(2, 8, 3, 5), (2, 8, 3, 5, 2)])
def test_the_memory_format_is_kept(shape: tuple[int, ...], compiled: bool) -> None:
    half = (2, 4, *shape[2:])
    x = last(torch.randn(shape)).requires_grad_()
    conditional, residual = last(torch.randn(shape)).requires_grad_(), last(torch.randn(half)).requires_grad_()
    leaves = [x, conditional, residual]

    def both(x: Tensor, conditional: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return ops.gated_activation(x, conditional, residual=residual), ops.concat_elu(x)

    if compiled:
        torch._dynamo.reset()
    y, z = (torch.compile(both, backend="aot_eager", fullgraph=True) if compiled else both)(*leaves)
    gradients = torch.autograd.grad((y, z), leaves, (torch.randn_like(y), torch.randn_like(z)))
    assert all(is_last(tensor) for tensor in (y, z, *gradients))
    assert is_last(ops.concat_elu(last(torch.randn(2, 8, 3, 5))[:, 2:5]))  # some channels of more
    plain = [ops.gated_activation(x.contiguous()), ops.concat_elu(x.contiguous())]
    assert all(tensor.is_contiguous() for tensor in plain)


@pytest.mark.parametrize("make_last", [False, True], ids=["channels first", "channels last"])
def test_no_copy_of_a_part(make_last: bool) -> None:
    """Some channels of more, and a batch of one image many times, are read where they lie."""
    more = torch.randn(3, 12, 4, 5)
    x = (last(more) if make_last else more)[:, 2:8]
    image = last(torch.randn(1, 6, 4, 5)) if make_last else torch.randn(1, 6, 4, 5)
    with torch.no_grad(), torch.profiler.profile() as profile:
        ops.gated_activation(x)
        ops.concat_elu(x)
        if not make_last:
            ops.gated_activation(image.expand(3, -1, -1, -1))
    assert not {"aten::copy_", "aten::clone", "aten::contiguous"} & {event.key for event in profile.key_averages()}


def test_backward_keeps_the_inputs_alone() -> None:
    """And of the residual nothing."""
    problem = make("gated_activation", "everything").map(lambda tensor: tensor.requires_grad_())
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda _: None):  # type: ignore[arg-type, return-value]
        problem.call()
    mine = {tensor.data_ptr() for name, tensor in problem.inputs.items() if name != "residual"}
    assert {tensor.data_ptr() for tensor in kept} == mine


def test_gradients_that_are_others_are_not_copied() -> None:
    x, conditional = (torch.randn(2, 4, 3, requires_grad=True) for _ in range(2))
    residual, grad = torch.randn(2, 2, 3, requires_grad=True), torch.randn(2, 2, 3)
    y = ops.gated_activation(x, conditional, residual=residual)
    of_x, of_conditional, of_residual = torch.autograd.grad(y, (x, conditional, residual), grad)
    assert of_x.data_ptr() == of_conditional.data_ptr()
    assert of_residual.data_ptr() == grad.data_ptr()
    y = ops.gated_activation(x, conditional)
    (alone,) = torch.autograd.grad(y, conditional, grad)
    assert torch.equal(alone, of_conditional)
    loss = (ops.gated_activation(x, conditional) * grad).sum()
    loss.backward()  # each accumulates into a tensor of its own
    assert x.grad is not None
    assert conditional.grad is not None
    x.grad.zero_()
    assert torch.equal(conditional.grad, of_conditional)


def test_threads_make_no_difference() -> None:
    problems = [
        make("gated_activation", "class, bias, linear", shape=shape)
        for shape in ((5, 24, 40, 41), (3000, 17), (2, 50_001))
    ]
    problems.append(problems[0].map(last))
    problems.append(make("gated_activation", "everything", shape=(3, 7, 3001)))
    problems += [make("concat_elu", shape=shape) for shape in ((3, 7, 3001), (30_001, 5))]
    for problem in problems:
        cotangents = problem.cotangents()
        found = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(problem.run(cotangents))
        for more in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(more, found[0], strict=True))


# ---- the ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_gate(dtype: torch.dtype) -> None:
    """Open and shut gates, with relative accuracy where the result is small; infinities are in their places."""
    a = torch.tensor([0.0, -0.0, 1e-20, -1e-20, 1e-4, 0.3, -0.35, 5.0, 20.0, -90.0, 1e30, INF, -INF], dtype=dtype)
    b = torch.tensor([0.0, 1e-20, -1.0, 3.0, -40.0, 80.0, -80.0, 1e30, INF], dtype=dtype)
    a, b = (t.flatten() for t in torch.meshgrid(a, b, indexing="ij"))
    wide_a, wide_b = a.double(), b.double()
    shut, open_ = torch.sigmoid(-wide_b), torch.sigmoid(wide_b)
    ulp, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    # e^-x stops at the least normal number, and a multiplies it.
    least = 16 * tiny * (1 + wide_a.abs().nan_to_num(posinf=0.0))
    for activation, act, slope in (
        ("tanh", torch.tanh(wide_a), torch.cosh(wide_a) ** -2),
        ("linear", wide_a, torch.ones_like(wide_a)),
    ):
        leaf = torch.stack((a, b), 1).requires_grad_()
        y = ops.gated_activation(leaf, activation=activation)
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        exact = act * open_, slope * open_, act * open_ * shut
        for ours, truth in zip((y[:, 0], grad[:, 0], grad[:, 1]), exact, strict=True):
            finite = truth.isfinite()
            assert bool(((ours - truth).abs() <= 16 * ulp * truth.abs() + least)[finite].all())
            assert torch.equal(ours.isfinite()[wide_a.isfinite()], finite[wide_a.isfinite()])
        assert bool((y[(a == INF) & (b == INF)] == (1.0 if activation == "tanh" else INF)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shut_gate_is_0(dtype: torch.dtype) -> None:
    """Whatever it is that it shuts out; and half shut, where e^b has lost places but is not 0, it is about that."""
    far, most = (-200.0, 1e38) if dtype == torch.float32 else (-1000.0, 1e308)
    x = torch.tensor([[most, far], [-most, far], [most, -INF], [most, INF], [INF, -INF], [-INF, far]], dtype=dtype)
    x = x.repeat(20, 1).requires_grad_()  # whole vectors, and what is left
    y = ops.gated_activation(x, activation="linear")
    (grad,) = torch.autograd.grad(y.sum(), x)
    a, b = x.detach().unbind(1)
    assert torch.equal(y[:, 0].nan_to_num(nan=7.0), (a * torch.sigmoid(b)).nan_to_num(nan=7.0))
    assert torch.equal(grad[:, 0], torch.where(b > 0, 1.0, 0.0).to(dtype))
    assert torch.equal(grad[:, 1][a.isfinite()], torch.zeros(80, dtype=dtype))
    low = -90.0 if dtype == torch.float32 else -710.0
    y = ops.gated_activation(torch.tensor([[most, low]], dtype=dtype), activation="linear")
    close(y.double(), torch.tensor([[math.exp(low + math.log(most))]], dtype=torch.float64), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_elu(dtype: torch.dtype) -> None:
    x = torch.tensor(
        [[0.0, -0.0, 1e-30, -1e-30, 1e-4, -1e-4, 0.3, 0.36, 1.0, 30.0, 90.0, -1e30, INF, -INF]], dtype=dtype
    )
    x.requires_grad_()
    y = ops.concat_elu(x)
    exact = torch.cat((x, -x), 1).detach().double()
    exact = torch.where(exact > 0, exact, torch.expm1(exact))
    close(y, exact.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=0.0)
    up, down = torch.randn(2, 14, dtype=dtype)
    (grad,) = torch.autograd.grad(y, x, torch.cat((up, down))[None])
    slope = torch.exp(-x.detach().double().abs())
    positive, negative = (torch.where(side, 1.0, slope) for side in (x.double() > 0, x.double() < 0))
    at_zero = (x == 0).double()
    negative = negative * (1 - at_zero) + at_zero  # torch has the slope 1 at 0, from below
    close(grad, (up * positive - down * negative).to(dtype), rtol=1e-5, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("make_last", [False, True], ids=["channels first", "channels last"])
def test_nan_stays_in_its_own_element(make_last: bool) -> None:
    where = last if make_last else (lambda tensor: tensor)
    clean = torch.randn(2, 6, 4, 5)
    for channel, activation in itertools.product((1, 4), ("tanh", "linear")):
        x = clean.clone()
        x[1, channel, 2, 3] = torch.nan
        leaf = where(x).requires_grad_()
        y = ops.gated_activation(leaf, activation=activation)
        expected = torch.zeros(2, 3, 4, 5, dtype=torch.bool)
        expected[1, 1, 2, 3] = True
        assert torch.equal(y.isnan(), expected)
        assert torch.equal(y[~expected], ops.gated_activation(where(clean), activation=activation)[~expected])
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        assert bool(grad[1, [1, 4], 2, 3].isnan().any())
        assert not bool(grad.isnan()[~torch.cat((expected, expected), 1)].any())
        z = ops.concat_elu(where(x))
        assert torch.equal(z.isnan(), torch.cat((x.isnan(), x.isnan()), 1))
    for index in ("bias", "conditional", "residual"):
        problem = make("gated_activation", "everything", shape=(2, 3, 4, 5)).map(where)
        tensor = problem.inputs[index] = problem.inputs[index].clone()
        tensor[(1,) * tensor.dim()] = torch.nan
        expected = torch.zeros(2, 3, 4, 5, dtype=torch.bool)
        expected[(slice(None), 1) if index == "bias" else (1, 1, 1, 1)] = True
        assert torch.equal(problem.results()[0].isnan(), expected)


# ---- what is wrong ---------------------------------------------------------------------------------------------------

X = torch.zeros(2, 6, 4)
WRONG: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (TypeError, "gated_activation: x must be a Tensor, got list", lambda: ops.gated_activation([1.0])),  # type: ignore[arg-type]
    (ValueError, "x must be of a floating dtype .*, got torch.int64", lambda: ops.gated_activation(X.long())),
    (
        RuntimeError,
        r"even number of channels in dimension 1, got \[2, 3\]",
        lambda: ops.gated_activation(torch.zeros(2, 3)),
    ),
    (IndexError, r"dim must be in \[-3, 2\] for x of \[2, 6, 4\], got 3", lambda: ops.gated_activation(X, dim=3)),
    (TypeError, "dim must be an int, got float", lambda: ops.gated_activation(X, dim=1.0)),  # type: ignore[arg-type]
    (TypeError, "dim must be an int, got bool", lambda: ops.concat_elu(X, dim=True)),
    (IndexError, "concat_elu: dim must be in", lambda: ops.concat_elu(X, dim=-4)),
    (IndexError, "concat_elu: dim must be in", lambda: ops.concat_elu(torch.zeros(()), dim=0)),
    (
        ValueError,
        "activation must be 'tanh' or 'linear', got 'relu'",
        lambda: ops.gated_activation(X, activation="relu"),
    ),
    (TypeError, "conditional must be a Tensor, got float", lambda: ops.gated_activation(X, 1.0)),  # type: ignore[arg-type]
    (ValueError, "conditional must be of a floating dtype", lambda: ops.gated_activation(X, X.bool())),
    (
        RuntimeError,
        r"conditional must broadcast to x, \[2, 6, 4\], or be \[batch, channels\]; got \[2, 5\]",
        lambda: ops.gated_activation(X, torch.zeros(2, 5)),
    ),
    (RuntimeError, "conditional must broadcast to x", lambda: ops.gated_activation(X, torch.zeros(1, 2, 6, 4))),
    (RuntimeError, "conditional must be on cpu, as x is; got meta", lambda: ops.gated_activation(X, X.to("meta"))),
    (RuntimeError, r"bias must be \[6\], .*, got \[3\]", lambda: ops.gated_activation(X, bias=torch.zeros(3))),
    (RuntimeError, r"bias must be \[6\]", lambda: ops.gated_activation(X, bias=torch.zeros(1, 6))),
    (
        RuntimeError,
        r"residual must be \[2, 3, 4\], the shape of the result, or broadcast to it; got \[2, 6, 4\]",
        lambda: ops.gated_activation(X, residual=X),
    ),
    (ValueError, "GatedActivation: activation must be", lambda: nn.GatedActivation("relu")),
    (TypeError, "GatedActivation: dim must be an int", lambda: nn.GatedActivation(dim="1")),  # type: ignore[arg-type]
    (TypeError, "ConcatELU: dim must be an int", lambda: nn.ConcatELU(1.0)),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("kind", "message", "call"), WRONG)
def test_what_is_wrong(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_the_operators_check_for_themselves() -> None:
    """No call of the registered operators can read out of bounds."""
    gate, backward = torch.ops.genfuse.gated_activation, torch.ops.genfuse.gated_activation_backward
    for arguments in (
        (torch.zeros(2, 5), None, None, None, 1, 0),
        (X, torch.zeros(5), None, None, 1, 0),
        (X, None, torch.zeros(2, 6), None, 1, 0),
        (X, None, torch.zeros(2, 1, 4), None, 1, 0),
        (X, None, None, X, 1, 0),
        (X, None, None, None, 3, 0),
        (X, None, None, None, -1, 0),
        (X, None, None, None, 1, 2),
    ):
        with pytest.raises(RuntimeError):
            gate(*arguments)
        with pytest.raises(RuntimeError):
            backward(None if arguments[-1] != 2 else X, *arguments, 15)
    with pytest.raises(RuntimeError, match="grad_y"):
        backward(X, X, None, None, None, 1, 0, 1)
    with pytest.raises(RuntimeError, match="grad_y"):
        torch.ops.genfuse.concat_elu_backward(X, X, 1, 1)
    with pytest.raises(RuntimeError, match="dim"):
        torch.ops.genfuse.concat_elu(X, 3)


# ---- compilers -------------------------------------------------------------------------------------------------------


def block(x: Tensor, of_class: Tensor, bias: Tensor) -> Tensor:
    h = ops.concat_elu(ops.gated_activation(x, of_class, bias=bias))
    return ops.gated_activation(h, residual=x[:, : h.shape[1] // 2], activation="linear")


def block_inputs(batch: int, side: int = 4, make_last: bool = False) -> list[Tensor]:
    x = torch.randn(batch, 8, side, side)
    return [t.requires_grad_() for t in (last(x) if make_last else x, torch.randn(batch, 8), torch.randn(8))]


def test_compiles_once_for_all_batch_sizes() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for batch, most in ((3, 1), (5, 2), (17, 2), (4, 2)):
        inputs = block_inputs(batch, make_last=True)
        found = [function(*inputs) for function in (compiled, block)]
        close(*found)
        close(*(torch.autograd.grad(y.square().sum(), inputs) for y in found))
        assert counter.frame_count <= most


def test_exports_with_a_dynamic_batch() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, of_class: Tensor, bias: Tensor) -> Tensor:
            return block(x, of_class, bias)

    batch = torch.export.Dim("batch", min=2)
    with torch.no_grad():
        program = torch.export.export(
            Model(), tuple(block_inputs(3)), dynamic_shapes={"x": {0: batch}, "of_class": {0: batch}, "bias": None}
        )
        for size in (3, 8):
            inputs = block_inputs(size)
            close(program.module()(*inputs), block(*inputs))


def test_modules() -> None:
    x, of_class, bias, residual = torch.randn(2, 6, 4), torch.randn(2, 6), torch.randn(6), torch.randn(2, 3, 4)
    layer = nn.GatedActivation()
    assert torch.equal(
        layer(x, of_class, bias=bias, residual=residual),
        ops.gated_activation(x, of_class, bias=bias, residual=residual),
    )
    assert torch.equal(nn.GatedActivation("linear", 2)(x), ops.gated_activation(x, dim=2, activation="linear"))
    assert torch.equal(nn.ConcatELU()(x), ops.concat_elu(x))
    assert torch.equal(nn.ConcatELU(dim=-1)(x), ops.concat_elu(x, -1))
    assert not list(layer.parameters())
    assert repr(layer) == "GatedActivation(activation='tanh', dim=1)"
    assert repr(nn.ConcatELU(2)) == "ConcatELU(dim=2)"
