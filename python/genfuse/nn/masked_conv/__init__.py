"""Layers of autoregressive image models: masked and shifted convolutions, gates."""

from __future__ import annotations

__all__: list[str] = []
