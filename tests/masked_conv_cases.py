"""Problems for the masked convolution: every mask and option, as tensors and keyword arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# "kernel" shapes the weight and "bias" says whether there is one; the rest are arguments of the operator. The first
# variant has every input.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "masked_conv2d": {
        "B": {},
        "A, no bias": {"mask_type": "A", "bias": False},
        "A of three colours": {"mask_type": "A", "channel_groups": 3},
        "B of two, interleaved": {"channel_groups": 2, "channel_order": "interleaved"},
        "vertical": {"mask_type": "vertical"},
        "vertical_B": {"mask_type": "vertical_B", "kernel": (3, 5), "bias": False},
        "horizontal": {"mask_type": "horizontal", "kernel": (1, 5)},
        "horizontal_B of two": {"mask_type": "horizontal_B", "channel_groups": 2},
        "dilation": {"mask_type": "A", "dilation": (2, 1)},
        "padding": {"padding": (4, 0)},
        "groups": {"groups": 2, "channel_groups": 2, "channel_order": "interleaved"},
        "of the pixel itself": {"kernel": (1, 1), "channel_groups": 3},
        "of nothing": {"mask_type": "A", "kernel": (1, 1)},
    }
}


def make(op: str, variant: str | dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Any:
    """Inputs and options of a problem, its numbers first drawn in float64 and then rounded to `dtype`; `shape` is the
    beginning of x's."""
    options = dict(VARIANTS[op][variant or next(iter(VARIANTS[op]))] if isinstance(variant, str) else variant)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    groups, kernel = options.get("groups", 1), options.pop("kernel", (3, 3))
    batch, channels, height, width = (*shape, *(1, 1, 2, 3)[len(shape) :])
    outputs = groups * min(channels + 1, 4) if channels > 0 else 0
    inputs = {"x": normal(batch, groups * channels, height, width), "weight": normal(outputs, channels, *kernel)}
    if options.pop("bias", True):
        inputs["bias"] = normal(outputs)
    return inputs, options
