"""Random numbers by address on a GPU, those of the CPU, and the Triton kernels of what is sampled with them and of the
likelihoods. Skipped where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import genfuse
import pytest
import torch
from genfuse import ops
from torch import Tensor

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

import test_triton_likelihood as likelihood  # noqa: E402
import test_triton_sampling as sampling  # noqa: E402
from genfuse.kernels import likelihood as likelihood_kernels  # noqa: E402
from genfuse.kernels import sampling as kernels  # noqa: E402
from genfuse.reference import sampling as reference  # noqa: E402
from test_triton_sampling import RNG, gaussian_options, integers, normal  # noqa: E402

NOISES = ("bits", "uniform", "normal", "gumbel", "logistic")


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_equals_the_cpu(noise: str, backend: str) -> None:
    draw = getattr(ops, f"philox_{noise}")
    with genfuse.use_backend(backend):
        found = draw((1001, 3), 2**63 + 5, -6, device="cuda").cpu()
    wanted = draw((1001, 3), 2**63 + 5, -6)
    if noise in ("bits", "uniform"):
        assert torch.equal(found, wanted)
    else:
        # Each is within 4 ulp of the exact number (docs/random.md).
        error = (found.double() - wanted.double()).abs() / wanted.double().abs().clamp(min=1.0)
        assert float(error.max()) <= 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_uniforms_equal_the_cpu(dtype: torch.dtype) -> None:
    with genfuse.use_backend("triton"):
        found = ops.philox_uniform(5001, 3, dtype=dtype, device="cuda").cpu()
    assert torch.equal(found, ops.philox_uniform(5001, 3, dtype=dtype))


def test_more_than_2_to_the_31_elements() -> None:
    count = 2**31 + 1001
    if torch.cuda.mem_get_info()[0] < 3 * count:
        pytest.skip("not enough memory")
    with genfuse.use_backend("triton"):
        found = ops.philox_uniform(count, 3, dtype=torch.bfloat16, device="cuda")
    assert 0.49 < float(found[-1000:].float().mean()) < 0.53
    assert float(found.max()) < 1


# ---- what is sampled with them, and likelihoods ----------------------------------------------------------------------

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
SHAPES = [(1,), (7,), (3, 8), (33, 5, 7), (300, 20), (5, 5000), (64, 3072), (1, 70001), (70001, 1)]


@pytest.fixture
def no_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gaussian(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = [normal(*shape) for _ in range(5)]
    sampling.gaussian((*tensors[:4], None, RNG), gaussian_options(), dtype, "cuda")
    sampling.gaussian((*tensors, None), gaussian_options(log_std=True, clamp=(-0.5, 0.5)), dtype, "cuda")
    sampling.gaussian((tensors[0], tensors[1], None, None, None, RNG), gaussian_options(), dtype, "cuda")
    row = tensors[2][:1].expand(shape)
    sampling.gaussian((tensors[0], row, row, row, None, RNG), gaussian_options(), dtype, "cuda")


@DTYPES
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("shape", [*SHAPES, (300, 1000), (3, 8192), (2, 20001)], ids=str)
def test_relaxed(shape: tuple[int, ...], hard: bool, dtype: torch.dtype) -> None:
    for noise, rng in ((normal(*shape), None), (None, RNG)):
        sampling.relaxed_bernoulli((normal(*shape), noise, rng), (0.7, hard), dtype, "cuda")
        if not (hard and noise is None):  # which of two is the largest may turn on the noise's last place
            sampling.gumbel_softmax((normal(*shape), noise, rng), (0.7, hard), dtype, "cuda")


@pytest.mark.parametrize("shape", [(3, 7), (64, 256), (5, 50257), (1, 1)], ids=str)
@pytest.mark.parametrize("samples", [1, 20])
def test_categorical_sample(shape: tuple[int, ...], samples: int) -> None:
    logits = normal(*shape, scale=2.0).float()
    logits[:, ::3] = -torch.inf if shape[1] > 1 else 0.0
    found = kernels.categorical_sample(logits.cuda(), None, RNG.cuda(), samples).cpu()
    sampling.assert_inverted(found, logits, reference.philox_uniform((shape[0], samples), RNG, torch.float64))
    assert bool(logits.gather(1, found).isfinite().all())


def test_rows_that_are_no_distribution() -> None:
    logits = torch.zeros(4, 1100, device="cuda")
    logits[0, 1050], logits[1, 3], logits[2] = torch.nan, torch.inf, -torch.inf
    assert (kernels.categorical_sample(logits, None, RNG.cuda(), 3) < 0).all(1).tolist() == [True, True, True, False]
    for hard in (False, True):
        for rows in (logits, logits.repeat(1, 9)):
            y = kernels.gumbel_softmax(rows, None, RNG.cuda(), 1.0, hard)
            assert y.isnan().all(1).tolist() == [True, True, True, False]
            assert not bool(y[3].isnan().any())


def test_nan_stays_in_its_element() -> None:
    """A GPU's minimum and maximum pass NaN over, which the interpreter's do not."""
    mean, scale = torch.randn(3, 5, device="cuda"), torch.randn(3, 5, device="cuda")
    mean[1, 2] = scale[1, 4] = torch.nan
    z, kl = kernels.gaussian(mean, scale, None, None, None, RNG.cuda(), *gaussian_options(clamp=(-1.0, 1.0)))
    assert z.isnan().nonzero().tolist() == [[1, 2], [1, 4]]
    assert kl.isnan().tolist() == [False, True, False]
    nll = likelihood_kernels.discretized_gaussian_nll(mean.clamp(-1, 1), mean, scale, 1, False, 256)
    assert nll.isnan().tolist() == [False, True, False]
    back = kernels.relaxed_bernoulli(mean, None, RNG.cuda(), 1.0, True)
    assert back.isnan().nonzero().tolist() == [[1, 2]]


@DTYPES
@pytest.mark.parametrize(("shape", "codes"), [*sampling.SIZES, ((1000, 64), 512), ((4097, 3), 33)], ids=str)
def test_vector_quantize(shape: tuple[int, ...], codes: int, dtype: torch.dtype, no_tf32: None) -> None:
    # Integers and a half: no distance is rounded.
    x, codebook = integers(*shape, span=4) + 0.5, integers(codes, shape[-1], span=4)
    sampling.vector_quantize((x, codebook), (0.25, 1.0), dtype, "cuda")


def test_vector_quantize_random_numbers() -> None:
    sizes = ((3000, 64), (512, 64))
    x, codebook = (torch.randn(size, device="cuda") for size in sizes)
    quantized, indices, _ = kernels.vector_quantize(x, codebook, 0.25, 1.0)
    distances = torch.cdist(x.double(), codebook.double())
    assert torch.allclose(distances.gather(1, indices[:, None])[:, 0], distances.amin(1), rtol=1e-6)
    assert torch.equal(quantized, codebook[indices])
    counts, sums = kernels.vector_quantize_statistics(x, indices, 512)
    exact = reference.vector_quantize_statistics(x.double().cpu(), indices.cpu(), 512)
    assert torch.equal(counts.double().cpu(), exact[0])
    assert torch.allclose(sums.double().cpu(), exact[1], rtol=1e-5, atol=1e-5)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_likelihoods(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    target = torch.rand(shape, dtype=torch.float64)
    likelihood.bernoulli((normal(*shape, scale=3.0), target), (1,), dtype, "cuda")
    likelihood.gaussian((normal(*shape), normal(*shape)[:1].expand(shape), normal(*shape)), (1, False), dtype, "cuda")
    levels = likelihood.levels_of(*shape, levels=16)
    likelihood.discretized((levels, normal(*shape), normal(*shape)), (1, True, 16), dtype, "cuda")


def test_every_bin() -> None:
    for levels in (3, 4, 256):
        x, mean, scale = likelihood.bins(levels)
        for place in (x, x * 0 - 1, x * 0 + 1):
            tensors = [t.double().view(-1, 1) for t in (place, mean, scale)]
            likelihood.discretized(tensors, (1, True, levels), device="cuda")


def everything(rng: Tensor, x: Tensor, codebook: Tensor) -> list[Tensor]:
    """Every kernel once."""
    options, rows = gaussian_options(), x[:, 0].float()
    gaussian = (x, x, x, x, None, rng)
    z, kl = kernels.gaussian(*gaussian, *options)
    results = [z, kl, *kernels.gaussian_backward(z, kl, *gaussian, *options, 15)]
    for op in ("gumbel_softmax", "relaxed_bernoulli"):
        y = getattr(kernels, op)(x, None, rng, 0.7, False)
        results += [y, *getattr(kernels, op + "_backward")(x, x, None, rng, y, 0.7, False, 1)]
    quantized, indices, loss = kernels.vector_quantize(x, codebook, 0.25, 1.0)
    results += [quantized, indices, loss, kernels.categorical_sample(x, None, rng, 5)]
    results += kernels.vector_quantize_backward(quantized, loss, x, codebook, indices, 0.25, 1.0, 3)
    results += kernels.vector_quantize_statistics(x, indices, codebook.size(0))
    for op, tensors, last in (("bernoulli", 2, ()), ("gaussian", 3, (True,)), ("discretized_gaussian", 3, (True, 4))):
        call = (*[x] * tensors, 1, *last)
        results.append(getattr(likelihood_kernels, f"{op}_nll")(*call))
        results += getattr(likelihood_kernels, f"{op}_nll_backward")(rows, *call, 7)
    return results


def test_cuda_graph_no_synchronisation_and_determinism() -> None:
    rng, x, codebook = RNG.cuda(), torch.randn(200, 67, device="cuda"), torch.randn(40, 67, device="cuda")

    def function() -> list[Tensor]:
        return everything(rng, x, codebook)

    first = [tensor.clone() for tensor in function()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    graph, result = captured(function)
    x.mul_(-0.5)
    rng.add_(12345)  # other random numbers: they are read when the graph runs
    expected = [tensor.clone() for tensor in function()]
    for tensor in result:
        tensor.fill_(0)
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(first[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


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


def test_samples_of_more_than_2_to_the_31_elements() -> None:
    count = 2**31 + 1001
    if torch.cuda.mem_get_info()[0] < 6 * count:
        pytest.skip("not enough memory")
    logits = torch.zeros(1, dtype=torch.bfloat16, device="cuda").expand(count)
    found = kernels.relaxed_bernoulli(logits, None, RNG.cuda(), 1.0, True)
    # The words beyond 2^31 by the definition, on a piece of them.
    first = 2**31 + 1
    words = reference.words(RNG, torch.arange(first, first + 1000))
    assert torch.equal(found[first:].cpu()[:1000] > 0, words >= 2**31)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_public_functions(backend: str) -> None:
    mean, scale = (
        torch.randn(4, 6, device="cuda", requires_grad=True),
        torch.randn(6, device="cuda", requires_grad=True),
    )
    with genfuse.use_backend(backend):
        z, kl = ops.gaussian_rsample_kl(mean, scale, rng=RNG.cuda())
        found = torch.autograd.grad(z.sum() + kl.sum(), (mean, scale))
    leaves = [tensor.detach().cpu().requires_grad_() for tensor in (mean, scale)]
    z, kl = ops.gaussian_rsample_kl(*leaves, rng=RNG)
    wanted = torch.autograd.grad(z.sum() + kl.sum(), leaves)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours.cpu(), theirs, rtol=1e-5, atol=1e-5)
