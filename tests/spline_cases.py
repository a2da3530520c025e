"""Problems for the splines of flows: every option, as tensors and keyword arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# "bins", "packed", "ends", "params_of" and "interval" shape the tensors; the rest are arguments of the operator. The
# first variant has every input.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "rational_quadratic_spline": {
        "separate": {},
        "inverse": {"inverse": True},
        "packed": {"packed": True},
        "packed, inverse, summed": {"packed": True, "inverse": True, "reduce_dims": -1},
        "8 bins": {"bins": 8, "packed": True},
        "8 bins, inverse": {"bins": 8, "inverse": True, "logit_scale": 0.5},
        "circular": {"tails": "circular"},
        "circular, packed, inverse": {"tails": "circular", "packed": True, "inverse": True, "tail_bound": 1.5},
        "no tails": {"tails": None, "interval": (-1.5, 2.0, -1.0, 3.0)},
        "no tails, packed, inverse": {
            "tails": None,
            "interval": (0.0, 1.0, -2.0, 1.0),
            "packed": True,
            "inverse": True,
        },
        "slopes at the ends": {"ends": True, "min_derivative": 0.1},
        "identity": {"normalizer": "identity", "min_bin_width": 0.05, "min_bin_height": 0.0},
        "zuko": {"normalizer": "zuko", "tail_bound": 5.0},
        "zuko, inverse": {"normalizer": "zuko", "inverse": True, "packed": True},
        "none": {"normalizer": "none"},
        "none, inverse": {"normalizer": "none", "inverse": True, "logit_scale": 0.9},
        "one row of parameters": {"params_of": "last", "reduce_dims": (-1,)},
    },
    "linear_spline": {
        "separate": {},
        "inverse": {"inverse": True, "logit_scale": 0.5},
        "no tails, summed": {"tails": None, "interval": (-1.5, 2.0, -1.0, 3.0), "reduce_dims": -1},
        "no tails, inverse": {"tails": None, "interval": (-1.5, 2.0, -1.0, 3.0), "inverse": True},
    },
    "quadratic_spline": {
        "separate": {"logit_scale": 0.7},
        "inverse": {"inverse": True},
        "packed, summed": {"packed": True, "reduce_dims": -1},
        "slopes at the ends": {"ends": True},
        "no tails, packed, inverse": {
            "tails": None,
            "interval": (-1.5, 2.0, -1.0, 3.0),
            "packed": True,
            "inverse": True,
        },
    },
    "cubic_spline": {
        "separate": {},
        "inverse": {"inverse": True},
        "packed, summed": {"packed": True, "reduce_dims": -1, "logit_scale": 0.7},
        "no tails, inverse": {"tails": None, "interval": (-1.5, 2.0, -1.0, 3.0), "inverse": True},
    },
}


def counts(op: str, bins: int, tails: str | None, ends: bool) -> dict[str, int]:
    """How many parameters each argument holds; `ends` asks for slopes or densities of their own with tails, too."""
    ends = ends or tails is None
    if op == "linear_spline":
        return {"pdf": bins}
    if op == "quadratic_spline":
        return {"widths": bins, "heights": bins + 1 if ends else bins - 1}
    if op == "cubic_spline":
        return {"widths": bins, "heights": bins, "derivatives": 2}
    inner = bins + 1 if ends else bins if tails == "circular" else bins - 1
    return {"widths": bins, "heights": bins, "derivatives": inner}


def make(
    op: str, options: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...], seed: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs and arguments of a problem, its numbers first drawn in float64 and then rounded to `dtype`."""
    options = dict(options)
    generator = torch.Generator().manual_seed(seed)
    bins, packed, ends = options.pop("bins", 4), options.pop("packed", False), options.pop("ends", False)
    interval, tails = options.pop("interval", None), options.get("tails", "linear")
    of = {"full": shape, "last": shape[-1:]}[options.pop("params_of", "full")]
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if interval is None:
        x = x * 0.7 * options.get("tail_bound", 3.0)  # a seventh of the elements in the tails
    else:
        options.update(zip(("left", "right", "bottom", "top"), interval, strict=True))
        low, high = interval[2:] if options.get("inverse") else interval[:2]
        # Not next to the ends, so that rounding leaves it inside.
        x = low + (high - low) * (0.01 + 0.98 * torch.rand(shape, generator=generator, dtype=torch.float64))
    inputs = {"x": x}
    for name, count in counts(op, bins, tails, ends).items():
        # Bins of like sizes: where narrow ones lie among wide ones, one element's luck is the largest error.
        value = 0.25 * torch.randn((*of, count), generator=generator, dtype=torch.float64)
        if options.get("normalizer") == "none":
            value = value.exp() if name == "derivatives" else value.softmax(-1)
        inputs[name] = value
    if packed:
        inputs = {"x": x, "widths": torch.cat(list(inputs.values())[1:], dim=-1)}
    return {name: value.to(dtype) for name, value in inputs.items()}, options
