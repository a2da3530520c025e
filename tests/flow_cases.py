"""Problems for the couplings and pointwise transforms of flows: every option, as tensors and keyword arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# "split" of "list" or "mask" becomes a tensor, "separate" asks for a shift of its own, "params_of" and "noise" shape
# the tensors; the rest are arguments of the operator. The first variant has every input.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "affine_coupling": {
        "separate": {"separate": True},
        "exp, second half": {"split": "second"},
        "inverse, first half": {"split": "first", "inverse": True, "layout": "scale_shift"},
        "add first": {"split": "second", "order": "add_multiply", "layout": "interleaved_shift_scale"},
        "add first, inverse": {"split": "even", "order": "add_multiply", "inverse": True},
        "sigmoid": {"scale": "sigmoid", "split": "odd", "layout": "interleaved_scale_shift"},
        "sigmoid, inverse": {"scale": "sigmoid", "offset": 1.0, "inverse": True},
        "sigmoid, eps": {"scale": "sigmoid", "eps": 1e-3, "split": "second"},
        "sigmoid, eps, inverse": {"scale": "sigmoid", "eps": 0.1, "inverse": True, "split": "list"},
        "inverse_sigmoid": {"scale": "inverse_sigmoid", "layout": "interleaved_shift_scale", "split": "second"},
        "inverse_sigmoid, inverse": {"scale": "inverse_sigmoid", "inverse": True, "order": "add_multiply"},
        "softplus": {"scale": "softplus", "layout": "interleaved_scale_shift"},
        "softplus, no eps, inverse": {"scale": "softplus", "eps": 0.0, "inverse": True},
        "softplus, clamp": {"scale": "softplus", "clamp": 1.0, "eps": 0.01},
        "tanh": {"scale": "tanh", "split": "mask"},
        "atan": {"scale": "atan", "layout": "scale_shift", "split": "first"},
        "sigmoid_clamp": {"scale": "sigmoid_clamp", "separate": True, "split": "list"},
        "softclip": {"scale": "softclip", "separate": True, "inverse": True},
        "clip": {"scale": "clip", "clamp": (-0.5, 0.7), "separate": True},
        "each element": {"reduce": False, "split": "list", "layout": "interleaved_shift_scale"},
        "each element, mask, inverse": {"reduce": False, "split": "mask", "inverse": True, "order": "add_multiply"},
        "one row of parameters": {"params_of": "row", "split": "second"},
    },
    "additive_coupling": {
        "all": {},
        "second half": {"split": "second"},
        "inverse, list": {"split": "list", "inverse": True},
        "mask": {"split": "mask"},
    },
    "actnorm": {
        "multiply_add": {},
        "add_multiply": {"order": "add_multiply"},
        "inverse": {"inverse": True},
        "add_multiply, inverse": {"order": "add_multiply", "inverse": True},
    },
    "conv1x1": {
        "bias": {},
        "no bias": {"bias": None},
        "fewer channels": {"outputs": 2},
    },
    "dequantize_logit": {
        "u": {},
        "rng": {"noise": "rng"},
        "two levels": {"levels": 2, "alpha": 0.01},
        "no alpha": {"alpha": 0.0, "levels": 8},
    },
}


def make(op: str, variant: str | dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Any:
    """Inputs and options of a problem, its numbers first drawn in float64 and then rounded to `dtype`."""
    options = dict(VARIANTS[op][variant or next(iter(VARIANTS[op]))] if isinstance(variant, str) else variant)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    batch, channels, space = shape[0], shape[1] if len(shape) > 1 else 1, shape[2:]
    if op == "actnorm":
        return {"x": normal(*shape), "log_scale": 0.5 * normal(channels), "bias": normal(channels)}, options
    if op == "conv1x1":
        outputs = min(options.pop("outputs", channels + 1), 2 * channels, 65)
        inputs = {"x": normal(*shape), "weight": normal(outputs, channels), "bias": normal(outputs)}
        if "bias" in options:
            del inputs["bias"]
        return inputs, options
    if op == "dequantize_logit":
        x = torch.randint(0, options.get("levels", 256), shape, generator=generator).to(dtype)
        if options.pop("noise", "u") == "rng":
            return {"x": x}, {**options, "rng": torch.tensor([seed + 17, 3 << 40])}
        noise = 0.05 + 0.9 * torch.rand(shape, generator=generator, dtype=torch.float64)
        return {"x": x, "u": noise.to(dtype if dtype.is_floating_point else torch.float32)}, options
    middle = (channels + 1) // 2
    split = options.get("split", "all")
    moved = {"first": middle, "second": channels - middle, "even": middle, "odd": channels - middle}.get(
        split, channels
    )
    if split == "list":
        order = torch.randperm(channels, generator=generator)
        options["split"], moved = order[:middle], middle
    elif split == "mask":
        options["split"] = torch.rand(shape[1:], generator=generator) < 0.6
    separate = options.pop("separate", False)
    rows = 1 if options.pop("params_of", "full") == "row" else batch
    if op == "additive_coupling":
        return {"x": normal(*shape), "shift": normal(batch, moved, *space)}, options
    inputs = {"x": normal(*shape), "params": normal(rows, moved if separate else 2 * moved, *space)}
    if separate:
        inputs["shift"] = normal(batch, moved, *space)
    return inputs, options
