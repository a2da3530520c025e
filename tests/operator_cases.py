"""Problems for the operators of sampling, likelihoods and flows: every option, as tensors and keyword arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flow_cases
import gate_cases
import genfuse
import likelihood_cases
import masked_conv_cases
import spline_cases
import torch
from genfuse import ops
from tolerances import FACTOR, assert_as_accurate, eager_runs
from torch import Tensor

# What each can be asked for. "scale", "prior_mean", "prior_scale", "noise" and the like shape the tensors; the rest are
# arguments of the operator.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "gaussian_rsample": {
        "logvar": {},
        "log_std": {"scale": "log_std"},
        "rng": {"noise": "rng"},
        "rng, log_std, clamp": {"noise": "rng", "scale": "log_std", "clamp": (-0.5, 0.5)},
        "one logvar for all": {"scale_of": "last"},
        "one mean for all": {"mean_of": "last"},
    },
    "gaussian_rsample_kl": {
        "standard prior": {},
        "log_std": {"scale": "log_std"},
        "rng": {"noise": "rng"},
        "prior": {"prior_mean": "full", "prior_logvar": "full"},
        "prior, rng": {"prior_mean": "full", "prior_logvar": "full", "noise": "rng"},
        "prior, log_std": {"scale": "log_std", "prior_mean": "full", "prior_log_std": "full"},
        "prior of the other kind": {"prior_mean": "full", "prior_log_std": "full"},
        "prior of the other kind, log_std": {"scale": "log_std", "prior_logvar": "last"},
        "prior mean": {"prior_mean": "last"},
        "prior variance": {"prior_logvar": "one"},
        "free bits": {"free_bits": 0.4, "prior_mean": "full", "prior_logvar": "last"},
        "clamp": {"clamp": (-0.3, 0.4), "noise": "rng"},
        "clamp from below, log_std": {"scale": "log_std", "clamp": (-0.3, float("inf"))},
        "all": {"clamp": (-0.7, 0.7), "free_bits": 0.2, "prior_mean": "one", "prior_logvar": "full", "noise": "rng"},
        "no batch": {"batch_dims": 0},
        "nothing summed": {"batch_dims": 2, "prior_mean": "last"},
    },
    "gaussian_kl": {
        "standard prior": {},
        "log_std": {"scale": "log_std"},
        "prior": {"prior_mean": "full", "prior_logvar": "full"},
        "free bits": {"free_bits": 0.4, "prior_mean": "last", "prior_logvar": "last"},
        "clamp": {"clamp": (-0.3, 0.4)},
    },
    "gumbel_softmax": {
        "soft": {},
        "rng": {"noise": "rng"},
        "hard": {"hard": True},
        "hard, rng": {"hard": True, "noise": "rng", "tau": 0.7},
        "cold": {"tau": 0.2},
        "hot": {"tau": 4.0, "noise": "rng"},
        "first dimension": {"dim": 0, "noise": "rng"},
    },
    "relaxed_bernoulli": {
        "soft": {},
        "rng": {"noise": "rng"},
        "hard": {"hard": True},
        "hard, rng": {"hard": True, "noise": "rng", "tau": 0.7},
        "cold": {"tau": 0.2},
        "hot": {"tau": 4.0, "noise": "rng"},
    },
    "vector_quantize": {
        "defaults": {},
        "weights": {"commitment_weight": 2.0, "codebook_weight": 0.5},
        "moving average": {"codebook_weight": 0.0},
        "codebook alone": {"commitment_weight": 0.0},
    },
    "bernoulli_nll": {
        "probabilities": {},
        "bits": {"binary": True},
        "bits_per_dim": {"unit": "bits_per_dim"},
        "one target for all": {"target_of": "last"},
        "one logit for all": {"logits_of": "one"},
        "no batch": {"batch_dims": 0},
        "nothing summed": {"batch_dims": 2},
    },
    "gaussian_nll": {
        "logvar": {},
        "log_std": {"scale": "log_std"},
        "bits_per_dim": {"unit": "bits_per_dim", "scale": "log_std"},
        "one variance for all": {"scale_of": "one"},
        "one mean and variance for all": {"scale_of": "last", "mean_of": "last"},
        "one x for all": {"x_of": "last"},
        "no batch": {"batch_dims": 0},
        "nothing summed": {"batch_dims": 2},
    },
    "discretized_gaussian_nll": {
        "logvar": {},
        "log_std": {"scale": "log_std"},
        "nats": {"unit": "nats"},
        "two levels": {"levels": 2, "scale": "log_std"},
        "many levels": {"levels": 65536, "scale": "log_std", "unit": "nats"},
        "one variance for all": {"scale_of": "one"},
        "one mean and variance for all": {"scale_of": "last", "mean_of": "last"},
        "no batch": {"batch_dims": 0},
        "nothing summed": {"batch_dims": 2},
    },
}
LIKELIHOOD_OPS = tuple(op for op in VARIANTS if op.endswith("nll"))
SAMPLING_OPS = tuple(op for op in VARIANTS if op not in LIKELIHOOD_OPS)
FLOW_OPS = tuple(flow_cases.VARIANTS)
VARIANTS.update(flow_cases.VARIANTS)
SAMPLING = [(op, variant) for op in SAMPLING_OPS for variant in VARIANTS[op]]
LIKELIHOOD = [(op, variant) for op in LIKELIHOOD_OPS for variant in VARIANTS[op]]
FLOWS = [(op, variant) for op in FLOW_OPS for variant in VARIANTS[op]]
GATE_OPS = tuple(gate_cases.VARIANTS)
VARIANTS.update(gate_cases.VARIANTS)
GATES = [(op, variant) for op in GATE_OPS for variant in VARIANTS[op]]
CONV_OPS = tuple(masked_conv_cases.VARIANTS)
VARIANTS.update(masked_conv_cases.VARIANTS)
CONVS = [(op, variant) for op in CONV_OPS for variant in VARIANTS[op]]
PIXEL_OPS = tuple(likelihood_cases.VARIANTS)
VARIANTS.update(likelihood_cases.VARIANTS)
PIXELS = [(op, variant) for op in PIXEL_OPS for variant in VARIANTS[op]]
SPLINES = [(op, variant) for op, variants in spline_cases.VARIANTS.items() for variant in variants]
VARIANTS.update(spline_cases.VARIANTS)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPE_NAMES = ["float32", "float64", "bfloat16", "float16"]
# Around the widths of vectors of every instruction set, and around blocks.
SIZES = [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 5000]


def floating(results: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The results that have gradients."""
    found = [results] if isinstance(results, Tensor) else list(results)
    return [result for result in found if result.is_floating_point()]


@dataclass
class Problem:
    """One call: floating tensors by name (each takes a gradient) and other arguments."""

    op: str
    inputs: dict[str, Tensor]
    options: dict[str, Any]

    def map(self, function: Callable[[Tensor], Tensor]) -> Problem:
        """The problem with a function applied to every floating input."""
        return Problem(self.op, {name: function(tensor) for name, tensor in self.inputs.items()}, self.options)

    def call(self, backend: str | None = None, **changed: Any) -> Any:
        """What the public function returns."""
        with genfuse.use_backend(backend) if backend else contextlib.nullcontext():
            return getattr(ops, self.op)(**{**self.inputs, **self.options, **changed})

    def results(self, backend: str | None = None, **changed: Any) -> list[Tensor]:
        """The floating results."""
        return floating(self.call(backend, **changed))

    def cotangents(self, seed: int = 99) -> list[Tensor]:
        """Some, of the results' shapes and dtypes."""
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.dtype)
            for result in self.map(torch.detach).results()
        ]

    def run(self, cotangents: Sequence[Tensor], backend: str | None = None) -> list[Tensor]:
        """The floating results, and then the gradients of all inputs."""
        leaves = self.map(lambda tensor: tensor.detach().clone().requires_grad_())
        results = leaves.results(backend)
        gradients = torch.autograd.grad(
            results,
            list(leaves.inputs.values()),
            [cotangent.to(result.dtype) for cotangent, result in zip(cotangents, results, strict=True)],
            materialize_grads=True,
        )
        return [*(result.detach() for result in results), *gradients]


def check(*problems: Problem, factor: float = FACTOR) -> None:
    """Results and all gradients against the reference, to the derived tolerance (`factor` times eager's error).

    Several problems of one kind are compared as one: a tensor of one or two elements by itself is a matter of luck.
    """
    cotangents = [problem.cotangents() for problem in problems]

    def together(change: Callable[[Tensor], Tensor], backend: str | None) -> list[Tensor]:
        runs = [
            problem.map(change).run([change(cotangent) for cotangent in own], backend)
            for problem, own in zip(problems, cotangents, strict=True)
        ]
        return [torch.stack(values) for values in zip(*runs, strict=True)]

    actual = together(lambda tensor: tensor, None)
    exact = together(lambda tensor: tensor.to(torch.float64), "reference")
    dtypes = [value.dtype for value in actual]
    eager = eager_runs(
        lambda nudge: [value.to(dtype) for value, dtype in zip(together(nudge, "reference"), dtypes, strict=True)]
    )
    names = [f"gradient of {name}" for name in problems[0].inputs]
    names = [*(f"result {index}" for index in range(len(actual) - len(names))), *names]
    for name, ours, theirs, truth in zip(names, actual, eager, exact, strict=True):
        assert_as_accurate(ours, theirs, truth, name, gradient=name.startswith("gradient"), factor=factor)


def make(
    op: str,
    variant: str | dict[str, Any] = "",
    *,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (5, 7),
    codes: int = 9,
    seed: int = 0,
) -> Problem:
    """A problem, its numbers first drawn in float64 and then rounded to `dtype`; the op's first variant by default."""
    if op in FLOW_OPS:
        return Problem(op, *flow_cases.make(op, variant, dtype, shape, seed))
    if op in CONV_OPS:
        return Problem(op, *masked_conv_cases.make(op, variant, dtype, shape, seed))
    if op in GATE_OPS:
        return Problem(op, *gate_cases.make(op, variant, dtype, shape, seed))
    if op in PIXEL_OPS:
        return Problem(op, *likelihood_cases.make(op, variant, dtype, shape, seed))
    variants = VARIANTS[op]
    options = dict(variants[variant or next(iter(variants))] if isinstance(variant, str) else variant)
    if op in spline_cases.VARIANTS:
        return Problem(op, *spline_cases.make(op, options, dtype, shape, seed))
    generator = torch.Generator().manual_seed(seed)
    sizes = {"full": shape, "last": shape[-1:], "one": ()}

    def normal(*size: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) * std + mean).to(dtype)

    def of(name: str) -> tuple[int, ...]:
        return sizes[options.pop(f"{name}_of", "full")]

    inputs: dict[str, Tensor] = {}
    if op.startswith("gaussian") and op != "gaussian_nll":
        inputs["mean"] = normal(*of("mean"))
        inputs[options.pop("scale", "logvar")] = normal(*of("scale"))
        for name in ("prior_mean", "prior_logvar", "prior_log_std"):
            if name in options:
                inputs[name] = normal(*sizes[options.pop(name)])
        noise = options.pop("noise", "eps") if op != "gaussian_kl" else None
        if noise == "eps":
            inputs["eps"] = normal(*shape)
    elif op in ("gumbel_softmax", "relaxed_bernoulli"):
        inputs["logits"] = normal(*shape)
        noise = options.pop("noise", "noise")
        if noise == "noise":
            inputs["noise"] = normal(*shape)
    elif op == "vector_quantize":
        inputs = {"x": normal(*shape), "codebook": normal(codes, shape[-1])}
        noise = None
    elif op == "bernoulli_nll":
        inputs["logits"] = normal(*of("logits"), std=3.0)
        target = torch.rand(of("target"), generator=generator, dtype=torch.float64)
        inputs["target"] = (target.round() if options.pop("binary", False) else target).to(dtype)
        noise = None
    else:
        discrete = op.startswith("discretized")
        levels = options.get("levels", 256)
        x = normal(*of("x"), std=2.0)
        if discrete:
            last = levels - 1
            pixels = torch.randint(0, levels, x.shape, generator=generator)
            if x.numel() > 3:
                pixels.view(-1)[:2] = torch.tensor([0, last])
            x = (pixels.to(torch.float64) * 2.0 / last - 1.0).to(dtype)
        scale = options.pop("scale", "logvar")
        inputs["x"] = x
        inputs["mean"] = normal(*of("mean"), std=0.5 if discrete else 1.0)
        middle = (-2.0 if scale == "log_std" else -4.0) if discrete else 0.0
        inputs[scale] = normal(*of("scale"), mean=middle)
        noise = None
    if noise == "rng":
        options["rng"] = torch.tensor([seed + 17, 3 << 40], dtype=torch.int64)
    return Problem(op, inputs, options)
