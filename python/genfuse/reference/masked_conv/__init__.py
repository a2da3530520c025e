"""The definitions of the masked_conv family, in plain PyTorch."""

from __future__ import annotations

from .ancestral import PixelProgram, ancestral_sample
from .conv import live_taps, masked_conv2d
from .gate import concat_elu, gated_activation

__all__ = ["PixelProgram", "ancestral_sample", "concat_elu", "gated_activation", "live_taps", "masked_conv2d"]
