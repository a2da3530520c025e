"""The inverse of autoregressive flows, beside libraries that run the whole network once for each column; masked layers,
beside a dense product with the masked weight.

The peers' own networks are inverted, with their own weights, so results are compared where the parametrisation is the
same (nflows); zuko's network of the same size does the same kind of work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from bench_sampling import contest
from cases import Case, Factory, Setting, UnavailableError, Work, benchmark_tests
from torch import Tensor

BINS, BOUND = 8, 3.0


def peer(name: str) -> Any:
    """An installed peer, whose absence is no failure."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as reason:
        raise UnavailableError(f"{name} is not installed ({reason})") from None


def nflows_transform(columns: int, hidden: int, spline: bool) -> Any:
    transforms = peer("nflows.transforms")
    torch.manual_seed(0)
    if not spline:
        return transforms.MaskedAffineAutoregressiveTransform(features=columns, hidden_features=hidden)
    return transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        num_bins=BINS, tails="linear", tail_bound=BOUND, features=columns, hidden_features=hidden
    )


def layers_of(made: Any) -> list[Any]:
    """nflows' MADE of residual blocks as `ops.autoregressive_inverse` takes it."""
    from genfuse.ops import MaskedLayer

    first, last = made.initial_layer, made.final_layer
    layers = [MaskedLayer(first.weight, first.bias, first.degrees)]
    for block in made.blocks:
        before = len(layers) - 1
        for linear, residual in zip(block.linear_layers, (None, before), strict=True):
            layers.append(MaskedLayer(linear.weight, linear.bias, linear.degrees, None, "relu", None, residual))
    return [*layers, MaskedLayer(last.weight, last.bias)]


def work_of(function: Callable[[Tensor], Any], net: Any, u: Tensor, backward: bool) -> Work:
    """Forward alone, or with the gradients of u and of all parameters."""
    if not backward:

        def forward() -> Any:
            with torch.no_grad():
                return function(u)

        return forward
    leaf = u.clone().requires_grad_()
    inputs = [leaf, *net.parameters()]
    generator = torch.Generator().manual_seed(2)
    cotangents = [torch.randn(u.shape, generator=generator), torch.randn(u.size(0), generator=generator)]

    def both() -> Any:
        return torch.autograd.grad(function(leaf), inputs, cotangents)

    return both


def inverse(
    sizes: tuple[int, int, int], setting: Setting, *, spline: bool = False, backward: bool = False
) -> Mapping[str, Factory]:
    batch, columns, hidden = (3, 4, 9) if setting.quick else sizes
    u = torch.randn(batch, columns, generator=torch.Generator().manual_seed(1))

    def ours() -> Work:
        from genfuse import ops

        net = nflows_transform(columns, hidden, spline)
        options: dict[str, Any] = {"scale": "softplus", "layout": "scale_shift"}
        if spline:
            options = {"transform": "rational_quadratic", "num_bins": BINS, "tail_bound": BOUND}

        def run(u: Tensor) -> Any:
            return ops.autoregressive_inverse(u, layers_of(net.autoregressive_net), **options)

        return work_of(run, net, u, backward)

    def nflows() -> Work:
        net = nflows_transform(columns, hidden, spline)
        return work_of(net.inverse, net, u, backward)

    def zuko() -> Work:
        autoregressive, transforms = peer("zuko.flows.autoregressive"), peer("zuko.transforms")
        torch.manual_seed(0)
        more: dict[str, Any] = {}
        if spline:
            more = {
                "univariate": functools.partial(transforms.MonotonicRQSTransform, bound=BOUND),
                "shapes": ((BINS,), (BINS,), (BINS - 1,)),
            }
        net = autoregressive.MaskedAutoregressiveTransform(columns, hidden_features=(hidden,) * 5, **more)
        return work_of(lambda u: net().inv.call_and_ladj(u), net, u, backward)

    return {"genfuse": ours, "nflows": nflows, "zuko (5 layers)": zuko}


def linear(outputs: int, backward: bool, setting: Setting) -> Mapping[str, Factory]:
    batch, inputs = (4, 8) if setting.quick else (512, 256)
    units = 16 if setting.quick else outputs
    in_degrees = torch.arange(inputs) % 63 + 1
    last = outputs != inputs and not setting.quick
    out_degrees = torch.arange(64).repeat_interleave(units // 64) if last else torch.arange(units) % 63 + 1
    mask = (out_degrees[:, None] >= in_degrees).float()

    def tensors(gradients: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((batch, inputs), (units, inputs), (units,))
        return [torch.randn(shape, generator=generator).requires_grad_(gradients) for shape in shapes]

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from genfuse import ops

        return ops.masked_linear(x, weight, bias, in_degrees, out_degrees)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight * mask, bias)

    return contest({"genfuse": ours, "eager": eager}, "eager", tensors, backward, setting)


def _case(name: str, title: str, build: Callable[[Setting], Mapping[str, Factory]], **rest: Any) -> Case:
    return Case(name=name, title=title, build=build, **rest)


ZUKO = ("zuko (5 layers)",)
CASES: list[Case] = [
    *(
        _case(
            f"maf-inverse-{batch}",
            f"MAF inverse, D=64, hidden 256, B={batch}",
            functools.partial(inverse, (batch, 64, 256)),
            targets={"nflows": 20.0} if batch == 256 else {},
            unchecked=ZUKO,
            memory=batch == 256,
        )
        for batch in (1, 16, 256)
    ),
    _case(
        "maf-inverse-backward",
        "MAF inverse, D=64, hidden 256, B=256, forward+backward",
        functools.partial(inverse, (256, 64, 256), backward=True),
        unchecked=ZUKO,
        memory=True,
        rtol=1e-3,
    ),
    _case(
        "spline-ar-inverse",
        "RQ-NSF (AR) inverse, D=32, K=8, hidden 256, B=256",
        functools.partial(inverse, (256, 32, 256), spline=True),
        unchecked=ZUKO,
    ),
    _case(
        "spline-ar-inverse-backward",
        "RQ-NSF (AR) inverse, D=32, K=8, hidden 256, B=256, forward+backward",
        functools.partial(inverse, (256, 32, 256), spline=True, backward=True),
        unchecked=ZUKO,
        rtol=1e-3,
    ),
    *(
        _case(
            f"masked-linear-{name}-{'backward' if backward else 'forward'}",
            f"masked linear 512 x 256 to {name}, {'forward+backward' if backward else 'forward'}",
            functools.partial(linear, outputs, backward),
        )
        for name, outputs in (("256", 256), ("1472", 1472))
        for backward in (False, True)
    ),
]

test_speed, test_agree = benchmark_tests(CASES)
