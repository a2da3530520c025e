"""Tolerances that are derived and not tuned.

A kernel is compared with the reference in float64. What it may be off by is what plain PyTorch at the test's dtype is
off by, twice, and a few units in the last place of the result's scale. So a tolerance grows where the problem is
ill-conditioned and only there, and nobody sets it by hand. Gradients are also compared as vectors: relative L2 error,
cosine, and signed bias (an error that leans to one side trains a model astray, even if it is small).

One run of plain PyTorch is one throw of the dice: where a single rounding decides, its error may be ten times smaller
than that of the same computation in another order. So PyTorch runs several times, each time with its inputs moved by
half a unit in the last place of the dtype that it computes in (`nudged`), which is what any computation does to them in
its first operation; the largest error of these runs counts. In float64 these runs show how far rounding alone carries
a result away, and the exact result is as good as any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0  # the kernel's error may be this many times eager's
ULPS = 4.0  # and this many units in the last place more
RUNS = 8  # of eager PyTorch


@dataclass(frozen=True)
class Errors:
    """How far a result is from the exact one; all are 0 for the exact one."""

    largest: float  # of an element, by the largest element of the exact result
    relative: float  # L2, by the exact result's
    cosine: float  # 1 - cosine of the angle between them
    bias: float  # |sum of errors|, by the sum of magnitudes


def errors(result: Tensor, exact: Tensor) -> Errors:
    """The errors of a result; `exact` is float64."""
    result = result.detach().to(torch.float64)
    exact = exact.detach().to(torch.float64)
    if exact.numel() == 0:
        return Errors(0.0, 0.0, 0.0, 0.0)
    difference = result - exact
    tiny = torch.finfo(torch.float64).tiny
    norm, result_norm = float(exact.norm()), float(result.norm())
    # For unit vectors, 1 - cos = |a - b|^2 / 2, which keeps its digits where 1 - (a . b) loses them.
    cosine = 0.0
    if norm > 0.0 and result_norm > 0.0:
        cosine = float((result / result_norm - exact / norm).square().sum()) / 2.0
    return Errors(
        largest=float(difference.abs().max()) / max(float(exact.abs().max()), tiny),
        relative=float(difference.norm()) / max(norm, tiny),
        cosine=cosine,
        bias=abs(float(difference.sum())) / max(float(exact.abs().sum()), tiny),
    )


def allowed(eager: Sequence[Errors], dtype: torch.dtype, elements: int, factor: float = FACTOR) -> Errors:
    """What a kernel may be off by, where runs of eager PyTorch at `dtype` are off by `eager`."""
    ulp = ULPS * torch.finfo(dtype).eps
    relative = factor * max(run.relative for run in eager) + ulp
    return Errors(
        largest=factor * max(run.largest for run in eager) + ulp,
        relative=relative,
        cosine=min(relative, 2.0) ** 2 / 2.0,  # no angle is wider; and the relative error of an exact 0 has no square
        # Errors of independent signs leave a sum that shrinks with the root of their number; three deviations may be.
        bias=factor * max(run.bias for run in eager) + 3.0 * ulp / max(elements, 1) ** 0.5,
    )


def assert_as_accurate(
    actual: Tensor,
    eager: Sequence[Tensor],
    exact: Tensor,
    what: str = "result",
    *,
    gradient: bool = False,
    factor: float = FACTOR,
) -> None:
    """Assert that a kernel's result is about as near to the exact one as plain PyTorch's.

    Args:
        actual: the kernel's result, in the dtype of the test.
        eager: plain PyTorch's, in the dtype of the test, from inputs nudged in several ways.
        exact: the reference's, in float64.
        what: a name for the message.
        gradient: also compare as vectors.
        factor: how many times eager's error the kernel's may be.
    """
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, want {list(exact.shape)}"
    assert exact.dtype == torch.float64, f"{what}: the exact result must be float64, is {exact.dtype}"
    assert len(eager) > 0, f"{what}: no run of eager PyTorch to compare with"
    for run in eager:
        assert run.dtype == actual.dtype, f"{what}: dtype {actual.dtype}, want {run.dtype}"
    assert bool(torch.equal(actual.isfinite(), exact.isfinite())), f"{what}: not finite where the exact result is"
    found, scales = errors(actual, exact), [errors(run, exact) for run in eager]
    limit = allowed(scales, actual.dtype, exact.numel(), factor)
    for measure in ("largest", "relative", "cosine", "bias") if gradient else ("largest",):
        have, may = getattr(found, measure), getattr(limit, measure)
        theirs = max(getattr(scale, measure) for scale in scales)
        assert have <= may, f"{what}: {measure} error {have:.3g}, allowed {may:.3g} (eager PyTorch has {theirs:.3g})"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What half types are computed in."""
    return dtype if dtype == torch.float64 else torch.float32


def nudged(tensor: Tensor, run: int) -> Tensor:
    """A tensor in the dtype it is computed in, its elements moved by half a unit in the last place; as is in run 0.

    Run 0 of a float64 tensor is nudged too: as it is, it gives the exact result.
    """
    tensor = tensor.detach()
    wide = tensor.to(compute_dtype(tensor.dtype))
    if run == 0 and tensor.dtype != torch.float64:
        return wide
    generator = torch.Generator().manual_seed(1000 + run)
    amount = torch.rand(wide.shape, generator=generator, dtype=wide.dtype) - 0.5
    return wide * (1.0 + 2.0 * amount * torch.finfo(wide.dtype).eps)


def eager_runs(compute: Callable[[Callable[[Tensor], Tensor]], Sequence[Tensor]]) -> list[list[Tensor]]:
    """For each result of an eager computation, its values in all runs.

    Args:
        compute: takes a function to apply to every floating input, and returns the results.
    """
    runs = [compute(lambda tensor, run=run: nudged(tensor, run)) for run in range(RUNS)]  # type: ignore[misc]
    return [list(values) for values in zip(*runs, strict=True)]
