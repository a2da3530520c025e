"""Tolerances that are derived and not tuned.

A kernel is compared with the reference in float64. What it may be off by is what plain PyTorch at the test's dtype is off by,
twice, and a few units in the last place of the result's scale. So a tolerance grows where the problem is ill-conditioned and
only there, and nobody sets it by hand. Gradients are also compared as vectors: relative L2 error, cosine, and signed bias
(an error that leans to one side trains a model astray, even if it is small).

In float64 there is no more exact computation to compare with. There the error of plain PyTorch in float32, scaled by the ratio
of the two dtypes' resolutions, says what rounding alone may do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0  # the kernel's error may be this many times eager's
ULPS = 4.0  # and this many units in the last place more


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


def allowed(eager: Errors, dtype: torch.dtype, elements: int) -> Errors:
    """What a kernel may be off by, where eager PyTorch at `dtype` is off by `eager`."""
    ulp = ULPS * torch.finfo(dtype).eps
    relative = FACTOR * eager.relative + ulp
    return Errors(
        largest=FACTOR * eager.largest + ulp,
        relative=relative,
        cosine=relative**2 / 2.0,
        # Errors of independent signs leave a sum that shrinks with the root of their number; three deviations are allowed.
        bias=FACTOR * eager.bias + 3.0 * relative / max(elements, 1) ** 0.5,
    )


def assert_as_accurate(
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    what: str = "result",
    *,
    gradient: bool = False,
) -> None:
    """Assert that a kernel's result is about as near to the exact one as plain PyTorch's.

    Args:
        actual: the kernel's result, in the dtype of the test.
        eager: plain PyTorch's, in the dtype of the test; for float64, in float32.
        exact: the reference's, in float64.
        what: a name for the message.
        gradient: also compare as vectors.
    """
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, want {list(exact.shape)}"
    assert exact.dtype == torch.float64, f"{what}: the exact result must be float64, is {exact.dtype}"
    dtype = actual.dtype
    if dtype == torch.float64:
        assert eager.dtype == torch.float32, f"{what}: a float64 test takes its scale from float32, got {eager.dtype}"
    else:
        assert eager.dtype == dtype, f"{what}: dtype {dtype}, want {eager.dtype}"
    assert bool(torch.equal(actual.isfinite(), exact.isfinite())), f"{what}: not finite where the exact result is"
    found, scale = errors(actual, exact), errors(eager, exact)
    if dtype == torch.float64:
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        scale = Errors(scale.largest * ratio, scale.relative * ratio, scale.cosine * ratio**2, scale.bias * ratio)
    limit = allowed(scale, dtype, exact.numel())
    measures = ("largest", "relative", "cosine", "bias") if gradient else ("largest",)
    for measure in measures:
        have, may = getattr(found, measure), getattr(limit, measure)
        assert have <= may, (
            f"{what}: {measure} error {have:.3g}, allowed {may:.3g} (eager PyTorch has {getattr(scale, measure):.3g})"
        )


def assert_all_as_accurate(
    actual: Sequence[Tensor],
    eager: Sequence[Tensor],
    exact: Sequence[Tensor],
    names: Sequence[str],
    *,
    gradient: bool = False,
) -> None:
    """`assert_as_accurate` for several results by name."""
    for ours, theirs, truth, name in zip(actual, eager, exact, names, strict=True):
        assert_as_accurate(ours, theirs, truth, name, gradient=gradient)
