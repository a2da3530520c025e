"""Negative log-likelihoods: what each promises, in the tails too. What is asked of all operators is in
test_operators.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import genfuse
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from genfuse import ops
from genfuse.reference.likelihood import log_normal_interval
from operator_cases import Problem, check
from scipy import special, stats
from torch import Tensor
from torch import distributions as torchs

EPS = torch.finfo(torch.float32).eps
INF, NAN = float("inf"), float("nan")
close = torch.testing.assert_close
both = pytest.mark.parametrize("backend", ["native", "reference"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These problems are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- against torch and SciPy -----------------------------------------------------------------------------------------


@both
def test_bernoulli_is_torchs(backend: str) -> None:
    logits, target = torch.randn(4, 3, 5, dtype=torch.float64), torch.rand(4, 3, 5, dtype=torch.float64)
    exact = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    with genfuse.use_backend(backend):
        close(ops.bernoulli_nll(logits, target), exact.sum((1, 2)))
        close(ops.bernoulli_nll(logits, target, batch_dims=2), exact.sum(2))
        close(ops.bernoulli_nll(logits, target, unit="bits_per_dim"), exact.mean((1, 2)) / math.log(2))
        close(ops.bernoulli_nll(logits, target[0]), ops.bernoulli_nll(logits, target[0].expand(4, 3, 5)))
        probability = torch.distributions.Bernoulli(logits=logits).log_prob(target.round()).sum((1, 2))
        close(ops.bernoulli_nll(logits, target.round()), -probability)


@both
def test_gaussian_is_torchs(backend: str) -> None:
    x, mean, logvar = torch.randn(3, 4, 6, dtype=torch.float64)
    exact = -torchs.Normal(mean, torch.exp(0.5 * logvar)).log_prob(x)
    with genfuse.use_backend(backend):
        close(ops.gaussian_nll(x, mean, logvar), exact.sum(1))
        close(ops.gaussian_nll(x, mean, log_std=0.5 * logvar, unit="bits_per_dim"), exact.mean(1) / math.log(2))
        close(
            ops.gaussian_nll(x, mean[0], logvar[0, 0], batch_dims=0),
            -torchs.Normal(mean[0], torch.exp(0.5 * logvar[0, 0])).log_prob(x).sum(),
        )


def exact_discretized(x: Any, mean: Any, log_std: Any, levels: int) -> Any:
    """By SciPy, in float64: from the side on which the tail is small."""
    x, mean, std = (np.asarray(value, np.float64) for value in (x, mean, np.exp(np.asarray(log_std, np.float64))))
    half = 1.0 / (levels - 1)
    low, high = (x - half - mean) / std, (x + half - mean) / std
    low, high = np.where(x < -1 + half, -np.inf, low), np.where(x > 1 - half, np.inf, high)
    mirrored = low + high > 0
    low, high = np.where(mirrored, -high, low), np.where(mirrored, -low, high)
    below, above = special.log_ndtr(low), special.log_ndtr(high)
    return -(above + np.log1p(-np.exp(below - above)))


@both
@pytest.mark.parametrize("levels", [2, 3, 17, 256])
def test_discretized_is_scipys(backend: str, levels: int) -> None:
    """Where its difference of two logarithms has digits: bins that are not narrow."""
    for log_std in (-9.0, -6.0, -4.0, -3.0, -1.0, 0.0, 2.0):
        grid = torch.linspace(-1, 1, levels, dtype=torch.float64)
        means = torch.tensor([-30.0, -1.3, -1.0, -0.2, 0.0, 0.003, 0.5, 1.0, 1.1, 7.0], dtype=torch.float64)
        x, mean = (t.flatten() for t in torch.meshgrid(grid, means, indexing="ij"))
        exact = exact_discretized(x, mean, log_std, levels)
        scale = torch.tensor(log_std, dtype=torch.float64)
        with genfuse.use_backend(backend):
            found = ops.discretized_gaussian_nll(x, mean, log_std=scale, levels=levels, unit="nats")
            wide = found.numpy()
            close(
                ops.discretized_gaussian_nll(x.view(-1, 1), mean.view(-1, 1), 2 * scale, levels=levels) * math.log(2),
                found,
            )
        narrow = 1.0 / (levels - 1) / math.exp(log_std)
        error = np.abs(wide - exact) / np.maximum(np.abs(exact), 1.0)
        assert error[np.isfinite(exact)].max() < 1e-12 / min(narrow, 1.0), log_std
        assert np.isfinite(wide).all()


# ---- the ends of the range -------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_certain_bits_keep_their_digits(backend: str, dtype: torch.dtype) -> None:
    """A pixel that is right by 30 nats costs e^-30, and not 0 or the rounding error of 30."""
    logits = torch.tensor([-100.0, -80.0, -30.0, -10.0, -1.0, 0.0, 1.0, 10.0, 30.0, 80.0, 100.0], dtype=dtype)
    for target in (0.0, 1.0, 0.3):
        leaf = logits.clone().requires_grad_()
        with genfuse.use_backend(backend):
            nll = ops.bernoulli_nll(leaf, torch.tensor(target, dtype=dtype))
        (gradient,) = torch.autograd.grad(nll.sum(), leaf)
        wide, t = logits.double(), torch.tensor(target, dtype=dtype).double()
        exact = t * torch.log1p(torch.exp(-wide)) + (1 - t) * torch.log1p(torch.exp(wide))
        slope = (1 - t) * torch.sigmoid(wide) - t * torch.sigmoid(-wide)
        eps = torch.finfo(dtype).eps
        tiny = torch.finfo(dtype).tiny
        assert bool(((nll.double() - exact).abs() <= 8 * eps * exact.clamp(min=eps * wide.abs()) + tiny).all())
        assert bool(((gradient.double() - slope).abs() <= 4 * eps).all())
        if target != 0.3:
            assert bool(((nll.double() - exact).abs() <= 1e-5 * exact + tiny).all())


@both
def test_bernoulli_of_absurd_logits(backend: str) -> None:
    with genfuse.use_backend(backend):
        assert ops.bernoulli_nll(torch.tensor([1e30]), torch.tensor([0.0])).item() == pytest.approx(1e30)
        assert bool(ops.bernoulli_nll(torch.tensor([NAN]), torch.tensor([1.0])).isnan())
        assert bool(ops.bernoulli_nll(torch.tensor([3.0]), torch.tensor([NAN])).isnan())


@both
@pytest.mark.parametrize("logvar", [-170.0, -100.0, -60.0, 0.0, 60.0, 100.0, 170.0])
def test_gaussians_of_any_width(backend: str, logvar: float) -> None:
    """At the mean nothing overflows; away from it only what float32 cannot hold."""
    for difference in (0.0, 1e-20, 1e-3, 3.0):
        values = []
        for dtype in (torch.float32, torch.float64):
            leaves = [torch.tensor([[value]], dtype=dtype, requires_grad=True) for value in (difference, 0.0, logvar)]
            with genfuse.use_backend(backend):
                nll = ops.gaussian_nll(*leaves)
            values.append([nll.double(), *(g.double() for g in torch.autograd.grad(nll.sum(), leaves))])
        for ours, exact in zip(*values, strict=True):
            if abs(float(exact.detach())) < 1e38:
                close(ours, exact, rtol=1e-5, atol=1e-37)
            else:
                assert float(ours.abs()) > 1e38


@both
@pytest.mark.parametrize("log_std", [-100.0, -1000.0])
def test_a_mean_that_is_met_exactly_by_no_width(backend: str, log_std: float) -> None:
    """Whose inverse deviation is infinite: nothing times that is nothing."""
    leaf, scale = torch.full((3, 2), 0.2, requires_grad=True), torch.full((3, 2), log_std, requires_grad=True)
    with genfuse.use_backend(backend):
        nll = ops.gaussian_nll(torch.full((3, 2), 0.2), leaf, log_std=scale)
        bins = ops.discretized_gaussian_nll(torch.full((3, 2), 0.2), leaf, log_std=scale, levels=11)
        beside = ops.discretized_gaussian_nll(torch.full((3, 2), 0.4), leaf, log_std=scale, levels=11)
    close(nll, torch.full((3,), 2 * (log_std + 0.5 * math.log(2 * math.pi))))
    assert bins.tolist() == [0.0, 0.0, 0.0]
    assert beside.tolist() == [INF, INF, INF]
    by_mean, by_scale = torch.autograd.grad(nll.sum(), (leaf, scale))
    assert not bool(by_mean.any())
    close(by_scale, torch.ones(3, 2))
    assert not any(bool(g.any()) for g in torch.autograd.grad(bins.sum(), (leaf, scale)))


@both
@pytest.mark.parametrize("log_std", [-12.0, -9.0, -7.0, -5.0, -3.0, -1.0, 0.0, 2.0, 5.0])
@pytest.mark.parametrize("levels", [2, 3, 256, 1000])
def test_the_levels_probabilities_sum_to_one(backend: str, log_std: float, levels: int) -> None:
    means = torch.tensor([-1e4, -50.0, -2.0, -1.0, -0.6203, -0.1, 0.0, 0.002, 0.3, 0.9993, 1.0, 1.01, 3.0, 1e3])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        x = torch.linspace(-1, 1, levels, dtype=torch.float64).to(dtype)
        mean = means.to(dtype)
        with genfuse.use_backend(backend):
            nll = ops.discretized_gaussian_nll(
                x[:, None], mean, log_std=torch.tensor(log_std, dtype=dtype), levels=levels, batch_dims=2, unit="nats"
            )
        total = torch.exp(-nll.double()).sum(0)
        # Neighbouring bins share an edge, which is rounded for each: by an eps of 1, in deviations, times a density.
        edges = 0.4 * 2 * torch.finfo(dtype).eps * math.exp(-log_std)
        assert float((total - 1).abs().max()) < tolerance + edges
        assert bool(nll.isfinite().all())


@pytest.mark.parametrize("log_std", [-8.0, -4.0, 0.0])
def test_sixty_five_thousand_levels(log_std: float) -> None:
    """Audio: bins of 3e-5, where a difference of two cumulative probabilities has few digits."""
    x = torch.linspace(-1, 1, 65536, dtype=torch.float64)

    def nll(x: Tensor, mean: Tensor) -> Tensor:
        return ops.discretized_gaussian_nll(
            x, mean, log_std=torch.full_like(mean, log_std), levels=65536, unit="nats"
        ).to(torch.float64)

    for mean in torch.tensor([-0.3, 0.0, 0.99999]):
        assert float((torch.exp(-nll(x, mean.double())).sum() - 1).abs()) < 1e-10
        exact, found = nll(x.float().double(), mean.double()), nll(x.float(), mean)
        assert bool(((found - exact).abs() <= 8 * EPS * (1.0 + exact)).all())
        # That float32 cannot say better than to an eps where x is, averages out.
        assert float((torch.exp(-found).sum() - 1).abs()) < 1e-4


@both
@pytest.mark.parametrize("levels", [2, 256, 65536])
def test_gradients_in_the_tails(backend: str, levels: int) -> None:
    """Finite, not 0, and right: where a clamped logarithm has none."""
    x = torch.tensor([-1.0, 1.0, *((2 * torch.tensor([0, levels // 3, levels // 2]) / (levels - 1)) - 1).tolist()])
    for log_std in (-12.0, -7.0, -3.0, 0.0, 5.0):
        for mean in (-100.0, -3.0, -0.9, 0.0, 0.4, 2.0, 50.0):
            gradients = []
            for dtype, which in ((torch.float32, backend), (torch.float64, "reference")):
                leaves = [t.to(dtype).requires_grad_() for t in (torch.full_like(x, mean), torch.full_like(x, log_std))]
                with genfuse.use_backend(which):
                    nll = ops.discretized_gaussian_nll(
                        x.to(dtype), leaves[0], log_std=leaves[1], levels=levels, unit="nats"
                    )
                gradients.append(torch.autograd.grad(nll.sum(), leaves))
                assert bool(nll.isfinite().all())
            for ours, exact in zip(*gradients, strict=True):
                assert bool(ours.isfinite().all())
                distance = (x.double() - mean).abs() + 1.0
                # The arguments are known to an eps of 1, in deviations: what that moves the gradient by.
                slack = 4 * EPS * distance * math.exp(-2 * log_std) * (1.0 + distance)
                assert bool(((ours.double() - exact).abs() <= 1e-4 * exact.abs() + slack.clamp(max=1e30) + 1e-6).all())
        with genfuse.use_backend(backend):
            leaf = torch.full((1,), 30.0, requires_grad=True)
            nll = ops.discretized_gaussian_nll(
                torch.full((1,), -1.0), leaf, log_std=torch.tensor(log_std), levels=levels, unit="nats"
            )
        assert float(torch.autograd.grad(nll.sum(), leaf)[0]) > 1e-3  # pulls the mean down, from far away too


@both
def test_wide_bins_are_certain(backend: str) -> None:
    """A level in the middle of whose bin everything lies: probability 1, cost 0, and no gradient worth the name."""
    leaf = torch.zeros(3, requires_grad=True)
    scale = torch.full((3,), -12.0, requires_grad=True)
    with genfuse.use_backend(backend):
        nll = ops.discretized_gaussian_nll(torch.zeros(3), leaf, log_std=scale, levels=3)
    assert nll.tolist() == [0.0, 0.0, 0.0]
    assert all(not bool(g.any()) for g in torch.autograd.grad(nll.sum(), (leaf, scale)))


def test_the_narrow_and_the_wide_formula_meet() -> None:
    """No jump and no kink where one takes over from the other."""
    for center in (0.0, 0.5, 3.0, 20.0):
        edge = 1.0 / (1.0 + center)
        halves = torch.tensor([edge * (1 - 1e-9), edge * (1 + 1e-9)], dtype=torch.float64, requires_grad=True)
        values = log_normal_interval(torch.tensor(center, dtype=torch.float64), halves)
        gradients = torch.autograd.grad(values.sum(), halves)[0]
        close(values[0], values[1], rtol=1e-7, atol=1e-8)
        close(gradients[0], gradients[1], rtol=1e-7, atol=1e-7)
        close(values[0].exp(), torch.tensor(stats.norm.cdf(center + edge) - stats.norm.cdf(center - edge)),
              rtol=1e-6, atol=1e-12)  # fmt: skip


def test_second_derivatives_at_the_mean() -> None:
    """Where the distance is 0, an absolute value would have none."""
    for log_std in (-4.0, 0.0):
        for x in (-1.0, 0.0, 1.0):

            def nll(mean: Tensor, x: float = x, log_std: float = log_std) -> Tensor:
                return ops.discretized_gaussian_nll(
                    torch.full_like(mean, x), mean, log_std=torch.full_like(mean, log_std), levels=257, unit="nats"
                ).sum()

            at = torch.tensor([x], dtype=torch.float64)
            found = torch.func.hessian(nll)(at)
            near = [torch.func.grad(nll)(at + step) for step in (1e-5, -1e-5)]
            close(found[0], (near[0] - near[1]) / 2e-5, rtol=1e-5, atol=1e-5)
            assert float(found) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_long_rows_of_small_terms(dtype: torch.dtype) -> None:
    """Sums in float32 or wider, whatever the dtype: an image's 3072 terms, and a row of 100 thousand."""
    for count in (3072, 100_000):
        generator = torch.Generator().manual_seed(count)
        logits, target = (torch.rand(2, count, generator=generator).to(dtype) for _ in range(2))
        check(Problem("bernoulli_nll", {"logits": logits, "target": target}, {}))
    zeros = torch.zeros(1, 2_000_000)
    assert ops.bernoulli_nll(zeros, zeros).item() == pytest.approx(math.log(2) * 2e6, rel=1e-6)


# ---- mistakes --------------------------------------------------------------------------------------------------------

X, INT, WIDE = torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.float64)
META = torch.zeros(3, 4, device="meta")
ERRORS: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("bernoulli_nll", ([0.0], X), {}, TypeError, "logits must be a Tensor, got list"),
    ("bernoulli_nll", (X, 1.0), {}, TypeError, "target must be a Tensor, got float"),
    ("bernoulli_nll", (X, INT), {}, ValueError, "target must be of a floating dtype .*, got torch.int64"),
    (
        "bernoulli_nll",
        (X, WIDE),
        {},
        RuntimeError,
        "target must be torch.float32, the dtype of logits; got torch.float64",
    ),
    ("bernoulli_nll", (X, META), {}, RuntimeError, "target must be on cpu, as logits is; got meta"),
    ("bernoulli_nll", (X, X[:, :3]), {}, RuntimeError, r"logits and target must broadcast together, got \[3, 4\] and"),
    ("bernoulli_nll", (X, X), {"batch_dims": 3}, RuntimeError, "logits must have at least batch_dims = 3 dimensions"),
    ("bernoulli_nll", (X, X), {"batch_dims": True}, TypeError, "batch_dims must be an int, got bool"),
    ("bernoulli_nll", (X, X), {"unit": "bits"}, ValueError, "unit must be 'nats' or 'bits_per_dim', got 'bits'"),
    ("gaussian_nll", (X, X), {}, TypeError, "exactly one of logvar and log_std must be given"),
    ("gaussian_nll", (X, X, X), {"log_std": X}, TypeError, "exactly one of logvar and log_std must be given"),
    ("gaussian_nll", (INT, X, X), {}, ValueError, "x must be of a floating dtype"),
    ("gaussian_nll", (X, WIDE, X), {}, RuntimeError, "mean must be torch.float32, the dtype of x; got torch.float64"),
    ("gaussian_nll", (X, X), {"log_std": WIDE}, RuntimeError, "log_std must be torch.float32, the dtype of x"),
    ("gaussian_nll", (X, X, 0.0), {}, TypeError, "logvar must be a Tensor, got float"),
    ("gaussian_nll", (X, X[:2], X), {}, RuntimeError, "x and mean must broadcast together"),
    ("gaussian_nll", (X, X, X[:2]), {}, RuntimeError, "x and mean and logvar must broadcast together"),
    ("gaussian_nll", (X, X, X), {"unit": None}, ValueError, "unit must be 'nats' or 'bits_per_dim', got None"),
    ("gaussian_nll", (X, X, X), {"batch_dims": -1}, RuntimeError, "batch_dims must not be negative, got -1"),
    ("discretized_gaussian_nll", (X, X), {}, TypeError, "exactly one of logvar and log_std must be given"),
    ("discretized_gaussian_nll", (X, X, X), {"levels": 1}, ValueError, "levels must be at least 2, got 1"),
    ("discretized_gaussian_nll", (X, X, X), {"levels": 256.0}, TypeError, "levels must be an int, got float"),
    ("discretized_gaussian_nll", (X, META, X), {}, RuntimeError, "mean must be on cpu, as x is; got meta"),
    ("discretized_gaussian_nll", (X, X, X), {"unit": "bpd"}, ValueError, "unit must be 'nats' or 'bits_per_dim'"),
]


@pytest.mark.parametrize(("op", "arguments", "options", "error", "message"), ERRORS)
def test_errors(
    op: str, arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as info:
        getattr(ops, op)(*arguments, **options)
    assert str(info.value).startswith(f"{op}: ")


def test_direct_callers_cannot_reach_out_of_bounds() -> None:
    ops_ = torch.ops.genfuse
    for call in (
        lambda: ops_.bernoulli_nll(X, X[:2], 1),
        lambda: ops_.bernoulli_nll(X, X, 3),
        lambda: ops_.bernoulli_nll(X, X, -1),
        lambda: ops_.bernoulli_nll(X, WIDE, 1),
        lambda: ops_.bernoulli_nll(INT, INT, 1),
        lambda: ops_.bernoulli_nll_backward(X[:2, 0], X, X, 1, 3),
        lambda: ops_.gaussian_nll(X, X, X[:2], 1, False),
        lambda: ops_.gaussian_nll_backward(X[:, 0], X, X[:, :3], X, 1, False, 7),
        lambda: ops_.discretized_gaussian_nll(X, X, X, 1, False, 1),
        lambda: ops_.discretized_gaussian_nll_backward(X, X, X, X, 1, False, 256, 7),
    ):
        with pytest.raises(RuntimeError):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_discretized_gaussian_keeps_both_tails_of_a_wide_bin(dtype: torch.dtype) -> None:
    """At the center of a bin of many deviations the NLL is the mass of two equal tails, erfc(h / sqrt 2)."""
    for h in (1.0, 3.0, 5.0, 5.5, 7.0):
        zero = torch.zeros(1, 1, dtype=dtype)
        scale = torch.full((1, 1), math.log(0.5 / h), dtype=dtype)
        found = ops.discretized_gaussian_nll(zero, zero, log_std=scale, levels=3, unit="nats").item()
        exact = -math.log1p(-math.erfc(h / math.sqrt(2.0)))
        # h itself is rounded, which the tail magnifies by h^2.
        assert abs(found - exact) <= 8.0 * torch.finfo(dtype).eps * (1.0 + h * h) * exact, h
