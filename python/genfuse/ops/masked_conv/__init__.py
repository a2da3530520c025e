"""The operators of autoregressive image models: masked convolution, gates, cached ancestral sampling."""

from __future__ import annotations

from .ancestral import PixelProgram, ancestral_sample
from .conv import masked_conv2d
from .gate import concat_elu, gated_activation

__all__ = ["PixelProgram", "ancestral_sample", "concat_elu", "gated_activation", "masked_conv2d"]
