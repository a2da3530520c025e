"""The operators of normalizing flows: splines, couplings, pointwise transforms, autoregressive networks."""

from __future__ import annotations

from .autoregressive import MaskedLayer, autoregressive_inverse, masked_linear
from .spline import (
    InputOutsideDomain,
    cubic_spline,
    linear_spline,
    piecewise_rational_quadratic_transform,
    quadratic_spline,
    rational_quadratic_spline,
    unconstrained_rational_quadratic_spline,
)

__all__ = [
    "InputOutsideDomain",
    "MaskedLayer",
    "autoregressive_inverse",
    "cubic_spline",
    "linear_spline",
    "masked_linear",
    "piecewise_rational_quadratic_transform",
    "quadratic_spline",
    "rational_quadratic_spline",
    "unconstrained_rational_quadratic_spline",
]
