"""The operators of likelihoods: of rows, of pixels under a softmax or a mixture of logistics, and pixels drawn."""

from __future__ import annotations

from .categorical import categorical_nll
from .mixture import discretized_logistic_mixture_nll, discretized_logistic_mixture_sample
from .rows import bernoulli_nll, discretized_gaussian_nll, gaussian_nll

__all__ = [
    "bernoulli_nll",
    "categorical_nll",
    "discretized_gaussian_nll",
    "discretized_logistic_mixture_nll",
    "discretized_logistic_mixture_sample",
    "gaussian_nll",
]
