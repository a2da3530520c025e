"""The operators of autoregressive image models: masked convolution, gates, cached ancestral sampling."""

from __future__ import annotations

__all__: list[str] = []
