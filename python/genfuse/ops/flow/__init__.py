"""The operators of normalizing flows: splines, couplings, pointwise transforms, autoregressive networks."""

from __future__ import annotations

from .autoregressive import MaskedLayer, autoregressive_inverse, masked_linear
from .coupling import additive_coupling, affine_coupling
from .linear import conv1x1
from .pointwise import actnorm, dequantize_logit, logit_quantize
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
    "actnorm",
    "additive_coupling",
    "affine_coupling",
    "autoregressive_inverse",
    "conv1x1",
    "cubic_spline",
    "dequantize_logit",
    "linear_spline",
    "logit_quantize",
    "masked_linear",
    "piecewise_rational_quadratic_transform",
    "quadratic_spline",
    "rational_quadratic_spline",
    "unconstrained_rational_quadratic_spline",
]
