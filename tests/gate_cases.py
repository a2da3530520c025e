"""Problems for the gated activation and the concatenated ELU: every option, as tensors and keyword arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# "conditional", "bias" and "residual" shape the tensors; the rest are arguments of the operator. The first variant has
# every input.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "gated_activation": {
        "everything": {"conditional": "full", "bias": True, "residual": True},
        "tanh": {},
        "linear": {"activation": "linear"},
        "bias": {"bias": True},
        "linear, everything": {"conditional": "full", "bias": True, "residual": True, "activation": "linear"},
        "class": {"conditional": "rows"},
        "class, bias, linear": {"conditional": "rows", "bias": True, "activation": "linear"},
        "one for all": {"conditional": "one", "residual": True},
    },
    "concat_elu": {"elu": {}},
}


def make(op: str, variant: str | dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Any:
    """Inputs and options of a problem, its numbers first drawn in float64 and then rounded to `dtype`; `shape` is that
    of the gate's result, and of what the ELU takes."""
    options = dict(VARIANTS[op][variant or next(iter(VARIANTS[op]))] if isinstance(variant, str) else variant)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    if op == "concat_elu":
        return {"x": normal(*shape)}, options
    wide = (shape[0], 2 * shape[1] if len(shape) > 1 else 2, *shape[2:])
    inputs = {"x": normal(*wide)}
    conditional = options.pop("conditional", None)
    if conditional is not None:
        of = {"full": wide, "rows": wide[:2], "one": (1, *wide[1:])}[conditional]
        inputs["conditional"] = normal(*of)
    if options.pop("bias", False):
        inputs["bias"] = normal(wide[1])
    if options.pop("residual", False):
        inputs["residual"] = normal(*shape)
    return inputs, options
