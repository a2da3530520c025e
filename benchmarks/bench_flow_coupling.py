"""Couplings, actnorm and dequantisation, beside the formulas that people write in eager PyTorch and the peers' layers.

A peer's layer is called with a net that returns parameters made before, so that the transform alone is timed: split,
scale, shift, merge and log-determinant, in the peer's own parametrisation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import bench_sampling
import torch
import torch.nn.functional as F
from cases import Case, Factory, Setting, UnavailableError, Work, benchmark_tests
from torch import Tensor

Function = Callable[..., Any]


class Given(torch.nn.Module):
    """A network that returns what it was given."""

    def __init__(self, params: Tensor) -> None:
        super().__init__()
        self.params = params

    def forward(self, *_: Any) -> Tensor:
        return self.params


def contest(
    functions: Mapping[str, Function], inputs: Callable[[bool], list[Tensor]], backward: bool, setting: Setting
) -> Mapping[str, Factory]:
    contestants = dict(bench_sampling.contest(functions, "eager", inputs, backward, setting))
    build = contestants["torch.compile(eager)"]

    def compiled() -> Work:
        torch._dynamo.reset()  # one function is compiled for more shapes, over all the cases, than Dynamo allows
        return build()

    return {**contestants, "torch.compile(eager)": compiled}


def unavailable(name: str) -> Function:
    def function(*_: Any) -> Any:
        raise UnavailableError(f"{name} is not installed")

    return function


def coupling(
    shape: tuple[int, ...], scale: str, inverse: bool, backward: bool, setting: Setting
) -> Mapping[str, Factory]:
    """The second half of the channels, of parameters in halves [shift, raw scale] (interleaved where normflows is)."""
    if setting.quick:
        shape = (3, 4, *(2 for _ in shape[2:]))
    channels = shape[1]
    normflows_layout = scale == "exp"

    def inputs(gradients: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator).requires_grad_(gradients) for _ in range(2)]

    def ours(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        from genfuse import ops

        if normflows_layout:
            layout = "interleaved_shift_scale"
            return ops.affine_coupling(x, params, layout=layout, split="second", inverse=inverse)
        return ops.affine_coupling(x, params, scale="sigmoid", eps=1e-3, split="second", inverse=inverse)

    def eager(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = x.chunk(2, 1)
        if normflows_layout:
            shift, log_scale = params[:, 0::2], params[:, 1::2]
            scaled = (moved - shift) * torch.exp(-log_scale) if inverse else moved * torch.exp(log_scale) + shift
        else:
            shift, raw = params.chunk(2, 1)
            s = torch.sigmoid(raw + 2.0) + 1e-3
            log_scale = torch.log(s)
            scaled = (moved - shift) / s if inverse else moved * s + shift
        log_abs_det = log_scale.flatten(1).sum(1)
        return torch.cat((kept, scaled), 1), -log_abs_det if inverse else log_abs_det

    def nflows() -> Function:
        try:
            from nflows.transforms.coupling import AffineCouplingTransform
        except ImportError:
            return unavailable("nflows")
        mask = torch.arange(channels) >= channels // 2

        def function(x: Tensor, params: Tensor) -> Any:
            layer = AffineCouplingTransform(mask, lambda *_: Given(params))
            return layer.inverse(x) if inverse else layer(x)

        return function

    def normflows() -> Function:
        try:
            from normflows.flows.affine.coupling import AffineCouplingBlock
        except ImportError:
            return unavailable("normflows")

        def function(x: Tensor, params: Tensor) -> Any:
            layer = AffineCouplingBlock(Given(params), scale_map="exp")
            return layer.inverse(x) if inverse else layer(x)

        return function

    peer = ("normflows", normflows()) if normflows_layout else ("nflows", nflows())
    return contest({"genfuse": ours, "eager": eager, peer[0]: peer[1]}, inputs, backward, setting)


def checkerboard(shape: tuple[int, ...], backward: bool, setting: Setting) -> Mapping[str, Factory]:
    """RealNVP's: full-width parameters and a mask, scales e^(2 tanh r)."""
    if setting.quick:
        shape = (3, 2, 4, 4)
    rows = torch.arange(shape[2]).view(-1, 1) + torch.arange(shape[3])
    moved = (rows % 2 == 0).expand(shape[1:])
    mask = moved.float()

    def inputs(gradients: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        double = (shape[0], 2 * shape[1], *shape[2:])
        return [torch.randn(size, generator=generator).requires_grad_(gradients) for size in (shape, double)]

    def ours(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        from genfuse import ops

        return ops.affine_coupling(x, params, scale="tanh", split=moved)

    def eager(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = params.chunk(2, 1)
        log_scale = 2.0 * torch.tanh(raw) * mask
        return x * torch.exp(log_scale) + shift * mask, log_scale.flatten(1).sum(1)

    return contest({"genfuse": ours, "eager": eager}, inputs, backward, setting)


def actnorm(shape: tuple[int, ...], backward: bool, setting: Setting) -> Mapping[str, Factory]:
    if setting.quick:
        shape = (3, 4, *(2 for _ in shape[2:]))
    channels, positions = shape[1], math.prod(shape[2:])
    each = (1, channels, *(1 for _ in shape[2:]))

    def inputs(gradients: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        sizes: tuple[tuple[int, ...], ...] = (shape, (channels,), (channels,))
        return [torch.randn(size, generator=generator).requires_grad_(gradients) for size in sizes]

    def ours(x: Tensor, log_scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        from genfuse import ops

        return ops.actnorm(x, log_scale, bias)

    def eager(x: Tensor, log_scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.exp(log_scale).view(each) * x + bias.view(each)
        return y, positions * log_scale.sum() * x.new_ones(x.shape[0])

    return contest({"genfuse": ours, "eager": eager}, inputs, backward, setting)


def dequantize(shape: tuple[int, ...], setting: Setting) -> Mapping[str, Factory]:
    """Of bytes; each draws its own noise."""
    if setting.quick:
        shape = (3, 4)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(2)) if setting.exact else None
    alpha, levels = 0.05, 256

    def inputs(gradients: bool) -> list[Tensor]:
        return [torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)]

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        from genfuse import ops

        return ops.dequantize_logit(x, levels=levels, alpha=alpha, u=noise)

    def eager(x: Tensor) -> tuple[Tensor, Tensor]:
        u = torch.rand(x.shape) if noise is None else noise
        p = alpha + (1 - 2 * alpha) * (x + u) / levels
        y = torch.logit(p)
        each = F.softplus(y) + F.softplus(-y) + math.log((1 - 2 * alpha) / levels)
        return y, each.flatten(1).sum(1)

    return contest({"genfuse": ours, "eager": eager}, inputs, False, setting)


IMAGES, VECTORS = (64, 24, 32, 32), (512, 32)
# The project's promises, of the images: forward and forward+backward.
TARGETS: dict[bool, dict[str, float]] = {
    False: {"eager": 4.0, "torch.compile(eager)": 1.0},
    True: {"eager": 2.5, "torch.compile(eager)": 1.5},
}


def label(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


CASES: list[Case] = [
    *(
        Case(
            name=f"affine-{scale}-{label(shape).replace(' ', '')}-{name}",
            title=f"affine coupling, {scale}, {label(shape)}, {title}",
            build=functools.partial(coupling, shape, scale, inverse, backward),
            targets=TARGETS[backward] if shape == IMAGES and not inverse else {},
            memory=True,
        )
        for shape in (IMAGES, VECTORS)
        for scale in ("sigmoid", "exp")
        for name, title, inverse, backward in (
            ("forward", "forward", False, False),
            ("inverse", "inverse", True, False),
            ("backward", "forward+backward", False, True),
        )
    ),
    *(
        Case(
            name=f"{name}-{'backward' if backward else 'forward'}",
            title=f"{title}, {'forward+backward' if backward else 'forward'}",
            build=functools.partial(build, backward=backward),
            memory=True,
        )
        for name, title, build in (
            (
                "checkerboard",
                "affine coupling under a checkerboard, tanh, 64 x 3 x 32 x 32",
                lambda setting, backward: checkerboard((64, 3, 32, 32), backward, setting),
            ),
            (
                "actnorm",
                f"actnorm, {label(IMAGES)}",
                lambda setting, backward: actnorm(IMAGES, backward, setting),
            ),
            (
                "actnorm-vectors",
                "actnorm, 512 x 64",
                lambda setting, backward: actnorm((512, 64), backward, setting),
            ),
        )
        for backward in (False, True)
    ),
    Case(
        name="dequantize",
        title="dequantisation and logit of bytes, 64 x 3 x 32 x 32",
        build=functools.partial(dequantize, (64, 3, 32, 32)),
        memory=True,
        random=True,
    ),
]

test_speed, test_agree = benchmark_tests(CASES)
