"""The definitions of the masked_conv family, in plain PyTorch."""

from __future__ import annotations

from .conv import live_taps, masked_conv2d

__all__ = ["live_taps", "masked_conv2d"]
