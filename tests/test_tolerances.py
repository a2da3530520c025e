"""The tolerance helpers can fail: each kind of error that they are for is planted, and must be found."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_as_accurate, errors
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix product: (as a kernel might sum it, plain PyTorch, exact)."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(64, 64, generator=generator).to(dtype) for _ in range(2))
    exact = a.double() @ b.double()
    eager = (a.float() @ b.float()) if dtype == torch.float64 else a @ b
    order = torch.randperm(64, generator=generator)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    other = (a.to(wide)[:, order] @ b.to(wide)[order]).to(dtype)
    return other, eager, exact


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
    limit = 2 * errors(eager, exact).largest * float(exact.abs().max())
    noisy = other + 0.9 * limit * torch.randn(64, 64).sign()
    assert_as_accurate(noisy, eager, exact)  # no element is beyond the limit ...
    with pytest.raises(AssertionError, match="relative"):  # ... but together they are
        assert_as_accurate(noisy, eager, exact, gradient=True)


def test_a_leaning_error_fails() -> None:
    """Rounding towards one side: no element is off by more than eager's are, but all lean the same way."""
    _, eager, exact = problem(torch.float32)
    leaning = (exact + (eager.double() - exact).abs()).float()
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
