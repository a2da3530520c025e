"""The Triton noise and what is sampled with it, without a GPU: run by the interpreter against the reference, and
compiled for every target.

The interpreter is chosen when a kernel is decorated, so the interpreted tests run in a process of their own, this same
file with TRITON_INTERPRET=1; what the compiler is given are the launches that the host functions really make, recorded.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is optional")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import triton_interpreter

    triton_interpreter.install()

from genfuse.kernels import sampling as kernels  # noqa: E402
from genfuse.reference import sampling as reference  # noqa: E402
from tolerances import assert_as_accurate, eager_runs  # noqa: E402

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
RNG = torch.tensor([0x1234_5678_9ABC_DEF, -(2**40) - 7])
NOISES = {"uniform": 1, "normal": 2, "gumbel": 3, "logistic": 4}
INF, NAN = math.inf, math.nan


# ---- an operator and its gradients against the reference ------------------------------------------------------------


def mapped(tensor: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A floating tensor changed element by element; what is expanded stays expanded."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return tensor
    base = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
    return change(base).expand(tensor.shape)


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


class Check:
    """A call of an operator: results and gradients of `family` against those of `definition`.

    Attributes:
        name: of the operator.
        differentiable: how many of its tensors, from the first on, take a gradient.
        constants: which results have none.
        saved: which results backward takes.
    """

    def __init__(
        self,
        name: str,
        differentiable: int,
        constants: tuple[int, ...] = (),
        saved: tuple[int, ...] = (),
        family: Any = kernels,
        definition: Any = reference,
    ) -> None:
        self.name, self.differentiable, self.constants, self.saved = name, differentiable, constants, saved
        self.family, self.definition = family, definition

    def __call__(
        self,
        tensors: Sequence[Tensor | None],
        options: Sequence[Any],
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        without: Iterable[int] = (),
    ) -> None:
        """Compare; `without` says which results have no gradient coming in."""
        # Rounded to the test's dtype first: the exact and the eager result start from the same numbers.
        given = [mapped(tensor, lambda t: t.to(dtype)) for tensor in tensors]
        there = [None if tensor is None else mapped(tensor, lambda t: t.to(device)) for tensor in given]
        there = [tensor if tensor is None else tensor.to(device) for tensor in there]
        found = as_tuple(getattr(self.family, self.name)(*there, *options))
        flowing = [index for index in range(len(found)) if index not in self.constants]
        generator = torch.Generator().manual_seed(5)
        cotangents: list[Tensor | None] = [
            None if index in without else torch.randn(found[index].shape, generator=generator).to(found[index].dtype)
            for index in flowing
        ]

        def eager(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
            inputs = [mapped(tensor, change) for tensor in given]
            leaves = inputs[: self.differentiable]
            leaves = [None if leaf is None else leaf.detach().requires_grad_() for leaf in leaves]
            results = getattr(self.definition, self.name)(*leaves, *inputs[self.differentiable :], *options)
            pairs = [
                (results[index], cotangent.to(results[index].dtype))
                for index, cotangent in zip(flowing, cotangents, strict=True)
                if cotangent is not None and results[index].requires_grad
            ]
            gradients: Sequence[Tensor] = []
            if self.differentiable > 0:
                wanted = [leaf for leaf in leaves if leaf is not None]
                outputs, incoming = zip(*pairs, strict=True)
                gradients = torch.autograd.grad(outputs, wanted, incoming, allow_unused=True, materialize_grads=True)
            return [*(result.detach() for result in results), *gradients]

        exact = eager(lambda tensor: tensor.to(torch.float64))
        runs = eager_runs(eager)
        results = [result.cpu() for result in found]
        names = [f"{self.name} result {index}" for index in range(len(found))]
        if self.differentiable > 0:
            everything = (1 << self.differentiable) - 1
            gradients = self.backward(cotangents, there, found, options, everything, device)
            for index, (gradient, tensor) in enumerate(zip(gradients, there, strict=False)):
                alone = self.backward(cotangents, there, found, options, 1 << index, device)
                assert [other.numel() for place, other in enumerate(alone) if place != index] == [0] * (
                    self.differentiable - 1
                )
                if tensor is None:
                    assert gradient.numel() == alone[index].numel() == 0
                    continue
                assert gradient.dtype == tensor.dtype
                assert torch.allclose(alone[index], gradient, rtol=0.0, atol=0.0, equal_nan=True)
                results.append(gradient.cpu())
                names.append(f"{self.name} gradient {index}")
        for place, (name, result, truth, theirs) in enumerate(zip(names, results, exact, runs, strict=True)):
            if not truth.is_floating_point():
                assert torch.equal(result, truth), name
                continue
            theirs = [run.to(result.dtype) for run in theirs]
            assert_as_accurate(result, theirs, truth.double(), name, gradient=place >= len(found))

    def backward(
        self,
        cotangents: Sequence[Tensor | None],
        there: Sequence[Tensor | None],
        found: Sequence[Tensor],
        options: Sequence[Any],
        needs: int,
        device: str,
    ) -> tuple[Tensor, ...]:
        incoming = [None if cotangent is None else cotangent.to(device) for cotangent in cotangents]
        saved = [found[index] for index in self.saved]
        return as_tuple(getattr(self.family, f"{self.name}_backward")(*incoming, *there, *saved, *options, needs))


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * scale


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many programs, and many tiles a program, from few elements."""
    monkeypatch.setattr(kernels, "_TILE", 16)
    monkeypatch.setattr(kernels, "_PROGRAMS", 2)


TILES = pytest.mark.parametrize("tiles", ["", "small tiles"])


@pytest.fixture
def maybe_small(tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if tiles:
        small_tiles(monkeypatch)


# ---- noise ----------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("count", [0, 1, 7, 3000])
def test_bits(count: int) -> None:
    out = torch.full((count,), -1)
    kernels.philox_(out, RNG, 0)
    assert torch.equal(out, reference.philox_bits((count,), RNG))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise", NOISES)
def test_noise(noise: str, dtype: torch.dtype) -> None:
    out = torch.full((3, 1001), torch.nan, dtype=dtype).t()
    kernels.philox_(out, RNG, NOISES[noise])
    exact = getattr(reference, f"philox_{noise}")((1001, 3), RNG, torch.float64 if noise != "uniform" else dtype)
    if noise == "uniform":
        assert torch.equal(out, exact)
        return
    # Four units in the last place, of 1 where the number is smaller: the difference of two logarithms near 0.
    error = (out.double() - exact).abs() / exact.abs().clamp(min=1.0)
    assert float(error.max()) <= 4 * torch.finfo(dtype).eps


@interpreted
def test_launches_of_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_LAUNCH", 2)
    out = torch.empty(5000)
    kernels.philox_(out, RNG, 2)
    monkeypatch.undo()
    whole = torch.empty(5000)
    kernels.philox_(whole, RNG, 2)
    assert torch.equal(out, whole)


# ---- Gaussians ------------------------------------------------------------------------------------------------------

gaussian = Check("gaussian", 5)


def gaussian_options(
    batch_dims: int = 1,
    log_std: bool = False,
    free_bits: float = 0.0,
    clamp: tuple[float, float] = (-INF, INF),
    sample: bool = True,
    divergence: bool = True,
) -> tuple[Any, ...]:
    return batch_dims, log_std, free_bits, *clamp, sample, divergence


SHAPES = [(3, 8), (3, 5, 7), (1,), (5,), (2, 70), (1, 70)]


@interpreted
@TILES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gaussian(shape: tuple[int, ...], maybe_small: None) -> None:
    gaussian((*(normal(*shape) for _ in range(4)), None, RNG), gaussian_options())


@interpreted
@pytest.mark.parametrize("prior", ["standard", "mean", "scale"])
def test_gaussian_priors(prior: str) -> None:
    prior_mean, prior_scale = (normal(3, 7) if prior == name else None for name in ("mean", "scale"))
    gaussian((normal(3, 7), normal(3, 7), prior_mean, prior_scale, None, RNG), gaussian_options())


@interpreted
@pytest.mark.parametrize("batch_dims", [0, 2, 3])
def test_gaussian_batch_dims(batch_dims: int) -> None:
    shape = (3, 5, 7)
    tensors = (normal(*shape), normal(*shape), None, normal(*shape), None, RNG)
    gaussian(tensors, gaussian_options(batch_dims, log_std=True))


@interpreted
@pytest.mark.parametrize("log_std", [False, True], ids=["", "log_std"])
def test_gaussian_options(log_std: bool) -> None:
    tensors = [normal(4, 37), normal(4, 37), normal(4, 37), normal(4, 37), normal(4, 37), None]
    gaussian(tensors, gaussian_options(log_std=log_std, free_bits=0.7))
    gaussian(tensors, gaussian_options(log_std=log_std, clamp=(-0.5, 0.4)))
    gaussian(tensors, gaussian_options(log_std=log_std, clamp=(-INF, 0.1)))
    gaussian(tensors, gaussian_options(log_std=log_std), without=[0])
    gaussian(tensors, gaussian_options(log_std=log_std), without=[1])


@interpreted
@pytest.mark.parametrize("part", ["sample", "divergence"])
def test_gaussian_part(part: str) -> None:
    options = gaussian_options(sample=part == "sample", divergence=part == "divergence")
    flowing = [1] if part == "sample" else [0]
    for shape in ((3, 7), (5, 2, 3)):
        tensors = [normal(*shape) for _ in range(4)]
        gaussian((*tensors, None, RNG if part == "sample" else None), options, without=flowing)
        if part == "sample":
            transposed = tensors[0].transpose(0, 1).contiguous().transpose(0, 1)
            gaussian((transposed, *tensors[1:], normal(*shape), None), options, without=[1])


@interpreted
@HALVES
def test_gaussian_half(dtype: torch.dtype) -> None:
    tensors = [normal(3, 37) for _ in range(4)]
    gaussian((*tensors, None, RNG), gaussian_options(free_bits=0.1), dtype)
    gaussian((*tensors, normal(3, 37), None), gaussian_options(log_std=True), dtype)


@interpreted
def test_gaussian_reads_expanded_tensors_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (4, 3, 5)
    views = {
        "batch": normal(3, 5).expand(shape),
        "columns": normal(4, 1, 1).expand(shape),
        "all": normal(1).expand(shape),
        "none": normal(*shape),
        "rows far apart": normal(4, 3, 9).flatten(1)[:, :15].view(shape),
    }
    for name, view in views.items():
        assert kernels._Plane(view, 1).data is view, name
    assert kernels._Plane(normal(5).expand(shape), 1).data.is_contiguous()  # three strides are too many
    for options in (gaussian_options(), gaussian_options(divergence=False)):
        scales = views["batch"], views["columns"], views["all"]
        gaussian((views["none"], *scales, None, RNG), options, without=[] if options[-1] else [1])
        gaussian(
            (views["rows far apart"], *scales[::-1], views["none"], None), options, without=[] if options[-1] else [1]
        )
    transposed = normal(5, 3, 4).permute(2, 1, 0)
    gaussian((transposed, normal(5).expand(shape), None, None, None, RNG), gaussian_options())


@interpreted
@pytest.mark.parametrize("shape", [(3, 8), (3, 7), (5, 1), (2, 1030)], ids=str)
def test_gaussian_noise_is_that_of_the_address(shape: tuple[int, ...]) -> None:
    zero, noise = torch.zeros(shape), torch.empty(shape)
    kernels.philox_(noise, RNG, 2)
    options = gaussian_options()
    z, _ = kernels.gaussian(zero, zero, None, None, None, RNG, *options)
    assert torch.equal(z, noise)
    back = kernels.gaussian_backward(zero + 2.0, None, zero, zero, None, None, None, RNG, *options, 2)
    assert torch.equal(back[1], noise)


@interpreted
def test_kl_near_0_keeps_its_digits() -> None:
    log_variance = torch.logspace(-18, 0, 60, dtype=torch.float64).repeat(2) * torch.tensor(
        [1.0, -1.0]
    ).repeat_interleave(60)
    log_variance = log_variance.float().view(-1, 1)
    zero = torch.zeros_like(log_variance)
    _, kl = kernels.gaussian(zero, log_variance, None, None, None, None, *gaussian_options(sample=False))
    d = log_variance.double().flatten()
    exact = torch.where(d.abs() < 1e-3, d.square() * (0.5 + d / 6 + d.square() / 24), torch.expm1(d) - d) / 2
    assert float(((kl.double() - exact) / exact).abs().max()) <= 4 * torch.finfo(torch.float32).eps
    ones = torch.ones_like(kl)
    back = kernels.gaussian_backward(
        None, ones, zero, log_variance, None, None, None, None, *gaussian_options(sample=False), 2
    )
    slope = 0.5 * torch.expm1(d)
    assert float(((back[1].double().flatten() - slope) / slope).abs().max()) <= 4 * torch.finfo(torch.float32).eps


@interpreted
def test_gaussian_overflows_no_earlier_than_it_must() -> None:
    mean = torch.tensor([[1e-25], [1e-30], [0.0]], dtype=torch.float64)
    scale = torch.tensor([[-185.0], [-200.0], [89.0]], dtype=torch.float64)
    prior = torch.tensor([[-185.0], [-200.0], [0.0]], dtype=torch.float64)
    eps = torch.tensor([[1.0], [1.0], [1e-20]], dtype=torch.float64)
    given = [tensor.float() for tensor in (mean, scale)] + [None, prior.float(), eps.float(), None]
    exact = [mean, scale, None, prior, eps, None]
    z, kl = kernels.gaussian(*given, *gaussian_options())
    z_exact, kl_exact = reference.gaussian(
        *[None if t is None else t.float().double() for t in exact], *gaussian_options()
    )
    assert bool(z.isfinite().all())
    assert bool(kl.isfinite().all())
    # An error of the exponent's last place is multiplied by the exponent, of 200.
    assert torch.allclose(z.double(), z_exact, rtol=1e-4, atol=0.0)
    assert torch.allclose(kl.double(), kl_exact, rtol=1e-4, atol=0.0)
    far = torch.tensor([[180.0]])
    z, _ = kernels.gaussian(far * 0, far, None, None, far * 0 + 1e-10, None, *gaussian_options())
    assert math.isclose(float(z), math.exp(90.0) * 1e-10, rel_tol=1e-4)


@interpreted
def test_gaussian_nan_stays_in_its_element() -> None:
    mean, scale = normal(3, 5).float(), normal(3, 5).float()
    mean[1, 2] = scale[1, 4] = NAN
    for options in (gaussian_options(), gaussian_options(free_bits=0.5, clamp=(-1.0, 1.0))):
        z, kl = kernels.gaussian(mean, scale, None, None, None, RNG, *options)
        assert z.isnan().nonzero().tolist() == [[1, 2], [1, 4]]
        assert kl.isnan().tolist() == [False, True, False]


@interpreted
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    empty = torch.empty(shape)
    z, kl = kernels.gaussian(empty, empty, None, None, None, RNG, *gaussian_options())
    assert z.shape == shape
    assert torch.equal(kl, torch.zeros(shape[:1]))
    back = kernels.gaussian_backward(z, kl, empty, empty, None, None, None, RNG, *gaussian_options(), 31)
    assert back[0].shape == back[1].shape == shape
    for op in (kernels.gumbel_softmax, kernels.relaxed_bernoulli):
        assert op(empty, None, RNG, 1.0, True).shape == shape
    for op in (kernels.gumbel_softmax_backward, kernels.relaxed_bernoulli_backward):
        assert op(empty, empty, None, RNG, empty, 1.0, True, 3)[0].shape == shape
    assert kernels.categorical_sample(torch.empty(0, 4), None, RNG, 2).shape == (0, 2)
    assert kernels.categorical_sample(torch.empty(3, 4), None, RNG, 0).shape == (3, 0)
    x, codebook = torch.empty(0, 3), torch.randn(4, 3)
    quantized, indices, loss = kernels.vector_quantize(x, codebook, 0.25, 1.0)
    assert (quantized.shape, indices.shape, loss.shape) == ((0, 3), (0,), (0,))
    grad_x, grad_codebook = kernels.vector_quantize_backward(x, loss, x, codebook, indices, 0.25, 1.0, 3)
    assert grad_x.shape == x.shape
    assert torch.equal(grad_codebook, torch.zeros(4, 3))
    counts, sums = kernels.vector_quantize_statistics(x, indices, 4)
    assert torch.equal(counts, torch.zeros(4))
    assert torch.equal(sums, torch.zeros(4, 3))


# ---- relaxed categories ---------------------------------------------------------------------------------------------

gumbel_softmax = Check("gumbel_softmax", 2, saved=(0,))
relaxed_bernoulli = Check("relaxed_bernoulli", 2, saved=(0,))
HARD = pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])


@pytest.fixture
def long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than 32 are longer than one program holds."""
    monkeypatch.setattr(kernels, "_ROW", 32)


@interpreted
@HARD
@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 5), (1,), (7,), (600, 3), (2, 1), (3, 101)], ids=str)
def test_gumbel_softmax(shape: tuple[int, ...], hard: bool) -> None:
    logits = normal(*shape)
    gumbel_softmax((logits, None, RNG), (0.7, hard))
    gumbel_softmax((logits, normal(*shape), None), (1.5, hard))


@interpreted
@HARD
@pytest.mark.parametrize("shape", [(2, 45), (2, 40), (1, 37)], ids=str)
def test_gumbel_softmax_of_long_rows(shape: tuple[int, ...], hard: bool, long_rows: None) -> None:
    logits = normal(*shape, scale=3.0)
    gumbel_softmax((logits, None, RNG), (0.7, hard))
    gumbel_softmax((logits, normal(*shape), None), (1.5, hard))
    gumbel_softmax((normal(shape[1]).expand(shape), None, RNG), (1.0, hard))


@interpreted
@HARD
@HALVES
def test_gumbel_softmax_half(dtype: torch.dtype, hard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gumbel_softmax((normal(3, 37), None, RNG), (0.7, hard), dtype)
    relaxed_bernoulli((normal(3, 37), None, RNG), (0.7, hard), dtype)
    monkeypatch.setattr(kernels, "_ROW", 32)
    gumbel_softmax((normal(2, 37), None, RNG), (0.7, hard), dtype)


@interpreted
@pytest.mark.parametrize("rows", ["short", "long"])
def test_gumbel_softmax_is_exactly_one_hot_at_the_first(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if rows == "long":
        monkeypatch.setattr(kernels, "_ROW", 16)
    logits = torch.zeros(6, 21)
    logits[0, [5, 11, 20]] = 1.0
    logits[1, [19, 20]] = 2.0
    logits[2] = -INF
    logits[2, 7] = -3.0
    logits[3], logits[3, 0] = 3e38, -3e38
    y = kernels.gumbel_softmax(logits, torch.zeros_like(logits), None, 1e-3, True)
    assert y.argmax(1).tolist() == [5, 19, 7, 1, 0, 0]
    assert torch.equal(y.sum(1), torch.ones(6))
    assert bool(((y == 0) | (y == 1)).all())
    drawn = kernels.gumbel_softmax(logits, None, RNG, 0.1, True)
    assert torch.equal(drawn, reference.gumbel_softmax(logits, None, RNG, 0.1, True)[0])


@interpreted
@HARD
@pytest.mark.parametrize("rows", ["short", "long"])
def test_gumbel_softmax_of_what_is_no_distribution(hard: bool, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if rows == "long":
        monkeypatch.setattr(kernels, "_ROW", 16)
    logits = torch.zeros(6, 21)
    logits[1, 13], logits[2, 3], logits[3], logits[4, 20] = NAN, INF, -INF, -INF
    bad = torch.tensor([False, True, True, True, False, False])
    y = kernels.gumbel_softmax(logits, None, RNG, 1.0, hard)
    assert torch.equal(y.isnan(), bad[:, None].expand_as(y))
    assert float(y[4, 20]) == 0.0
    gradient, _ = kernels.gumbel_softmax_backward(torch.randn(6, 21), logits, None, RNG, y, 1.0, hard, 1)
    assert torch.equal(gradient.isnan(), bad[:, None].expand_as(y))
    assert float(gradient[4, 20]) == 0.0


@interpreted
def test_temperatures_at_the_ends_of_their_range(long_rows: None) -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, -3.0] * 9, [1e30, -1e30, 0.0, 1.0] * 9])
    noise = torch.zeros_like(logits)
    for length in (4, 36):
        for tau in (1e-320, 1e-40, 1e-30):
            soft = kernels.gumbel_softmax(logits[:, :length], noise[:, :length], None, tau, False)
            best = (logits[:, :length] == logits[:, :length].amax(1, keepdim=True)).float()
            assert torch.allclose(soft, best / best.sum(1, keepdim=True))
        soft = kernels.gumbel_softmax(logits[:1, :length], noise[:1, :length], None, 1e40, False)
        assert torch.allclose(soft, torch.full((1, length), 1.0 / length))
    p = torch.tensor([-1e-3, 0.0, 1e-3])
    assert kernels.relaxed_bernoulli(p, p * 0, None, 1e-320, False).tolist() == [0.0, 0.5, 1.0]


@interpreted
@TILES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relaxed_bernoulli(shape: tuple[int, ...], maybe_small: None) -> None:
    relaxed_bernoulli((normal(*shape, scale=3.0), None, RNG), (0.7, False))
    relaxed_bernoulli((normal(*shape), normal(*shape), None), (1.5, True))


@interpreted
def test_relaxed_bernoulli_of_expanded_logits() -> None:
    relaxed_bernoulli((normal(7).expand(3, 7), None, RNG), (0.7, False))
    relaxed_bernoulli((normal(7, 3).t(), normal(3, 1).expand(3, 7), None), (0.7, False))


@interpreted
def test_relaxed_bernoulli_in_its_tails() -> None:
    logits = torch.tensor([-60.0, -100.0, 20.0, 60.0, 1e30, -1e30, INF, -INF, NAN])
    y = kernels.relaxed_bernoulli(logits, torch.zeros(9), None, 1.0, False)
    exact = torch.sigmoid(logits.double())
    assert torch.allclose(y.double(), exact, rtol=1e-6, atol=1e-44, equal_nan=True)
    gradient, _ = kernels.relaxed_bernoulli_backward(torch.ones(9), logits, torch.zeros(9), None, y, 1.0, False, 1)
    exact = torch.exp(-logits.double().abs()) / (1 + torch.exp(-logits.double().abs())) ** 2
    assert torch.allclose(gradient.double(), exact, rtol=1e-6, atol=1e-44, equal_nan=True)
    hard = kernels.relaxed_bernoulli(logits, torch.zeros(9), None, 1.0, True)
    assert hard[:8].tolist() == [0, 0, 1, 1, 1, 0, 1, 0]
    assert bool(hard[8].isnan())


# ---- categories -----------------------------------------------------------------------------------------------------


def assert_inverted(found: Tensor, logits: Tensor, u: Tensor) -> None:
    """Each class is the first whose cumulated probability exceeds u, or u is within rounding of an edge of it."""
    probabilities = torch.softmax(logits.double(), -1)
    above = probabilities.cumsum(-1).gather(-1, found)
    of_it = probabilities.gather(-1, found)
    slack = 1e-6
    assert bool((of_it > 0).all())
    assert bool((above > u - slack).all())
    assert bool((above - of_it <= u + slack).all())


@interpreted
@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 5), (9,), (4, 1), (3, 2500)], ids=str)
@pytest.mark.parametrize("samples", [1, 5, 20])
def test_categorical_sample(shape: tuple[int, ...], samples: int) -> None:
    logits = normal(*shape, scale=2.0).float()
    found = kernels.categorical_sample(logits, None, RNG, samples)
    exact = reference.categorical_sample(logits, None, RNG, samples)[0]
    assert found.shape == exact.shape
    assert found.dtype == torch.int64
    u = reference.philox_uniform((*shape[:-1], samples), RNG, torch.float64)
    assert_inverted(found, logits, u)
    assert int((found != exact).sum()) <= found.numel() // 50
    given = torch.rand(*shape[:-1], samples)
    found = kernels.categorical_sample(logits, given, None, samples)
    assert_inverted(found, logits, given)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_categorical_sample_of_views(dtype: torch.dtype) -> None:
    for logits in (normal(33).to(dtype).expand(4, 33), normal(33, 4).to(dtype).t(), normal(4, 66).to(dtype)[:, ::2]):
        found = kernels.categorical_sample(logits, None, RNG, 3)
        assert_inverted(found, logits, reference.philox_uniform((4, 3), RNG, torch.float64))


@interpreted
def test_an_edge_belongs_to_the_class_above() -> None:
    u = torch.tensor([[0.0, 0.25, 0.5, 0.75, 0.625]])
    assert kernels.categorical_sample(torch.zeros(1, 4), u, None, 5).tolist() == [[0, 1, 2, 3, 2]]


@interpreted
def test_categorical_sample_never_draws_the_impossible() -> None:
    u = torch.tensor([0.0, 2.0**-24, 0.5, 1.0 - 2.0**-24]).expand(5, 4)
    logits = torch.full((5, 3000), -INF)
    logits[0, [7, 2990]] = 0.0  # 0 to 6 and what lies between, and after, is impossible
    logits[1, 1500] = -300.0
    logits[2, ::2] = torch.randn(1500)
    logits[3, 1::3] = torch.randn(1000) * 10
    logits[4, 2999] = 5.0
    found = kernels.categorical_sample(logits, u, None, 4)
    assert found[0].tolist() == [7, 7, 2990, 2990]
    assert found[1].tolist() == [1500] * 4
    assert found[4].tolist() == [2999] * 4
    assert bool(logits.gather(1, found).isfinite().all())


@interpreted
def test_categorical_sample_of_what_is_no_distribution() -> None:
    logits = torch.zeros(5, 1100)
    logits[0, 1050], logits[1, 3], logits[2] = NAN, INF, -INF
    found = kernels.categorical_sample(logits, None, RNG, 3)
    assert found[:3].eq(-1).all()
    assert found[3:].ge(0).all()
    assert kernels.categorical_sample(torch.zeros(1, 3), torch.tensor([[1.0, NAN, 2.0]]), None, 3).eq(-1).all()


# ---- vector quantisation --------------------------------------------------------------------------------------------

vector_quantize = Check("vector_quantize", 2, constants=(1,), saved=(1,))
# Integers: no distance is rounded, so the nearest code is the same in every arithmetic.
SIZES = [((5, 3), 4), ((2, 3, 19), 70), ((130, 16), 33), ((4,), 9), ((3, 1), 1), ((7, 150), 20)]


def integers(*shape: int, span: int = 9) -> Tensor:
    return torch.randint(-span, span + 1, shape).to(torch.float64)


@interpreted
@pytest.mark.parametrize(("shape", "codes"), SIZES, ids=str)
def test_vector_quantize(shape: tuple[int, ...], codes: int) -> None:
    x, codebook = integers(*shape) + 0.25, integers(codes, shape[-1])
    vector_quantize((x, codebook), (0.25, 1.0))
    vector_quantize((x, codebook), (0.5, 0.0), without=[0])
    vector_quantize((x, codebook), (0.5, 2.0), without=[2])


@interpreted
@HALVES
def test_vector_quantize_half(dtype: torch.dtype) -> None:
    vector_quantize((integers(70, 37) + 0.5, integers(90, 37)), (0.25, 1.0), dtype)


@interpreted
def test_vector_quantize_of_views(monkeypatch: pytest.MonkeyPatch) -> None:
    vector_quantize((integers(2, 5, 3).transpose(1, 2), integers(6, 5)), (0.25, 1.0))
    vector_quantize((integers(5).expand(7, 5) + 0.25, integers(12, 5)[::2]), (0.25, 1.0))


@interpreted
def test_vector_quantize_random_numbers() -> None:
    x, codebook = normal(70, 19).float(), normal(130, 19).float()
    quantized, indices, loss = kernels.vector_quantize(x, codebook, 0.25, 1.0)
    distances = torch.cdist(x.double(), codebook.double())
    assert torch.allclose(distances.gather(1, indices[:, None])[:, 0], distances.amin(1), rtol=1e-6)
    assert torch.equal(quantized, codebook[indices])
    assert torch.allclose(loss.double(), 1.25 * distances.amin(1).square(), rtol=1e-5)


@interpreted
def test_the_first_of_equally_near_codes() -> None:
    # Equals beside each other and one or more blocks of codes apart.
    codebook = integers(50, 4, span=2).repeat(4, 1)
    codebook = torch.cat([codebook[:64], codebook[:64], codebook])
    x = integers(50, 4, span=3)
    _, indices, _ = kernels.vector_quantize(x.float(), codebook.float(), 0.25, 1.0)
    distances = (x[:, None] - codebook).square().sum(-1)
    first = (distances == distances.amin(1, keepdim=True)).int().argmax(1)
    assert int((distances == distances.amin(1, keepdim=True)).sum(1).max()) > 1
    assert torch.equal(indices, first)


@interpreted
def test_vector_quantize_of_what_is_near_to_nothing() -> None:
    codebook = torch.tensor([[1.0, 2.0], [NAN, 0.0], [INF, 0.0], [-4.0, -4.0]])
    x = torch.tensor([[NAN, 0.0], [INF, 0.0], [-INF, 1.0], [0.0, 0.0], [-3.0, -5.0]])
    quantized, indices, loss = kernels.vector_quantize(x, codebook, 0.25, 1.0)
    assert indices.tolist() == [0, 0, 0, 0, 3]
    lost = torch.tensor([True, True, True, False, False])
    assert torch.equal(quantized.isnan(), lost[:, None].expand(5, 2))
    assert torch.equal(quantized[3:], codebook[[0, 3]])
    assert not loss[:3].isfinite().any()
    back, _ = kernels.vector_quantize_backward(torch.ones(5, 2), None, x, codebook, indices, 0.25, 1.0, 1)
    assert torch.equal(back, torch.ones(5, 2))  # straight through, whatever the value
    nothing = torch.full((3, 2), NAN)
    quantized, indices, _ = kernels.vector_quantize(x, nothing, 0.25, 1.0)
    assert indices.tolist() == [0] * 5
    assert bool(quantized.isnan().all())


@interpreted
@pytest.mark.parametrize("codes", [1, 7, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vector_quantize_statistics(codes: int, dtype: torch.dtype) -> None:
    rows = 40 if codes == 600 else 700
    x, indices = integers(rows, 19).to(dtype), torch.randint(0, codes, (rows,))
    indices[: rows // 2] = codes // 2  # one code has most of them
    counts, sums = kernels.vector_quantize_statistics(x, indices, codes)
    exact_counts, exact_sums = reference.vector_quantize_statistics(x.double(), indices, codes)
    assert counts.dtype == sums.dtype == torch.float32
    assert torch.equal(counts.double(), exact_counts)
    assert torch.equal(sums.double(), exact_sums)  # of integers


@interpreted
def test_indices_of_no_code_are_passed_over() -> None:
    x, indices = torch.ones(5, 3), torch.tensor([-1, 0, 4, 2**40, -(2**40)])
    counts, sums = kernels.vector_quantize_statistics(x, indices, 4)
    assert counts.tolist() == [1, 0, 0, 0]
    assert sums.sum(1).tolist() == [3, 0, 0, 0]
    grad_x, grad_codebook = kernels.vector_quantize_backward(
        x, torch.ones(5), x, torch.zeros(4, 3), indices, 0.25, 1.0, 3
    )
    assert bool(grad_x.isfinite().all())
    assert grad_codebook[:, 0].tolist() == [-2, 0, 0, 0]


@compiled
def test_interpreted_in_a_process_of_its_own() -> None:
    """Every test above."""
    run_interpreted(__file__)


def run_interpreted(path: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", path]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


# ---- compiling for GPUs that are not there --------------------------------------------------------------------------

TARGETS: dict[str, tuple[Any, Any, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "mi300": ("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Every dtype on two targets and every kernel on all four, which is what a test run has time for; GENFUSE_ALL_TARGETS=1
# compiles everything for everything.
OWN_TARGETS = {"fp32": ["sm_80", "mi300"], "bf16": ["sm_90", "sm_100"], "fp16": ["sm_90", "mi300"]}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.uint8: "u8",
}
# gfx942 has 64 KiB to a block; what it can have, all others can.
SHARED = 64 * 1024


@compiled
@pytest.mark.parametrize("target", TARGETS)
def test_noise_compiles_for_every_target(target: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for noise in range(5):
        for kind in ("i64",) if noise == 0 else ("fp32", "bf16", "fp16"):
            types = {"out": f"*{kind}", "rng": "*i64", "count": "i64", "first": "i64"}
            types |= dict.fromkeys(("NOISE", "BITS", "BLOCKS"), "constexpr")
            constants = {(4,): noise, (5,): 24, (6,): kernels._BLOCKS}
            source = ASTSource(kernels._philox_kernel, types, constants)
            binary = triton.compile(source, target=GPUTarget(*TARGETS[target]))
            assert binary.metadata.shared <= SHARED


def signature(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What the launcher would hand to the compiler: types, constants, alignment, options."""
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
    options = {name: value for name, value in kwargs.items() if name not in names}
    types: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (free and type(value) is int and value == 1):
            types[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, Tensor):
            types[parameter.name] = "*" + TYPES[value.dtype]
            aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            types[parameter.name] = "i32" if isinstance(value, int) else "fp32"
            if free and isinstance(value, int) and value % 16 == 0:
                aligned[(index,)] = [["tt.divisibility", 16]]
    return kernel.__module__, kernel.__name__, types, constants, aligned, options


def recorded(calls: Callable[[], None]) -> list[tuple[Any, ...]]:
    """The launches that calls of host functions make, each kind once."""
    from triton.runtime.jit import JITFunction

    seen: dict[str, tuple[Any, ...]] = {}

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = signature(self, args, kwargs)
        seen.setdefault(str((launch[1:4], launch[5])), launch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        calls()
    return list(seen.values())


def compile_for(work: tuple[str, tuple[Any, ...]]) -> tuple[str, str, int]:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target, (module, name, types, constants, aligned, options) = work
    source = ASTSource(getattr(importlib.import_module(module), name), types, constants, aligned)
    binary = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    return name, target, int(binary.metadata.shared)


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    workers = min(4, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


def check_compilation(module: Any, launches: list[tuple[Any, ...]], dtype: str, pool: ProcessPoolExecutor) -> None:
    names = {name for _, name, *_ in launches}
    entered = {
        name
        for name, value in vars(module).items()
        if getattr(value, "do_not_specialize", None) and value.__module__ == module.__name__
    }
    assert names == entered, "a kernel that no host function launches, or the other way round"
    targets = list(TARGETS) if os.environ.get("GENFUSE_ALL_TARGETS") else OWN_TARGETS[dtype]
    work = [(target, launch) for launch in launches for target in targets]
    for name, target, shared in pool.map(compile_for, work):
        assert shared <= SHARED, f"{name} on {target}: {shared} bytes of shared memory"


def calls(dtype: torch.dtype) -> None:
    """Every operator with every tensor that it may have, and without those it need not have."""

    def of(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    wide, rows = of(8, 4096), torch.zeros(8)
    for tensors in ((wide, wide, wide, wide, wide, None), (of(9, 63), of(9, 1).expand(9, 63), None, None, None, RNG)):
        options = gaussian_options(clamp=(-1.0, 1.0), log_std=tensors[-1] is None)
        z, _ = kernels.gaussian(*tensors, *options)
        kernels.gaussian_backward(z, rows, *tensors, *options, 31)
    for columns in (4096, 20001) if dtype == torch.float32 else (4096,):
        for noise, rng in ((of(8, columns), None), (None, RNG)):
            for hard in (False, True):
                tensors = (of(8, columns), noise, rng)
                y = kernels.gumbel_softmax(*tensors, 1.0, hard)
                kernels.gumbel_softmax_backward(y, *tensors, y, 1.0, hard, 3)
    for tensors in ((wide, wide, None), (of(9, 63).expand(9, 63), None, RNG)):
        y = kernels.relaxed_bernoulli(*tensors, 1.0, False)
        kernels.relaxed_bernoulli_backward(y, *tensors, y, 1.0, False, 3)
    kernels.categorical_sample(wide, None, RNG, 16)
    kernels.categorical_sample(of(5, 7), torch.zeros(5, 1), None, 1)
    x, codebook = of(512, 64), of(512, 64)
    quantized, indices, loss = kernels.vector_quantize(x, codebook, 0.25, 1.0)
    kernels.vector_quantize_backward(quantized, loss, x, codebook, indices.zero_(), 0.25, 1.0, 3)
    kernels.vector_quantize_statistics(x, indices, 512)
    kernels.vector_quantize(of(5, 3), of(4, 3), 0.25, 1.0)


@compiled
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_compiles_for_every_target(dtype: str, pool: ProcessPoolExecutor) -> None:
    launches = recorded(lambda: calls(DTYPES[dtype]))
    check_compilation(kernels, launches, dtype, pool)
