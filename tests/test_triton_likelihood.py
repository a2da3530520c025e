"""The Triton likelihoods without a GPU: run by the interpreter against the reference, and compiled for every target.

The interpreted tests run in a process of their own, as those of test_triton_sampling.py.
"""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is optional")

from genfuse.kernels import likelihood as kernels
from genfuse.reference import likelihood as reference
from test_triton_sampling import (
    DTYPES,
    HALVES,
    INF,
    NAN,
    RNG,
    SHAPES,
    TILES,
    Check,
    check_compilation,
    compiled,
    interpreted,
    normal,
    pool,
    recorded,
    run_interpreted,
    small_tiles,
)

__all__ = ["pool"]

bernoulli = Check("bernoulli_nll", 2, family=kernels, definition=reference)
gaussian = Check("gaussian_nll", 3, family=kernels, definition=reference)
discretized = Check("discretized_gaussian_nll", 3, family=kernels, definition=reference)
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def maybe_small(tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if tiles:
        small_tiles(monkeypatch)


def levels_of(*shape: int, levels: int = 256) -> Tensor:
    return torch.randint(0, levels, shape).to(torch.float64) * (2.0 / (levels - 1)) - 1.0


@interpreted
@TILES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], maybe_small: None) -> None:
    bernoulli((normal(*shape, scale=3.0), torch.rand(shape, dtype=torch.float64)), (1,))
    gaussian((normal(*shape), normal(*shape), normal(*shape)), (1, False))
    discretized((levels_of(*shape, levels=16), normal(*shape), normal(*shape)), (1, True, 16))


@interpreted
@pytest.mark.parametrize("batch_dims", [0, 2, 3])
def test_batch_dims(batch_dims: int) -> None:
    shape = (2, 3, 4)
    bernoulli((normal(*shape), normal(*shape).round().clamp(0, 1)), (batch_dims,))
    gaussian((normal(*shape), normal(*shape), normal(*shape)), (batch_dims, True))
    discretized((levels_of(*shape), normal(*shape), normal(*shape)), (batch_dims, False, 256))


@interpreted
def test_expanded_and_transposed() -> None:
    shape = (4, 3, 5)
    transposed = normal(5, 3, 4).permute(2, 1, 0)
    bernoulli((transposed, normal(3, 5).sigmoid().expand(shape)), (1,))
    gaussian((normal(*shape), normal(3, 5).expand(shape), normal(1).expand(shape)), (1, False))
    gaussian((transposed, normal(4, 1, 1).expand(shape), normal(3, 1).expand(shape)), (2, True))
    discretized((levels_of(*shape), normal(5).expand(shape), normal(1).expand(shape)), (1, True, 256))


@interpreted
@HALVES
def test_half(dtype: torch.dtype) -> None:
    shape = (3, 37)
    bernoulli((normal(*shape, scale=3.0), normal(*shape).sigmoid()), (1,), dtype)
    gaussian((normal(*shape), normal(*shape), normal(*shape)), (1, False), dtype)
    discretized((levels_of(*shape, levels=16), normal(*shape), normal(*shape)), (1, True, 16), dtype)


@interpreted
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    empty = torch.empty(shape)
    for op, tensors, options in ((bernoulli, 2, (1,)), (gaussian, 3, (1, True)), (discretized, 3, (1, True, 4))):
        nll = getattr(kernels, op.name)(*[empty] * tensors, *options)
        assert torch.equal(nll, torch.zeros(shape[:1]))
        for grad in (nll, None):
            back = getattr(kernels, op.name + "_backward")(grad, *[empty] * tensors, *options, 7)
            assert all(gradient.shape == shape for gradient in back)


@interpreted
def test_no_gradient_coming_in() -> None:
    x = torch.randn(2, 3)
    for op, tensors, options in ((bernoulli, 2, (1,)), (gaussian, 3, (1, True)), (discretized, 3, (1, True, 4))):
        back = getattr(kernels, op.name + "_backward")(None, *[x] * tensors, *options, 1)
        assert torch.equal(back[0], torch.zeros(2, 3))
        assert all(gradient.numel() == 0 for gradient in back[1:])


@interpreted
def test_nan_stays_in_its_row() -> None:
    x, mean, scale = levels_of(7, 3).float(), torch.randn(7, 3), torch.randn(7, 3)
    x[1, 0] = mean[3, 1] = scale[5, 2] = NAN
    wanted = [False, True] * 3 + [False]
    assert kernels.gaussian_nll(x, mean, scale, 1, False).isnan().tolist() == wanted
    assert kernels.discretized_gaussian_nll(x, mean, scale, 1, False, 256).isnan().tolist() == wanted
    back = kernels.discretized_gaussian_nll_backward(torch.ones(7), x, mean, scale, 1, False, 256, 7)
    for gradient in back:
        assert gradient.isnan().any(1).tolist() == wanted
        assert int(gradient.isnan().sum()) == 3
    assert kernels.bernoulli_nll(mean, x, 1).isnan().tolist() == [False, True, False, True, False, False, False]


@interpreted
def test_bernoulli_keeps_its_digits() -> None:
    """Where the outcome is the likely one, what is left is e^-|l|."""
    logits = torch.tensor([1.0, 10.0, 20.0, 60.0, 90.0])
    logits = torch.cat([logits, -logits]).view(-1, 1)
    target = (logits > 0).float()
    nll = kernels.bernoulli_nll(logits, target, 1)
    small = torch.exp(-logits.double().abs().flatten())
    assert torch.allclose(nll.double(), torch.log1p(small), rtol=8 * EPS, atol=1e-44)
    back, _ = kernels.bernoulli_nll_backward(torch.ones(10), logits, target, 1, 1)
    assert torch.allclose(back.double().flatten().abs(), small / (1 + small), rtol=8 * EPS, atol=1e-44)


@interpreted
def test_gaussian_overflows_no_earlier_than_it_must() -> None:
    x, zero, scale = torch.full((1, 1), 1e-41), torch.zeros(1, 1), torch.full((1, 1), -190.0)
    assert bool(kernels.gaussian_nll(x, zero, scale, 1, False).isfinite())
    exact = reference.gaussian_nll(x.double(), zero.double(), scale.double(), 1, False)[0]
    assert torch.allclose(kernels.gaussian_nll(x, zero, scale, 1, False).double(), exact, rtol=1e-4)


# ---- the mass of a bin ----------------------------------------------------------------------------------------------


@interpreted
def test_mills_ratio() -> None:
    """Through the lowest bin, ln of the mass below an edge t deviations below the mean: within 2 units of it."""
    t = torch.cat([torch.linspace(0, 40, 2001), torch.logspace(-6, 9, 500)])
    exact = math.sqrt(math.pi / 2) * torch.special.erfcx(t.double() * math.sqrt(0.5))
    # By center the derivative is 1 / (Mills' ratio): x = -1, half = 1, the edge at 0, mean t, deviation 1.
    one = torch.ones(len(t))
    slope = kernels.discretized_gaussian_nll_backward(
        one, -one.view(-1, 1), t.view(-1, 1), 0 * one.view(-1, 1), 1, True, 2, 2
    )[1].flatten()
    assert float((slope.double() * exact - 1.0).abs().max()) <= 4 * EPS


# Centre and half-width of a bin in deviations: both sides of every branch, far tails, narrow and wide.
CENTERS = [0.0, 1e-6, 1e-3, 0.3, 0.61, 0.63, 1.0, 3.0, 6.0, 30.0, 1000.0]
WIDTHS = [1e-7, 1e-3, 0.1, 0.3, 0.49, 0.51, 0.7, 0.99, 1.01, 2.0, 5.0, 20.0, 300.0]


def bins(levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """x at a level, mean and ln deviation of inner bins with every centre (of both signs) and width, float32."""
    half = 1.0 / (levels - 1)
    center, width = (t.flatten().double() for t in torch.meshgrid(
        torch.tensor(CENTERS + [-c for c in CENTERS]), torch.tensor(WIDTHS), indexing="ij"
    ))  # fmt: skip
    deviation = half / width
    x = torch.full_like(center, 2.0 * half * ((levels - 1) // 2) - 1.0).float()
    return x, (x.double() - center * deviation).float(), deviation.log().float()


@interpreted
@pytest.mark.parametrize("levels", [3, 4, 256])
def test_every_branch(levels: int) -> None:
    x, mean, scale = bins(levels)
    discretized([t.double().view(-1, 1) for t in (x, mean, scale)], (1, True, levels))
    # At the ends one side is a tail: the same means, from the lowest level and the highest.
    for end in (-1.0, 1.0):
        discretized([t.double().view(-1, 1) for t in (x * 0 + end, mean, scale)], (1, True, levels))


@interpreted
def test_each_element_alone() -> None:
    """Element by element: what is small must be as exact as what is large."""
    for end in (None, -1.0, 1.0):
        x, mean, scale = (t.view(-1, 1) for t in bins(256))
        if end is not None:
            x = torch.full_like(x, end)
        leaves = [t.double().requires_grad_() for t in (x, mean, scale)]
        (exact,) = reference.discretized_gaussian_nll(*leaves, 1, True, 256)
        gradients = torch.autograd.grad(exact.sum(), leaves)
        found = kernels.discretized_gaussian_nll(x, mean, scale, 1, True, 256)
        back = kernels.discretized_gaussian_nll_backward(torch.ones(len(x)), x, mean, scale, 1, True, 256, 7)
        # What one unit in the last place of every input does to it.
        nudges = [x.double().abs(), mean.double().abs(), scale.double().abs() + 1.0]
        moved = sum(g.abs() * n for g, n in zip(gradients, nudges, strict=True)).flatten()
        error = (found.double() - exact).abs()
        assert bool((error <= 8 * EPS * (exact.abs() + moved) + 1e-44).all())
        # By ln deviation it is a difference, of about 1 from the centre's square.
        for name, gradient, truth, least in zip(
            ["x", "mean", "scale"], back, gradients, (1e-6, 1e-6, 1.0), strict=True
        ):
            error = (gradient.double() - truth).abs()
            assert bool((error <= 64 * EPS * (truth.abs() + least)).all()), name


@interpreted
def test_narrow_and_wide_bins_at_their_ends() -> None:
    """A deviation of next to nothing or without end: the log of a density, 0, or what remains, never NaN."""
    x = torch.tensor([-1.0, 0.0, 1.0, 0.0, 1.0]).view(-1, 1)
    mean = torch.tensor([0.0, 0.0, 0.0, 0.4, 0.4]).view(-1, 1)
    for log_std in (-300.0, -100.0, -60.0, -30.0, 30.0, 60.0, 80.0):
        scale = torch.full((5, 1), log_std)
        nll = kernels.discretized_gaussian_nll(x, mean, scale, 1, True, 3)
        exact = reference.discretized_gaussian_nll(x.double(), mean.double(), scale.double(), 1, True, 3)[0]
        exact = torch.where(exact > torch.finfo(torch.float32).max, INF, exact)
        assert torch.allclose(nll.double(), exact, rtol=1e-4, atol=1e-30), log_std
        back = kernels.discretized_gaussian_nll_backward(torch.ones(5), x, mean, scale, 1, True, 3, 7)
        assert not any(bool(gradient.isnan().any()) for gradient in back)


@interpreted
@pytest.mark.parametrize("levels", [2, 5, 256])
def test_probabilities_of_all_levels_sum_to_1(levels: int) -> None:
    x = torch.linspace(-1, 1, levels, dtype=torch.float64).float().view(-1, 1).repeat(1, 40)
    mean, scale = torch.randn(40).expand_as(x), torch.linspace(-6, 3, 40).expand_as(x)
    nll = kernels.discretized_gaussian_nll(x, mean, scale, 2, True, levels)
    assert torch.allclose(torch.exp(-nll.double()).sum(0), torch.ones(40, dtype=torch.float64), rtol=1e-5)


@compiled
def test_interpreted_in_a_process_of_its_own() -> None:
    """Every test above."""
    run_interpreted(__file__)


def calls(dtype: torch.dtype) -> None:
    def of(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    grad = torch.zeros(8)
    tensors: tuple[Any, ...]
    for tensors in ((of(8, 4096), of(8, 4096), of(4096).expand(8, 4096)), (of(9, 63), of(9, 63), of(9, 63))):
        kernels.bernoulli_nll(*tensors[:2], 1)
        kernels.bernoulli_nll_backward(grad, *tensors[:2], 1, 3)
        for kind, options in ((kernels.gaussian_nll, (False,)), (kernels.discretized_gaussian_nll, (True, 256))):
            kind(*tensors, 1, *options)
            getattr(kernels, kind.__name__ + "_backward")(grad, *tensors, 1, *options, 7)
    # Of colours, and of grey pixels by the published formula; levels outside of space, and innermost.
    colours = dtype != torch.float16
    channels, layout = (3, 0) if colours else (1, 2)
    x, params = torch.zeros(8, channels, 1024), of(8, 100 if colours else 30, 1024)
    mixture = (8, not colours, layout, -7.0, not colours)
    nll = kernels.discretized_logistic_mixture_nll(x, params, *mixture)
    kernels.discretized_logistic_mixture_nll_backward(nll, x, params, *mixture, 3)
    kernels.discretized_logistic_mixture_sample(params, None, RNG, channels, 8, layout, -7.0, 1.0, True)
    logits, target = of(8, 256, 8, 8), torch.zeros(8, 8, 8, dtype=torch.uint8)
    if dtype != torch.float32:
        logits, target = logits.contiguous(memory_format=torch.channels_last), target.to(torch.int64)
    nll, *saved = kernels.categorical_nll(logits, target, 1, dtype == torch.float32)
    kernels.categorical_nll_backward(nll, logits, target, *saved, 1, dtype == torch.float32, 1)


@compiled
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_compiles_for_every_target(dtype: str, pool: ProcessPoolExecutor) -> None:
    check_compilation(kernels, recorded(lambda: calls(DTYPES[dtype])), dtype, pool)
