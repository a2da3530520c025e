"""The definitions of the masked_conv family, in plain PyTorch."""

from __future__ import annotations

__all__: list[str] = []
