"""Layers of autoregressive image models: masked and shifted convolutions, gates."""

from __future__ import annotations

from .conv import MaskedConv2d
from .gate import ConcatELU, GatedActivation

__all__ = ["ConcatELU", "GatedActivation", "MaskedConv2d"]
