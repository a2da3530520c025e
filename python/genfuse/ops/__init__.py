"""The operators: one public function per op, with its fake kernel, derivatives, autocast and vmap rules."""

from __future__ import annotations

from .flow import (
    InputOutsideDomain,
    MaskedLayer,
    autoregressive_inverse,
    cubic_spline,
    linear_spline,
    masked_linear,
    piecewise_rational_quadratic_transform,
    quadratic_spline,
    rational_quadratic_spline,
    unconstrained_rational_quadratic_spline,
)
from .likelihood import bernoulli_nll, discretized_gaussian_nll, gaussian_nll
from .recurrent import gru, gru_generate, linear_cross_entropy, lstm, lstm_generate
from .sampling import (
    VectorQuantized,
    categorical_sample,
    gaussian_kl,
    gaussian_rsample,
    gaussian_rsample_kl,
    gumbel_softmax,
    philox_bits,
    philox_gumbel,
    philox_logistic,
    philox_normal,
    philox_uniform,
    relaxed_bernoulli,
    vector_quantize,
    vector_quantize_statistics,
)

__all__ = [
    "InputOutsideDomain",
    "MaskedLayer",
    "VectorQuantized",
    "autoregressive_inverse",
    "bernoulli_nll",
    "categorical_sample",
    "cubic_spline",
    "discretized_gaussian_nll",
    "gaussian_kl",
    "gaussian_nll",
    "gaussian_rsample",
    "gaussian_rsample_kl",
    "gru",
    "gru_generate",
    "gumbel_softmax",
    "linear_cross_entropy",
    "linear_spline",
    "lstm",
    "lstm_generate",
    "masked_linear",
    "philox_bits",
    "philox_gumbel",
    "philox_logistic",
    "philox_normal",
    "philox_uniform",
    "piecewise_rational_quadratic_transform",
    "quadratic_spline",
    "rational_quadratic_spline",
    "relaxed_bernoulli",
    "unconstrained_rational_quadratic_spline",
    "vector_quantize",
    "vector_quantize_statistics",
]
