"""The operators: one public function per op, with its fake kernel, derivatives, autocast and vmap rules."""

from __future__ import annotations

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
    "VectorQuantized",
    "bernoulli_nll",
    "categorical_sample",
    "discretized_gaussian_nll",
    "gaussian_kl",
    "gaussian_nll",
    "gaussian_rsample",
    "gaussian_rsample_kl",
    "gru",
    "gru_generate",
    "gumbel_softmax",
    "linear_cross_entropy",
    "lstm",
    "lstm_generate",
    "philox_bits",
    "philox_gumbel",
    "philox_logistic",
    "philox_normal",
    "philox_uniform",
    "relaxed_bernoulli",
    "vector_quantize",
    "vector_quantize_statistics",
]
