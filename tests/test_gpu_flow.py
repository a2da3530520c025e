"""The Triton flows on a GPU: against the reference, against the CPU, in CUDA graphs. Skipped where there is none."""

from __future__ import annotations

import genfuse
import pytest
import torch
from genfuse import ops
from torch import Tensor

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

import test_triton_flow as flow  # noqa: E402
from genfuse.kernels import flow as kernels  # noqa: E402
from test_gpu_sampling import captured  # noqa: E402
from test_triton_flow import LIST, MASK, MOVED, RNG, SCALES, affine_options, normal, parameters, spline_options  # noqa: E402

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
INVERSE = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
SHAPES = [(1,), (7,), (3, 8), (33, 5, 7), (300, 20), (5, 5000), (64, 3072), (1, 70001), (70001, 1)]
VOLUMES = [(1, 1), (7, 3), (512, 6), (70001, 2), (3, 5000), (2, 3, 5, 4), (16, 24, 32, 32), (2, 5, 70001)]


# ---- splines --------------------------------------------------------------------------------------------------------


@DTYPES
@INVERSE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spline_shapes(shape: tuple[int, ...], inverse: bool, dtype: torch.dtype) -> None:
    for batch_dims in {1, len(shape)}:
        options = spline_options(batch_dims, inverse=inverse)
        flow.spline((normal(*shape), parameters(*shape), None, None), options, dtype, "cuda")


@INVERSE
@pytest.mark.parametrize("ends", range(3), ids=["one", "wrap", "given"])
@pytest.mark.parametrize("normalizer", range(4), ids=["softmax", "identity", "zuko", "none"])
@pytest.mark.parametrize("bins", [1, 3, 8, 10, 16, 32])
def test_spline_kinds(bins: int, normalizer: int, ends: int, inverse: bool) -> None:
    params = parameters(64, 32, bins=bins, normalizer=normalizer, ends=ends)
    options = spline_options(1, bins=bins, normalizer=normalizer, ends=ends, inverse=inverse, logit_scale=0.7)
    flow.spline((normal(64, 32, scale=1.5), params, None, None), options, device="cuda")


@DTYPES
def test_spline_layouts(dtype: torch.dtype) -> None:
    shape = (6, 12, 70)
    for params in (
        parameters(*shape).movedim(-1, -2).contiguous().movedim(-2, -1),
        parameters(1, 12, 70).expand(*shape, 23),
        parameters(70, 12, 6).permute(2, 1, 0, 3),
    ):
        for batch_dims in (1, 3):
            flow.spline((normal(*shape), params, None, None), spline_options(batch_dims), dtype, "cuda")
    apart = [normal(*shape, size) for size in (8, 8, 7)]
    flow.spline((normal(*shape), *apart), spline_options(1), dtype, "cuda")


@INVERSE
def test_spline_nan_and_what_lies_outside(inverse: bool) -> None:
    """A GPU's minimum and maximum pass NaN over, which the interpreter's do not."""
    x = torch.zeros(2, 6, device="cuda")
    x[1] = torch.tensor([-3.0, 3.0, torch.nan, torch.inf, -torch.inf, 1e30])
    params = parameters(2, 6, ends=2).float().cuda()
    params[0, 1, 3] = params[0, 2, 9] = torch.nan
    params[0, 3, 16:] = torch.nan
    y, log = kernels.spline(x, params, None, None, *spline_options(2, ends=2, inverse=inverse))
    assert y.isnan().nonzero().tolist() == log.isnan().nonzero().tolist() == [[0, 1], [0, 2], [0, 3], [1, 2]]
    assert torch.equal(y[1].nan_to_num(7.0), x[1].nan_to_num(7.0))


def test_spline_at_its_ends_and_back_again() -> None:
    params = (parameters(100001) * 2.0).float().cuda()
    x = torch.linspace(-2.0, 2.0, 100001, device="cuda")
    sides = (-2.0, 2.0, -2.0, 2.0)
    y, log = kernels.spline(x, params, None, None, *spline_options(1, sides=sides))
    assert y[[0, -1]].tolist() == [-2.0, 2.0]
    again, back = kernels.spline(y, params, None, None, *spline_options(1, sides=sides, inverse=True))
    error = (again - x).abs().double()
    assert bool((error <= 16 * flow.EPS * 2.0 * (1.0 + torch.exp(-log.double()))).all())
    assert bool(back.isfinite().all())


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_public_spline(backend: str) -> None:
    x, params = torch.randn(64, 32), torch.randn(64, 32, 23)
    there = x.cuda().requires_grad_(), params.cuda().requires_grad_()
    with genfuse.use_backend(backend):
        y, log = ops.rational_quadratic_spline(*there, reduce_dims=1)
        found = torch.autograd.grad(y.sum() + log.sum(), there)
    here = x.requires_grad_(), params.requires_grad_()
    y_here, log_here = ops.rational_quadratic_spline(*here, reduce_dims=1)
    wanted = torch.autograd.grad(y_here.sum() + log_here.sum(), here)
    for ours, theirs in zip((y, log, *found), (y_here, log_here, *wanted), strict=True):
        assert torch.allclose(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)


def test_spline_of_more_than_2_to_the_31_parameters() -> None:
    count = 2**31 // 23 + 1001
    if torch.cuda.mem_get_info()[0] < 2 * 25 * count + 2**30:
        pytest.skip("not enough memory")
    params = torch.zeros(count, 23, dtype=torch.bfloat16, device="cuda")
    params[-1000:].normal_()
    x = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    y, log = kernels.spline(x, params, None, None, *spline_options(1))
    tail = kernels.spline(x[-1000:], params[-1000:].clone(), None, None, *spline_options(1))
    assert torch.equal(y[-1000:], tail[0])
    assert torch.equal(log[-1000:], tail[1])


# ---- couplings, actnorm, dequantisation -----------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("shape", VOLUMES, ids=str)
def test_affine_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    params = shape[0], 2 * ((shape[1] + 1) // 2), *shape[2:]
    for reduce in (True, False):
        options = affine_options("sigmoid", split=flow.FIRST, reduce=reduce)
        flow.affine((normal(*shape), normal(*params), None, None), options, dtype, "cuda")


@INVERSE
@pytest.mark.parametrize("scale", SCALES)
def test_affine_scales(scale: str, inverse: bool) -> None:
    for add_first in (False, True):
        options = affine_options(scale, add_first=add_first, inverse=inverse)
        flow.affine((normal(5, 4, 70), normal(5, 8, 70, scale=2.0), None, None), options, device="cuda")


@pytest.mark.parametrize("layout", range(4))
@pytest.mark.parametrize("split", MOVED)
def test_affine_splits(split: int, layout: int) -> None:
    channels = {LIST: torch.tensor([3, 0, 4]), MASK: torch.rand(5, 33) < 0.5}.get(split)
    params = normal(6, 2 * MOVED[split], 33)
    flow.affine((normal(6, 5, 33), params, None, channels), affine_options("tanh", layout, split), device="cuda")
    flow.additive((normal(6, 5, 33), params[:, ::2], channels), (split, True), device="cuda")


@DTYPES
@pytest.mark.parametrize("shape", VOLUMES, ids=str)
def test_actnorm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for inverse in (False, True):
        numbers = normal(shape[1], scale=0.3), normal(shape[1])
        flow.actnorm((normal(*shape), *numbers), (inverse, inverse), dtype, "cuda")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_logit(shape: tuple[int, ...]) -> None:
    x = flow.levels_of(*shape, levels=16)
    flow.dequantize((x.double(), torch.rand(shape, dtype=torch.float64), None), (16, 0.05), device="cuda")
    flow.dequantize((x.double(), None, RNG), (16, 0.05), device="cuda")
    pixels = x.to(torch.uint8).cuda()
    y, _ = kernels.dequantize_logit(pixels, None, RNG.cuda(), 16, 0.05)
    assert float((kernels.logit_quantize(y, 16, 0.05) - pixels).abs().max()) <= 1.0
    wanted, _ = ops.dequantize_logit(x.to(torch.uint8), levels=16, u=ops.philox_uniform(x.shape, *RNG.tolist()))
    assert torch.allclose(y.cpu(), wanted, rtol=1e-5, atol=1e-5)


# ---- graphs ---------------------------------------------------------------------------------------------------------


def everything(x: Tensor, params: Tensor, pixels: Tensor, rng: Tensor) -> list[Tensor]:
    """Every kernel once. x is [B, C], params [B, C, 23]."""
    results: list[Tensor] = []
    for inverse in (False, True):
        options = spline_options(1, inverse=inverse)
        y, log = kernels.spline(x, params, None, None, *options)
        results += [y, log, *kernels.spline_backward(y, log, x, params, None, None, *options, 3)]
        numbers = params[0, :, 0], params[0, :, 1]
        y, log = kernels.actnorm(x, *numbers, inverse, False)
        results += [y, log, *kernels.actnorm_backward(y, log, x, *numbers, inverse, False, 7)]
        raw = params[:, :, :1].flatten(1)
        affine = affine_options("sigmoid", inverse=inverse)
        y, log = kernels.affine_coupling(x, raw, x, None, *affine)
        results += [y, log, *kernels.affine_coupling_backward(y, log, x, raw, x, None, *affine, 7)]
        results.append(kernels.additive_coupling(x, raw, None, 0, inverse))
        results += kernels.additive_coupling_backward(y, x, raw, None, 0, inverse, 3)
    y, log = kernels.dequantize_logit(pixels, None, rng, 256, 0.05)
    results += [y, log, kernels.logit_quantize(y, 256, 0.05)]
    floating = pixels.float()
    results += kernels.dequantize_logit_backward(y, log, floating, None, rng, 256, 0.05, 1)
    return results


def test_cuda_graph_no_synchronisation_and_determinism() -> None:
    x, params = torch.randn(600, 67, device="cuda"), torch.randn(600, 67, 23, device="cuda")
    pixels, rng = torch.randint(0, 256, (600, 67), device="cuda").to(torch.uint8), RNG.cuda()

    def function() -> list[Tensor]:
        return everything(x, params, pixels, rng)

    first = [tensor.clone() for tensor in function()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    graph, result = captured(function)
    x.mul_(-0.5)
    params.neg_()
    rng.add_(12345)
    expected = [tensor.clone() for tensor in function()]
    for tensor in result:
        tensor.fill_(0)
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(first[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_a_size_compiles_nothing_new() -> None:
    def call(rows: int, columns: int) -> None:
        x = torch.randn(rows, columns, device="cuda")
        everything(
            x,
            torch.randn(rows, columns, 23, device="cuda"),
            torch.zeros(rows, columns, dtype=torch.uint8, device="cuda"),
            RNG.cuda(),
        )

    def compiled() -> int:
        launchers = [value for value in vars(kernels).values() if getattr(value, "do_not_specialize", None)]
        return sum(len(cache[0]) for value in launchers for cache in value.device_caches.values())

    call(600, 67)
    call(601, 67)
    before = compiled()
    for rows in (602, 603, 605, 607):
        call(rows, 67)
    assert compiled() == before


def test_training_step_in_a_graph() -> None:
    """A neural spline flow's step, captured whole, moves its parameters as the eager step does."""
    from genfuse import models

    def steps(graph: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = models.NeuralSplineFlow(32, transforms=2, hidden=(64, 64)).cuda()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, capturable=True)
        x = torch.randn(512, 32, device="cuda")

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=False)
            loss: Tensor = model.loss(x)
            loss.backward()
            optimizer.step()
            return loss

        with genfuse.use_backend("triton"):
            if graph:
                replay, _ = captured(step)  # two steps before, and none while it is captured
                for _ in range(3):
                    replay.replay()
            else:
                for _ in range(5):
                    step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    for ours, theirs in zip(steps(True), steps(False), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
