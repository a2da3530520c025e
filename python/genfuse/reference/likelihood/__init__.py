"""The definitions of the likelihoods, in plain PyTorch."""

from __future__ import annotations

from .categorical import categorical_nll
from .mixture import LAYOUTS, discretized_logistic_mixture_nll, discretized_logistic_mixture_sample
from .rows import bernoulli_nll, discretized_gaussian_nll, gaussian_nll, log_normal_interval

__all__ = [
    "LAYOUTS",
    "bernoulli_nll",
    "categorical_nll",
    "discretized_gaussian_nll",
    "discretized_logistic_mixture_nll",
    "discretized_logistic_mixture_sample",
    "gaussian_nll",
    "log_normal_interval",
]
