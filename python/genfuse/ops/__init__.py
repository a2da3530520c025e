"""The operators: one public function per op, with its fake kernel, derivatives, autocast and vmap rules."""

from __future__ import annotations

from .recurrent import gru, gru_generate, linear_cross_entropy, lstm, lstm_generate

__all__ = ["gru", "gru_generate", "linear_cross_entropy", "lstm", "lstm_generate"]
