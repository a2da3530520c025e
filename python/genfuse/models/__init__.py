"""Whole models: `log_prob`, `loss` and sampling, built from `genfuse.nn` and `genfuse.ops`."""

from __future__ import annotations

from .language_model import LSTMLanguageModel

__all__ = ["LSTMLanguageModel"]
