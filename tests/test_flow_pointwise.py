"""Actnorm, and dequantisation with its logit: equal to their peers, invertible, exact at the ends, the same anywhere.

(What is asked of every operator is in test_operators.py, the options in flow_cases.py.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from genfuse import ops
from genfuse.reference.flow import pointwise as reference
from operator_cases import check, make
from torch import Tensor
from torch import library as registry
from torch._dynamo.testing import CompileCounterWithBackend

close = torch.testing.assert_close
ORDERS = ("multiply_add", "add_multiply")
# Planes and rows, shorter and longer than a vector, a tile and a block.
SHAPES = [
    (1, 1),
    (3, 2),
    (7, 5),
    (700, 3),
    (40, 33),
    (5, 600),
    (2, 3, 15),
    (2, 3, 16),
    (3, 4, 5, 5),
    (2, 3, 1025),
    (1, 2, 2500),
]


def with_gradients(function: Callable[..., Any], *inputs: Tensor, **options: Any) -> list[Tensor]:
    """Results and the gradients of all inputs."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    results = list(function(*leaves, **options))
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    gradients = torch.autograd.grad(results, leaves, cotangents, materialize_grads=True)
    return [*(result.detach() for result in results), *gradients]


def on_threads(function: Callable[[], list[Tensor]]) -> None:
    """The same bits for every number of threads."""
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(function())
    finally:
        torch.set_num_threads(before)
    for more in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(more, found[0], strict=True))


# ---- actnorm ---------------------------------------------------------------------------------------------------------


def actnorm_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype), *(torch.randn(shape[1], dtype=dtype) for _ in range(2))]


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("shape", [(6, 4), (3, 5, 4, 4)])
def test_nflows_actnorm(shape: tuple[int, ...], inverse: bool) -> None:
    normalization = pytest.importorskip("nflows.transforms.normalization")
    x, log_scale, bias = actnorm_inputs(shape)

    def theirs(x: Tensor, log_scale: Tensor, bias: Tensor) -> Any:
        layer = normalization.ActNorm(shape[1]).eval()
        del layer.log_scale, layer.shift
        layer.log_scale, layer.shift = log_scale, bias
        return layer.inverse(x) if inverse else layer(x)

    close(with_gradients(ops.actnorm, x, log_scale, bias, inverse=inverse), with_gradients(theirs, x, log_scale, bias))


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_normflows_actnorm(inverse: bool) -> None:
    """Its AffineConstFlow: z e^s + t."""
    coupling = pytest.importorskip("normflows.flows.affine.coupling")
    x, log_scale, bias = actnorm_inputs((3, 5, 4, 4))

    def theirs(x: Tensor, log_scale: Tensor, bias: Tensor) -> Any:
        flow = coupling.AffineConstFlow((5, 1, 1))
        del flow.s, flow.t
        flow.s, flow.t = log_scale.view(1, 5, 1, 1), bias.view(1, 5, 1, 1)
        y, log_abs_det = flow.inverse(x) if inverse else flow(x)
        return y, log_abs_det.expand(3)

    close(with_gradients(ops.actnorm, x, log_scale, bias, inverse=inverse), with_gradients(theirs, x, log_scale, bias))


@pytest.mark.parametrize("shape", SHAPES)
def test_actnorm_of_every_size(shape: tuple[int, ...]) -> None:
    inputs = actnorm_inputs(shape)
    for order, inverse in itertools.product(ORDERS, (False, True)):
        found = with_gradients(ops.actnorm, *inputs, order=order, inverse=inverse)
        close(found, with_gradients(reference.actnorm, *inputs, order=order, inverse=inverse), rtol=1e-11, atol=1e-11)
    check(*(make("actnorm", "inverse", shape=shape, seed=seed) for seed in range(4)))


@pytest.mark.parametrize("order", ORDERS)
def test_actnorm_comes_back(order: str) -> None:
    for dtype in (torch.float32, torch.float64):
        x, log_scale, bias = actnorm_inputs((5, 7, 3, 3), dtype)
        y, there = ops.actnorm(x, log_scale, bias, order=order)
        back, again = ops.actnorm(y, log_scale, bias, order=order, inverse=True)
        worst = float(torch.stack([x.abs().max(), y.abs().max(), bias.abs().max()]).max())
        bound = 8 * torch.finfo(dtype).eps * worst * float((-log_scale).exp().max())
        assert float((back - x).abs().max()) <= bound
        assert torch.equal(again, -there)
        close(there, (9 * log_scale.sum()).expand(5))


def test_actnorm_of_a_channel_without_spread() -> None:
    """Trap 9: a scale of 1 / 0 = e^89 or more; 0 times it is 0 and not NaN, and its gradients are finite."""
    x = torch.zeros(4, 2, 3)
    log_scale = torch.tensor([100.0, 0.0])
    found = with_gradients(ops.actnorm, x, log_scale, torch.zeros(2))
    assert torch.equal(found[0], torch.zeros_like(x))
    assert bool(found[3].isfinite().all())
    close(found[1], torch.full((4,), 300.0))
    _, by_scale = torch.autograd.functional.jacobian(lambda s: ops.actnorm(x, s, torch.zeros(2)), log_scale)
    close(by_scale, torch.full((4, 2), 3.0))
    # e^100 is no float32, but 1e-20 e^100 is.
    y, _ = ops.actnorm(torch.full((1, 1), 1e-20), torch.tensor([100.0]), torch.zeros(1))
    close(y, torch.full((1, 1), 1e-20 * math.exp(100)))


def test_a_long_batch_is_summed_in_wide_digits() -> None:
    for shape in ((1 << 18, 4), (1 << 8, 4, 1 << 10)):
        x = torch.full(shape, 1 / 3)
        *_, grad_log_scale, grad_bias = with_gradients(
            lambda x, s, b: ops.actnorm(x, s, b)[:1], x, *2 * [torch.zeros(4)]
        )
        wide = with_gradients(
            lambda x, s, b: reference.actnorm(x, s, b)[:1], x.double(), *2 * [torch.zeros(4).double()]
        )
        for ours, exact in ((grad_log_scale, wide[-2]), (grad_bias, wide[-1])):
            assert float((ours.double() - exact).abs().max()) < 1e-6 * shape[0] * math.prod(shape[2:]) ** 0.5


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 20)])
def test_nan_stays_in_its_channel(shape: tuple[int, ...]) -> None:
    x, log_scale, bias = actnorm_inputs(shape, torch.float32)
    clean = with_gradients(ops.actnorm, x, log_scale, bias)
    spoilt = x.clone()
    spoilt[1, 2, ...] = torch.nan
    y, log_abs_det, grad_x, grad_log_scale, grad_bias = with_gradients(ops.actnorm, spoilt, log_scale, bias)
    assert torch.equal(y.isnan(), spoilt.isnan())
    assert torch.equal(log_abs_det, clean[1])
    assert torch.equal(grad_x, clean[2])
    assert torch.equal(grad_log_scale.isnan(), torch.tensor([False, False, True]))
    assert torch.equal(grad_bias, clean[4])
    broken = log_scale.clone()
    broken[0] = torch.nan
    y, log_abs_det, *_ = with_gradients(ops.actnorm, x, broken, bias)
    assert bool(y[:, 0].isnan().all())
    assert torch.equal(y[:, 1:], clean[0][:, 1:])
    assert bool(log_abs_det.isnan().all())


def test_actnorm_with_parameters_of_another_dtype() -> None:
    for dtype, param, wide in (
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
    ):
        x, log_scale, bias = (t.to(k) for t, k in zip(actnorm_inputs((3, 4, 5)), (dtype, param, param), strict=True))
        found = with_gradients(ops.actnorm, x, log_scale, bias)
        assert [t.dtype for t in found] == [dtype, wide, dtype, param, param]
        assert torch.equal(found[0], ops.actnorm(x.to(wide), log_scale.to(wide), bias.to(wide))[0].to(dtype))


@pytest.mark.parametrize("shape", [(64, 24, 16, 16), (3, 4, 100_003), (30_001, 2), (401, 301), (5, 3, 7), (4001, 3, 5)])
def test_threads_make_no_difference_to_actnorm(shape: tuple[int, ...]) -> None:
    inputs = actnorm_inputs(shape, torch.float32)
    on_threads(lambda: with_gradients(ops.actnorm, *inputs))


def test_actnorm_of_slices_and_repetitions() -> None:
    for shape in ((6, 5), (6, 5, 20)):
        x, log_scale, bias = actnorm_inputs((12, *shape[1:]), torch.float32)
        for view in (x[::2], x[3:9], x[:1].expand(shape)):
            found = with_gradients(lambda s, b, v=view: ops.actnorm(v, s, b), log_scale, bias)  # type: ignore[misc]
            again = with_gradients(lambda s, b, v=view: ops.actnorm(v.contiguous(), s, b), log_scale, bias)  # type: ignore[misc]
            for ours, theirs in zip(found, again, strict=True):
                close(ours, theirs)


# ---- dequantisation --------------------------------------------------------------------------------------------------


def pixels(*shape: int, levels: int = 256) -> Tensor:
    return torch.randint(0, levels, shape, dtype=torch.int64).to(torch.uint8)


@pytest.mark.parametrize("levels", [2, 5, 256])
@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.05, 0.4])
def test_dequantize_logit(levels: int, alpha: float) -> None:
    """Of bytes and of floating numbers, with a given u, against the formula in float64."""
    x = pixels(6, 3, 17, levels=levels)
    u = 0.01 + 0.98 * torch.rand(x.shape)
    v = (x.double() + u.double()) / levels
    p = (alpha + (1 - 2 * alpha) * v).requires_grad_()
    exact = torch.logit(p.detach())
    slope = (1 - 2 * alpha) / levels / (p * (1 - p)).detach()
    for kind in (torch.uint8, torch.float32, torch.float64):
        wide = torch.float64 if kind == torch.float64 else torch.float32
        y, log_abs_det = ops.dequantize_logit(x.to(kind), levels=levels, alpha=alpha, u=u.to(wide))
        assert y.dtype == log_abs_det.dtype == wide
        close(y.double(), exact, rtol=2e-5, atol=2e-6)
        close(log_abs_det.double(), slope.log().flatten(1).sum(1), rtol=1e-5, atol=1e-4)


def test_the_noise_is_philox_by_address() -> None:
    x = pixels(5, 700)
    rng = torch.tensor([11, -3])
    u = ops.philox_uniform(x.shape, 11, -3)
    for kind in (torch.uint8, torch.float32, torch.bfloat16):
        found = ops.dequantize_logit(x.to(kind), rng=rng)
        assert found[0].dtype == (torch.float32 if kind == torch.uint8 else kind)
        expected = ops.dequantize_logit(x.float(), u=u)
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0], expected[0].to(found[0].dtype))
    torch.manual_seed(4)
    one = ops.dequantize_logit(x)[0]
    assert not torch.equal(one, ops.dequantize_logit(x)[0])
    torch.manual_seed(4)
    assert torch.equal(one, ops.dequantize_logit(x)[0])
    generator = torch.Generator().manual_seed(9)
    two = ops.dequantize_logit(x, generator=generator)[0]
    assert torch.equal(two, ops.dequantize_logit(x, generator=torch.Generator().manual_seed(9))[0])


def test_backward_draws_the_noise_again_and_keeps_none() -> None:
    x = pixels(3, 1500).float().requires_grad_()
    rng = torch.tensor([11, 1 << 40])
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y, log_abs_det = ops.dequantize_logit(x, rng=rng)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), rng.data_ptr()}
    (ours,) = torch.autograd.grad(y.sum() + log_abs_det.sum(), x)
    u = ops.philox_uniform(x.shape, 11, 1 << 40)
    y, log_abs_det = reference.dequantize_logit(x, u=u)
    close(ours, torch.autograd.grad(y.sum() + log_abs_det.sum(), x)[0])


def test_gradients_of_x_and_u_are_one() -> None:
    x = pixels(4, 60).float()
    found = with_gradients(lambda x, u: ops.dequantize_logit(x, u=u), x, 0.05 + 0.9 * torch.rand(4, 60))
    assert torch.equal(found[2], found[3])
    u = (0.05 + 0.9 * torch.rand(4, 60, dtype=torch.float64)).requires_grad_()
    y, log_abs_det = ops.dequantize_logit(x.to(torch.uint8), u=u)
    torch.autograd.grad(y.sum() + log_abs_det.sum(), u)
    assert torch.autograd.gradcheck(
        lambda u: ops.dequantize_logit(x[:2, :5].to(torch.uint8), u=u), u[:2, :5].detach().requires_grad_()
    )


def test_every_level_comes_back() -> None:
    """Wherever in its level the noise put it, but for the last few digits of float32 at its edges."""
    x = torch.arange(256.0).repeat(100, 1)
    for dtype, margin in ((torch.float64, 1e-11), (torch.float32, 2e-4)):
        u = margin + (1 - 2 * margin) * torch.linspace(0, 1, 100, dtype=torch.float64).view(-1, 1).expand(100, 256)
        for alpha in (0.0, 1e-6, 0.05):
            y, _ = ops.dequantize_logit(x.to(dtype), alpha=alpha, u=u.to(dtype))
            assert torch.equal(ops.logit_quantize(y, alpha=alpha), x.to(dtype))
    y, _ = ops.dequantize_logit(x.to(torch.uint8))
    near = (ops.logit_quantize(y).to(torch.uint8).int() - x.int()).abs()
    assert int(near.max()) <= 1
    assert int(near.sum()) <= 20


def test_the_ends_without_alpha() -> None:
    """p and 1 - p keep their digits: the noise nearest to 1 in the highest level is not rounded to it."""
    u = torch.tensor([[2.0**-24, 1 - 2.0**-24]])
    y, log_abs_det = ops.dequantize_logit(torch.tensor([[0.0, 255.0]]), alpha=0.0, u=u)
    low = math.log(2.0**-24 / 256)
    close(y, torch.tensor([[low, -low]]))
    close(log_abs_det, torch.tensor([-2 * low - 2 * math.log(256)]))
    y, log_abs_det = ops.dequantize_logit(torch.zeros(1, 1), alpha=0.0, u=torch.zeros(1, 1))
    assert y.item() == -math.inf
    assert log_abs_det.item() == math.inf


def test_numbers_that_are_no_levels_and_nan() -> None:
    x = torch.tensor([[3.0, torch.nan], [300.0, 2.0], [-40.0, 1.0]])
    y, log_abs_det = ops.dequantize_logit(x, alpha=0.0, u=torch.full((3, 2), 0.5))
    assert torch.equal(y.isnan(), torch.tensor([[False, True], [True, False], [True, False]]))
    assert bool(log_abs_det.isnan().all())
    found = ops.logit_quantize(torch.tensor([torch.nan, -math.inf, math.inf, 0.0]))
    close(found, torch.tensor([torch.nan, 0.0, 255.0, 128.0]), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (17,), (3, 5), (3, 1, 700)])
def test_logit_quantize(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for levels, alpha in ((2, 0.0), (32, 0.05), (256, 1e-6)):
        y = (4 * torch.randn(shape)).to(dtype)
        x = ops.logit_quantize(y, levels=levels, alpha=alpha)
        assert x.dtype == dtype
        exact = ((torch.sigmoid(y.double()) - alpha) / (1 - 2 * alpha) * levels).clamp(0, levels - 1)
        # A level's edge may be met from either side.
        bound = 1e-9 if dtype == torch.float64 else 1e-4
        assert bool((x.double() >= torch.floor(exact - bound)).all())
        assert bool((x.double() <= torch.floor(exact + bound)).all())
        assert not x.requires_grad
        assert not ops.logit_quantize(y.requires_grad_(), levels=levels).requires_grad
        transposed = ops.logit_quantize(y.detach().T.contiguous().T if y.dim() == 2 else y, levels=levels, alpha=alpha)
        assert torch.equal(transposed, x)


def test_opcheck_of_logit_quantize() -> None:
    registry.opcheck(torch.ops.genfuse.logit_quantize.default, (torch.randn(3, 5), 256, 0.05))
    result = torch.vmap(ops.logit_quantize)(torch.randn(3, 5))
    assert result.shape == (3, 5)


@pytest.mark.parametrize("shape", [(7,), (3, 4001), (64, 3, 32, 32), (20_011, 3), (0, 4), (3, 0)])
def test_threads_make_no_difference_to_dequantisation(shape: tuple[int, ...]) -> None:
    x = pixels(*shape)
    rng = torch.tensor([1, 2])

    def both() -> list[Tensor]:
        found = with_gradients(lambda x: ops.dequantize_logit(x, rng=rng), x.float())
        return [*found, *ops.dequantize_logit(x, rng=rng), ops.logit_quantize(found[0])]

    on_threads(both)


def test_bytes_of_any_strides_and_use_backend() -> None:
    import genfuse

    x, rng = pixels(6, 5, 4), torch.tensor([1, 2])
    expected = ops.dequantize_logit(x, rng=rng)
    for view in (x.transpose(0, 2).contiguous().transpose(0, 2), torch.stack((x, x), -1)[..., 1]):
        assert torch.equal(ops.dequantize_logit(view, rng=rng)[0], expected[0])
    with genfuse.use_backend("reference"):
        for ours, theirs in zip(ops.dequantize_logit(x, rng=rng), expected, strict=True):
            close(ours, theirs)
    assert genfuse.explain("dequantize_logit", x).backend == "native"


def test_autocast() -> None:
    x, rng = pixels(3, 8), torch.tensor([1, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = ops.dequantize_logit(x.to(torch.bfloat16), rng=rng)
        z, _ = ops.actnorm(y.to(torch.bfloat16), torch.zeros(8), torch.zeros(8, dtype=torch.bfloat16))
    assert y.dtype == z.dtype == torch.float32
    assert torch.equal(y, ops.dequantize_logit(x, rng=rng)[0])


def test_a_uniform_density_has_log2_of_levels_bits() -> None:
    """The logistic density of y is the uniform one of v where alpha is 0: 8 bits a number, whatever the noise."""
    x = pixels(9, 40)
    y, log_abs_det = ops.dequantize_logit(x, alpha=0.0)
    log_p = (torch.nn.functional.logsigmoid(y) + torch.nn.functional.logsigmoid(-y)).sum(1)
    close(-(log_p + log_abs_det) / (40 * math.log(2)), torch.full((9,), 8.0))


# ---- compilers -------------------------------------------------------------------------------------------------------


def pipeline(x: Tensor, log_scale: Tensor, bias: Tensor, rng: Tensor) -> tuple[Tensor, ...]:
    y, first = ops.dequantize_logit(x, rng=rng)
    z, second = ops.actnorm(y, log_scale, bias)
    return z, first + second, ops.logit_quantize(ops.actnorm(z, log_scale, bias, inverse=True)[0])


def test_compiles_once_for_all_batches_and_exports() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pipeline, backend=counter, fullgraph=True, dynamic=True)
    log_scale, bias, rng = torch.randn(3, requires_grad=True), torch.randn(3), torch.tensor([1, 2])
    for batch in (5, 7, 17, 9):
        x = pixels(batch, 3, 4)
        found, expected = compiled(x, log_scale, bias, rng), pipeline(x, log_scale, bias, rng)
        close(found, expected)
        by_scale = [torch.autograd.grad(r[0].sum() + r[1].sum(), log_scale)[0] for r in (found, expected)]
        close(*by_scale)
    assert sum(any(node.op == "call_function" for node in graph.graph.nodes) for graph in counter.graphs) == 1

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return pipeline(x, log_scale.detach(), bias, rng)

    with torch.no_grad():
        shapes = {"x": {0: torch.export.Dim("batch", min=2)}}
        program = torch.export.export(Model(), (pixels(3, 3, 4),), dynamic_shapes=shapes)
        x = pixels(7, 3, 4)
        close(program.module()(x), pipeline(x, log_scale, bias, rng))


# ---- what is wrong with a call ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": 3}, TypeError, "x must be a Tensor, got int"),
        ({"x": torch.zeros(2, 3).long()}, ValueError, "x must be of a floating dtype"),
        ({"x": torch.zeros(3)}, RuntimeError, "x must have at least 2 dimensions"),
        ({"log_scale": None}, TypeError, "log_scale must be a Tensor, got NoneType"),
        ({"log_scale": torch.zeros(4)}, RuntimeError, r"log_scale must be \[3\], one for each channel, got \[4\]"),
        ({"log_scale": torch.zeros(1, 3)}, RuntimeError, r"log_scale must be \[3\].*got \[1, 3\]"),
        ({"bias": torch.zeros(2)}, RuntimeError, r"bias must be \[3\]"),
        ({"bias": torch.zeros(3, device="meta")}, RuntimeError, "bias must be on cpu, as x is; got meta"),
        ({"order": "none"}, ValueError, "order must be one of 'multiply_add', 'add_multiply', got 'none'"),
        ({"inverse": 0}, TypeError, "inverse must be a bool, got int"),
    ],
)
def test_wrong_arguments_of_actnorm(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 3), "log_scale": torch.zeros(3), "bias": torch.zeros(3), **changed}
    with pytest.raises(error, match=f"actnorm: {message}"):
        ops.actnorm(**arguments)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": 3}, TypeError, "x must be a Tensor, got int"),
        ({"x": torch.zeros(2, 3).long()}, ValueError, "x must be uint8 or of a floating dtype, got torch.int64"),
        ({"x": torch.tensor(3.0)}, RuntimeError, "x must have at least 1 dimension"),
        ({"levels": 2.0}, TypeError, "levels must be an int, got float"),
        ({"levels": 1}, ValueError, r"levels must be in \[2, 2\^24\], got 1"),
        ({"levels": 2**25}, ValueError, r"levels must be in \[2, 2\^24\], got 33554432"),
        ({"alpha": "0"}, TypeError, "alpha must be a number, got str"),
        ({"alpha": -0.1}, ValueError, "alpha must be at least 0"),
        ({"alpha": 0.5}, ValueError, "alpha must be below 0.5, got 0.5"),
        ({"u": torch.zeros(3, 2)}, RuntimeError, r"u must have the shape \[2, 3\] of x, got \[3, 2\]"),
        ({"u": torch.zeros(2, 3).double()}, RuntimeError, "u must be torch.float32, the dtype of x"),
        ({"x": torch.zeros(2, 3).byte(), "u": torch.zeros(2, 2)}, RuntimeError, "u must have the shape"),
        ({"x": torch.zeros(2, 3).byte(), "u": torch.zeros(2, 3).int()}, ValueError, "u must be of a floating dtype"),
        ({"x": torch.zeros(2, 3).byte(), "u": torch.zeros(2, 3, device="meta")}, RuntimeError, "u must be on cpu"),
        ({"rng": torch.zeros(3).long()}, RuntimeError, r"rng must be \[2\]"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator"),
    ],
)
def test_wrong_arguments_of_dequantize_logit(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 3), **changed}
    with pytest.raises(error, match=f"dequantize_logit: {message}"):
        ops.dequantize_logit(**arguments)


def test_wrong_arguments_of_logit_quantize() -> None:
    with pytest.raises(TypeError, match="logit_quantize: y must be a Tensor, got float"):
        ops.logit_quantize(1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logit_quantize: y must be of a floating dtype"):
        ops.logit_quantize(torch.zeros(3).byte())
    with pytest.raises(ValueError, match="logit_quantize: levels must be in"):
        ops.logit_quantize(torch.zeros(3), levels=0)


def test_the_operators_themselves_check_what_they_are_given() -> None:
    with pytest.raises(RuntimeError, match=r"log_scale must have shape \[3\], got \[2\]"):
        torch.ops.genfuse.actnorm(torch.zeros(2, 3), torch.zeros(2), torch.zeros(3), False, False)
    with pytest.raises(RuntimeError, match="noise must come as u or from rng"):
        torch.ops.genfuse.dequantize_logit(torch.zeros(2, 3), None, None, 256, 0.05)
    with pytest.raises(RuntimeError, match="u must have the shape of x"):
        torch.ops.genfuse.dequantize_logit(torch.zeros(2, 3), torch.zeros(2, 2), None, 256, 0.05)
    with pytest.raises(RuntimeError, match=r"alpha must be in \[0, 0.5\)"):
        torch.ops.genfuse.logit_quantize(torch.zeros(2, 3), 256, 0.7)
