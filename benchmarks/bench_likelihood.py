"""Negative log-likelihoods of rows, beside the formulas that people write in eager PyTorch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from bench_sampling import contest
from cases import Case, Factory, Setting, benchmark_tests
from torch import Tensor


def bernoulli(sizes: tuple[int, ...], backward: bool, setting: Setting) -> Mapping[str, Factory]:
    shape = (4, 32) if setting.quick else sizes

    def inputs(gradients: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(shape, generator=generator).requires_grad_(gradients)
        return [logits]

    target = torch.rand(shape, generator=torch.Generator().manual_seed(1)).round()

    def ours(logits: Tensor) -> Tensor:
        from genfuse import ops

        return ops.bernoulli_nll(logits, target)

    def eager(logits: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)

    return contest({"genfuse": ours, "eager": eager}, "eager", inputs, backward, setting)


def gaussian(sizes: tuple[int, ...], discretized: bool, backward: bool, setting: Setting) -> Mapping[str, Factory]:
    shape = (4, 32) if setting.quick else sizes
    x = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)) / 127.5 - 1.0

    def inputs(gradients: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        mean, log_std = torch.randn(shape, generator=generator) * 0.3, torch.randn(shape, generator=generator) - 2.0
        return [mean.requires_grad_(gradients), log_std.requires_grad_(gradients)]

    def ours(mean: Tensor, log_std: Tensor) -> Tensor:
        from genfuse import ops

        if discretized:
            return ops.discretized_gaussian_nll(x, mean, log_std=log_std, unit="nats")
        return ops.gaussian_nll(x, mean, log_std=log_std)

    def density(mean: Tensor, log_std: Tensor) -> Tensor:
        each = 0.5 * math.log(2 * math.pi) + log_std + 0.5 * ((x - mean) * torch.exp(-log_std)) ** 2
        return each.flatten(1).sum(-1)

    def cdf(t: Tensor) -> Tensor:
        """The usual approximation by tanh."""
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (t + 0.044715 * t**3)))

    def mass(mean: Tensor, log_std: Tensor) -> Tensor:
        inverse = torch.exp(-log_std)
        above, below = cdf(inverse * (x - mean + 1 / 255)), cdf(inverse * (x - mean - 1 / 255))
        inside = torch.log((above - below).clamp(min=1e-12))
        lowest, highest = torch.log(above.clamp(min=1e-12)), torch.log((1.0 - below).clamp(min=1e-12))
        each = torch.where(x < -0.999, lowest, torch.where(x > 0.999, highest, inside))
        return -each.flatten(1).sum(-1)

    eager: Callable[..., Tensor] = mass if discretized else density
    name = "eager (tanh approximation)" if discretized else "eager"
    return contest({"genfuse": ours, name: eager}, name, inputs, backward, setting)


IMAGES = (128, 3, 32, 32)

CASES: list[Case] = [
    Case(
        name=f"{name}-{'backward' if backward else 'forward'}",
        title=f"{title}, {'forward+backward' if backward else 'forward'}",
        build=functools.partial(build, backward=backward),
        rtol=rtol,
        memory=True,
    )
    for name, title, build, rtol in (
        ("bernoulli", "Bernoulli, 512 x 784", lambda setting, backward: bernoulli((512, 784), backward, setting), 1e-4),
        (
            "gaussian",
            "Gaussian, 128 x 3 x 32 x 32",
            lambda setting, backward: gaussian(IMAGES, False, backward, setting),
            1e-4,
        ),
        (
            "discretized-gaussian",
            "discretised Gaussian, 128 x 3 x 32 x 32",
            lambda setting, backward: gaussian(IMAGES, True, backward, setting),
            None,  # theirs is an approximation
        ),
    )
    for backward in (False, True)
]

test_speed, test_agree = benchmark_tests(CASES)
