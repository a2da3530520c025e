"""The tolerance helpers can fail: each kind of error that they are for is planted, and must be found."""

from __future__ import annotations

import pytest
import torch
from tolerances import RUNS, assert_as_accurate, compute_dtype, eager_runs, errors, nudged
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def problem(dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor]:
    """A matrix product: (as a kernel might sum it, runs of plain PyTorch, exact)."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(64, 64, generator=generator).to(dtype) for _ in range(2))
    (eager,) = eager_runs(lambda nudge: [(nudge(a) @ nudge(b)).to(dtype)])
    order = torch.randperm(64, generator=generator)
    wide = compute_dtype(dtype)
    other = (a.to(wide)[:, order] @ b.to(wide)[order]).to(dtype)
    return other, eager, a.double() @ b.double()


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_order_of_summation_passes(dtype: torch.dtype) -> None:
    other, eager, exact = problem(dtype)
    assert_as_accurate(other, eager, exact, gradient=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_element_fails(dtype: torch.dtype) -> None:
    other, eager, exact = problem(dtype)
    other[3, 5] += 32 * torch.finfo(dtype).eps * float(exact.abs().max())
    with pytest.raises(AssertionError, match="largest"):
        assert_as_accurate(other, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_scale_fails(dtype: torch.dtype) -> None:
    other, eager, exact = problem(dtype)
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate(other * (1 + 40 * torch.finfo(dtype).eps), eager, exact, gradient=True)


def test_noise_spread_over_all_elements_fails_as_a_vector() -> None:
    other, eager, exact = problem(torch.float32)
    limit = 2 * max(errors(run, exact).largest for run in eager) * float(exact.abs().max())
    noisy = other + 0.8 * limit * torch.randn(64, 64).sign()
    assert_as_accurate(noisy, eager, exact)  # no element is beyond the limit ...
    with pytest.raises(AssertionError, match="relative"):  # ... but together they are
        assert_as_accurate(noisy, eager, exact, gradient=True)


def test_a_leaning_error_fails() -> None:
    """Rounding towards one side: no element is off by more than eager's are, but all lean the same way."""
    _, eager, exact = problem(torch.float32)
    leaning = (exact + (eager[0].double() - exact).abs()).float()
    assert_as_accurate(leaning, eager, exact)
    with pytest.raises(AssertionError, match="bias"):
        assert_as_accurate(leaning, eager, exact, gradient=True)


def test_a_turned_vector_fails() -> None:
    other, eager, exact = problem(torch.float32)
    with pytest.raises(AssertionError, match=r"largest|relative|cosine"):
        assert_as_accurate(other.T.contiguous(), eager, exact, gradient=True)


def test_the_cosine_is_of_use_by_itself() -> None:
    """A result of another length but the same direction has no cosine error, a turned one has."""
    _, _, exact = problem(torch.float32)
    assert errors(3.0 * exact, exact).cosine < 1e-30
    turned = exact + 1e-3 * exact.flip(0)
    assert errors(turned, exact).cosine > 1e-8


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_element_never_written_fails(value: float) -> None:
    other, eager, exact = problem(torch.float32)
    other[0, 0] = value
    with pytest.raises(AssertionError, match="not finite"):
        assert_as_accurate(other, eager, exact)


def test_a_missing_nan_fails() -> None:
    other, eager, exact = problem(torch.float32)
    exact[0, 0] = float("nan")
    with pytest.raises(AssertionError, match="not finite"):
        assert_as_accurate(other, eager, exact)


def test_another_shape_fails() -> None:
    other, eager, exact = problem(torch.float32)
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate(other[:1], eager, exact)


def test_another_dtype_fails() -> None:
    other, eager, exact = problem(torch.float32)
    with pytest.raises(AssertionError, match="dtype"):
        assert_as_accurate(other.to(torch.bfloat16), eager, exact)


def test_an_exact_result_of_low_precision_fails() -> None:
    other, eager, exact = problem(torch.float32)
    with pytest.raises(AssertionError, match="must be float64"):
        assert_as_accurate(other, eager, exact.float())


def test_no_run_of_eager_fails() -> None:
    other, _, exact = problem(torch.float32)
    with pytest.raises(AssertionError, match="no run of eager"):
        assert_as_accurate(other, [], exact)


def test_a_result_that_is_not_the_exact_zero_fails() -> None:
    exact = torch.zeros(4, dtype=torch.float64)
    eager = torch.full((4,), 1e-8)
    assert_as_accurate(eager, [eager], exact, gradient=True)
    with pytest.raises(AssertionError, match="largest error"):
        assert_as_accurate(torch.full((4,), 1e-3), [eager], exact, gradient=True)


def test_an_empty_result_passes() -> None:
    empty = torch.zeros(0, 3)
    assert_as_accurate(empty, [empty], empty.double(), gradient=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nudge_is_half_a_unit_in_the_last_place(dtype: torch.dtype) -> None:
    tensor = torch.randn(1000).to(dtype)
    wide = compute_dtype(dtype)
    for run in range(RUNS):
        result = nudged(tensor, run)
        assert result.dtype == wide
        assert bool(((result - tensor.to(wide)).abs() <= 2 * torch.finfo(wide).eps * tensor.to(wide).abs()).all())
        moved = not torch.equal(result, tensor.to(wide))
        assert moved == (run > 0 or dtype == torch.float64)
