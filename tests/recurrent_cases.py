"""Problems for the recurrent operators: every option, as tensors and keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tolerances import assert_as_accurate, eager_runs
from torch import Tensor

# What an LSTM can be asked for, each alone and together. "proj", "norm", "bias" and "packed" shape the tensors, the
# rest are arguments of the operator.
LSTM_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": ()},
    "one bias": {"bias": ("bias_hh",)},
    "reverse": {"reverse": True},
    "projection": {"proj": 3},
    "layer norm": {"norm": True},
    "layer norm, projection, no bias": {"norm": True, "proj": 3, "bias": ()},
    "packed": {"packed": True},
    "packed reverse": {"packed": True, "reverse": True},
    "packed layer norm": {"packed": True, "norm": True},
    "resets": {"resets": True},
    "resets reverse": {"resets": True, "reverse": True},
    "zoneout in eval": {"zoneout_h": 0.3, "zoneout_c": 0.2},
    "zoneout": {"zoneout_h": 0.3, "zoneout_c": 0.2, "training": True},
    "weight drop": {"weight_drop": 0.3, "training": True},
    "input dropout": {"input_dropout": 0.3, "training": True},
    "output dropout": {"output_dropout": 0.3, "training": True},
    "masks in eval": {"weight_drop": 0.3, "input_dropout": 0.3, "output_dropout": 0.3},
    "all": {
        "norm": True,
        "proj": 3,
        "resets": True,
        "zoneout_h": 0.2,
        "zoneout_c": 0.3,
        "weight_drop": 0.2,
        "input_dropout": 0.3,
        "output_dropout": 0.4,
        "training": True,
    },
    "all packed reverse": {
        "norm": True,
        "packed": True,
        "reverse": True,
        "zoneout_h": 0.2,
        "zoneout_c": 0.3,
        "weight_drop": 0.2,
        "input_dropout": 0.3,
        "output_dropout": 0.4,
        "training": True,
    },
    "all plain": {
        "resets": True,
        "reverse": True,
        "zoneout_h": 0.2,
        "zoneout_c": 0.3,
        "weight_drop": 0.2,
        "input_dropout": 0.3,
        "output_dropout": 0.4,
        "training": True,
    },
}
_NOT_GRU = {"proj", "norm", "zoneout_c"}
GRU_OPTIONS: dict[str, dict[str, Any]] = {
    name: {key: value for key, value in options.items() if key not in _NOT_GRU}
    for name, options in LSTM_OPTIONS.items()
    if name not in ("projection", "layer norm", "layer norm, projection, no bias", "packed layer norm", "all")
}
CASES = [("lstm", name) for name in LSTM_OPTIONS] + [("gru", name) for name in GRU_OPTIONS]


@dataclass
class Problem:
    """One call: floating tensors by name (each takes a gradient), other arguments, and cotangents of the results."""

    op: str
    inputs: dict[str, Tensor]
    arguments: dict[str, Any]
    cotangents: list[Tensor] = field(default_factory=list)

    @property
    def results(self) -> tuple[str, ...]:
        return ("y", "h_n", "c_n") if self.op == "lstm" else ("y", "h_n")

    def map(self, function: Callable[[Tensor], Tensor]) -> Problem:
        """The problem with a function applied to every floating input and cotangent."""
        inputs = {name: function(tensor) for name, tensor in self.inputs.items()}
        return Problem(self.op, inputs, self.arguments, [function(cotangent) for cotangent in self.cotangents])

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype."""
        return self.map(lambda tensor: tensor.to(dtype))

    def run(self, function: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        """The results, and then the gradients of all inputs."""
        inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in self.inputs.items()}
        results = function(**inputs, **self.arguments)
        cotangents = [cotangent.to(result.dtype) for cotangent, result in zip(self.cotangents, results, strict=True)]
        gradients = torch.autograd.grad(results, list(inputs.values()), cotangents)
        return [*(result.detach() for result in results), *gradients]


def check(
    problems: Sequence[Problem],
    function: Callable[..., tuple[Tensor, ...]],
    definition: Callable[..., tuple[Tensor, ...]],
) -> None:
    """Results and all gradients of a function against the definition, to the derived tolerance.

    Several problems of one kind are compared as one: a tensor of one or two elements by itself is a matter of luck.
    """
    dtype = problems[0].inputs["x"].dtype

    def together(change: Callable[[Tensor], Tensor], function: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        runs = [problem.map(change).run(function) for problem in problems]
        return [torch.stack(values) for values in zip(*runs, strict=True)]

    exact = together(lambda tensor: tensor.to(torch.float64), definition)
    eager = eager_runs(lambda nudge: [value.to(dtype) for value in together(nudge, definition)])
    actual = together(lambda tensor: tensor, function)
    names = [*problems[0].results, *(f"gradient of {name}" for name in problems[0].inputs)]
    for name, ours, theirs, truth in zip(names, actual, eager, exact, strict=True):
        assert_as_accurate(ours, theirs, truth, name, gradient=name.startswith("gradient"))


def make(
    op: str,
    options: str | dict[str, Any] = "plain",
    *,
    dtype: torch.dtype = torch.float32,
    sizes: tuple[int, int, int, int] = (7, 5, 4, 6),
    seed: int = 0,
    lengths: Sequence[int] | None = None,
) -> Problem:
    """A problem of sizes (T, B, I, H), its numbers first drawn in float64 and then rounded to `dtype`."""
    table = LSTM_OPTIONS if op == "lstm" else GRU_OPTIONS
    chosen = dict(table[options] if isinstance(options, str) else options)
    steps, batch, features, hidden = sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    proj = chosen.pop("proj", None)
    norm, packed = chosen.pop("norm", False), chosen.pop("packed", False)
    biases = chosen.pop("bias", ("bias_ih", "bias_hh"))
    outputs = min(proj, hidden) if proj else hidden
    gates = (4 if op == "lstm" else 3) * hidden
    arguments: dict[str, Any] = {}
    if packed:
        if lengths is None:
            lengths = [max(1, steps - (2 * row) % (steps + 1)) for row in range(batch)]
        ordered = sorted(lengths, reverse=True)
        counts = [sum(length > t for length in ordered) for t in range(ordered[0])] if ordered else []
        arguments["batch_sizes"] = torch.tensor(counts, dtype=torch.int64)
        x = draw(sum(counts), features)
        rows: tuple[int, ...] = (sum(counts),)
    else:
        x = draw(steps, batch, features)
        rows = (steps, batch)
    inputs = {"x": x, "h0": draw(batch, outputs)}
    if op == "lstm":
        inputs["c0"] = draw(batch, hidden)
    scale = hidden**-0.5
    inputs["weight_ih"] = draw(gates, features, scale=features**-0.5)
    inputs["weight_hh"] = draw(gates, outputs, scale=scale)
    for name in biases:
        inputs[name] = draw(gates, scale=0.5)
    if proj:
        inputs["weight_hr"] = draw(outputs, hidden, scale=scale)
    if norm:
        for name, size in (("ln_ih_weight", gates), ("ln_hh_weight", gates), ("ln_c_weight", hidden)):
            inputs[name] = 1.0 + draw(size, scale=0.2)
        inputs["ln_c_bias"] = draw(hidden, scale=0.2)
    if chosen.pop("resets", False):
        arguments["resets"] = torch.rand(steps, batch, generator=generator) < 0.3
    arguments.update(chosen)
    if chosen.get("training"):
        arguments["rng"] = torch.tensor([seed + 17, 3 << 40], dtype=torch.int64)
    cotangents = [draw(*rows, outputs), draw(batch, outputs)]
    if op == "lstm":
        cotangents.append(draw(batch, hidden))
    return Problem(op, inputs, arguments, cotangents)
