"""The operators of normalizing flows: splines, couplings, pointwise transforms, autoregressive networks."""

from __future__ import annotations

__all__: list[str] = []
