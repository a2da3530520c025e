"""Problems for the masked linear layer and the inverse of autoregressive flows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import genfuse
import torch
from genfuse import ops
from genfuse.ops import MaskedLayer
from operator_cases import Problem
from torch import Tensor

# A layer: units, and what is not usual of it. "parameters" of each column are the last layer's units.
FEED_FORWARD = [{"units": 9}, {"units": 8, "activation": "relu"}, {"activation": "relu"}]
RESIDUAL = [  # nflows: each block takes the activation of what came before, and its result is added to it
    {"units": 9, "add": True},
    {"units": 9, "activation": "relu", "add": True},
    {"units": 9, "activation": "relu", "residual": 0},
    {"units": 9, "activation": "relu", "add": True},
    {"units": 9, "activation": "relu", "residual": 2},
    {},
]
SKIP = [  # pyro: the columns reach the parameters by a second way
    {"units": 11},
    {"units": 7, "activation": "relu", "bias": False},
    {"units": "parameters", "source": -1, "bias": False, "degrees": "parameters"},
    {"source": 1, "activation": "relu", "residual": 2},
]


def _with(activation: str) -> list[dict[str, Any]]:
    return [{"units": 9}, {"units": 8, "activation": activation}, {"activation": activation}]


VARIANTS: dict[str, dict[str, Any]] = {
    "affine": {"layers": FEED_FORWARD},
    "nflows": {"layers": RESIDUAL, "scale": "softplus", "layout": "scale_shift"},
    "zuko": {"layers": _with("elu"), "scale": "softclip", "degrees": (3, 1, 2, 5, 4)},
    "pyro": {"layers": SKIP, "scale": "clip", "interleaved": False, "degrees": (2, 5, 1, 4, 3), "std": 0.5},
    "normflows": {"layers": RESIDUAL, "scale": "sigmoid", "eps": 1e-3, "layout": "scale_shift"},
    "sigmoid": {"layers": _with("tanh"), "scale": "sigmoid"},
    "inverse sigmoid": {"layers": _with("silu"), "scale": "inverse_sigmoid"},
    "softplus without least": {"layers": _with("gelu"), "scale": "softplus", "eps": 0.0},
    "tanh": {"layers": _with("leaky_relu"), "scale": "tanh", "clamp": 1.5},
    "atan": {"layers": _with("sigmoid"), "scale": "atan"},
    "sigmoid clamp": {"layers": _with("none"), "scale": "sigmoid_clamp"},
    "additive": {"layers": FEED_FORWARD, "transform": "additive"},
    "one layer": {"layers": [{"add": True}]},
    "groups": {"layers": FEED_FORWARD, "degrees": (1, 2, 1, 1, 2)},
    "one group": {"layers": FEED_FORWARD, "degrees": (7, 7, 7, 7, 7)},
    "any degrees": {"layers": FEED_FORWARD, "degrees": (-30, 12, 5, -7, 12), "range": (-40, 20)},
    "spline": {"layers": FEED_FORWARD, "transform": "rational_quadratic", "num_bins": 4},
    "spline, identity": {
        "layers": RESIDUAL,
        "transform": "rational_quadratic",
        "num_bins": 8,
        "tail_bound": 2.0,
        "normalizer": "identity",
        "logit_scale": 0.5,
    },
    "spline, zuko": {
        "layers": FEED_FORWARD,
        "transform": "rational_quadratic",
        "num_bins": 3,
        "normalizer": "zuko",
        "interleaved": False,
    },
}


@dataclass
class Network(Problem):
    """A call of the inverse: `inputs` are u, weights, biases and additions; `layers` says how they make the network."""

    layers: list[dict[str, Any]] = field(default_factory=list)

    def map(self, function: Callable[[Tensor], Tensor]) -> Network:
        """The problem with a function applied to every floating input."""
        inputs = {name: function(tensor) for name, tensor in self.inputs.items()}
        return Network(self.op, inputs, self.options, self.layers)

    def network(self) -> list[MaskedLayer]:
        """The layers as they are given."""
        return [
            MaskedLayer(
                self.inputs[f"weight {index}"],
                self.inputs.get(f"bias {index}"),
                add=self.inputs.get(f"add {index}"),
                **layer,
            )
            for index, layer in enumerate(self.layers)
        ]

    def results(self, backend: str | None = None, **changed: Any) -> list[Tensor]:
        """x, and the log-determinant where it depends on anything."""
        found = list(self.call(backend, **changed))
        return found[:1] if self.options.get("transform") == "additive" else found

    def call(self, backend: str | None = None, **changed: Any) -> Any:
        """What the public function returns."""
        with genfuse.use_backend(backend) if backend else contextlib.nullcontext():
            return ops.autoregressive_inverse(self.inputs["u"], self.network(), **{**self.options, **changed})


def make(
    op: str,
    variant: str | dict[str, Any] = "affine",
    *,
    dtype: torch.dtype = torch.float32,
    batch: int = 6,
    columns: int = 5,
    units: int | None = None,
    seed: int = 0,
) -> Problem:
    """A problem, its numbers first drawn in float64 and then rounded to `dtype`.

    Of masked_linear a variant may say "bias", "strict", and `units` outputs.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) * std).to(dtype)

    def some_degrees(count: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (count,), generator=generator)

    if op == "masked_linear":
        options = {} if isinstance(variant, str) else dict(variant)
        outputs = 9 if units is None else units
        inputs = {"x": normal(batch, columns), "weight": normal(outputs, columns)}
        if options.pop("bias", True):
            inputs["bias"] = normal(outputs)
        high = max(columns, 1)
        degrees = {"in_degrees": some_degrees(columns, 1, high), "out_degrees": some_degrees(outputs, 0, high)}
        if options.pop("sorted", False):
            degrees = {name: tensor.sort().values for name, tensor in degrees.items()}
        if "bias" not in inputs:
            options["bias"] = None
        return Problem(op, inputs, {**degrees, **options})

    options = dict(VARIANTS[variant] if isinstance(variant, str) else variant)
    of_columns = options.get("degrees", tuple(range(1, columns + 1)))
    low, high = options.pop("range", (0, max(of_columns, default=1)))
    each = {"affine": 2, "additive": 1}.get(options.get("transform", "affine"), 3 * options.get("num_bins", 8) - 1)
    inputs = {"u": normal(batch, columns)}
    std = options.pop("std", 1.0)  # of the weights, as a multiple of what keeps numbers as large as they are
    skeleton: list[dict[str, Any]] = []
    sizes = [columns]
    for index, layer in enumerate(options.pop("layers")):
        last = "units" not in layer
        own = columns * each if last or layer["units"] == "parameters" else layer["units"] if units is None else units
        source = layer.get("source", index - 1)
        count = max(sizes[source + 1], 1)
        inputs[f"weight {index}"] = normal(own, sizes[source + 1], std=std * (0.4 if last else 1.2) / count**0.5)
        if layer.get("bias", True):
            inputs[f"bias {index}"] = normal(own, std=0.5)
        if layer.get("add"):
            inputs[f"add {index}"] = normal(batch, own, std=0.5)
        residual = layer.get("residual")
        degrees: Tensor | None = None
        if layer.get("degrees") == "parameters":
            column = torch.tensor(of_columns)
            each_after = options.get("interleaved", True)
            degrees = (column.repeat_interleave(each) if each_after else column.repeat(each)) - 1
        elif not last:
            degrees = some_degrees(own, low, high)
            if residual is not None:
                degrees = degrees.maximum(skeleton[residual]["degrees"])
        skeleton.append(
            {
                "degrees": degrees,
                "source": layer.get("source"),
                "activation": layer.get("activation", "none"),
                "residual": residual,
            }
        )
        sizes.append(own)
    return Network(op, inputs, options, skeleton)
