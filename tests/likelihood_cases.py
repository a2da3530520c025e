"""Problems for the likelihoods of pixels: every option, as tensors and keyword arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# "channels" and "components" shape the tensors; the rest are arguments of the operator.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "discretized_logistic_mixture_nll": {
        "rgb": {},
        "grey": {"channels": 1, "components": 5},
        "openai": {"mode": "openai"},
        "flax": {"layout": "flax"},
        "pixel_models, each pixel": {"layout": "pixel_models", "reduction": "pixel"},
        "sound of 16 bits": {"channels": 1, "bits": 16, "layout": "wavenet", "reduction": "mean"},
        "sound as published": {"channels": 1, "bits": 16, "layout": "wavenet", "mode": "openai", "reduction": "sum"},
        "two levels, wide": {"bits": 1, "log_scale_min": -0.5, "reduction": "bits_per_dim"},
    },
    "categorical_nll": {
        "levels first": {},
        "each position": {"reduction": "pixel"},
        "levels last": {"dim": -1},
        "bits_per_dim": {"reduction": "bits_per_dim"},
    },
}


def make(op: str, variant: str | dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Any:
    """Inputs and options of a problem, its numbers first drawn in float64 and then rounded to `dtype`; `shape` is
    that of the pixels, without channels."""
    options = dict(VARIANTS[op][variant or next(iter(VARIANTS[op]))] if isinstance(variant, str) else variant)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    if op == "categorical_nll":
        levels = 11
        last = options.get("dim", 1) == -1 and len(shape) > 0
        logits = normal(*shape, levels) if last else normal(*shape[:1], levels, *shape[1:])
        options["target"] = torch.randint(0, levels, shape, generator=generator)
        return {"logits": (2.0 * logits).to(dtype)}, options
    channels, components = options.pop("channels", 3), options.pop("components", 2)
    last = 2 ** options.get("bits", 8) - 1
    levels = torch.randint(0, last + 1, (shape[0], channels, *shape[1:]), generator=generator)
    if levels.numel() > 3:
        levels.view(-1)[:2] = torch.tensor([0, last])
    each = (1 + 3 * channels) if channels > 1 else 3
    # Scales about as wide as what there is to explain, some of them narrow.
    params = normal(shape[0], each * components, *shape[1:])
    if options.get("layout", "openai") != "flax":
        params = params - 0.5
    return {"x": (levels.to(torch.float64) * 2.0 / last - 1.0).to(dtype), "params": params.to(dtype)}, options
