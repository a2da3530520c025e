"""Layers of autoregressive image models: masked and shifted convolutions, gates."""

from __future__ import annotations

from .conv import MaskedConv2d

__all__ = ["MaskedConv2d"]
