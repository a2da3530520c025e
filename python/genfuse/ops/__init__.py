"""The operators: one public function per op, with its fake kernel, derivatives, autocast and vmap rules."""

from __future__ import annotations

from .recurrent import gru, gru_generate, linear_cross_entropy, lstm, lstm_generate
from .sampling import philox_bits, philox_gumbel, philox_logistic, philox_normal, philox_uniform

__all__ = [
    "gru",
    "gru_generate",
    "linear_cross_entropy",
    "lstm",
    "lstm_generate",
    "philox_bits",
    "philox_gumbel",
    "philox_logistic",
    "philox_normal",
    "philox_uniform",
]
