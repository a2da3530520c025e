"""The definitions of the flow family, in plain PyTorch."""

from __future__ import annotations

from .coupling import additive_coupling, affine_coupling
from .pointwise import actnorm, dequantize_logit, logit_quantize

__all__ = ["actnorm", "additive_coupling", "affine_coupling", "dequantize_logit", "logit_quantize"]
