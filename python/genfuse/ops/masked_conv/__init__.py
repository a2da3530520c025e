"""The operators of autoregressive image models: masked convolution, gates, cached ancestral sampling."""

from __future__ import annotations

from .conv import masked_conv2d

__all__ = ["masked_conv2d"]
